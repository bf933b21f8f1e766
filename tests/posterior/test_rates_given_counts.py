"""The rates behind counts, against known answers."""

from dataclasses import replace

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from known_rates import (
    GATE,
    MEAN,
    POSTERIOR,
    PRIOR,
    THETA,
    Known,
    X,
    cells_of,
    distance,
    drawn_rates,
    dropouts,
    known,
)

from pyrosc import from_anndata, multiple_imputation
from pyrosc.criticism.baseline import baseline
from pyrosc.distributions.counts import ZeroInflated
from pyrosc.posterior import sampling
from pyrosc.posterior.impute import impute


def test_rates_of_a_negative_binomial_are_gamma_distributed():
    fit, adata = known(X, MEAN, THETA)
    imputed = impute(fit, adata, "rate", n_draws=4000)
    np.testing.assert_allclose(imputed.mean, POSTERIOR.mean(), rtol=1e-5)  # exact, as no state is drawn
    np.testing.assert_allclose(imputed.sd, POSTERIOR.std(), rtol=0.15)
    assert np.abs(POSTERIOR.cdf(imputed.lower) - 0.05).max() < 0.02
    assert np.abs(POSTERIOR.cdf(imputed.upper) - 0.95).max() < 0.02
    w = drawn_rates(fit, adata, 4000)
    assert distance(w, POSTERIOR.cdf).max() < 2.3 / np.sqrt(4000)
    assert distance(w, PRIOR.cdf).max() > 0.5


def test_a_zero_that_may_be_a_dropout_says_less_of_its_rate():
    fit, adata = known(X, MEAN, THETA, GATE)
    d = dropouts()
    mean = impute(fit, adata, "rate", n_draws=3).mean
    np.testing.assert_allclose(mean, d * MEAN + (1 - d) * POSTERIOR.mean(), rtol=1e-5)
    w = drawn_rates(fit, adata, 4000)
    mixture = lambda w: d * PRIOR.cdf(w) + (1 - d) * POSTERIOR.cdf(w)
    assert distance(w, mixture).max() < 2.3 / np.sqrt(4000)


@pytest.mark.parametrize("gate", [None, GATE])
def test_the_rate_of_a_poisson_is_the_decoders_mean(gate):
    fit, adata = known(X, MEAN, gate=gate)
    imputed = impute(fit, adata, "rate", n_draws=3)
    np.testing.assert_allclose(imputed.mean, np.tile(MEAN, (4, 1)), rtol=1e-6)
    assert (imputed.sd < 1e-5 * MEAN).all()


@pytest.mark.parametrize("kind", ["gamma-poisson", "negative binomial"])
def test_rates_behind_pyros_own_distributions(kind):
    class Theirs(Known):
        def model(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                theta, mean = (t.expand(cells.x.shape) for t in (self.theta, self.mean))
                x = (
                    dist.GammaPoisson(theta, theta / mean)
                    if kind == "gamma-poisson"
                    else dist.NegativeBinomial(theta, probs=mean / (theta + mean))
                )
                pyro.sample("x", x.to_event(1), obs=cells.x)

        def guide(self, cells):
            pass

    _, adata = known(X, MEAN)
    fit = pairs.untrained(Theirs(MEAN, THETA), from_anndata(adata))
    np.testing.assert_allclose(impute(fit, adata, "rate", n_draws=3).mean, POSTERIOR.mean(), rtol=1e-5)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["cells x genes", "genes x cells"])
def test_rates_of_a_program_with_a_plate_of_genes(data, few, transposed, parallel):
    program = pairs.GenesPlate(np.linspace(0.5, 8, 40), transposed=transposed)
    fit = pairs.untrained(program, data, plates=2)
    options = {"n_draws": 6, "parallel": parallel, "seed": 3}
    rate, w = impute(fit, few, "rate", **options), impute(fit, few, site="w", **options)
    for name in ("mean", "sd", "lower"):
        np.testing.assert_allclose(getattr(rate, name), getattr(w, name), rtol=1e-3, atol=1e-6)


def test_the_mean_is_that_of_conditional_means():
    """It has the limit of a mean of draws, with less noise."""
    fit, adata = known(X, MEAN, THETA, GATE, sd=0.4)
    w = drawn_rates(fit, adata, 4000)
    many = impute(fit, adata, "rate", n_draws=4000, seed=1)
    assert np.max(np.abs(many.mean - w.mean(0)) / (w.std(0) * np.sqrt(2 / 4000))) < 5
    np.testing.assert_allclose(many.sd, w.std(0), rtol=0.2)
    ours = np.stack([impute(fit, adata, "rate", n_draws=10, seed=i).mean for i in range(60)])
    of_draws = w.reshape(-1, 10, *X.shape).mean(1)
    ratio = ours.var(0) / of_draws.var(0)
    assert np.median(ratio) < 0.5
    assert (ratio < 1.5).all()


@pytest.mark.parametrize("parallel", [True, False])
def test_draws_one_at_a_time_have_the_same_mean(parallel):
    fit, adata = known(X, MEAN, THETA, GATE)
    for what in ("rate", "repaired"):
        one = impute(fit, adata, what, n_draws=3, parallel=False)
        np.testing.assert_allclose(one.mean, impute(fit, adata, what, n_draws=3).mean, rtol=1e-5)
    assert impute(fit, adata, "rate", batch="average", n_draws=3, parallel=False).mean.shape == X.shape


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("n_draws", [25, 50])
def test_intervals_of_rates_cover_true_ones(likelihood, n_draws):
    """At the true parameters: of w ~ Gamma, x ~ Poisson(w) and dropouts, 90% of the w are in theirs."""
    rng = np.random.default_rng(5)
    mean, theta = np.geomspace(0.2, 30, 40), np.tile([0.3, 1.0, 4.0, 20.0], 10)
    w = rng.gamma(theta, mean / theta, (400, 40))
    x = rng.poisson(w)
    if likelihood == "zinb":
        x[rng.random(x.shape) < 0.3] = 0
    gate = np.full(40, np.log(0.3 / 0.7)) if likelihood == "zinb" else None
    fit, adata = known(x, mean, theta, gate)
    imputed = impute(fit, adata, "rate", n_draws=n_draws)
    inside = (imputed.lower <= w) & (w <= imputed.upper)
    assert 0.88 < inside.mean() < 0.92
    assert (
        np.abs(inside.reshape(400, 4, 10).mean((0, 2)) - 0.9) < 0.02
    ).all()  # at every level of expression


def test_a_library_size_scales_rates():
    fit, adata = known(X, MEAN, THETA)
    own, at = impute(fit, adata, "rate", n_draws=9), impute(fit, adata, "rate", library=500.0, n_draws=9)
    for name in ("mean", "sd", "upper"):
        expected = getattr(own, name) * 500 / X.sum(1, keepdims=True)
        np.testing.assert_allclose(getattr(at, name), expected, rtol=1e-4)
    assert "500" in at.unit
    fit, adata = known(X, MEAN, THETA, l=20.0)  # the program's own
    at = impute(fit, adata, "rate", library=500.0, n_draws=9)
    np.testing.assert_allclose(at.mean, POSTERIOR.mean() * 500 / 20, rtol=1e-5)


def test_a_cell_takes_its_factor_to_another_batch():
    fit, adata = known(X, MEAN, THETA, batches=["a", "b", "a", "b"])
    mu = MEAN * np.array([1, 2, 1, 2])[:, None]
    factor = (THETA + X) / (THETA + mu)
    options = {"n_draws": 4}
    expected = {None: factor * mu, "a": factor * MEAN, "b": factor * 2 * MEAN, "average": factor * 1.5 * MEAN}
    for batch, mean in expected.items():
        imputed = impute(fit, adata, "rate", batch=batch, **options)
        np.testing.assert_allclose(imputed.mean, mean, rtol=1e-5)
        (drawn,) = multiple_imputation(fit, adata, 1, batch=batch)
        assert drawn.shape == (4, 5)


def test_genes_chosen_are_those_columns_and_streaming_changes_no_mean(monkeypatch):
    fit, adata = known(X, MEAN, THETA, GATE)
    whole = impute(fit, adata, "rate", n_draws=5)
    some = impute(fit, adata, "rate", genes=["g3", "g0"], n_draws=5)
    # (float32 in loops of other shapes)
    np.testing.assert_allclose(some.mean, whole.mean[:, [3, 0]], rtol=1e-5)
    assert list(some.gene_names) == ["g3", "g0"]
    turned = impute(fit, adata[:, ::-1].copy(), "rate", n_draws=5)
    np.testing.assert_allclose(turned.mean, whole.mean[:, ::-1], rtol=1e-5)
    monkeypatch.setattr(sampling, "_ELEMENTS", 1)  # a cell at a time
    pieces = impute(fit, adata, "rate", n_draws=5)
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-5)


@pytest.mark.parametrize("what", ["rate", "predictive", "repaired"])
def test_only_the_genes_chosen_are_worked_out(what, rich_fit, rich, monkeypatch):
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)
        made = lambda *args: seen.append(tuple((result := original(*args)).shape)) or result
        monkeypatch.setattr(owner, name, made)

    watched(ZeroInflated, "dropout_probability")
    watched(torch, "_standard_gamma")
    watched(torch, "poisson")
    impute(rich_fit, rich, what, genes=["gene_30", "gene_2"], n_draws=3)
    assert len(seen) >= 2
    assert {shape[-1] for shape in seen} == {2}


def test_a_gene_that_was_not_measured_has_the_decoders_opinion_alone():
    fit, adata = known(X, MEAN, THETA, GATE)
    fit = replace(fit, schema=replace(fit.schema, absent=("g2",)))
    d = dropouts()
    less = adata[:, [0, 1, 3, 4]].copy()
    names = list(fit.schema.genes)
    expected = d * MEAN + (1 - d) * POSTERIOR.mean()
    expected[:, 2] = MEAN[2]
    np.testing.assert_allclose(impute(fit, less, "rate", genes=names).mean, expected, rtol=1e-4)
    expected = np.where(X == 0, d * MEAN, X)
    expected[:, 2] = MEAN[2]
    np.testing.assert_allclose(impute(fit, less, "repaired", genes=names).mean, expected, rtol=1e-4)
    (drawn,) = multiple_imputation(fit, less, 1)
    assert list(drawn.var_names) == list(less.var_names)


def test_rates_keep_a_gene_that_the_decoder_smooths_away():
    """A model in which all cells are alike knows no marker of a rare type; the cells' own counts do."""
    rng = np.random.default_rng(0)
    w = np.tile(rng.gamma(2, 3, 30), (300, 1))
    w[:, 7] = 0.05
    w[:15, 7] = 20
    adata = cells_of(rng.poisson(w))
    fit = baseline(from_anndata(adata), progress=False)
    error = lambda imputed: np.sqrt(((imputed.mean - w) ** 2).mean(0))
    share, rate = (error(impute(fit, adata, what, n_draws=2)) for what in ("count", "rate"))
    assert rate[7] < 0.4 * share[7]
    others = np.arange(30) != 7
    assert rate[others].mean() < 1.5 * share[others].mean()


@pytest.mark.parametrize("what", ["rate", "log1p", "predictive", "repaired"])
def test_rates_of_a_model_with_all_that_is_optional(rich_fit, rich, what):
    imputed = impute(rich_fit, rich, what, n_draws=4, interval=0.5)
    assert np.isfinite(imputed.mean).all()
    assert (imputed.lower <= imputed.upper).all()
    assert imputed.mean.shape == (200, 40)
    again = impute(rich_fit, rich, what, n_draws=4, interval=0.5)
    assert all(
        np.array_equal(getattr(imputed, n), getattr(again, n)) for n in ("mean", "sd", "lower", "upper")
    )
