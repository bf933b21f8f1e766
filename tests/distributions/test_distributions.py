"""Count distributions against mpmath, scipy, Pyro and themselves."""

import itertools

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyrosc.distributions import density
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated

mpmath.mp.dps = 50

COUNTS = [0, 1, 2, 7, 130, 5_000, 100_000]
MEANS = [1e-6, 1e-3, 0.03, 1.0, 1.7, 40.0, 5_001.0, 1e5]
THETAS = [1e-4, 1e-2, 0.7, 5.0, 1e3, 1e5, 1e8]
GATES = [-50.0, -12.0, -1.0, 0.0, 0.3, 9.0, 50.0]


@pytest.fixture(autouse=True)
def _one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def poisson(x, mu):
    """Log density and its derivative in mu."""
    return x * mpmath.log(mu) - mu - mpmath.loggamma(x + 1), x / mu - 1


def negative_binomial(x, mu, theta):
    """Log density and its derivatives in mu and theta."""
    total = theta + mu
    return (
        mpmath.loggamma(x + theta)
        - mpmath.loggamma(theta)
        - mpmath.loggamma(x + 1)
        + theta * mpmath.log(theta / total)
        + x * mpmath.log(mu / total),
        x / mu - (x + theta) / total,
        mpmath.digamma(x + theta) - mpmath.digamma(theta) + mpmath.log(theta / total) + (mu - x) / total,
    )


def zero_inflated(base, x, *parameters):
    """Log density and its derivatives in the base's parameters and the gate logit."""
    *parameters, g = parameters
    log_p0, *slopes = base(x, *parameters)
    pi, p0 = 1 / (1 + mpmath.exp(-g)), mpmath.exp(log_p0)
    keep = 1 - pi
    p = (pi if x == 0 else 0) + keep * p0
    return mpmath.log(p), *(keep * p0 / p * d for d in slopes), pi * keep * ((1 if x == 0 else 0) - p0) / p


CASES = {
    "poisson": (Poisson, poisson, (MEANS,)),
    "nb": (NegativeBinomial, negative_binomial, (MEANS, THETAS)),
    "zip": (
        lambda mean, gate: ZeroInflated(Poisson(mean), gate),
        lambda *a: zero_inflated(poisson, *a),
        (MEANS, GATES),
    ),
    "zinb": (
        lambda mean, theta, gate: ZeroInflated(NegativeBinomial(mean, theta), gate),
        lambda *a: zero_inflated(negative_binomial, *a),
        (MEANS, THETAS[::2], GATES),
    ),
}
ALL = pytest.mark.parametrize("name", CASES)


def columns(grid, dtype=torch.float32):
    return [torch.tensor(column, dtype=dtype) for column in zip(*grid, strict=True)]


def value_and_gradients(make, x, parameters):
    parameters = [p.clone().requires_grad_() for p in parameters]
    log_prob = make(*parameters).log_prob(x)
    return [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), parameters)]


class OneGene:
    """Each entry as a cell of one gene: the density of whole cells, which is compiled on a CPU."""

    def __init__(self, d):
        self.d = d

    def log_prob(self, x):
        return self.d.to_event(1).log_prob(x.unsqueeze(-1))


def example(name, shape=(4, 6), dtype=torch.float64, seed=0):
    """A distribution's parameters, unlike in shape, and counts of which half are zero."""
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.rand(*size, generator=rng, dtype=dtype)
    parameters = {
        "poisson": [rand(*shape) * 3],
        "nb": [rand(*shape) * 3, rand(shape[-1]) * 4 + 0.1],
        "zip": [rand(*shape) * 3, rand(shape[-1]) * 4 - 2],
        "zinb": [rand(*shape) * 3, rand(shape[-1]) * 4 + 0.1, rand(*shape) * 4 - 2],
    }[name]
    x = torch.poisson(rand(*shape[-2:]) * 4, generator=rng) * (rand(*shape[-2:]) < 0.7)
    return parameters, x


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("compiled", [False, True])
@ALL
def test_value_and_gradients_match_mpmath(name, dtype, rtol, compiled):
    entrywise, reference, grids = CASES[name]
    make = (lambda *p: OneGene(entrywise(*(q.unsqueeze(-1) for q in p)))) if compiled else entrywise
    x, *parameters = columns(itertools.product(COUNTS, *grids), dtype)
    rows = zip(x.tolist(), *(p.tolist() for p in parameters), strict=True)
    expected = zip(*(reference(*map(mpmath.mpf, row)) for row in rows), strict=True)
    for i, (got, want) in enumerate(zip(value_and_gradients(make, x, parameters), expected, strict=True)):
        want = np.array([float(w) for w in want])
        np.testing.assert_allclose(got.double().numpy(), want, rtol=rtol, atol=1e-9, err_msg=f"output {i}")


def test_gradient_in_inverse_dispersion_keeps_its_digits_where_theta_is_large():
    """There d log p / d theta is of order 1 / theta^2: no digit of two digammas is left there."""
    x, mean, theta = columns(itertools.product([0, 1, 3, 50], [0.02, 1.0, 30.0], [1e2, 1e4, 1e6, 1e8]))
    rows = zip(x.tolist(), mean.tolist(), theta.tolist(), strict=True)
    want = np.array([float(negative_binomial(*map(mpmath.mpf, row))[2]) for row in rows])
    got = value_and_gradients(NegativeBinomial, x, [mean, theta])[2]
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-5)


@ALL
def test_lookup_and_mask_agree(name, monkeypatch):
    """CUDA evaluates everywhere and selects; a tensor that says it is on CUDA takes that path here."""

    class OnCuda(torch.Tensor):
        is_cuda = True

    make, _, grids = CASES[name]
    x, *parameters = columns(itertools.product(COUNTS, *grids))
    called = []
    monkeypatch.setattr(density, "_SMALL", 0)  # these few entries are to be looked up
    lookup = density._positive_entries
    monkeypatch.setattr(density, "_positive_entries", lambda *a: called.append(a) or lookup(*a))
    for dtype in (torch.float32, torch.float64):
        x, parameters = x.to(dtype), [p.to(dtype) for p in parameters]
        want = value_and_gradients(make, x, parameters)
        n = len(called)
        got = value_and_gradients(make, x.as_subclass(OnCuda), parameters)
        assert n
        assert len(called) == n
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.as_subclass(torch.Tensor), b)


@ALL
def test_gradcheck(name):
    parameters, x = example(name)
    log_prob = lambda *p: CASES[name][0](*p).log_prob(x)
    assert torch.autograd.gradcheck(log_prob, [p.requires_grad_() for p in parameters])


def test_density_matches_scipy():
    x, mean, theta = columns(
        itertools.product([0, 1, 5, 60], [0.1, 2.0, 50.0], [0.2, 3.0, 80.0]), torch.float64
    )
    want = scipy.stats.nbinom.logpmf(x, n=theta, p=theta / (theta + mean))
    np.testing.assert_allclose(NegativeBinomial(mean, theta).log_prob(x), want, rtol=1e-9)
    np.testing.assert_allclose(Poisson(mean).log_prob(x), scipy.stats.poisson.logpmf(x, mean), rtol=1e-9)


def test_density_and_moments_match_torch_and_pyro():
    x, mean, theta, gate = columns(
        itertools.product([0, 1, 5, 60], [0.1, 2.0], [0.2, 30.0], [-3.0, 1.0]), torch.float64
    )
    nb, logits = NegativeBinomial(mean, theta), mean.log() - theta.log()
    pairs = [
        (Poisson(mean), dist.Poisson(mean)),
        (nb, dist.GammaPoisson(theta, theta / mean)),
        (nb, dist.NegativeBinomial(theta, logits=logits)),
        (ZeroInflated(Poisson(mean), gate), dist.ZeroInflatedPoisson(mean, gate_logits=gate)),
        (ZeroInflated(nb, gate), dist.ZeroInflatedNegativeBinomial(theta, logits=logits, gate_logits=gate)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.variance, theirs.variance)


@ALL
def test_sums_to_one(name):
    grids = {"mean": [0.0, 1e-3, 0.5, 20.0], "theta": [0.3, 2.0, 1e6], "gate": [-50.0, -1.0, 2.0]}
    axes = {"poisson": ["mean"], "nb": ["mean", "theta"], "zip": ["mean", "gate"], "zinb": list(grids)}[name]
    parameters = columns(itertools.product(*(grids[axis] for axis in axes)))
    x = torch.arange(4000.0).unsqueeze(-1)
    total = CASES[name][0](*parameters).log_prob(x).double().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)


@ALL
def test_samples_have_the_moments(name):
    parameters = columns([(3.0, 1.5, -0.4), (0.2, 0.5, 1.0), (25.0, 9.0, -2.0)])
    parameters = [
        parameters[i] for i in {"poisson": [0], "nb": [0, 1], "zip": [0, 2], "zinb": [0, 1, 2]}[name]
    ]
    d = CASES[name][0](*parameters)
    pyro.set_rng_seed(0)
    n = 200_000
    x = d.sample((n,)).double()
    assert x.shape == (n, 3)
    assert torch.all(d.support.check(x))
    p_zero = d.log_prob(torch.zeros(())).double().exp()
    fourth = (x - x.mean(0)).pow(4).mean(0)
    variance = x.var(0)
    for got, want, sd in [
        (x.mean(0), d.mean, variance.sqrt()),
        (variance, d.variance, (fourth - variance**2).sqrt()),
        ((x == 0).double().mean(0), p_zero, (p_zero * (1 - p_zero)).sqrt()),
    ]:
        assert torch.all((got - want).abs() < 5 * sd / n**0.5), (got, want)


def test_expanded_samples_are_independent():
    pyro.set_rng_seed(0)
    nb = NegativeBinomial(torch.tensor(20.0), torch.tensor(2.0))
    for d in (Poisson(torch.tensor(20.0)), nb, ZeroInflated(nb, torch.tensor(0.0))):
        assert len(set(d.expand((200,)).sample().tolist())) > 8
    dropouts = ZeroInflated(Poisson(torch.tensor(50.0)), torch.tensor(0.0)).expand((400,)).sample() == 0
    assert 140 < dropouts.sum() < 260


def test_extreme_samples_are_finite_whole_numbers():
    mean, theta = columns(itertools.product([0.0, 1e-6, 1.0, 1e5, 1e30], [1e-4, 1.0, 1e8]))
    for d in (
        Poisson(mean),
        NegativeBinomial(mean, theta),
        ZeroInflated(NegativeBinomial(mean, theta), mean * 0),
    ):
        x = d.sample((200,))
        assert torch.all(d.support.check(x))
        assert torch.all(x[:, :3] == 0)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    "sizes", [((6,), (4, 6)), ((4, 6), (6,)), ((3, 4, 6), (6,)), ((3, 4, 1), (4, 6)), ((), (3, 1, 1))]
)
@pytest.mark.parametrize("size_x", [(4, 6), (6,), (4, 1), (3, 4, 6)])
def test_broadcast_equals_materialised(sizes, size_x):
    """Value, and the gradient summed over the entries that share a parameter."""
    rng = torch.Generator().manual_seed(0)
    mean, theta = (torch.rand(size, generator=rng) * 3 + 0.1 for size in sizes)
    gate = torch.randn(size_x[-1:], generator=rng)
    x = torch.poisson(torch.rand(size_x, generator=rng) * 2, generator=rng)
    make = lambda mean, theta, gate: ZeroInflated(NegativeBinomial(mean, theta), gate)
    shape = torch.broadcast_shapes(size_x, *sizes)
    full = [t.expand(shape).clone() for t in (x, mean, theta, gate)]
    got = value_and_gradients(make, x, [mean, theta, gate])
    want = value_and_gradients(make, full[0], full[1:])
    torch.testing.assert_close(got[0], want[0])
    for parameter, a, b in zip((mean, theta, gate), got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b.sum_to_size(parameter.shape))


@ALL
def test_strides_do_not_matter(name):
    parameters, x = example(name)
    want = value_and_gradients(CASES[name][0], x, parameters)
    transposed = [p.mT.contiguous().mT if p.dim() > 1 else p for p in parameters]
    got = value_and_gradients(CASES[name][0], x.mT.contiguous().mT, transposed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@ALL
def test_draws_axis_equals_a_loop(name):
    parameters, x = example(name, shape=(3, 4, 6), dtype=torch.float32)
    make = CASES[name][0]
    together = make(*parameters).log_prob(x)
    one_by_one = [make(*(p[i] if p.dim() == 3 else p for p in parameters)).log_prob(x) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@ALL
def test_expand(name):
    parameters, x = example(name)
    d = CASES[name][0](*parameters)
    e = d.expand((2, 4, 6))
    assert d.batch_shape == (4, 6)
    assert e.batch_shape == e.mean.shape == e.variance.shape == (2, 4, 6)
    assert e.sample((5,)).shape == (5, 2, 4, 6)
    assert e._validate_args == d._validate_args
    torch.testing.assert_close(e.log_prob(x), d.log_prob(x).expand(2, 4, 6))
    torch.testing.assert_close(e.mean, d.mean.expand(2, 4, 6))
    with pytest.raises((ValueError, RuntimeError)):
        d.expand((2, 4, 5))
    with pytest.raises(ValueError, match="cannot expand"):
        d.expand((1, 6))


@ALL
def test_validation(name):
    make = CASES[name][0]
    parameters, x = example(name)
    for bad in (-1.0, 0.5, float("nan")):
        with pytest.raises(ValueError):
            make(*parameters).log_prob(x.masked_fill(x == 0, bad))
    for i, bad in enumerate([-1.0, 0.0, float("nan")] if name == "zinb" else [-1.0]):
        with pytest.raises(ValueError):
            make(*parameters[:i], torch.full((6,), bad, dtype=torch.float64), *parameters[i + 1 :])


def test_no_validation_when_off():
    with pyro.validation_enabled(False):
        Poisson(torch.tensor(-1.0)).log_prob(torch.tensor(-1.0))
    Poisson(torch.tensor(-1.0), validate_args=False).log_prob(torch.tensor(0.5))


@pytest.mark.parametrize("mean", [0.0, 1e-42, 2e-38])
@pytest.mark.parametrize("count", [0.0, 1.0, 1e5])
def test_vanished_mean_is_finite(mean, count):
    """Also after the chain rule of library size times softmax."""
    make = lambda rho, theta, gate: ZeroInflated(NegativeBinomial(1e4 * rho, theta), gate)
    parameters = [torch.tensor([mean]), torch.tensor([0.5]), torch.tensor([-1.0])]
    for output in value_and_gradients(make, torch.tensor([count]), parameters):
        assert torch.isfinite(output).all()
    for output in value_and_gradients(lambda rho: Poisson(1e4 * rho), torch.tensor([count]), parameters[:1]):
        assert torch.isfinite(output).all()
    logits = torch.tensor([0.0, 0.0 if mean else -200.0, -86.0], requires_grad=True)
    Poisson(1e4 * logits.softmax(-1)).log_prob(torch.tensor([3.0, count, count])).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_far_gates_are_finite():
    gate, mean, x = columns(itertools.product([-1e4, -200.0, 200.0, 1e4], [1e-6, 1e5], [0.0, 3.0]))
    make = lambda mean, gate: ZeroInflated(Poisson(mean), gate)
    for output in value_and_gradients(make, x, [mean, gate]):
        assert torch.isfinite(output).all()


def test_dropout_probability():
    mean, theta, gate = columns(itertools.product([1e-6, 0.7, 1e5], [0.1, 5.0], [-50.0, -1.0, 50.0]))
    got = ZeroInflated(NegativeBinomial(mean, theta), gate).dropout_probability()
    want = []
    for m, t, g in zip(mean.tolist(), theta.tolist(), gate.tolist(), strict=True):
        pi = 1 / (1 + mpmath.exp(-g))
        want.append(
            float(pi / (pi + (1 - pi) * mpmath.exp(negative_binomial(0, mpmath.mpf(m), mpmath.mpf(t))[0])))
        )
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-5, atol=1e-6)
    assert ZeroInflated(Poisson(torch.ones(3)), torch.zeros(2, 1)).dropout_probability().shape == (2, 3)


def test_base_with_events_is_refused():
    with pytest.raises(ValueError, match="event shape"):
        ZeroInflated(Poisson(torch.ones(3)).to_event(1), torch.zeros(3))


def test_only_needed_gradients_are_computed(monkeypatch):
    parameters, x = example("nb")
    calls = []
    original = density._less_log1p_ratio
    monkeypatch.setattr(density, "_less_log1p_ratio", lambda *a: calls.append(a) or original(*a))
    mean, theta = (p.requires_grad_() for p in parameters)
    NegativeBinomial(mean, theta.detach()).log_prob(x).sum().backward()
    with torch.no_grad():
        NegativeBinomial(mean, theta).log_prob(x)
    assert not calls
    assert mean.grad is not None
    NegativeBinomial(mean.detach(), theta).log_prob(x)
    assert calls


def test_dtypes_and_empty():
    nb = NegativeBinomial(torch.ones(3), torch.ones(3))
    assert nb.log_prob(torch.tensor([0, 1, 2])).dtype == torch.float32
    torch.testing.assert_close(
        nb.log_prob(torch.tensor([0, 1, 2])), nb.log_prob(torch.tensor([0.0, 1.0, 2.0]))
    )
    assert (
        NegativeBinomial(torch.ones(3).double(), torch.ones(3)).log_prob(torch.ones(3)).dtype == torch.float64
    )
    mixed = [torch.ones(2, 3).double(), torch.ones(3), torch.zeros(2, 1)]
    zinb = lambda mean, theta, gate: ZeroInflated(NegativeBinomial(mean, theta), gate)
    outputs = value_and_gradients(zinb, torch.tensor([0, 1, 2]), mixed)
    assert [y.dtype for y in outputs] == [torch.float64, torch.float64, torch.float32, torch.float32]
    mean = torch.ones(0, 3, requires_grad=True)
    NegativeBinomial(mean, torch.ones(3)).log_prob(torch.ones(0, 3)).sum().backward()
    assert mean.grad.shape == (0, 3)


@ALL
def test_in_a_plate_the_elbo_is_the_log_density(name):
    """No latent sites: the loss is -log p(x), scaled up by the subsample."""
    parameters, x = example(name, dtype=torch.float32)
    parameters = [p.requires_grad_() for p in parameters]

    def model():
        with pyro.plate("cells", 40, subsample=torch.arange(4)):
            pyro.sample("x", CASES[name][0](*parameters).to_event(1), obs=x)

    loss = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    got = loss.differentiable_loss(model, lambda: None)
    got_gradients = torch.autograd.grad(got, parameters)
    want, *gradients = value_and_gradients(CASES[name][0], x, [p.detach() for p in parameters])
    torch.testing.assert_close(got.detach(), -10 * want.sum())
    for a, b in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(a, -10 * b)


def test_gene_wise_expand_in_a_plate():
    """A distribution without a cells axis, which the plate expands."""
    theta = torch.tensor([0.5, 2.0], requires_grad=True)

    def model():
        with pyro.plate("draws", 3, dim=-2), pyro.plate("cells", 5, dim=-1):
            return pyro.sample("x", NegativeBinomial(torch.ones(2), theta).to_event(1))

    trace = pyro.poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (3, 5, 2)
    trace.log_prob_sum().backward()
    want = value_and_gradients(NegativeBinomial, x, [torch.ones(3, 5, 2), theta.detach().expand(3, 5, 2)])[2]
    torch.testing.assert_close(theta.grad, want.sum((0, 1)))
