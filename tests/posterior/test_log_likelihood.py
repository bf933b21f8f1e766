import numpy as np
import pytest
import torch

import pyrosc
from pyrosc import GMVAE, SCANVI, VAE, fit_svi
from pyrosc.inference.contract import elbo_of
from pyrosc.inference.elbo import weighted_loss

QUICK = {"epochs": 2, "minibatch_size": 64, "progress": False}


def loss_of(fit, data, n):
    """The training loss of all cells, a mean over draws."""
    cells = data.on(fit.device).cells(torch.arange(data.n_cells))
    with fit.asking(0):
        elbo = elbo_of(fit.program, None)
        return np.mean([float(weighted_loss(elbo, fit.model, fit.guide, cells)) for _ in range(n)])


@pytest.mark.parametrize(
    "model",
    [
        lambda data: VAE.for_data(data, n_latent=2, hidden=(8,), library="latent"),
        lambda data: VAE.for_data(data, n_latent=2, hidden=(8,), prior="mixture", n_components=3),
        lambda data: GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)),
        lambda data: SCANVI.for_data(data, classification=0.0, n_latent=2, hidden=(8,)),
    ],
)
def test_the_parts_are_those_of_the_loss(model, rich):
    data = type(rich)(**{**vars(rich), "labels": np.full(rich.n_cells, -1)})
    fit = fit_svi(model(data), data, **QUICK)
    table = pyrosc.elbo(fit, data, n_draws=100)
    kl = table.filter(like="kl_").sum(axis=1)
    np.testing.assert_allclose(table.elbo, table.reconstruction - kl, rtol=1e-9)
    assert (table.filter(like="kl_").mean() > -1e-3).all()
    assert -table.elbo.mean() == pytest.approx(loss_of(fit, data, 20), abs=0.3)
    assert list(table.index) == list(data.cell_names)


def test_a_mixtures_kl_is_split_by_the_chain_rule(data):
    """KL of z and y together is that of the mixture, and KL_y that of responsibilities against pi."""
    fit = fit_svi(GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)), data, **QUICK)
    table = pyrosc.elbo(fit, data, n_draws=40)
    (drawn,) = pyrosc.draws(fit, data, "p_y", n_draws=40)
    p = drawn["p_y"].double().numpy()
    pi = torch.softmax(fit.program.prior.logits, -1).detach().double().numpy()
    assert np.ptp(pi) > 1e-4  # learned
    by_hand = (p * np.log(p / pi)).sum(-1).mean(0)
    np.testing.assert_allclose(table.kl_y, by_hand, atol=1e-4)


def test_an_empty_elbo_is_refused(vae_fit, data):
    with pytest.raises(ValueError, match="n_draws must be at least 1"):
        pyrosc.elbo(vae_fit, data, n_draws=0)
