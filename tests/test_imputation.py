"""Imputation, against known answers."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyrosc import imputation
from pyrosc.asking import draws
from pyrosc.imputation import impute


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
    np.testing.assert_allclose(imputed.lower, np.quantile(rho, 0.1, 0), rtol=1e-4)
    np.testing.assert_allclose(imputed.upper, np.quantile(rho, 0.9, 0), rtol=1e-4)


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
    for n in (12, 40):
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
    np.testing.assert_allclose(average.lower, expected.quantile(0.25, 0), rtol=1e-4)


# --- the summary


@pytest.mark.parametrize("n_draws", [1, 2, 3, 25, 200])
def test_the_moments_and_quantiles_over_draws_are_torchs(n_draws):
    values = torch.rand(n_draws, 7, 11, generator=torch.Generator().manual_seed(n_draws))
    torch.testing.assert_close(imputation._sd(values, values.mean(0)), values.std(0, correction=0))
    for share in (0.0005, 0.05, 0.25, 0.45):
        low, high = imputation._low_quantile(values, share), -imputation._low_quantile(-values, share)
        torch.testing.assert_close(low, values.quantile(share, 0))
        torch.testing.assert_close(high, values.quantile(1 - share, 0))
