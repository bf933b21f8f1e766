"""Programs run from outside: pairing, isolation, the KL weight, checks."""

import math
import types

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrosc.inference.contract import check_programs, elbo_of, pair
from pyrosc.inference.elbo import _kl_by_site, _weighted_loss
from pyrosc.inference.handlers import ScaleKL
from pyrosc.inference.isolation import isolated, modules_of

CPU = torch.device("cpu")


@pytest.fixture
def cells(data):
    return data.on("cpu").cells(torch.tensor([3, 1, 8, 120]))


def plate(cells):
    return pyro.plate("cells", cells.n_total, subsample=cells.index)


# --- pairs, estimators, modules


def test_pairs_of_an_object_of_two_functions_and_of_a_model_with_a_guide():
    two = pairs.TwoMethods(5)
    assert pair(two, None) == (two.model, two.guide)
    model, guide = pairs.two_functions(5)
    assert pair(model, guide) == (model, guide)
    assert pair(two, guide) == (two.model, guide)
    auto = AutoNormal(model)
    assert pair(model, auto) == (model, auto)


def test_no_model_and_no_guide_are_told():
    with pytest.raises(TypeError, match="callable with Cells"):
        pair(3, None)
    with pytest.raises(TypeError, match=r"no guide.*AutoNormal"):
        pair(lambda cells: None, None)


def test_the_elbo_is_the_argument_then_the_attribute_then_trace():
    two = pairs.TwoMethods(5)
    assert type(elbo_of(two, None)) is Trace_ELBO
    two.elbo = TraceMeanField_ELBO
    assert type(elbo_of(two, None)) is TraceMeanField_ELBO
    assert type(elbo_of(two, TraceEnum_ELBO)) is TraceEnum_ELBO
    given = Trace_ELBO(num_particles=3)
    assert elbo_of(two, given) is given


def test_modules_behind_programs():
    two = pairs.TwoMethods(5)
    model, guide = pairs.two_functions(5)
    auto = AutoNormal(model)
    assert modules_of(two, None) == [two]
    assert modules_of(two.model, two.guide) == [two]
    plain = types.SimpleNamespace(net=two, size=3)
    assert modules_of(plain) == [two]  # the parts of an object that is no module itself
    assert modules_of(model, auto) == [auto]
    assert modules_of(model, guide) == []


# --- isolation


def test_isolated_keeps_parameters_in_a_store_of_its_own(untouched):
    params = pairs.empty_params()
    with untouched():
        with isolated(CPU, 0, params):
            pyro.param("a", torch.ones(2))
            torch.randn(3)
        with isolated(CPU, 0, params):
            assert list(pyro.get_param_store()) == ["a"]
        with isolated(CPU, 0, pairs.empty_params()):
            assert not list(pyro.get_param_store())
    assert list(params["params"]) == ["a"]


def test_isolated_gives_the_callers_store_back():
    mine = pyro.param("mine", torch.ones(2), constraint=dist.constraints.positive)
    try:
        with isolated(CPU, 0, pairs.empty_params()):
            assert not list(pyro.get_param_store())
            pyro.param("mine", torch.zeros(5))
        assert list(pyro.get_param_store()) == ["mine"]
        assert torch.equal(pyro.param("mine"), mine)
    finally:
        pyro.clear_param_store()


@pytest.mark.parametrize("validate", [True, False])
def test_isolated_restores_everything_after_an_exception(untouched, validate):
    def interrupted():
        with isolated(CPU, 0, pairs.empty_params()):
            pyro.param("a", torch.ones(2))
            torch.randn(2)
            raise ZeroDivisionError

    before = pyro.settings.get()
    pyro.enable_validation(validate)
    try:
        with untouched(), pytest.raises(ZeroDivisionError):
            interrupted()
    finally:
        pyro.settings.set(**before)


def test_isolated_runs_without_validation_and_with_its_seed():
    drawn = []
    for seed in (1, 1, 2):
        with isolated(CPU, seed, pairs.empty_params()):
            assert not pyro.settings.get("validate_infer")
            assert not torch.distributions.Distribution._validate_args
            drawn.append(torch.randn(2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# --- the KL weight


def both_traces(model, guide, cells, weight):
    scaled = ScaleKL(weight)
    guided = poutine.trace(scaled(guide)).get_trace(cells)
    return guided, poutine.trace(poutine.replay(scaled(model), guided)).get_trace(cells)


@pytest.mark.parametrize("weight", [0.25, torch.tensor(0.25)])
def test_scale_kl_scales_unobserved_sites_only(data, cells, weight):
    two = pairs.TwoMethods(data.n_genes).eval()
    with pyro.validation_enabled(is_validate=False):
        guided, modelled = both_traces(two.model, two.guide, cells, weight)
    subsampling = data.n_cells / len(cells)
    assert float(guided.nodes["z"]["scale"]) == subsampling * 0.25
    assert float(modelled.nodes["z"]["scale"]) == subsampling * 0.25
    assert float(modelled.nodes["x"]["scale"]) == subsampling
    assert float(modelled.nodes["rho"]["scale"]) == subsampling


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_weighted_loss_is_the_reconstruction_and_the_weighted_kl(data, cells, elbo):
    two = pairs.TwoMethods(data.n_genes).eval()
    losses = []
    for weight in (1.0, 0.5, 1e-9):
        with isolated(CPU, 4, pairs.empty_params()):
            loss = _weighted_loss(elbo(), two.model, two.guide, cells, weight)
            losses.append(float(loss.detach()))
    one, half, none = losses
    assert half == pytest.approx((one + none) / 2, rel=1e-5)
    with isolated(CPU, 4, pairs.empty_params()), torch.no_grad():
        trace = poutine.trace(two.guide).get_trace(cells)
        p = poutine.trace(poutine.replay(two.model, trace)).get_trace(cells)
        p.compute_log_prob()
        reconstruction = -float(p.nodes["x"]["unscaled_log_prob"].mean())
    assert none == pytest.approx(reconstruction, rel=1e-5)
    assert one > none


def test_the_loss_is_the_evidence_at_the_exact_posterior(data, cells):
    exact = pairs.Conjugate(data.share)
    with isolated(CPU, 0, pairs.empty_params()):
        loss = float(_weighted_loss(Trace_ELBO(), exact.model, exact.guide, cells).detach())
    assert loss == pytest.approx(-exact.evidence(cells.x.numpy()).mean(), rel=1e-5)


# --- KL by site


def test_kl_by_site_is_the_analytic_one(data, cells):
    two = pairs.TwoMethods(data.n_genes).eval()
    with isolated(CPU, 0, pairs.empty_params()), torch.no_grad():
        kl = _kl_by_site(two.model, two.guide, cells)
        q = poutine.trace(two.guide).get_trace(cells).nodes["z"]["fn"].base_dist
    m, s = q.loc, q.scale
    expected = (0.5 * (m**2 + s**2 - 1) - s.log()).sum(-1).mean()
    assert list(kl) == ["z"]
    assert kl["z"] == pytest.approx(float(expected), rel=1e-4)


def test_kl_by_site_of_a_global_site_is_shared_by_all_cells(data, cells):
    def model(cells):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with plate(cells):
            pyro.sample("x", dist.Poisson(w.exp()).expand([data.n_genes]).to_event(1), obs=cells.x)

    def guide(cells):
        pyro.sample("w", dist.Normal(2.0, 0.5))

    with pyro.validation_enabled(is_validate=False):
        kl = _kl_by_site(model, guide, cells)
    expected = 0.5 * (4 + 0.25 - 1) - math.log(0.5)
    assert kl["w"] == pytest.approx(expected / data.n_cells, rel=1e-5)


def test_kl_by_site_of_an_autoguide_at_the_prior_is_zero(data, cells):
    model = pairs.global_model(data.n_genes)
    params = pairs.empty_params()
    with isolated(CPU, 0, params), torch.no_grad():
        guide = AutoNormal(model, init_loc_fn=lambda site: torch.zeros(data.n_genes), init_scale=3.0)
        kl = _kl_by_site(model, guide, cells)
    assert kl["w"] == pytest.approx(0, abs=1e-5)


# --- checks


def good_guide(cells):
    with plate(cells):
        pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))


def model_of(latent=("z",), observe=True, plated=True, name="cells"):
    def model(cells):
        for_cells = pyro.plate(name, cells.n_total, subsample=cells.index)
        with for_cells:
            for site in latent:
                pyro.sample(site, dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            pyro.deterministic("rho", torch.ones_like(cells.x) / cells.x.shape[1], event_dim=1)
            if observe and plated:
                pyro.sample("x", dist.Poisson(torch.ones_like(cells.x)).to_event(1), obs=cells.x)
        if observe and not plated:
            pyro.sample("x", dist.Poisson(torch.ones_like(cells.x)).to_event(2), obs=cells.x)

    return model


def test_programs_that_fit_pass(untouched, cells):
    torch.manual_seed(0)
    with untouched(), isolated(CPU, 0, pairs.empty_params()):
        check_programs(model_of(), good_guide, cells)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(("z", "w")), r"guide samples no \['w'\]"),
        (model_of(()), r"model samples no \['z'\]"),
        (model_of(observe=False), "observes nothing.*obs=cells.x"),
        (model_of(plated=False), "x.* in no plate.*subsample=cells.index"),
        (model_of(name="data"), "cells"),
    ],
    ids=["guide lacks a site", "model lacks a site", "nothing observed", "not in a plate", "another plate"],
)
def test_programs_that_do_not_fit_are_told_why(cells, model, words):
    guide = good_guide
    if model is not None and words == "cells":

        def guide(cells):
            with pyro.plate("data", cells.n_total, subsample=cells.index):
                pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=words), isolated(CPU, 0, pairs.empty_params()):
        check_programs(model, guide, cells)


def test_a_distribution_out_of_range_is_found_by_the_check(cells):
    def model(cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            rate = -torch.ones_like(cells.x) + 0 * z
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    with pytest.raises(ValueError, match=r"rate"), isolated(CPU, 0, pairs.empty_params()):
        check_programs(model, good_guide, cells)


def test_a_site_that_the_model_enumerates_needs_no_guide(cells):
    def model(cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            rate = (1.0 + y)[..., None] * torch.ones_like(cells.x) + 0 * z
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    with isolated(CPU, 0, pairs.empty_params()):
        check_programs(model, good_guide, cells)


def test_the_check_makes_the_parameters(data, cells):
    model, guide = pairs.two_functions(data.n_genes)
    params = pairs.empty_params()
    with isolated(CPU, 0, params):
        check_programs(model, guide, cells)
    assert set(params["params"]) == {"weight", "bias", "theta", "slope", "offset", "scale"}


def test_modules_are_no_programs_by_themselves():
    with pytest.raises(TypeError, match="no guide"):
        pair(nn.Linear(2, 2), None)
