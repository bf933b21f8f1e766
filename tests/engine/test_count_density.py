"""The loop over counts and their means against the torch operations that it takes the place of."""

import math

import numba
import numpy as np
import pytest
import torch

from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.engine.backends import kernels
from pyrosc.engine.cpu.math32 import WIDE
from pyrosc.inference.isolation import validating

MANY = 1 << 15  # entries from which on rows are shared among threads

MAKE = {
    "poisson": lambda mean: Poisson(mean),
    "nb": NegativeBinomial,
    "zip": lambda mean, gate: ZeroInflated(Poisson(mean), gate),
    "zinb": lambda mean, theta, gate: ZeroInflated(NegativeBinomial(mean, theta), gate),
}
ALL = pytest.mark.parametrize("name", MAKE)
WIDTHS = sorted({1, 7, WIDE - 1, WIDE, WIDE + 1, 2 * WIDE, 2 * WIDE + 1, 1024, 1025, 2300})
SPECIAL = [0.0, 1.0, 4.0, 5.0, 16.0, 17.0, 1023.0, 1024.0, 2e5]


def example(name, rows, n_genes, *, theta=None, gate=None, draws=(), seed=0):
    """Parameters and counts: most are zero, and each special one occurs if there is room."""
    rng = np.random.default_rng(seed)
    uniform = lambda low, high, *shape: torch.tensor(rng.uniform(low, high, shape), dtype=torch.float32)
    parameters = [uniform(-7, 7, *draws, rows, n_genes).exp()]
    if "nb" in name:
        parameters.append(uniform(-4, 7, *((n_genes,) if theta is None else theta)).exp())
    if "z" in name:
        parameters.append(uniform(-6, 6, *((rows, n_genes) if gate is None else gate)))
    x = torch.tensor(rng.poisson(3, (rows, n_genes)) * (rng.random((rows, n_genes)) < 0.4)).float()
    places = torch.tensor(rng.permutation(x.numel())[: len(SPECIAL)])
    x.view(-1)[places] = torch.tensor(SPECIAL[: len(places)])
    return parameters, x


@pytest.fixture
def called(monkeypatch):
    """Arguments of each call of the compiled density."""
    assert kernels()
    calls, original = [], torch.ops.pyrosc.log_density
    monkeypatch.setattr(torch.ops.pyrosc, "log_density", lambda *a: calls.append(a) or original(*a))
    return calls


def both(name, x, parameters, transform=lambda p: p):
    """Value and gradients of whole cells, and the sum over genes of single counts, in float64."""
    results = []
    for dtype, whole in ((torch.float32, True), (torch.float64, False)):
        leaves = [p.to(dtype, copy=True).requires_grad_() for p in parameters]
        d = MAKE[name](*map(transform, leaves))
        log_prob = d.to_event(1).log_prob(x) if whole else d.log_prob(x.to(dtype)).sum(-1)
        upstream = (
            0.5 + torch.arange(log_prob.numel(), dtype=dtype, device=x.device).view(log_prob.shape).sin()
        )
        gradients = torch.autograd.grad(log_prob, leaves, upstream)
        # Of a sum, the error is as that of its terms.
        scale = d.log_prob(x.to(dtype)).abs().sum(-1).detach()
        results.append([log_prob.detach(), *gradients])
    return *results, scale


def check(name, x, parameters, transform=lambda p: p):
    got, want, scale = both(name, x, parameters, transform)
    assert got[0].shape == want[0].shape
    assert ((got[0].double() - want[0]).abs() <= 3e-6 * scale + 1e-6).all()
    for i, (a, b) in enumerate(zip(got[1:], want[1:], strict=True)):
        assert a.shape == b.shape
        atol = 1e-5 * float(b[b != 0].abs().median()) if b.any() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=atol, msg=lambda m, i=i: f"slope {i}: {m}")


# --- values and slopes


@pytest.mark.parametrize("n_genes", WIDTHS)
@ALL
def test_cells_are_the_sum_over_their_counts(name, n_genes, called):
    parameters, x = example(name, 5, n_genes)
    check(name, x, parameters)
    assert len(called) == 1


@pytest.mark.parametrize("theta", [1e-13, 1e-12, 1e-9, 1e-8, 1e-4, 1e8])
@pytest.mark.parametrize("mean", [1e-20, 1.0, 1e20])
def test_small_counts_of_any_theta_and_mean(theta, mean, called):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 0.0]])
    check("nb", x, [torch.full_like(x, mean), torch.full_like(x, theta)])
    assert len(called) == 1


BROADCASTS = {
    "theta and gate of genes": {"theta": (31,), "gate": (31,)},
    "theta and gate of genes, with an axis": {"theta": (1, 31), "gate": (1, 31)},
    "theta and gate of cells": {"theta": (6, 1), "gate": (6, 1)},
    "theta and gate of both": {"theta": (6, 31), "gate": (6, 31)},
    "scalars": {"theta": (), "gate": ()},
    "single numbers": {"theta": (1,), "gate": (1,)},
    "draws of the mean": {"draws": (3,)},
    "draws of the mean, theta of cells": {"draws": (3,), "theta": (6, 1)},
    "draws of everything": {"draws": (3,), "theta": (3, 1, 31), "gate": (3, 6, 31)},
    "two axes of draws": {"draws": (2, 3), "theta": (2, 1, 1, 31)},
    "draws of theta and gate alone": {"theta": (3, 1, 31), "gate": (3, 1, 31)},
    "draws of one cell's gate": {"gate": (3, 6, 1)},
}


@pytest.mark.parametrize("shapes", BROADCASTS.values(), ids=BROADCASTS)
@ALL
def test_parameters_are_broadcast(name, shapes, called):
    parameters, x = example(name, 6, 31, **shapes)
    check(name, x, parameters)
    assert len(called) == 1


@ALL
def test_a_mean_of_genes_is_shared_by_cells(name, called):
    parameters, x = example(name, 6, 31)
    check(name, x, [parameters[0][0], *parameters[1:]])
    check(name, x, [parameters[0][:, :1], *parameters[1:]])
    assert len(called) == 2


@ALL
def test_one_cell_under_many_parameters_and_a_vector_of_counts(name, called):
    parameters, x = example(name, 6, 31)
    check(name, x[0], parameters)
    check(name, x[:1], parameters)
    vector = [p if p.ndim == 1 else p[0] for p in parameters]
    check(name, x[0], vector)
    assert len(called) == 3


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float64])
@ALL
def test_counts_of_another_dtype(name, dtype, called):
    parameters, x = example(name, 4, 9)
    x = x.clamp(max=3e4)
    expected = MAKE[name](*parameters).to_event(1).log_prob(x)
    assert torch.equal(MAKE[name](*parameters).to_event(1).log_prob(x.to(dtype)), expected)
    assert len(called) == 2


@ALL
def test_what_is_not_contiguous(name, called):
    parameters, x = example(name, 24, 24, theta=(24, 24))
    check(name, x.T, parameters, lambda p: p.mT)
    check(name, x[::2, ::3], parameters, lambda p: p[::2, ::3])
    assert len(called) == 2


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
@ALL
def test_no_cells(name, shape):
    parameters = [torch.ones(shape, requires_grad=True) for _ in example(name, 1, 1)[0]]
    log_prob = MAKE[name](*parameters).to_event(1).log_prob(torch.zeros(shape))
    assert log_prob.shape == shape[:-1]
    for gradient in torch.autograd.grad(log_prob.sum(), parameters):
        assert gradient.shape == shape


@ALL
def test_cells_all_zero_and_cells_without_a_zero(name):
    parameters, x = example(name, 6, WIDE + 9)
    check(name, torch.zeros_like(x), parameters)
    check(name, x + 1, parameters)


@ALL
def test_more_than_one_axis_in_the_event(name, called):
    parameters, x = example(name, 6, 31)
    d = MAKE[name](*parameters)
    torch.testing.assert_close(d.to_event(2).log_prob(x), d.to_event(1).log_prob(x).sum(), rtol=1e-5, atol=0)
    assert len(called) == 2


@ALL
def test_every_count_to_forty_and_beyond_the_table(name):
    """The products of the small ones, the table of log factorials and what comes after it."""
    x = torch.tensor([[*range(41), *range(1020, 1028), 65_535, 1e6]], dtype=torch.float32)
    for mean in (1e-3, 2.0, 700.0):
        for theta in (1e-3, 0.4, 30.0, 1e4):
            parameters = [torch.full_like(x, mean)]
            parameters += [torch.full_like(x, theta)] * ("nb" in name)
            parameters += [torch.full_like(x, -0.7)] * ("z" in name)
            for place in range(0, x.shape[1], 7):  # a few at a time: one large number would hide the others
                part = slice(place, place + 7)
                check(name, x[:, part], [p[:, part].clone() for p in parameters])


# --- threads


@pytest.mark.parametrize("rows", [1, 2, 37, 300])
@ALL
def test_bits_do_not_depend_on_the_threads(name, rows):
    n_genes = 2 * MANY // rows + 1
    parameters, x = example(name, rows, n_genes)

    def run():
        leaves = [p.clone().requires_grad_() for p in parameters]
        log_prob = MAKE[name](*leaves).to_event(1).log_prob(x)
        return [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaves)]

    alone = run()
    before = numba.get_num_threads()
    torch.set_num_threads(2)
    try:
        shared = run()
    finally:
        torch.set_num_threads(1)
    assert numba.get_num_threads() == before
    # A gene-wise slope's sum over cells is torch's own.
    wise = [t.shape == (n_genes,) and rows > 1 for t in alone]
    for a, b, summed in zip(alone, shared, wise, strict=True):
        assert (
            torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())) if summed else torch.equal(a, b)
        )


# --- far out, and where nothing is a number


@pytest.mark.parametrize("base", ["zip", "zinb"])
def test_zeros_far_out_are_summed_in_log_space(base):
    """pi and p(0) are both too small for float32; their logs and the slopes are not."""
    grid = torch.cartesian_prod(
        torch.tensor([-150.0, -120, -101, -100, -90, -88, -87, -86, -81, -80, -70, -60]),
        torch.tensor([60.0, 81, 87, 88, 100, 101, 300, 1e3, 1e4]),
        torch.tensor([50.0, 300, 1e5] if base == "zinb" else [1.0]),
    )
    gate, mean, theta = (c[:, None].clone() for c in grid.unbind(1))
    parameters = [mean, theta, gate] if base == "zinb" else [mean, gate]
    x = torch.zeros_like(mean)
    leaves = [p.clone().requires_grad_() for p in parameters]
    log_prob = MAKE[base](*leaves).to_event(1).log_prob(x)
    got = [log_prob.detach()[:, None], *torch.autograd.grad(log_prob.sum(), leaves)]
    leaves = [p.double().requires_grad_() for p in parameters]
    m, *t, g = leaves
    log_p0 = -t[0] * torch.log1p(m / t[0]) if t else -m
    reference = torch.logaddexp(
        torch.nn.functional.logsigmoid(g), log_p0 + torch.nn.functional.logsigmoid(-g)
    )
    want = [reference.detach(), *torch.autograd.grad(reference.sum(), leaves)]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all()
        rtol, atol = (1e-4, 1e-4) if i else (1e-5, 0)
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda s, i=i: f"{i}: {s}")


@pytest.mark.parametrize("base", ["zip", "zinb"])
def test_a_zero_far_out_leaves_its_neighbours_as_they_were(base):
    parameters, x = example(base, 2, 40)
    alone = both(base, x, parameters)[0]
    parameters[-1][0, 3], parameters[0][0, 3] = -130.0, 5e3
    far = both(base, x, parameters)[0]
    for a, b in zip(alone[1:], far[1:], strict=True):
        if a.shape == x.shape:
            same = torch.ones(2, 40, dtype=torch.bool)
            same[0, 3] = False
            assert torch.equal(a[same], b[same])
    assert alone[0][1] == far[0][1]
    check(base, torch.where(torch.arange(40) == 3, 0.0, x), parameters)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("far_out", [False, True])
@ALL
def test_what_is_no_number_is_not_hidden(name, bad, place, far_out):
    """At a zero (gene 0) and at a count (gene 3)."""
    n_parameters = len(example(name, 1, 1)[0])
    for which in range(n_parameters):
        parameters, x = example(name, 3, 8, theta=(3, 8))
        x[:, 0], x[:, 3] = 0.0, 2.0
        if far_out and "z" in name:
            parameters[0][1, 5], parameters[-1][1, 5] = 5e3, -130.0
        with validating(on=False):
            clean = MAKE[name](*parameters).to_event(1).log_prob(x)
            parameters[which][1, place] = bad
            log_prob = MAKE[name](*parameters).to_event(1).log_prob(x)
            single = MAKE[name](*parameters).log_prob(x)[1].sum()
        assert torch.isfinite(clean).all()
        assert torch.equal(log_prob[[0, 2]], clean[[0, 2]])
        if math.isnan(bad) or not torch.isfinite(single):
            assert not torch.isfinite(log_prob[1]), f"parameter {which}"


@ALL
def test_a_negative_zero_is_a_zero(name):
    parameters, x = example(name, 3, 8)
    d = MAKE[name](*parameters).to_event(1)
    assert (x == 0).any()
    assert torch.equal(d.log_prob(torch.where(x == 0, -0.0, x)), d.log_prob(x))


@pytest.mark.parametrize("name", ["poisson", "nb", "zip", "zinb"])
def test_a_mean_that_has_underflowed_stays_finite(name):
    parameters, x = example(name, 3, 8)
    parameters[0][:] = 0.0
    leaves = [p.clone().requires_grad_() for p in parameters]
    log_prob = MAKE[name](*leaves).to_event(1).log_prob(x)
    assert torch.isfinite(log_prob).all()
    for slope in torch.autograd.grad(log_prob.sum(), leaves):
        assert torch.isfinite(slope).all()


# --- what is wanted


@ALL
def test_no_slopes_are_computed_that_nobody_wants(name, called):
    parameters, x = example(name, 3, 8)
    leaves = [p.clone().requires_grad_() for p in parameters]
    with torch.no_grad():
        value = MAKE[name](*leaves).to_event(1).log_prob(x)
    MAKE[name](*parameters).to_event(1).log_prob(x)
    with_slopes = MAKE[name](*leaves).to_event(1).log_prob(x)
    has = [True, "nb" in name, "z" in name]
    assert [call[-1] for call in called] == [[False] * 3, [False] * 3, has]
    assert torch.equal(value, with_slopes.detach())


@ALL
def test_one_slope_alone_is_what_it_is_among_all(name, called):
    parameters, x = example(name, 3, WIDE + 3)
    want = both(name, x, parameters)[0]
    for i in range(len(parameters)):
        leaves = [p.clone().requires_grad_(i == j) for j, p in enumerate(parameters)]
        log_prob = MAKE[name](*leaves).to_event(1).log_prob(x)
        upstream = 0.5 + torch.arange(3.0).sin()
        (slope,) = torch.autograd.grad(log_prob, leaves[i], upstream)
        assert torch.equal(log_prob.detach(), want[0])
        assert torch.equal(slope, want[1 + i])
        assert sum(called[-1][-1]) == 1
