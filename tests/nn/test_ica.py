"""Independent components."""

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import pyrosc
from pyrosc.nn.ica import independent_components


def test_sparse_sources_are_found_up_to_order_and_sign():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 3)) * (rng.random((2000, 3)) < 0.3)
    w = rng.normal(0, 0.3, (3, 80))
    x = rng.poisson(50 * np.exp(z @ w)).astype("f4")
    found = independent_components(pyrosc.from_anndata(anndata.AnnData(csr_matrix(x))), 3)
    assert found.shape == (80, 3)
    match = np.abs(np.corrcoef(w, found.T)[:3, 3:])
    assert sorted(match.argmax(1)) == [0, 1, 2]
    assert match.max(1).min() > 0.95


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (3, 2), (4, 9)])
def test_few_cells_or_genes_have_few_components_and_all_are_finite(shape):
    x = np.random.default_rng(0).poisson(3.0, shape).astype("f4") + 1
    found = independent_components(pyrosc.from_anndata(anndata.AnnData(csr_matrix(x))), 6)
    assert found.shape == (shape[1], min(shape) - 1)
    assert np.isfinite(found).all()


def test_cells_that_are_all_alike_have_none():
    x = np.ones((5, 4), "f4")
    assert independent_components(pyrosc.from_anndata(anndata.AnnData(csr_matrix(x))), 3).shape == (4, 0)
