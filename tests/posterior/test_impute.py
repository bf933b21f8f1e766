"""Imputation, against known answers."""

from dataclasses import replace

import anndata
import numpy as np
import pairs
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import zarr
from scipy import stats
from torch import nn
from tqdm.auto import tqdm

import pyrosc
from pyrosc import from_anndata, multiple_imputation
from pyrosc.criticism.baseline import baseline
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.posterior import imputation as imputed
from pyrosc.posterior import impute as imputation
from pyrosc.posterior import intervals as summaries
from pyrosc.posterior import sampling as asking
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute


@pytest.fixture
def few(data):
    return data[np.arange(12)]


def stacked(stream, site):
    return torch.cat([drawn[site] for drawn in stream], 1)


# --- what the decoder has: shares and counts


def test_shares_sum_to_one_and_lie_in_their_interval(vae_fit, data):
    imputed = impute(vae_fit, data, n_draws=30, interval=0.8)
    np.testing.assert_allclose(imputed.mean.sum(1), 1, atol=1e-4)
    assert (imputed.lower <= imputed.upper).all()
    assert (imputed.lower >= 0).all()
    inside = (imputed.lower <= imputed.mean) & (imputed.mean <= imputed.upper)
    assert inside.mean() > 0.99
    assert (imputed.sd > 0).all()
    for array in (imputed.mean, imputed.sd, imputed.lower, imputed.upper):
        assert array.shape == (200, 40)
        assert array.dtype == np.float32
    assert list(imputed.cell_names) == list(data.cell_names)
    assert tuple(imputed.gene_names) == data.schema.genes
    for word in ("200 cells", "40 genes", "80%", "share"):
        assert word in repr(imputed)
    wider = impute(vae_fit, data, n_draws=30, interval=0.95)
    assert (wider.lower <= imputed.lower).all()
    assert (wider.upper >= imputed.upper).all()


def test_impute_summarises_its_draws(vae_fit, data, few):
    n = 21
    (drawn,) = draws(vae_fit, few, "rho", n_draws=n, seed=5)
    rho = drawn["rho"].double().numpy()
    imputed = impute(vae_fit, few, n_draws=n, interval=0.8, seed=5)
    np.testing.assert_allclose(imputed.mean, rho.mean(0), rtol=1e-4)
    np.testing.assert_allclose(imputed.sd, rho.std(0), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(imputed.lower, np.quantile(rho, 0.1, 0, method="weibull"), rtol=1e-4)
    np.testing.assert_allclose(imputed.upper, np.quantile(rho, 0.9, 0, method="weibull"), rtol=1e-4)


def test_intervals_of_an_exact_posterior_are_its_quantiles(data, few):
    mean = np.linspace(0.5, 8, 40)
    fit = pairs.untrained(pairs.GenesPlate(mean), data, plates=2)
    imputed = impute(fit, few, site="w", n_draws=4000, interval=0.9)
    x = few.x.toarray()
    known = stats.gamma(2 + x, scale=1 / (1 + 2 / mean))
    np.testing.assert_allclose(imputed.mean, known.mean(), rtol=0.08)
    np.testing.assert_allclose(imputed.sd, known.std(), rtol=0.12)
    assert np.abs(known.cdf(imputed.lower) - 0.05).max() < 0.025
    assert np.abs(known.cdf(imputed.upper) - 0.95).max() < 0.025


def test_counts_at_the_cells_own_library_and_at_a_given_one(vae_fit, rich_fit, data, rich):
    share = impute(vae_fit, data, n_draws=5)
    count = impute(vae_fit, data, "count", n_draws=5)
    np.testing.assert_allclose(count.mean, share.mean * data.library[:, None], rtol=1e-4)
    at = impute(vae_fit, data, "count", library=1e4, n_draws=5)
    np.testing.assert_allclose(at.upper, share.upper * 1e4, rtol=1e-4)
    assert "1e4" in at.unit or "10000" in at.unit
    # A latent library: each draw of rho with its own draw of l.
    (drawn,) = draws(rich_fit, rich, "rho", "l", n_draws=5)
    count = impute(rich_fit, rich, "count", n_draws=5)
    np.testing.assert_allclose(count.mean, (drawn["rho"] * drawn["l"]).mean(0), rtol=1e-4)


def test_a_library_site_without_an_axis_of_its_own(data):
    """`l` may be a number per cell, (cells,), and as many cells as genes must not hide a wrong broadcast."""

    class Flat(pairs.TwoMethods):
        def model(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                zero = cells.x.new_zeros(len(cells), 2)
                z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                l = pyro.sample("l", dist.Delta(cells.library[:, 0]))
                rho = pyro.deterministic("rho", torch.softmax(self.decoder(z), -1), event_dim=1)
                pyro.sample("x", dist.Poisson(l[..., None] * rho).to_event(1), obs=cells.x)

        def guide(self, cells):
            super().guide(cells)
            with pyro.plate("cells_", cells.n_total, subsample=cells.index):
                pyro.sample("l", dist.Delta(cells.library[:, 0]))

    fit = pairs.untrained(Flat(data.n_genes), data)
    for n in (1, 12, 40):
        some = data[np.arange(n)]
        count = impute(fit, some, "count", n_draws=3)
        expected = impute(fit, some, n_draws=3).mean * some.library[:, None]
        np.testing.assert_allclose(count.mean, expected, rtol=1e-4)


def test_a_subset_of_genes_is_those_columns_in_that_order(vae_fit, few):
    full = impute(vae_fit, few, n_draws=5)
    some = impute(vae_fit, few, genes=["gene_30", "gene_2", "gene_7"], n_draws=5)
    columns = [30, 2, 7]
    for name in ("mean", "sd", "lower", "upper"):
        np.testing.assert_allclose(getattr(some, name), getattr(full, name)[:, columns], rtol=1e-5)
    assert list(some.gene_names) == ["gene_30", "gene_2", "gene_7"]


def test_a_counterfactual_batch_is_seen_by_the_model_only(data, few):
    program = pairs.Watching(data.n_genes)
    fit = pairs.untrained(program, data)
    true = few.batch.tolist()
    own = impute(fit, few, n_draws=3)
    assert all(batch == true for _, batch in program.seen)
    program.seen.clear()
    there = impute(fit, few, batch="batch_1", n_draws=3)
    assert {who for who, batch in program.seen if batch == [1] * 12} == {"model"}
    assert all(batch == true for who, batch in program.seen if who == "guide")
    moved = few.batch == 0
    assert not np.allclose(there.mean[moved], own.mean[moved], rtol=0.05)
    np.testing.assert_array_equal(there.mean[~moved], own.mean[~moved])
    z = np.concatenate([d["z"][:, :, 0].mean(0) for d in draws(fit, few, "z", batch="batch_1")])
    np.testing.assert_allclose(z, true, atol=0.15)


def test_average_is_the_mean_over_batches_of_each_draw(vae_fit, few):
    names = vae_fit.schema.batches
    each = [stacked(draws(vae_fit, few, "rho", n_draws=9, batch=b), "rho") for b in names]
    expected = torch.stack(each).mean(0)
    average = impute(vae_fit, few, batch="average", n_draws=9, interval=0.5)
    np.testing.assert_allclose(average.mean, expected.mean(0), rtol=1e-4)
    np.testing.assert_allclose(average.sd, expected.std(0, correction=0), rtol=1e-3, atol=1e-8)
    lower = np.quantile(expected.numpy(), 0.25, 0, method="weibull")
    np.testing.assert_allclose(average.lower, lower, rtol=1e-4)


# --- what the cell expresses: rates


class Known(nn.Module):
    """x ~ Poisson, NB(mu, theta), or that with dropouts: mu = mean_g (1 + batch) exp(sd z), z the prior's."""

    def __init__(self, mean, theta=None, gate=None, sd=0.0, l=None):
        super().__init__()
        self.mean, self.theta, self.gate = (
            None if t is None else torch.as_tensor(t, dtype=torch.float32) for t in (mean, theta, gate)
        )
        self.sd, self.l = sd, l

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            mu = self.mean * (1 + cells.batch[:, None]) * torch.exp(self.sd * z)
            if self.l is not None:
                pyro.deterministic("l", torch.full((len(cells), 1), self.l), event_dim=1)
            x = Poisson(mu) if self.theta is None else NegativeBinomial(mu, self.theta)
            x = x if self.gate is None else ZeroInflated(x, self.gate)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))


def cells_of(x, batches=None):
    """An AnnData of these counts."""
    n, g = x.shape
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    if batches is not None:
        obs["batch"] = batches
    var = pd.DataFrame({"place": range(g)}, index=[f"g{i}" for i in range(g)])
    return anndata.AnnData(np.asarray(x, np.float32), obs=obs, var=var)


def known(x, *args, batches=None, **kwargs):
    """A fit of Known, and the cells as an AnnData."""
    adata = cells_of(x, batches)
    data = from_anndata(adata, batch_key=None if batches is None else "batch")
    return pairs.untrained(Known(*args, **kwargs), data), adata


X = np.array([[0, 1, 3, 0, 40], [2, 0, 0, 7, 0], [5, 0, 1, 0, 1], [0, 0, 0, 12, 30]])
MEAN = np.array([0.3, 0.8, 2.0, 5.0, 20.0])
THETA = np.array([0.2, 1.0, 3.0, 0.7, 10.0])
GATE = np.array([-2.0, 0.0, 1.0, -1.0, 0.5])
PRIOR = stats.gamma(np.tile(THETA, (4, 1)), scale=MEAN / THETA)
POSTERIOR = stats.gamma(THETA + X, scale=1 / (THETA / MEAN + 1))


def dropouts(x=X, mean=MEAN):
    """P(dropout given x) by Bayes' rule."""
    pi, p0 = 1 / (1 + np.exp(-GATE)), stats.nbinom.pmf(0, THETA, THETA / (THETA + mean))
    return np.where(x == 0, pi / (pi + (1 - pi) * p0), 0)


def drawn_rates(fit, adata, m, **options):
    return np.stack([part.X for part in multiple_imputation(fit, adata, m, **options)])


def distance(values, cdf):
    """Largest distance of the distribution of draws, along the first axis, from another."""
    n = len(values)
    at = cdf(np.sort(values, 0))
    place = np.arange(n).reshape(-1, *[1] * (values.ndim - 1))
    return np.maximum(at - place / n, (place + 1) / n - at).max(0)


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
    np.testing.assert_allclose(some.mean, whole.mean[:, [3, 0]], rtol=1e-6)
    assert list(some.gene_names) == ["g3", "g0"]
    turned = impute(fit, adata[:, ::-1].copy(), "rate", n_draws=5)
    np.testing.assert_allclose(turned.mean, whole.mean[:, ::-1], rtol=1e-6)
    monkeypatch.setattr(asking, "ELEMENTS", 1)  # a cell at a time
    pieces = impute(fit, adata, "rate", n_draws=5)
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-6)


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


# --- log1p


@pytest.mark.parametrize("library", [None, 100.0])
def test_log1p_is_the_mean_of_the_log_not_the_log_of_the_mean(library):
    fit, adata = known(X, MEAN, THETA)
    n, scale = 4000, (library or 1e4) / X.sum(1)
    imputed = impute(fit, adata, "log1p", library=library, n_draws=n)
    shape, rate = THETA + X, THETA / MEAN + 1
    expected, sd = np.empty(X.shape), np.empty(X.shape)
    for i, g in np.ndindex(X.shape):
        w = stats.gamma(shape[i, g], scale=1 / rate[g]).ppf((np.arange(200_000) + 0.5) / 200_000)
        logs = np.log1p(w * scale[i])
        expected[i, g], sd[i, g] = logs.mean(), logs.std()
    assert np.max(np.abs(imputed.mean - expected) / (sd / np.sqrt(n))) < 5
    np.testing.assert_allclose(imputed.sd, sd, rtol=0.1)
    assert (np.log1p(POSTERIOR.mean() * scale[:, None]) - expected).max() > 0.3
    assert f"{library or 1e4:g}" in imputed.unit


def nb(x, mean, shape, rate):
    """P(x' = k) of x' ~ Poisson(mean u), u ~ Gamma(shape, rate)."""
    return stats.nbinom.pmf(x, shape, rate / (rate + mean))


def enumerated(f, pmf, n=3000):
    """Mean and sd of f(x') by summing over x'."""
    k = np.arange(n).reshape(-1, 1, 1)
    p, values = pmf(k), f(k)
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-9)
    mean = (p * values).sum(0)
    return mean, np.sqrt((p * values**2).sum(0) - mean**2)


@pytest.mark.parametrize("gate", [None, GATE], ids=["nb", "zinb"])
@pytest.mark.parametrize("each", [False, True], ids=["a depth", "one of each cell"])
def test_log1p_of_a_new_measurement_is_that_of_its_counts(gate, each):
    fit, adata = known(X, MEAN, THETA, gate)
    library, depth = (np.array([100.0, 50.0, 20.0, 1e4]), np.array([10.0, 3.0, 40.0, 7.0]))
    if not each:
        library, depth = 1e4, 20.0
    n, size = 4000, np.broadcast_to(depth, 4)[:, None]
    imputed = impute(fit, adata, "log1p", library=library, depth=depth, n_draws=n)
    mean, d = MEAN * size / X.sum(1, keepdims=True), 0 if gate is None else dropouts()
    pmf = lambda k: d * nb(k, mean, THETA, THETA) + (1 - d) * nb(k, mean, THETA + X, THETA + MEAN)
    scale = np.broadcast_to(library, 4)[:, None] / size
    expected, sd = enumerated(lambda k: np.log1p(scale * k), pmf)
    assert np.max(np.abs(imputed.mean - expected) / (sd / np.sqrt(n))) < 5
    np.testing.assert_allclose(imputed.sd, sd, rtol=0.05)
    for name, at in (("lower", 0.05), ("upper", 0.95)):
        ends = np.expm1(getattr(imputed, name).astype(np.float64)) / scale
        np.testing.assert_allclose(ends, np.rint(ends), atol=1e-2)
        cdf = sum(pmf(k) * (k <= ends + 0.5) for k in range(3000))
        below = cdf - pmf(np.rint(ends))
        assert (below < at + 0.02).all()
        assert (cdf > at - 0.02).all()
    assert "new counts at depth" in imputed.unit
    infinitely_deep = impute(fit, adata, "log1p", library=library, depth=1e7, n_draws=n)
    rates = impute(fit, adata, "log1p", library=library, n_draws=n)
    np.testing.assert_allclose(infinitely_deep.mean, rates.mean, rtol=0.1, atol=0.05)


def test_log1p_of_small_new_counts_is_not_drawn():
    fit, adata = known(X, MEAN, THETA, GATE)
    depth = X.sum(1) / 500
    imputed = impute(fit, adata, "log1p", depth=depth, n_draws=2)
    d, mean = dropouts(), MEAN / 500
    pmf = lambda k: d * nb(k, mean, THETA, THETA) + (1 - d) * nb(k, mean, THETA + X, THETA + MEAN)
    expected, sd = enumerated(lambda k: np.log1p(1e4 / depth[:, None] * k), pmf)
    np.testing.assert_allclose(imputed.mean, expected, rtol=1e-4)
    np.testing.assert_allclose(imputed.sd, sd, rtol=1e-3)


# --- new counts


@pytest.mark.parametrize("kind", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("library", [None, np.array([46.0, 90.0, 3.0, 500.0])], ids=["own", "of each"])
def test_new_counts_of_a_cell_are_negative_binomial(kind, library):
    fit, adata = known(
        X, MEAN, None if kind == "poisson" else THETA, GATE if kind == "zinb" else None, batches=list("abab")
    )
    mu = MEAN * np.array([1, 2, 1, 2])[:, None]
    size = X.sum(1) if library is None else library
    mean, d = mu * (size / X.sum(1))[:, None], dropouts(mean=mu) if kind == "zinb" else 0
    pmf = lambda k: d * nb(k, mean, THETA, THETA) + (1 - d) * nb(k, mean, THETA + X, THETA + mu)
    if kind == "poisson":
        pmf = lambda k: stats.poisson.pmf(k, mean)
    expected, sd = enumerated(lambda k: k, pmf, 5000)
    n = 4000
    imputed = impute(fit, adata, "predictive", library=library, n_draws=n)
    np.testing.assert_allclose(imputed.mean, expected, rtol=1e-5)  # exact, as no state is drawn
    np.testing.assert_allclose(imputed.sd, sd, rtol=1e-4)
    for name, at in (("lower", 0.05), ("upper", 0.95)):
        end = getattr(imputed, name)
        np.testing.assert_array_equal(end, np.rint(end))
        cdf = sum(pmf(k) * (k <= end) for k in range(2000))
        assert (cdf - pmf(end) < at + 0.02).all()
        assert (cdf > at - 0.02).all()
    assert "new counts" in imputed.unit
    assert ("given" if library is not None else "of the cell") in imputed.unit


def test_intervals_of_new_counts_cover_them():
    """Of x' ~ Poisson(w / 2), w as in x ~ Poisson(w): at least 90%, and no more where counts are large."""
    rng = np.random.default_rng(5)
    mean, theta = np.geomspace(0.2, 600, 40), np.tile([0.3, 1.0, 4.0, 20.0], 10)
    w = rng.gamma(theta, mean / theta, (400, 40))
    x = np.maximum(rng.poisson(w), [1] + [0] * 39)
    fit, adata = known(x, mean, theta)
    imputed = impute(fit, adata, "predictive", library=x.sum(1) / 2)
    new = rng.poisson(w / 2)
    inside = (imputed.lower <= new) & (new <= imputed.upper)
    by_mean = inside.reshape(400, 4, 10).mean((0, 2))
    assert (by_mean > 0.89).all()
    assert by_mean[0] > 0.95
    assert by_mean[-1] < 0.925
    z = ((new - imputed.mean) / imputed.sd)[:, theta > 1]
    np.testing.assert_allclose((z**2).mean(), 1, atol=0.06)


def test_the_sd_is_in_closed_form():
    """Of few draws that of all: given the cell's state, nothing is left to chance."""
    fit, adata = known(X, MEAN, THETA, GATE)
    d = dropouts()
    mean = d * MEAN + (1 - d) * POSTERIOR.mean()
    second = d * (PRIOR.var() + MEAN**2) + (1 - d) * (POSTERIOR.var() + POSTERIOR.mean() ** 2)
    variance = second - mean**2
    np.testing.assert_allclose(impute(fit, adata, "rate", n_draws=2).sd, np.sqrt(variance), rtol=1e-4)
    new = impute(fit, adata, "predictive", n_draws=2).sd
    np.testing.assert_allclose(new, np.sqrt(variance + mean), rtol=1e-4)
    fit, adata = known(X, MEAN, THETA, GATE, sd=0.4)
    w = drawn_rates(fit, adata, 20_000)
    np.testing.assert_allclose(impute(fit, adata, "rate", n_draws=5000).sd, w.std(0), rtol=0.1)


@pytest.mark.parametrize("what", ["count", "rate", "log1p", "predictive"])
def test_a_library_size_of_each_cell_is_that_of_its_row(what, monkeypatch, vae_fit, few):
    sizes, n = np.linspace(50, 5000, 12), 300
    imputed = impute(vae_fit, few, what, library=sizes, n_draws=n)
    for i in (0, 7):
        alone = impute(vae_fit, few, what, library=sizes[i], n_draws=n).mean[i]
        np.testing.assert_allclose(imputed.mean[i], alone, rtol=1e-5)
    named = pd.Series(sizes, few.cell_names)[::-1]
    np.testing.assert_array_equal(impute(vae_fit, few, what, library=named, n_draws=n).mean, imputed.mean)
    with pytest.raises(ValueError, match="library is a Series whose names are not those of the cells"):
        impute(vae_fit, few, what, library=named[1:])
    monkeypatch.setattr(asking, "ELEMENTS", 1)  # a cell at a time
    pieces = impute(vae_fit, few, what, library=sizes, n_draws=n)
    assert np.max(np.abs(pieces.mean - imputed.mean) / (imputed.sd * np.sqrt(2 / n))) < 6


# --- repaired


def test_a_zero_is_repaired_by_its_probability_of_dropout():
    fit, adata = known(X, MEAN, THETA, GATE)
    imputed = impute(fit, adata, "repaired", n_draws=4000)
    p = pyrosc.dropout_probability(fit, adata)
    np.testing.assert_allclose(p, dropouts(), rtol=1e-5)
    np.testing.assert_allclose(imputed.mean, np.where(X == 0, p * MEAN, X), rtol=1e-5)
    # The count before dropout: 0, or NB where it was one.
    second = p * (MEAN + MEAN**2 / THETA + MEAN**2)
    sd = np.sqrt(np.where(X == 0, second - (p * MEAN) ** 2, 0))
    np.testing.assert_allclose(imputed.sd[:, 1:], sd[:, 1:], rtol=0.15)  # (that of g0 hangs on few draws)
    for array in (imputed.lower, imputed.upper):
        np.testing.assert_array_equal(array[X > 0], X[X > 0])
    assert (imputed.lower[X == 0] == 0).any()
    assert (imputed.upper[X == 0] >= 1).any()


def test_a_threshold_fills_zeros_that_are_dropouts_with_the_mean():
    fit, adata = known(X, MEAN, THETA, GATE, sd=0.1)
    p, count = pyrosc.dropout_probability(fit, adata, 400), MEAN * np.exp(0.005)
    for threshold in (0.0, 0.6, 1.0):
        mean = impute(fit, adata, "repaired", threshold=threshold, n_draws=400).mean
        expected = np.where(X > 0, X, np.where(p > threshold, count, 0))
        np.testing.assert_allclose(mean, expected, rtol=0.03)
    assert 0 < ((p > 0.6) & (X == 0)).sum() < (X == 0).sum()


# --- what an Imputation can do


def test_a_layer_has_the_genes_and_cells_of_the_anndata(vae_fit, data, adata, tmp_path):
    imputed = impute(vae_fit, data, n_draws=2)
    few = adata[::-3, 5:30].copy()
    imputed.to_layer(few, "imputed")
    np.testing.assert_array_equal(few.layers["imputed"], imputed.mean[::-3, 5:30])
    assert "share" in few.uns["pyrosc_imputed"]["imputed"]
    impute(vae_fit, data, "rate", n_draws=2).to_layer(few, "imputed")  # replaced
    assert "rates" in few.uns["pyrosc_imputed"]["imputed"]
    imputed.to_layer(few, "other")
    few.write_h5ad(tmp_path / "few.h5ad")
    again = anndata.read_h5ad(tmp_path / "few.h5ad")
    assert set(again.uns["pyrosc_imputed"]) == {"imputed", "other"}
    with pytest.raises(ValueError, match=r"imputed has imputed values .*rates.*fit and test the raw counts"):
        from_anndata(again, layer="imputed")
    assert from_anndata(again).n_genes == 25


def test_a_layer_is_refused(vae_fit, data, adata):
    imputed = impute(vae_fit, data, n_draws=1, genes=["gene_0", "gene_1"])
    with pytest.raises(ValueError, match=r"38 of adata's 40 genes were not imputed \(gene_2.*select others"):
        imputed.to_layer(adata, "imputed")
    imputed = impute(vae_fit, data[np.arange(50)], n_draws=1)
    with pytest.raises(ValueError, match="150 of adata's 200 cells were not imputed"):
        imputed.to_layer(adata, "imputed")
    few = adata[:50].copy()
    few.layers["counts"] = few.X.copy()
    for name in ("counts", "X"):
        with pytest.raises(ValueError, match=f"'{name}', which is not imputed: choose another name"):
            imputed.to_layer(few, name)
    assert "pyrosc_imputed" not in few.uns
    few.obs_names = ["same"] * 50
    with pytest.raises(ValueError, match="names of cells are not unique"):
        imputed.to_layer(few, "imputed")


def test_information_is_one_less_the_share_of_the_variance_that_is_left():
    rng = np.random.default_rng(1)
    mean, theta = np.array([0.05, 5.0, 500.0]), np.array([1.0, 1.0, 1.0])
    x = np.maximum(rng.poisson(rng.gamma(theta, mean / theta, (2000, 3))), [0, 0, 1])
    fit, adata = known(x, mean, theta)
    imputed = impute(fit, adata, "rate", n_draws=400)
    right = stats.gamma(theta + x, scale=1 / (theta / mean + 1))
    total = right.var().mean(0) + right.mean().var(0)
    np.testing.assert_allclose(total, mean**2 / theta, rtol=0.2)  # the prior's variance
    information = imputed.information
    total = (imputed.sd**2).mean(0) + imputed.mean.var(0)
    np.testing.assert_allclose(information, (1 - imputed.sd**2 / total).clip(0), atol=1e-4)
    assert np.abs(information - (1 - right.var() / total).clip(0)).mean() < 0.05
    # On average that of a gamma with a Poisson count: mu / (mu + theta).
    np.testing.assert_allclose(1 - right.var().mean(0) / total, mean / (mean + theta), atol=0.05)
    assert (information >= 0).all()
    assert (information <= 1).all()
    fit, adata = known(x, mean)
    assert (impute(fit, adata, "rate", n_draws=1).information == 0).all()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rate", "rates of the cell's own counts, in counts at library size of the cell"),
        ("log1p", "log1p of rates"),
        ("repaired", "counts before dropout: as observed, but zeros are P(dropout) x mean"),
    ],
)
def test_its_repr_says_what_it_is(what, words):
    fit, adata = known(X, MEAN, THETA, GATE)
    assert words in repr(impute(fit, adata, what, n_draws=2))


# --- its numbers, in memory and on disk

FIELDS = ("mean", "sd", "lower", "upper")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_disk_are_the_numbers_of_memory(vae_fit, data, adata, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(asking, "ELEMENTS", 3 * 40 * 30)  # 30 cells at a time, and the last 20
    monkeypatch.setattr(imputed, "_CHUNK", 40 * 50)  # 60 are written at a time
    asked = {"what": "count", "n_draws": 3, "dtype": dtype}
    memory = impute(vae_fit, data, **asked)
    disk = impute(vae_fit, data, **asked, store=tmp_path / "imputed")
    for name in FIELDS:
        array = getattr(disk, name)
        assert isinstance(array, zarr.Array)
        assert array.chunks == (60, 40)
        assert array.dtype == getattr(memory, name).dtype == dtype
        np.testing.assert_array_equal(array[:], getattr(memory, name))
        again = zarr.open_array(str(tmp_path / "imputed" / name), mode="r")
        np.testing.assert_array_equal(again[:], getattr(memory, name))
    assert repr(disk) == repr(memory)
    np.testing.assert_array_equal(disk.information, memory.information)
    few = adata[::-3, 5:30].copy()
    disk.to_layer(few, "imputed")
    np.testing.assert_array_equal(few.layers["imputed"], memory.mean[::-3, 5:30])


def test_nothing_is_overwritten_and_nothing_half_written_stays(vae_fit, few, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").touch()
    with pytest.raises(FileExistsError, match="there is there already: name another folder to store to, or"):
        impute(vae_fit, few, store=str(there))
    assert [path.name for path in there.iterdir()] == ["kept"]
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to make new in: make it first"):
        impute(vae_fit, few, store=tmp_path / "none" / "new")
    monkeypatch.setattr(asking, "ELEMENTS", 1)
    monkeypatch.setattr(imputed, "_CHUNK", 1)
    place, seen = tmp_path / "new", []

    def broken(drawn, interval):
        seen.append((place / "upper").exists())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return summaries.of_draws(drawn, interval)

    monkeypatch.setattr(imputation, "of_draws", broken)
    with pytest.raises(KeyboardInterrupt):
        impute(vae_fit, few, store=place)
    assert seen == [False] + [True] * 4
    assert not place.exists()


def test_half_precision_keeps_three_digits_and_says_what_it_cannot_hold():
    fit, adata = known(X, MEAN, THETA, GATE)
    for what in ("rate", "predictive", "log1p", "repaired"):
        half, whole = (impute(fit, adata, what, n_draws=9, dtype=d) for d in ("float16", "float32"))
        for name in FIELDS:
            assert getattr(half, name).dtype == np.float16
            # (Ends are rounded outwards, by up to a digit.)
            rtol = 5e-4 if name in ("mean", "sd") else 1e-3
            np.testing.assert_allclose(getattr(half, name), getattr(whole, name), rtol=rtol, atol=1e-6)
        assert (half.lower <= whole.lower).all()
        assert (half.upper >= whole.upper).all()
    with pytest.raises(ValueError, match=r'float16 has no room for .*: ask for dtype="float32", or for'):
        impute(fit, adata, "rate", library=1e7, dtype="float16")
    with pytest.raises(ValueError, match=r"shares are too small for float16: .*library=1e4"):
        impute(fit, adata, dtype="float16")
    with pytest.raises(ValueError, match=r'dtype must be "float32" or "float16", not \'float64\''):
        impute(fit, adata, "rate", dtype="float64")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_refused_by_the_cell(bad):
    mean = np.array(MEAN, np.float32)
    mean[2] = bad
    fit, adata = known(X, mean, THETA)
    with pytest.raises(ValueError, match=f"answer for cell {adata.obs_names[0]} is not finite"):
        impute(fit, adata, "rate", n_draws=2)


@pytest.mark.parametrize("slow", [True, False])
def test_a_progress_bar_is_of_what_takes_long(slow, few, vae_fit, capsys, monkeypatch):
    monkeypatch.setattr(asking, "ELEMENTS", 1)
    monkeypatch.setattr(imputed, "tqdm", lambda **kw: tqdm(**kw | {"delay": 0 if slow else kw["delay"]}))
    impute(vae_fit, few, n_draws=2)
    assert ("12/12" in capsys.readouterr().err) == slow
    impute(vae_fit, few, n_draws=2, progress=False)
    assert capsys.readouterr().err == ""


# --- multiple imputation


def test_multiple_imputations_are_draws_of_rates():
    fit, adata = known(X, MEAN, THETA, batches=["a", "b", "a", "b"])
    adata.layers["raw"] = adata.X.copy()
    drawn = multiple_imputation(fit, adata, 3, seed=2)
    assert [part.shape for part in drawn] == [(4, 5)] * 3
    assert len({part.X.tobytes() for part in drawn}) == 3
    for part in drawn:
        assert part.X.dtype == np.float32
        pd.testing.assert_frame_equal(part.obs, adata.obs)
        pd.testing.assert_frame_equal(part.var, adata.var)
        with pytest.raises(ValueError, match=r"X has imputed values .*posterior draw"):
            from_anndata(part)
        with pytest.raises(ValueError, match="fit and test the raw counts"):
            impute(fit, part)
    assert "draw 3 of 3" in drawn[2].uns["pyrosc_imputed"]["X"]
    again, other = (multiple_imputation(fit, adata, 3, seed=s) for s in (2, 3))
    np.testing.assert_array_equal(again[1].X, drawn[1].X)
    assert not np.array_equal(other[1].X, drawn[1].X)
    drawn[0].obs["batch"] = "changed"
    assert adata.obs["batch"].iloc[0] == "a"


def test_pooled_by_rubins_rules_the_mean_is_that_of_rates():
    fit, adata = known(X, MEAN, THETA, sd=0.2)
    w, imputed = drawn_rates(fit, adata, 500), impute(fit, adata, "rate", n_draws=500)
    assert np.max(np.abs(w.mean(0) - imputed.mean) / (imputed.sd * np.sqrt(1.5 / 500))) < 5
    for library in (100.0, np.array([100.0, 3.0, 20.0, 1e4])):
        at = drawn_rates(fit, adata, 500, library=library)
        scale = (np.broadcast_to(library, 4) / X.sum(1))[:, None]
        np.testing.assert_allclose(at, w * scale, rtol=1e-4)


# --- what is refused


def test_wrong_questions_about_rates_are_told_why(vae_fit, data, adata):
    fit, cells = known(X, MEAN, THETA)
    for what in ("share", "repaired"):
        with pytest.raises(ValueError, match=rf"library.*count.*rate.*log1p.*{what}"):
            impute(fit, cells, what, library=5.0)
    each = r"library is a number of counts above 0, or one for each of the 4 cells, not "
    for library, got in ((-1.0, r"-1\.0"), ([1.0, 2.0], r"\(2,\)"), ([1, 2, 3, 0], r"\(4,\), the least 0")):
        with pytest.raises(ValueError, match=each + got):
            impute(fit, cells, "rate", library=library)
    with pytest.raises(ValueError, match="depth is a number of counts above 0"):
        impute(fit, cells, "log1p", depth=0)
    with pytest.raises(ValueError, match="depth goes with what=\"log1p\", not with 'predictive'"):
        impute(fit, cells, "predictive", depth=10)
    with pytest.raises(ValueError, match=r'what must be .*"predictive".*not \'counts\''):
        impute(fit, cells, "counts")
    with pytest.raises(ValueError, match=r'"repaired" counts are those of their own batch.*rate'):
        impute(fit, cells, "repaired", batch="all")
    for what, threshold in (("rate", 0.5), ("repaired", 1.5)):
        with pytest.raises(ValueError, match=r"threshold, a probability.*repaired"):
            impute(fit, cells, what, threshold=threshold)
    with pytest.raises(TypeError, match=r'NegativeBinomial has no dropouts.*likelihood="zinb"'):
        impute(fit, cells, "repaired")
    with pytest.raises(KeyError, match="no site 'counts'"):
        impute(fit, cells, "rate", site="counts")
    with pytest.raises(TypeError, match="AnnData"):
        multiple_imputation(fit, from_anndata(cells), 2)
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        multiple_imputation(fit, cells, 0)
    with pytest.raises(ValueError, match="library"):
        multiple_imputation(fit, cells, 2, library=0.0)

    class Normal(Known):
        def model(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                pyro.sample("x", dist.Normal(cells.x, 1.0).to_event(1), obs=cells.x)

        def guide(self, cells):
            pass

    normal = pairs.untrained(Normal(MEAN), from_anndata(cells))
    for what in ("rate", "log1p"):
        with pytest.raises(TypeError, match=r'Normal: fit a model with likelihood="nb".*share'):
            impute(normal, cells, what)


# --- the summary


@pytest.mark.parametrize("n_draws", [1, 2, 3, 25, 200])
def test_the_moments_and_quantiles_over_draws_are_numpys(n_draws):
    values = torch.rand(n_draws, 7, 11, generator=torch.Generator().manual_seed(n_draws))
    torch.testing.assert_close(summaries.variance(values, values.mean(0)), values.var(0, correction=0))
    for share in (0.0005, 0.05, 0.25, 0.45):
        low, high = summaries._low_quantile(values, share), -summaries._low_quantile(-values, share)
        for ours, at in ((low, share), (high, 1 - share)):
            theirs = np.quantile(values.numpy(), at, 0, method="weibull")
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_an_interval_of_counts_reaches_out_to_whole_ones():
    low, high = summaries._whole((torch.tensor([0.55, 2.0]), torch.tensor([3.2, 4.0])))
    assert low.tolist() == [0, 2]
    assert high.tolist() == [4, 4]
