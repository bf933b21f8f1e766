"""The latent space, against known answers."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.predictive import posterior_predictive


@pytest.mark.parametrize("site", ["z", "l"])
def test_the_latent_mean_is_the_mean_of_many_draws(rich_fit, rich, site):
    few = rich[np.arange(10)]
    mean = latent(rich_fit, few, site=site)
    many = latent(rich_fit, few, 3000, site=site)
    assert mean.dtype == many.dtype == np.float32
    assert many.shape == (3000, *mean.shape)
    assert np.max(np.abs(many.mean(0) - mean) / (many.std(0) / np.sqrt(3000))) < 5


def test_the_latent_mean_is_exact_where_the_guide_says_so(exact, few):
    np.testing.assert_allclose(latent(exact, few)[:, 0], (3 + few.library) / 1.01, rtol=1e-5)


def test_the_latent_mean_of_a_site_that_hangs_on_another(data, few):
    class Chain(pairs.Conjugate):
        def guide(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                u = pyro.sample("u", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
                pyro.sample("z", dist.Gamma(3 + cells.library, 1.01 * torch.exp(u * 0.01)).to_event(1))

    mean = latent(pairs.untrained(Chain(data.share), data), few)[:, 0]
    np.testing.assert_allclose(mean, (3 + few.library) / 1.01, rtol=0.02)


def test_an_anndata_is_asked_like_counts(vae_fit, data, adata):
    a, b = impute(vae_fit, data, n_draws=2).mean, impute(vae_fit, adata, n_draws=2).mean
    np.testing.assert_array_equal(a, b)
    shuffled = adata[:, ::-1].copy()
    turned = impute(vae_fit, shuffled, n_draws=2)
    assert turned.gene_names.tolist() == shuffled.var_names.tolist()
    np.testing.assert_array_equal(turned.mean, a[:, ::-1])  # a layer of the AnnData that was asked about
    new, layer = posterior_predictive(vae_fit, data)[0], posterior_predictive(vae_fit, shuffled)[0]
    np.testing.assert_array_equal(layer.toarray(), new.toarray()[:, ::-1])
    assert np.array_equal(latent(vae_fit, shuffled), latent(vae_fit, data))
