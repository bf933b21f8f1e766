"""The dispersion of counts between cells."""

import numpy as np
import pytest
from arms import arms_of, negative_binomial

from pyrosc.differential.dispersion import dispersion


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
