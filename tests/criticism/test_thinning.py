import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import stats

from pyrosc.criticism.thinning import thin


def test_the_parts_of_a_thinned_count_sum_to_it(adata):
    before = adata.X.copy()
    one, other = thin(adata, 0.7, seed=1)
    assert (one.X + other.X != adata.X).nnz == 0
    assert (before != adata.X).nnz == 0
    for part in (one, other):
        pd.testing.assert_frame_equal(part.obs, adata.obs)
        assert list(part.var_names) == list(adata.var_names)
        assert part.X.dtype == np.float32
        assert part.X.nnz == (part.X.toarray() > 0).sum()
    assert (thin(adata, 0.7, seed=1)[0].X != one.X).nnz == 0
    assert (thin(adata, 0.7, seed=2)[0].X != one.X).nnz > 0


def test_thinned_counts_are_binomial():
    one, _ = thin(AnnData(np.full((400, 50), 6.0, np.float32)), 0.3)
    seen = np.bincount(one.X.toarray().astype(int).ravel(), minlength=7)
    assert stats.chisquare(seen, 20000 * stats.binom(6, 0.3).pmf(range(7))).pvalue > 1e-3


def test_parts_of_poisson_counts_are_independent():
    x = np.random.default_rng(0).poisson(4.0, (500, 100)) + 0.0
    one, other = (part.X.toarray().ravel() for part in thin(AnnData(x.astype(np.float32)), 0.5))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(x.size)


def test_what_can_not_be_thinned_is_refused(adata):
    for fraction in (0, 1, -0.5, np.nan):
        with pytest.raises(ValueError, match="share between 0 and 1"):
            thin(adata, fraction)
    with pytest.raises(KeyError, match="no layer 'raw'"):
        thin(adata, 0.5, layer="raw")
    adata = adata.copy()
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="whole"):
        thin(adata, 0.5)
