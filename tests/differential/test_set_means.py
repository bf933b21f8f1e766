"""Means over sets of genes, and their errors."""

import numpy as np

from pyrosc.differential.quasi_likelihood import LFC
from pyrosc.differential.set_means import _Errors, _spread, set_means


def test_means_of_sets_are_best_linear_predictions():
    """Against the normal model written down whole: centre flat, t about it, e about t; errors independent."""
    rng = np.random.default_rng(0)
    c = np.array([0.01, 0.04, 0.2, 0.02, 0.1, 0.05])
    e = rng.normal(0, 0.6, 6)
    curves = np.exp(-0.5 * (LFC - e[:, None]) ** 2 / c[:, None])
    member = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).T.astype(float)
    independent = _Errors(lambda: [np.eye(6)])
    found, variance = set_means(curves, independent, member)
    s2 = _spread(e, c, independent, member)
    for i, rows in enumerate((slice(0, 3), slice(3, 6))):
        # Precision of (centre, t), and what e adds to it.
        precision = np.zeros((4, 4))
        precision[0, 0], precision[0, 1:], precision[1:, 0] = 3 / s2, -1 / s2, -1 / s2
        precision[1:, 1:] = np.diag(1 / s2 + 1 / c[rows])
        covariance = np.linalg.inv(precision)
        mean = covariance @ np.r_[0, e[rows] / c[rows]]
        np.testing.assert_allclose(found[i], mean[1:].mean(), rtol=1e-3)
        np.testing.assert_allclose(variance[i], covariance[1:, 1:].mean(), rtol=1e-3)


def test_errors_that_go_together_are_summed_over_pairs():
    rng = np.random.default_rng(0)
    items, weights = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.uniform(0.1, 1, (6, 2))
    items[:, 4] = 0
    norms = np.sqrt((items**2).sum(0))
    with np.errstate(invalid="ignore"):
        correlation = np.nan_to_num(items.T @ items / np.outer(norms, norms))
    np.fill_diagonal(correlation, 0)
    want = [w @ correlation @ w for w in weights.T]
    found = _Errors(lambda: [items[:20], items[20:]]).together(weights)
    np.testing.assert_allclose(found, want, rtol=1e-10)
