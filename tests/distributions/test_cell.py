"""Whole cells by logits and totals: the same as by means, in one loop; once differentiable, as it says."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import MaskedDistribution

from pyrosc.distributions import cell
from pyrosc.distributions.cell import without
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.engine.backends import kernels
from pyrosc.inference.isolation import validating

MAKE = {
    "poisson": lambda **mean: Poisson(**mean),
    "nb": lambda theta, **mean: NegativeBinomial(inverse_dispersion=theta, **mean),
    "zip": lambda gate, **mean: ZeroInflated(Poisson(**mean), gate),
    "zinb": lambda theta, gate, **mean: ZeroInflated(
        NegativeBinomial(inverse_dispersion=theta, **mean), gate
    ),
}
ALL = pytest.mark.parametrize("name", MAKE)


def example(name, logits=(6, 31), total=(6, 1), theta=(31,), gate=(6, 31), x=(6, 31), seed=0):
    """Parameters by name, and counts."""
    rng = torch.Generator().manual_seed(seed)
    parameters = {
        "logits": torch.randn(logits, generator=rng) * 2,
        "total": torch.rand(total, generator=rng) * 200 + 1,
    }
    if "nb" in name:
        parameters["theta"] = (torch.randn(theta, generator=rng) * 2).exp()
    if "z" in name:
        parameters["gate"] = torch.randn(gate, generator=rng) * 2
    return parameters, torch.poisson(torch.rand(x, generator=rng) * 6, generator=rng).clamp_min(3) - 3


def evaluated(name, parameters, x, *, by_mean=False, dtype=torch.float32, change=lambda d: d.to_event(1)):
    """Value of log p, and gradients of its weighted sum in all parameters."""
    leaves = {key: p.to(dtype, copy=True).requires_grad_() for key, p in parameters.items()}
    given = dict(leaves)
    if by_mean:
        given["mean"] = given.pop("total") * given.pop("logits").softmax(-1)
    log_p = change(MAKE[name](**given)).log_prob(x.to(dtype))
    upstream = 0.5 + torch.arange(log_p.numel(), dtype=dtype).view(log_p.shape).sin()
    return [log_p.detach(), *torch.autograd.grad(log_p, list(leaves.values()), upstream)]


def assert_close(found, true, x):
    """To rounding, by the largest number, of slopes too: these are differences of the counts."""
    for a, b in zip(found, true, strict=True):
        assert a.shape == b.shape
        atol = 5e-6 * float(max(b.abs().max(), x.max()))
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


@pytest.fixture
def called(monkeypatch):
    """Arguments of each call of the loop."""
    assert kernels()
    calls, original = [], torch.ops.pyrosc.softmax_density
    monkeypatch.setattr(torch.ops.pyrosc, "softmax_density", lambda *a: calls.append(a) or original(*a))
    return calls


SHAPES = {
    "cells": {},
    "one total": {"total": ()},
    "one total for all cells": {"total": (1,)},
    "theta and gate of genes": {"gate": (31,)},
    "theta and gate of genes, with an axis": {"theta": (1, 31), "gate": (1, 31)},
    "theta and gate of cells": {"theta": (6, 1), "gate": (6, 1)},
    "theta of both": {"theta": (6, 31)},
    "draws": {"logits": (3, 6, 31), "gate": (3, 6, 31)},
    "draws, and of the total": {"logits": (3, 6, 31), "total": (3, 6, 1)},
    "draws, and one total each": {"logits": (3, 6, 31), "total": (3, 1, 1)},
    "draws of theta": {"logits": (3, 6, 31), "theta": (3, 1, 31)},
    "two axes of draws": {"logits": (2, 3, 6, 31), "theta": (2, 1, 1, 31)},
    "draws of theta and gate alone": {"theta": (3, 1, 31), "gate": (3, 1, 31)},
    "logits of genes": {"logits": (31,)},
    "logits of genes, of one cell": {"logits": (31,), "total": (1,), "gate": (31,), "x": (31,)},
    "one cell, many parameters": {"x": (31,)},
    "draws of the counts": {"x": (3, 6, 31)},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@ALL
def test_logits_and_totals_are_their_mean(name, shapes, called):
    parameters, x = example(name, **shapes)
    found = evaluated(name, parameters, x)
    assert len(called) == 1
    assert_close(found, evaluated(name, parameters, x, by_mean=True, dtype=torch.float64), x)
    assert_close(found, evaluated(name, parameters, x, by_mean=True), x)


@ALL
def test_single_counts_sum_to_the_cell(name, called):
    parameters, x = example(name)
    found = evaluated(name, parameters, x)
    single = evaluated(name, parameters, x, change=lambda d: Summed(d))
    assert len(called) == 1
    assert_close(found, single, x)


class Summed:
    """Counts one by one, summed."""

    def __init__(self, d):
        self.d = d

    def log_prob(self, x):
        return self.d.log_prob(x).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@ALL
def test_where_no_loop_runs_torch_does(name, dtype, called, monkeypatch):
    monkeypatch.setattr(cell, "softmax_density_for", lambda *_: None)
    parameters, x = example(name)
    found = evaluated(name, parameters, x, dtype=dtype)
    assert not called
    assert_close(found, evaluated(name, parameters, x, by_mean=True, dtype=torch.float64), x)


@pytest.mark.parametrize(
    "shapes",
    [
        {"logits": (6, 1)},
        {"total": (6, 31)},
        {"x": (6, 1)},
        {"logits": (6, 1), "theta": (1,), "gate": (6, 1)},
    ],
    ids=["one logit", "a total of each gene", "a count for all", "all genes alike"],
)
@ALL
def test_shapes_that_no_loop_takes_are_their_mean_too(name, shapes, called):
    parameters, x = example(name, **shapes)
    found = evaluated(name, parameters, x)
    assert not called
    assert_close(found, evaluated(name, parameters, x, by_mean=True, dtype=torch.float64), x)


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("shapes", [{}, {"logits": (3, 6, 31), "gate": (3, 6, 31)}, {"theta": (6, 31)}])
@ALL
def test_genes_left_out_keep_their_shares(name, shapes, loop, called, monkeypatch):
    if not loop:
        monkeypatch.setattr(cell, "softmax_density_for", lambda *_: None)
        monkeypatch.setattr(cell, "log_density_for", lambda *_: None)
    parameters, x = example(name, **shapes)
    kept = torch.arange(31) % 3 > 0
    leave = lambda d: without(d.to_event(1), kept)
    found = evaluated(name, parameters, torch.where(kept, x, 2.5), change=leave)
    assert len(called) == loop

    class Kept(Summed):
        def log_prob(self, x):
            return torch.where(kept, self.d.log_prob(x), 0.0).sum(-1)

    true = evaluated(name, parameters, x, by_mean=True, dtype=torch.float64, change=Kept)
    assert_close(found, true, x)
    assert_close(found, evaluated(name, parameters, x, by_mean=True, change=leave), x)
    by_gate = dict(zip(parameters, found[1:], strict=True)).get("gate")
    assert by_gate is None or not by_gate[..., ~kept].any()


@ALL
def test_entries_of_cells_may_be_left_out(name, called):
    parameters, x = example(name)
    mask = torch.rand(6, 31, generator=torch.Generator().manual_seed(1)) < 0.6
    leave = lambda d: cell.as_event(MaskedDistribution(d, mask), 1)
    found = evaluated(name, parameters, x, change=leave)
    assert len(called) == 1
    assert_close(found, evaluated(name, parameters, x, change=lambda d: d.mask(mask).to_event(1)), x)


@ALL
def test_it_expands(name, called):
    parameters, x = example(name)
    d = MAKE[name](**parameters)
    e = d.expand((4, 6, 31))
    assert e.mean.shape == e.variance.shape == (4, 6, 31)
    torch.testing.assert_close(e.mean, d.mean.expand(4, 6, 31))
    torch.testing.assert_close(e.to_event(1).log_prob(x), d.to_event(1).log_prob(x).expand(4, 6))
    torch.testing.assert_close(d.to_event(1).expand((4, 6)).log_prob(x), e.to_event(1).log_prob(x))
    assert all(call[0].shape == (6, 31) for call in called)
    assert e.sample().shape == (4, 6, 31)


def test_what_was_given_is_known_and_what_follows():
    logits, total, theta = (
        torch.tensor([[0.0, 1.0], [2.0, 2.0]]),
        torch.tensor([[10.0], [3.0]]),
        torch.ones(2),
    )
    mean = total * logits.softmax(-1)
    for d in (Poisson(logits=logits, total=total), NegativeBinomial(None, theta, logits=logits, total=total)):
        torch.testing.assert_close(d.mean, mean)
        assert torch.equal(d.logits, logits)
        assert torch.equal(d.total, total)
    for d in (Poisson(mean), NegativeBinomial(mean, theta), Poisson(mean=mean)):
        assert torch.equal(d.mean, mean)
        torch.testing.assert_close(d.total * d.logits.softmax(-1), mean)
        torch.testing.assert_close(d.total, total)
    gated = ZeroInflated(Poisson(logits=logits, total=total), torch.zeros(2))
    torch.testing.assert_close(gated.mean, mean / 2)


@pytest.mark.parametrize("make", [Poisson, lambda *a, **k: NegativeBinomial(*a, inverse_dispersion=ONE, **k)])
@pytest.mark.parametrize("given", ["", "logits", "total", "mean logits", "mean total", "mean logits total"])
def test_there_is_one_mean(make, given):
    says = r"takes mean=, or logits= and total=, not " + (" and ".join(given.split()) or "none of them") + "$"
    with pytest.raises(ValueError, match=says):
        make(**dict.fromkeys(given.split(), ONE))


ONE = torch.ones(1)


def test_a_negative_binomial_has_a_dispersion():
    with pytest.raises(ValueError, match="inverse_dispersion="):
        NegativeBinomial(ONE)


@pytest.mark.parametrize(
    ("name", "bad"), [("logits", math.nan), ("total", -1.0), ("inverse_dispersion", 0.0)]
)
def test_parameters_are_checked(name, bad):
    given = {"logits": torch.zeros(2), "total": torch.ones(1), "inverse_dispersion": torch.ones(2)}
    given[name] = torch.full_like(given[name], bad)
    with pytest.raises(ValueError, match=f"parameter {name}"):
        NegativeBinomial(**given, validate_args=True)
    with validating(on=False):
        NegativeBinomial(**given)
    with pytest.raises(ValueError, match="value"):
        Poisson(logits=ONE, total=ONE, validate_args=True).to_event(1).log_prob(-ONE)


# --- second derivatives


THEIRS = {
    "poisson": lambda mean: dist.Poisson(mean),
    "nb": lambda theta, mean: dist.GammaPoisson(theta, theta / mean),
    "zip": lambda gate, mean: dist.ZeroInflatedDistribution(dist.Poisson(mean), gate_logits=gate),
    "zinb": lambda theta, gate, mean: dist.ZeroInflatedDistribution(
        dist.GammaPoisson(theta, theta / mean), gate_logits=gate
    ),
}


@pytest.mark.parametrize("how", ["single counts", "cells by means", "cells by logits"])
@ALL
def test_a_second_derivative_is_refused_and_the_way_to_have_it_named(name, how):
    parameters, x = example(name)
    parameters = {key: p.requires_grad_() for key, p in parameters.items()}
    given = dict(parameters)
    if how != "cells by logits":
        given["mean"] = given.pop("total") * given.pop("logits").softmax(-1)
    d = MAKE[name](**given)
    log_p = d.log_prob(x) if how == "single counts" else d.to_event(1).log_prob(x)
    for key, p in parameters.items():
        # (And of a sum with what does have one: the rest would be taken for the whole.)
        (slope,) = torch.autograd.grad(log_p.sum() + p.pow(3).sum(), p, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"differentiable once.*dist\.GammaPoisson\(theta, theta / mean\)"
        ):
            torch.autograd.grad(slope.sum(), p)
        assert slope.shape == parameters[key].shape


@ALL
def test_pyros_densities_are_the_way_to_second_derivatives(name):
    """Against differences of our slopes."""
    parameters, x = example(name, logits=(2, 3), total=(2, 1), theta=(3,), gate=(2, 3), x=(2, 3))
    parameters = {key: p.double() for key, p in parameters.items()}
    parameters["mean"] = parameters.pop("total") * parameters.pop("logits").softmax(-1)
    for key in parameters:
        p = parameters[key].clone().requires_grad_()
        others = {k: v for k, v in parameters.items() if k != key}
        log_p = THEIRS[name](**others, **{key: p}).log_prob(x.double()).sum()
        (slope,) = torch.autograd.grad(log_p, p, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), p)

        def ours(at, key=key, others=others):
            at = at.detach().requires_grad_()
            return torch.autograd.grad(MAKE[name](**others, **{key: at}).log_prob(x.double()).sum(), at)[0]

        torch.testing.assert_close(slope.detach(), ours(p), rtol=1e-6, atol=1e-9)
        h = 1e-6 * parameters[key].abs()
        differences = (ours(p + h) - ours(p - h)) / (2 * h)
        torch.testing.assert_close(second, differences, rtol=1e-5, atol=1e-6 * float(second.abs().max()))
