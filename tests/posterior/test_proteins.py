"""What is asked about proteins of a fit that knows none. (TOTALVI's tests ask about proteins.)"""

import pytest

import pyrosc

QUICK = {"epochs": 2, "minibatch_size": 64, "progress": False}


@pytest.mark.parametrize("ask", [pyrosc.foreground, pyrosc.impute_proteins])
def test_a_fit_without_proteins_says_so(ask, vae_fit, data):
    with pytest.raises(KeyError, match="this VAE knows no proteins: fit a TOTALVI"):
        ask(vae_fit, data)
