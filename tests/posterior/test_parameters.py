"""What a fit says of genes."""

import numpy as np
import pytest

import pyrosc
from pyrosc import LDVAE, fit_svi

QUICK = {"epochs": 2, "minibatch_size": 64, "progress": False}


def test_loadings_give_the_log_shares(data):
    fit = fit_svi(LDVAE.for_data(data, n_latent=2, hidden=(8,)), data, **QUICK)
    table = pyrosc.loadings(fit)
    assert list(table.index) == list(data.schema.genes)
    (drawn,) = pyrosc.draws(fit, data[:9], "z", "rho", n_draws=1)
    log = drawn["rho"][0].log().double().numpy()
    offset = log - drawn["z"][0].double().numpy() @ table.to_numpy().T
    offset -= offset.mean(1, keepdims=True)
    same_batch = data.batch[:9] == data.batch[0]
    np.testing.assert_allclose(offset[same_batch] - offset[0], 0, atol=1e-4)


@pytest.mark.parametrize("ask", [pyrosc.loadings, pyrosc.zero_inflation])
def test_a_program_without_the_property_says_so(ask, vae_fit):
    with pytest.raises(TypeError, match="VAE has no"):
        ask(vae_fit)
