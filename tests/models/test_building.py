"""What all recipes share."""

import inspect

import pytest
import torch
from anndata import AnnData

import pyrosc
from pyrosc import GMVAE, TOTALVI, VAE, Counts
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require

MODELS = [getattr(pyrosc, name) for name in pyrosc.models.__all__]
REQUIRED = {GMVAE: {"n_components": 3}}


def test_a_model_keeps_the_numbers_that_it_was_made_of_and_the_names(data, adata):
    for given in (data, adata):
        vae = VAE.for_data(given, n_latent=3, hidden=(4,))
        assert vae.recipe.keys() == inspect.signature(VAE.for_data).parameters.keys() - {"data"}
        assert (vae.recipe["n_latent"], vae.recipe["hidden"]) == (3, (4,))
        assert (vae.recipe["likelihood"], vae.recipe["seed"]) == ("nb", 0)
    assert VAE.for_data(data).schema is data.schema
    assert GMVAE.for_data(data, n_components=3).recipe["n_components"] == 3


@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_makes_the_same_weights_again(model, rich, untouched):
    small = {"hidden": (4,), "seed": 3} | REQUIRED.get(model, {})
    with untouched():
        made = model.for_data(rich, **small)
    again, other = model.for_data(rich, **made.recipe), model.for_data(rich, **small | {"seed": 4})
    assert made.recipe == again.recipe
    assert made.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in made.state_dict().items())
    assert not all(torch.equal(t, other.state_dict()[name]) for name, t in made.state_dict().items())


def test_for_data_shows_what_it_takes():
    parameters = inspect.signature(VAE.for_data).parameters
    assert next(iter(parameters)) == "data"
    assert parameters["data"].annotation == Counts | AnnData
    assert parameters["n_latent"].default == 30
    assert VAE.for_data.__doc__.startswith("Build a VAE")


def test_a_wrong_call_is_refused(data):
    with pytest.raises(TypeError, match="unexpected keyword argument 'latents'"):
        VAE.for_data(data, latents=3)
    with pytest.raises(TypeError, match="positional argument"):
        VAE.for_data(data, "nb")
    with pytest.raises(TypeError, match="'n_components'"):
        GMVAE.for_data(data)
    with pytest.raises(ValueError, match="no proteins"):
        TOTALVI.for_data(data)


def test_sizes_are_checked_before_anything_is_built(data):
    class Toy:
        @classmethod
        @recipe
        def for_data(cls, data, *, n_parts=2, branch=3, hidden=(), seed=0):
            raise AssertionError

    for sizes in ({"n_parts": 0}, {"branch": 1.5}, {"hidden": 4}):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            Toy.for_data(data, **sizes)


def test_require_raises_with_the_message():
    require(fine=(8,), message="never seen")
    with pytest.raises(ValueError, match="this and that"):
        require(fine=(), message="this and that")


def test_parts_start_at_the_data(rich):
    decoder = decoder_for(rich, 2, (4,), norm=None, dropout=0.0)
    torch.testing.assert_close(decoder.logits.bias.exp(), torch.as_tensor(rich.share).float())
    assert decoder.covariates.sizes == (3, 2)  # plates, batches
    theta = likelihood_for(rich, "nb", "gene-batch", 4).log_inverse_dispersion
    assert theta.shape == (2, rich.n_genes)
