"""Between cells: sums over groups, and the dispersion of counts."""

import numpy as np
import pytest
import scipy.sparse as sp
from arms import arms_of, negative_binomial

from pyrosc.differential import group_sums as variation
from pyrosc.differential.dispersion import dispersion
from pyrosc.differential.group_sums import sums

# --- sums


def test_sums_are_those_of_the_cells_of_each_group_and_batch():
    rng = np.random.default_rng(0)
    x, batch = rng.poisson(0.7, (30, 5)), rng.integers(3, size=30)
    group = rng.integers(-1, 2, size=30)
    arms = sums(sp.csr_array(x.astype(np.float32)), group, 2, batch, 3)
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
    once = sums(x, codes, 3, batch, 2)
    monkeypatch.setattr(variation, "_CELLS", 7)
    for a, b in zip(once, sums(x, codes, 3, batch, 2), strict=True):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(vars(b)[name], value)


# --- dispersion


@pytest.mark.parametrize("theta", [0.5, 3.0])
def test_dispersion_is_that_of_the_counts(theta):
    rng = np.random.default_rng(1)
    mean = rng.gamma(2, 2, 60) * rng.lognormal(0, 0.3, (800, 1))
    a, b = arms_of(negative_binomial(rng, mean, theta), np.arange(800) % 2)
    for arm in (a, b):
        np.testing.assert_allclose(np.median(dispersion(arm)), 1 / theta, rtol=0.15)


def test_dispersion_is_unbiased_where_cells_are_few():
    rng = np.random.default_rng(1)
    a, _ = arms_of(negative_binomial(rng, np.full((16, 2000), 5.0), 2.0), np.arange(16) % 2)
    np.testing.assert_allclose(dispersion(a).mean(), 0.5, rtol=0.12)


def test_dispersion_of_poisson_counts_is_next_to_nothing():
    rng = np.random.default_rng(2)
    a, _ = arms_of(rng.poisson(rng.gamma(2, 2, 60), (800, 60)), np.arange(800) % 2)
    assert dispersion(a).max() < 0.1


def test_dispersion_is_within_batches():
    rng = np.random.default_rng(3)
    batch = np.arange(800) // 2 % 2
    x = rng.poisson(rng.gamma(2, 2, 60) * np.exp(rng.normal(0, 1, (2, 60)))[batch])
    assert np.median(dispersion(arms_of(x, np.arange(800) % 2, batch)[0])) < 0.05


def test_genes_are_shrunk_to_each_other_only_as_far_as_noise_goes():
    rng = np.random.default_rng(4)
    theta = np.where(np.arange(60) < 30, 1.0, 10.0)
    phi = dispersion(arms_of(negative_binomial(rng, np.full((2000, 60), 8.0), theta), np.arange(2000) % 2)[0])
    np.testing.assert_allclose([phi[:30].mean(), phi[30:].mean()], [1, 0.1], atol=0.1)
    few = dispersion(arms_of(negative_binomial(rng, np.full((16, 60), 0.5)), np.arange(16) % 2)[0])
    assert np.ptp(few) < 0.5


def test_single_cells_have_no_dispersion():
    a, _ = arms_of(np.array([[3, 4], [5, 6]]), np.array([0, 1]))
    np.testing.assert_array_equal(dispersion(a), [0, 0])
