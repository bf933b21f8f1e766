"""Types of cells that differ in known genes, in two batches, and a fit of them."""

import pytest


@pytest.fixture(scope="session")
def typed():
    """600 cells x 80 genes."""
    from pyrosc import datasets

    return datasets.simulate(
        600, 80, n_types=3, n_batches=2, de_fraction=0.2, log2_fold_change=1.5, batch_sd=0.3, seed=3
    )


@pytest.fixture(scope="session")
def typed_fit(typed):
    """A VAE, told of the batches."""
    from pyrosc import VAE, fit_svi, from_anndata

    data = from_anndata(typed, batch_key="batch")
    vae = VAE.for_data(data, n_latent=5, hidden=(32,))
    return fit_svi(vae, data, epochs=40, learning_rate=1e-2, progress=False, device="cpu")
