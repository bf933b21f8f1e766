"""New counts of the same cells, against known answers."""

import numpy as np
import pairs
import scipy.sparse as sp
from scipy import stats

from pyrosc.posterior.predictive import posterior_predictive


def test_predictive_counts_are_whole_sparse_and_one_matrix_a_draw(rich_fit, rich):
    drawn = posterior_predictive(rich_fit, rich, 3)
    assert len(drawn) == 3
    for x in drawn:
        assert sp.issparse(x)
        assert x.format == "csr"
        assert x.shape == (200, 40)
        assert x.dtype == np.float32
        assert (x.data == np.rint(x.data)).all()
        assert (x.data > 0).all()
    assert (drawn[0] != drawn[1]).nnz > 0


def test_predictive_mean_and_zeros_are_the_analytic_ones(data, few):
    """x' ~ Poisson(w), w ~ Gamma(2 + x, 1 + 2 / m): negative binomial."""
    mean = np.linspace(0.5, 8, 40)
    fit = pairs.untrained(pairs.GenesPlate(mean), data, plates=2)
    n = 1500
    drawn = np.stack([x.toarray() for x in posterior_predictive(fit, few, n)])
    shape, rate = 2 + few.x.toarray(), 1 + 2 / mean
    known = stats.nbinom(shape, rate / (1 + rate))
    error = known.std() / np.sqrt(n)
    assert np.max(np.abs(drawn.mean(0) - known.mean()) / error) < 5
    p0 = known.pmf(0)
    error = np.sqrt(p0 * (1 - p0) / n) + 1 / n
    assert np.max(np.abs((drawn == 0).mean(0) - p0) / error) < 5


def test_predictive_counts_in_another_batch(data, few):
    fit = pairs.untrained(pairs.Watching(data.n_genes), data)
    low, high = (
        sum(posterior_predictive(fit, few, 30, batch=b)).toarray()[:, -1].sum()
        for b in ("batch_0", "batch_1")
    )
    assert high > 1.5 * low
