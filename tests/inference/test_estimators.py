"""Pyro's estimators in a fit: those that work give Pyro's own numbers, the others are refused by name."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import nn

from pyrosc import VAE, fit_svi
from pyrosc.inference.elbo import loss_and_gradients
from pyrosc.inference.isolation import isolated

CPU = torch.device("cpu")
QUICK = {"epochs": 3, "minibatch_size": 60, "progress": False}
WHOLE = {"epochs": 3, "minibatch_size": 200, "kl_warmup": 0, "validation": 0.0, "progress": False}


class Switch(nn.Module):
    """A discrete state of each cell, drawn by the guide: its gradient is a score function's."""

    def __init__(self, n_genes):
        super().__init__()
        self.logits = nn.Parameter(pairs.wave(2, n_genes))
        self.at = nn.Parameter(torch.zeros(n_genes))

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            rho = torch.softmax(self.logits, -1)[y.long()]
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("y", dist.Bernoulli(logits=torch.log1p(cells.x) @ self.at))


ESTIMATORS = {
    "trace graph": (TraceGraph_ELBO(), lambda data: Switch(data.n_genes), QUICK),
    "trace graph of a reparameterised program": (
        TraceGraph_ELBO(),
        lambda d: pairs.TwoMethods(d.n_genes),
        QUICK,
    ),
    "renyi": (RenyiELBO(alpha=0, num_particles=4), lambda d: pairs.TwoMethods(d.n_genes), WHOLE),
    "renyi, one particle": (RenyiELBO(num_particles=1), lambda d: pairs.TwoMethods(d.n_genes), WHOLE),
    "renyi, particles at once": (
        RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        lambda d: pairs.Conjugate(d.share, shift=0.3),
        WHOLE,
    ),
}


@pytest.mark.parametrize(("elbo", "make", "settings"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_estimator_without_a_differentiable_loss_trains(elbo, make, settings, data):
    fit = fit_svi(make(data), data, elbo=elbo, **settings | {"epochs": 12})
    assert np.isfinite(fit.history["train"]).all()
    assert fit.history["train"].iloc[-1] < fit.history["train"].iloc[0]


@pytest.mark.parametrize(("elbo", "make", "settings"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_its_loss_and_gradients_are_pyros(elbo, make, settings, data):
    program, cells = make(data), data.on("cpu").cells(torch.arange(200))
    parameters = list(program.parameters())
    with isolated(CPU, 3, pairs.empty_params()):
        step = loss_and_gradients(elbo, program.model, program.guide, parameters)
        loss, gradients = step(cells, torch.tensor(1.0))
    assert all(p.grad is None for p in parameters)

    def model(cells):
        pyro.module("program", program)  # (RenyiELBO differentiates only where Pyro knows of parameters)
        return program.model(cells)

    with isolated(CPU, 3, pairs.empty_params()):
        expected = elbo.loss_and_grads(model, program.guide, cells)
    assert float(loss) == pytest.approx(expected / 200, rel=1e-5)
    for p, gradient in zip(parameters, gradients, strict=True):
        if p.grad is None:
            assert gradient is None
        else:
            # Weights are powers of log densities of hundreds of nats, which have an error of 3e-5 in float32.
            atol = 1e-4 * float(p.grad.abs().max()) / 200 + 1e-4
            torch.testing.assert_close(gradient, p.grad / 200, rtol=1e-4, atol=atol)
    assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_the_importance_weighted_bound_is_above_the_elbo_and_below_the_evidence(data):
    program, cells = pairs.Conjugate(data.share, shift=0.3), data.on("cpu").cells(torch.arange(200))
    bounds = {}
    for name, elbo in {
        "elbo": Trace_ELBO(num_particles=64),
        "weighted": RenyiELBO(alpha=0, num_particles=64),
    }.items():
        with isolated(CPU, 0, pairs.empty_params()):
            bounds[name] = -elbo.loss(program.model, program.guide, cells) / 200
    assert bounds["elbo"] < bounds["weighted"] < program.evidence(data.x.toarray()).mean() + 1e-3


@pytest.mark.parametrize(
    ("elbo", "settings", "words"),
    [
        (TraceTailAdaptive_ELBO, WHOLE, "TraceTailAdaptive_ELBO has gradients but no loss.*RenyiELBO"),
        (RenyiELBO(), QUICK, "RenyiELBO weights particles .*minibatch_size=data.n_cells"),
        (RenyiELBO(), WHOLE | {"kl_warmup": 2}, "RenyiELBO weights particles .*kl_warmup=0"),
        (RenyiELBO(), WHOLE | {"kl_weight": 2.0}, "RenyiELBO weights particles .*kl_weight=1"),
    ],
)
def test_an_estimator_that_can_not_be_minimised_so_is_refused(elbo, settings, words, data):
    with pytest.raises(ValueError, match=words):
        fit_svi(pairs.TwoMethods(data.n_genes), data, elbo=elbo, **settings)


def test_renyis_bound_of_a_discrete_guide_is_refused(data):
    with pytest.raises(ValueError, match="RenyiELBO takes sites of the guide that are reparameterised"):
        fit_svi(Switch(data.n_genes), data, elbo=RenyiELBO(), **WHOLE)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, TraceMeanField_ELBO()])
def test_what_pyros_validation_refuses_is_refused_before_the_fit(elbo, data):
    with pytest.raises(ValueError, match=r"TraceMeanField_ELBO refuses these programs: .*Give another"):
        fit_svi(Switch(data.n_genes), data, elbo=elbo, **QUICK)
    fit_svi(Switch(data.n_genes), data, **QUICK)


def test_a_program_that_writes_into_the_counts_is_refused(data):
    class Writes(pairs.TwoMethods):
        def guide(self, cells):
            cells.x[:, 0] = 0
            super().guide(cells)

    with pytest.raises(ValueError, match=r"writes into cells.x.*cells.x.clone\(\)"):
        fit_svi(Writes(data.n_genes), data, **QUICK)


# --- plates beside that of cells


class Nested(nn.Module):
    """Counts of each cell and gene, the genes in a plate within that of cells; rates common to all cells."""

    def __init__(self, n_genes, subsample_size=None):
        super().__init__()
        self.n_genes, self.size = n_genes, subsample_size
        self.loc = nn.Parameter(torch.zeros(n_genes))

    def genes(self):
        return pyro.plate("genes", self.n_genes, subsample_size=self.size, dim=-1)

    def model(self, cells):
        with self.genes() as some:
            w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([len(some)]))
            with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
                pyro.sample("x", dist.Poisson(w.exp()), obs=cells.x[:, some])

    def guide(self, cells):
        with self.genes() as some:
            pyro.sample("w", dist.Normal(self.loc[some], 0.1))


@pytest.mark.parametrize("size", [None, 10])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("replay", [False, True])
def test_a_plate_of_genes_nested_or_subsampled_finds_the_rates(size, elbo, replay, data):
    settings = {"epochs": 120, "minibatch_size": 100, "validation": 0.0, "learning_rate": 0.3}
    fit = fit_svi(
        Nested(data.n_genes, size), data, elbo=elbo, kl_warmup=0, replay=replay, progress=False, **settings
    )
    rates = np.log(data.x.toarray().mean(0))
    np.testing.assert_allclose(fit.program.loc.detach().numpy(), rates, atol=0.15)
    if replay and elbo is not TraceGraph_ELBO:
        assert fit.found.replayed is True


def test_a_plate_written_as_a_loop_works(data):
    class Loop(pairs.TwoMethods):
        def model(self, cells):
            for i in pyro.plate("factors", 3):
                pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0))
            super().model(cells)

        def guide(self, cells):
            for i in pyro.plate("factors", 3):
                pyro.sample(f"w_{i}", dist.Normal(self.loc.bias[0], 1.0))
            super().guide(cells)

    fit = fit_svi(Loop(data.n_genes), data, **QUICK)
    assert {"kl_w_0", "kl_w_1", "kl_w_2", "kl_z"} <= {*fit.history}


def test_an_enumerated_site_common_to_cells_that_are_subsampled_is_refused(data):
    class Enumerated(Nested):
        elbo = TraceEnum_ELBO

        def model(self, cells):
            with self.genes():
                on = pyro.sample("on", dist.Bernoulli(0.9), infer={"enumerate": "parallel"})
                with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
                    pyro.sample("x", dist.Poisson(self.loc.exp() * (0.1 + on)), obs=cells.x)

        def guide(self, cells):
            pass

    with pytest.raises(ValueError, match=r"TraceEnum_ELBO refuses these programs: .*common poutine\.scale"):
        fit_svi(Enumerated(data.n_genes), data, **QUICK)
    fit = fit_svi(Enumerated(data.n_genes), data, **WHOLE | {"epochs": 10})
    assert fit.history["train"].iloc[-1] < fit.history["train"].iloc[0]


def test_the_kl_weight_reaches_every_estimator(data):
    vae = VAE.for_data(data, n_latent=2, hidden=(8,))
    cells = data.on("cpu").cells(torch.arange(50))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
        losses = []
        for weight in (1.0, 0.1):
            with isolated(CPU, 5, pairs.empty_params()):
                step = loss_and_gradients(elbo, vae.model, vae.guide, list(vae.parameters()))
                losses.append(float(step(cells, torch.tensor(weight))[0]))
        assert losses[0] > losses[1]
