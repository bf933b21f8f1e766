"""The loss of a step against Pyro's estimators, draw for draw."""

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrosc import VAE
from pyrosc.inference import elbo as objective
from pyrosc.inference.elbo import _kl_by_site, _weighted_loss, loss_and_kl
from pyrosc.inference.isolation import isolated

CPU = torch.device("cpu")


def plate(cells):
    return pyro.plate("cells", cells.n_total, subsample=cells.index)


class Discrete(nn.Module):
    """A type drawn from the guide, not summed over; and a state whose draw has a gradient."""

    infer: dict = {}  # noqa: RUF012

    def __init__(self, n_genes):
        super().__init__()
        self.logits = nn.Parameter(pairs.wave(2, n_genes, size=0.5))
        self.encoder = nn.Parameter(pairs.wave(n_genes, 2, size=0.2))
        self.prior = nn.Parameter(pairs.wave(2))
        self.at = nn.Parameter(torch.tensor([0.2, -0.5]))

    def model(self, cells):
        with plate(cells):
            y = pyro.sample("y", dist.Categorical(logits=self.prior))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            rho = torch.softmax(self.logits, -1)[y]
            rate = cells.library * rho * (0.1 * z).exp().unsqueeze(-1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    def guide(self, cells):
        with plate(cells):
            pyro.sample("y", dist.Categorical(logits=torch.log1p(cells.x) @ self.encoder), infer=self.infer)
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()))


class SummedOut(nn.Module):
    """The same type, summed over by TraceEnum_ELBO."""

    def __init__(self, n_genes):
        super().__init__()
        self.inner = Discrete(n_genes)
        self.inner.infer = {"enumerate": "parallel"}
        self.model, self.guide = self.inner.model, self.inner.guide


class PoissonDraw(nn.Module):
    """A count drawn for each cell and one for all of them, neither with a gradient of its own."""

    def __init__(self, n_genes):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([0.3, 1.2, 0.4]))
        self.register_buffer("share", torch.full((n_genes,), 1 / n_genes))

    def model(self, cells):
        k = pyro.sample("k", dist.Poisson(2.0))
        with plate(cells):
            n = pyro.sample("n", dist.Poisson(3.0))
            rate = (1 + n + k).unsqueeze(-1) * self.share * self.at[2].exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    def guide(self, cells):
        pyro.sample("k", dist.Poisson(self.at[0].exp()))
        with plate(cells):
            pyro.sample("n", dist.Poisson(self.at[1].exp()))


PROGRAMS = {
    "vae": lambda data: VAE.for_data(data, n_latent=2, hidden=(8,), norm="layer", likelihood="zinb"),
    "conjugate": lambda data: pairs.Conjugate(data.share, shift=0.3),
    "categorical": lambda data: Discrete(data.n_genes),
    "poisson": lambda data: PoissonDraw(data.n_genes),
    "summed out": lambda data: SummedOut(data.n_genes),
}
CASES = [
    *(
        (Trace_ELBO, name, settings)
        for name in ("vae", "conjugate", "categorical", "poisson")
        for settings in ({}, {"num_particles": 3})
    ),
    (Trace_ELBO, "categorical", {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}),
    (Trace_ELBO, "conjugate", {"num_particles": 3, "vectorize_particles": True}),
    (TraceMeanField_ELBO, "vae", {}),
    (TraceMeanField_ELBO, "conjugate", {"num_particles": 3}),
    (TraceMeanField_ELBO, "conjugate", {"num_particles": 3, "vectorize_particles": True}),
    (TraceEnum_ELBO, "conjugate", {"max_plate_nesting": 1}),
    (TraceEnum_ELBO, "poisson", {"max_plate_nesting": 1}),
    (TraceEnum_ELBO, "summed out", {"max_plate_nesting": 1}),
    (TraceEnum_ELBO, "summed out", {"max_plate_nesting": 1, "num_particles": 3}),
    (TraceEnum_ELBO, "summed out", {"max_plate_nesting": 1, "num_particles": 3, "vectorize_particles": True}),
]


def asked(loss, program, seed=5):
    """A loss and its gradients, at a seed."""
    with isolated(CPU, seed, pairs.empty_params()):
        value = loss()
    gradients = torch.autograd.grad(value, list(program.parameters()), allow_unused=True)
    return value.detach(), gradients


@pytest.fixture
def cells(data):
    return data.on("cpu").cells(torch.tensor([5, 0, 17, 130, 99, 64]))


@pytest.mark.parametrize(("elbo", "name", "settings"), CASES)
def test_value_and_gradients_are_those_of_pyros_differentiable_loss(data, cells, elbo, name, settings):
    program = PROGRAMS[name](data).train()
    theirs, want = asked(
        lambda: elbo(**settings).differentiable_loss(program.model, program.guide, cells) / cells.n_total,
        program,
    )
    ours, got = asked(lambda: _weighted_loss(elbo(**settings), program.model, program.guide, cells), program)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert any(g is not None for g in want)
    for (which, _), a, b in zip(program.named_parameters(), got, want, strict=True):
        assert (a is None) == (b is None), which
        if b is not None:
            assert b.abs().sum() > 0, which
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.abs().max()), msg=which)


@pytest.mark.parametrize(("elbo", "name", "settings"), CASES)
def test_without_gradients_the_value_is_the_same(data, cells, elbo, name, settings):
    program = PROGRAMS[name](data).train()
    value, _ = asked(lambda: _weighted_loss(elbo(**settings), program.model, program.guide, cells), program)
    with torch.no_grad(), isolated(CPU, 5, pairs.empty_params()):
        alone = _weighted_loss(elbo(**settings), program.model, program.guide, cells)
    assert not alone.requires_grad
    assert float(alone) == pytest.approx(float(value), rel=1e-5)  # float32 sums, perhaps in another order


def test_the_score_functions_gradient_is_that_of_the_expectation(data):
    """Averaged over draws, the gradient in a Poisson's rate is the derivative of the averaged loss."""
    cells = data.on("cpu").cells(torch.tensor([3]), n_total=1)
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)

    class OneCount(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.tensor(0.5))

        def model(self, cells):
            with plate(cells):
                pyro.sample("n", dist.Poisson(3.0))
                pyro.sample("x", dist.Delta(cells.x, event_dim=1), obs=cells.x)

        def guide(self, cells):
            with plate(cells):
                pyro.sample("n", dist.Poisson(self.at.exp()).expand([1]))

    program = OneCount()
    loss, (gradient,) = asked(lambda: _weighted_loss(elbo, program.model, program.guide, cells), program)
    q = program.at.detach().exp()
    kl = q * (q / 3).log() - q + 3
    assert float(loss) == pytest.approx(float(kl), abs=0.05)
    assert float(gradient) == pytest.approx(float(q * (q / 3).log()), abs=0.08)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_weight_scales_the_kl_alone(data, cells, elbo):
    program = PROGRAMS["conjugate"](data)
    losses = {}
    for weight in (0.5, 1.0, 2.0, torch.tensor(2.0)):
        loss = lambda w=weight: _weighted_loss(elbo(), program.model, program.guide, cells, w)
        losses[str(weight)] = float(asked(loss, program)[0])
    half, one, two, tensor = losses.values()
    assert two - one == pytest.approx(2 * (one - half), rel=1e-3)
    assert abs(two - one) > 1e-3
    assert tensor == two


@pytest.mark.parametrize("grad", [True, False])
def test_a_subclass_of_an_estimator_is_asked_itself(data, cells, grad):
    class Mine(Trace_ELBO):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            return torch.tensor(7.0 * cells.n_total, requires_grad=True)

        def loss(self, model, guide, *args, **kwargs):
            return 9.0 * cells.n_total

    program = PROGRAMS["conjugate"](data)
    with torch.set_grad_enabled(grad):
        loss = _weighted_loss(Mine(), program.model, program.guide, cells)
    assert float(loss.detach()) == (7 if grad else 9)
    assert loss.requires_grad == grad


def test_a_subclass_sees_the_weight(data, cells):
    class Mine(Trace_ELBO):
        pass

    program = PROGRAMS["conjugate"](data)
    for weight in (1.0, 0.3):
        ours, theirs = (
            asked(lambda e=e, w=weight: _weighted_loss(e, program.model, program.guide, cells, w), program)
            for e in (Trace_ELBO(), Mine())
        )
        assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


def test_only_three_estimators_are_written_again():
    """A fourth would need its case above."""
    assert set(objective._ESTIMATES) == {case[0] for case in CASES}
    assert all(issubclass(e, ELBO) for e in objective._ESTIMATES)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_loss_and_kl_of_one_run_are_those_of_two(data, cells, elbo, weight):
    program = PROGRAMS["conjugate"](data)

    def run(ask):
        with isolated(CPU, 5, pairs.empty_params()), torch.no_grad():
            return ask()

    loss, kl = run(lambda: loss_and_kl(elbo(), program.model, program.guide, cells, weight))
    expected = run(lambda: _weighted_loss(elbo(), program.model, program.guide, cells, weight))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # float32 sums, in another order
    closed = elbo is TraceMeanField_ELBO
    apart = run(lambda: _kl_by_site(program.model, program.guide, cells, mean_field=closed))
    if elbo is not TraceEnum_ELBO:  # there the KL's draws come after the loss's
        assert kl == pytest.approx(apart, rel=1e-4)
    assert kl.keys() == apart.keys()
    assert min(kl.values()) != 0
