"""Clusters, labels and sparse codes."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyrosc
from pyrosc import GMVAE, SCANVI, VSC, fit_svi

QUICK = {"epochs": 2, "minibatch_size": 64, "progress": False}


@pytest.fixture(scope="module")
def gmvae_fit(data):
    return fit_svi(GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)), data, **QUICK)


def test_clusters_are_mean_responsibilities(gmvae_fit, data):
    answer = pyrosc.clusters(gmvae_fit, data, n_draws=7)
    drawn = torch.cat([d["p_y"] for d in pyrosc.draws(gmvae_fit, data, "p_y", n_draws=7)], 1)
    np.testing.assert_allclose(answer.probability, drawn.mean(0), atol=1e-6)
    np.testing.assert_allclose(answer.probability.sum(1), 1)
    p = answer.probability.to_numpy()
    np.testing.assert_allclose(answer.entropy, -(p * np.log(p)).sum(1), atol=1e-9)
    assert list(answer.probability.index) == list(data.cell_names)
    assert list(answer.most_probable.cat.categories) == ["0", "1", "2"]
    assert (answer.most_probable.cat.codes == p.argmax(1)).all()
    assert "of 3 are the most probable" in repr(answer)


def test_a_model_without_clusters_says_so(vae_fit, data):
    with pytest.raises(KeyError, match=r"no site 'p_y'.*pyrosc.GMVAE has clusters"):
        pyrosc.clusters(vae_fit, data)


def test_clusters_are_no_labels(data):
    fit = fit_svi(GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)), data, **QUICK)
    with pytest.raises(ValueError, match=r"ask with pyrosc\.clusters"):
        pyrosc.predict(fit, data)


def test_predict_does_not_look_at_labels(rich):
    fit = fit_svi(SCANVI.for_data(rich, n_latent=2, hidden=(8,)), rich, **QUICK)
    other = type(rich)(**{**vars(rich), "labels": (rich.labels + 1) % len(rich.schema.labels)})
    a, b = pyrosc.predict(fit, rich), pyrosc.predict(fit, other)
    pd.testing.assert_frame_equal(a.probability, b.probability)
    assert list(a.probability.columns) == list(rich.schema.labels)


def test_inclusion_is_that_of_the_draws(data):
    fit = fit_svi(VSC.for_data(data, n_latent=3, hidden=(8,), branch=4), data, **QUICK)
    gamma = pyrosc.inclusion(fit, data)
    z = pyrosc.latent(fit, data, n_draws=2000)
    assert gamma.shape == (data.n_cells, 3)
    np.testing.assert_allclose((z != 0).mean(0), gamma, atol=0.06)
    np.testing.assert_allclose(z.mean(0), pyrosc.latent(fit, data), atol=0.2)


def test_inclusion_needs_a_sparse_code(vae_fit, data):
    with pytest.raises(TypeError, match="Normal, whose draws are never 0: fit a VSC"):
        pyrosc.inclusion(vae_fit, data)
