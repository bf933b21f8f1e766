"""Sums over the cells of groups."""

import numpy as np
import scipy.sparse as sp

from pyrosc.differential import group_sums
from pyrosc.differential.group_sums import pseudobulk


def test_sums_are_those_of_the_cells_of_each_group_and_batch():
    rng = np.random.default_rng(0)
    x, batch = rng.poisson(0.7, (30, 5)), rng.integers(3, size=30)
    group = rng.integers(-1, 2, size=30)
    arms = pseudobulk(sp.csr_array(x.astype(np.float32)), group, 2, batch, 3)
    l = x.sum(1)
    for g in range(2):
        for b in range(3):
            at = (group == g) & (batch == b)
            assert arms[g].cells[b] == at.sum()
            assert (arms[g].l[b], arms[g].ll[b]) == (l[at].sum(), (l[at] ** 2).sum())
            np.testing.assert_array_equal(arms[g].x[b], x[at].sum(0))
            np.testing.assert_array_equal(arms[g].xx[b], (x[at] ** 2).sum(0))
            np.testing.assert_array_equal(arms[g].xl[b], (x[at] * l[at, None]).sum(0))
            np.testing.assert_array_equal(arms[g].expressing[b], (x[at] > 0).sum(0))
    assert (arms[0] + arms[1]).n == (group >= 0).sum()
    assert arms[0][np.array([1])].n == arms[0].cells[1]


def test_sums_do_not_depend_on_how_many_cells_are_taken_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    x, codes, batch = sp.csr_array(rng.poisson(0.4, (50, 6))), rng.integers(-1, 3, 50), rng.integers(0, 2, 50)
    once = pseudobulk(x, codes, 3, batch, 2)
    monkeypatch.setattr(group_sums, "_CELLS", 7)
    for a, b in zip(once, pseudobulk(x, codes, 3, batch, 2), strict=True):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(vars(b)[name], value)
