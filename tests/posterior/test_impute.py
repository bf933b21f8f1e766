"""What impute says, against known answers."""

import numpy as np
import pairs
import pandas as pd
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
    drawn_rates,
    dropouts,
    known,
)
from scipy import stats

import pyrosc
from pyrosc import from_anndata, multiple_imputation
from pyrosc.posterior import sampling
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute


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
    monkeypatch.setattr(sampling, "_ELEMENTS", 1)  # a cell at a time
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
