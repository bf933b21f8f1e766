"""Small data and small fits; and after every test the process is as before: store, flags, threads.

Tests run on one thread of torch's, or on as many as the environment variable PYROSC_TEST_THREADS says.
"""

import contextlib
import os

import numpy as np
import pyro
import pytest
import torch

# pyrosc is imported inside the fixtures: jaxtyping's hook must be in place first.
THREADS = int(os.environ.get("PYROSC_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that pytest-xdist and tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when it is imported


def pytest_configure(config):
    # Pyro's distributions are generic over typing.Callable, of which beartype warns wherever it meets one.
    warning = "beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    config.addinivalue_line("filterwarnings", f"ignore:.*typing.Callable deprecated:{warning}")


def flags():
    """Settings of the process that no library call may change."""
    return {
        **pyro.settings.get(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def random_states():
    """States of torch's and numpy's random numbers. (Python's own: beartype draws from them.)"""
    state = np.random.get_state()  # noqa: NPY002
    return (torch.get_rng_state().numpy().tobytes(), state[1].tobytes(), state[2])


@contextlib.contextmanager
def check_untouched():
    """Check that what runs inside leaves random numbers, flags and the param store as they were."""
    before, flags_before = random_states(), flags()
    try:
        yield
    finally:
        assert random_states() == before, "random numbers of the process were used or reseeded"
        assert flags() == flags_before
        assert not list(pyro.get_param_store()), "the global param store is not empty"


@pytest.fixture
def untouched():
    """The check as a context manager, for calls whose caller uses random numbers itself."""
    return check_untouched


@pytest.fixture(autouse=True)
def _process_as_before():
    torch.set_num_threads(THREADS)
    pyro.clear_param_store()
    before = flags()
    yield
    left = list(pyro.get_param_store())
    pyro.clear_param_store()
    assert not left, f"the global param store holds {left}"
    assert flags() == before
    assert torch.get_num_threads() in {1, THREADS}  # tests of threads leave one


@pytest.fixture(scope="session")
def _simulated():
    from pyrosc.datasets.simulate import simulate, simulate_proteins

    adata = simulate(200, 40, n_types=3, n_batches=2, de_fraction=0.4, log2_fold_change=2.0, seed=3)
    adata = simulate_proteins(adata, 5, unmeasured_batches=["batch_1"], seed=3)
    adata.obs["depth"] = np.log(adata.obs["library"].to_numpy())
    adata.obs["plate"] = np.array(["p0", "p1", "p2"])[np.arange(200) % 3]
    return adata


@pytest.fixture
def adata(_simulated):
    """200 cells x 40 genes, 3 types, 2 batches, 5 proteins in one of them; the test's own."""
    return _simulated.copy()


@pytest.fixture(scope="session")
def data(_simulated):
    """The same as Counts, with batches and labels."""
    from pyrosc import from_anndata

    return from_anndata(_simulated, batch_key="batch", labels_key="cell_type")


@pytest.fixture(scope="session")
def rich(_simulated):
    """The same as Counts, with covariates and proteins too."""
    from pyrosc import from_anndata

    return from_anndata(
        _simulated,
        batch_key="batch",
        labels_key="cell_type",
        categorical_keys=["plate"],
        continuous_keys=["depth"],
        protein_key="protein_expression",
    )


@pytest.fixture(scope="session")
def vae_fit(data):
    """A VAE, NB, observed library, after a few epochs."""
    from pyrosc import VAE, fit_svi

    vae = VAE.for_data(data, n_latent=4, hidden=(16,))
    return fit_svi(vae, data, epochs=8, minibatch_size=64, learning_rate=1e-2, progress=False)


@pytest.fixture(scope="session")
def rich_fit(rich):
    """A VAE with all that is optional: ZINB, latent library, theta by batch, covariates also encoded."""
    from pyrosc import VAE, fit_svi

    vae = VAE.for_data(
        rich,
        likelihood="zinb",
        library="latent",
        dispersion="gene-batch",
        n_latent=3,
        hidden=(16, 8),
        encode_covariates=True,
    )
    return fit_svi(vae, rich, epochs=6, minibatch_size=64, learning_rate=1e-2, progress=False)
