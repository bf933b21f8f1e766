"""Curves over fold changes: exact cases, and widths that are those of the sampling error."""

import numpy as np
import pytest
from arms import arm_of_one_gene, arms_of, arms_of_donors, donors, negative_binomial, normal_curves
from scipy import special, stats

from pyrosc.differential.donor_variance import TAU2
from pyrosc.differential.group_sums import Pseudobulk
from pyrosc.differential.quasi_likelihood import LFC, _log_likelihood, _student, beyond, quasi_likelihood


def one_gene(x, l, other):
    """Sums of an arm of two cells alike, of which gene 0 has x counts in all."""
    x, l, other = (np.array(v, float).reshape(-1, 1) for v in (x, l, other))
    n = np.full(len(x), 2.0)
    return Pseudobulk(n, n[:, None], l[:, 0], l[:, 0] ** 2 / 2, x, x**2 / 2, x * l / 2)


def test_likelihood_of_poisson_counts_is_binomial():
    # Cells of equal counts have no dispersion beyond Poisson's.
    a, b = one_gene([12], [300], [0]), one_gene([30], [500], [0])
    p = 300 * 2**LFC / (300 * 2**LFC + 500)
    exact = stats.binom.pmf(12, 42, p)
    np.testing.assert_allclose(quasi_likelihood(a, b)[0], exact / exact.max(), atol=2e-3)


def test_batches_multiply_their_likelihoods():
    a, b = one_gene([12, 3], [300, 100], [0, 0]), one_gene([30, 1], [500, 80], [0, 0])
    product = np.prod([quasi_likelihood(a[np.array([i])], b[np.array([i])])[0] for i in range(2)], axis=0)
    np.testing.assert_allclose(quasi_likelihood(a, b)[0], product / product.max(), atol=2e-3)


def test_a_batch_of_one_side_says_nothing():
    a, b = one_gene([12, 50], [300, 100], [0, 0]), one_gene([30, 0], [500, 0], [0, 0])
    b = Pseudobulk(**(vars(b) | {"cells": np.array([2.0, 0.0])}))
    first = np.array([0])
    np.testing.assert_allclose(quasi_likelihood(a, b), quasi_likelihood(a[first], b[first]), atol=1e-12)


def test_a_gene_without_counts_says_nothing():
    np.testing.assert_array_equal(quasi_likelihood(one_gene([0], [300], [0]), one_gene([0], [500], [0])), 1.0)


def test_a_gene_seen_on_one_side_only_bounds_the_fold_change_from_one_side():
    curve = quasi_likelihood(one_gene([20], [300], [0]), one_gene([0], [300], [0]))[0]
    assert (np.diff(curve) >= -1e-12).all()
    assert curve[LFC < 1].max() < 1e-3
    assert curve[LFC > 7].min() > 0.8


def test_likelihood_has_the_width_of_the_sampling_error():
    """Over simulated data sets, the curve's peak spreads as its own width says."""
    rng = np.random.default_rng(5)
    n, genes = 300, 2000
    mean = np.full((n, genes), 5.0) * rng.lognormal(0, 0.3, (n, 1))
    group = (np.arange(n) < 60).astype(int)
    mean[group == 1, : genes // 2] *= 2  # more variance where more is expressed
    curves = quasi_likelihood(*arms_of(negative_binomial(rng, mean, 2.0), group))
    weights = curves / curves.sum(1, keepdims=True)
    at = weights @ LFC
    width = np.sqrt((weights * (LFC - at[:, None]) ** 2).sum(1))
    for half in (slice(0, genes // 2), slice(genes // 2, None)):
        np.testing.assert_allclose(at[half].std(), width[half].mean(), rtol=0.07)


def test_an_arm_of_single_cells_borrows_the_dispersion_of_the_other():
    rng = np.random.default_rng(6)
    x = negative_binomial(rng, np.full((101, 50), 20.0), 1.0)
    curves = quasi_likelihood(*arms_of(x, (np.arange(101) == 0).astype(int)))
    width = np.array([np.ptp(LFC[c > 0.6]) / 2 for c in curves])
    # One cell's log2 count varies by about sqrt(1 / 20 + 1) / ln 2 = 1.5; Poisson's error would be .32.
    assert np.median(width) > 0.8


def test_curves_beyond_a_fold_change_are_those_of_the_rest():
    curves = normal_curves(np.array([0.3, 9.0]), np.array([0.2, 0.4]))
    moved = beyond(curves, 0.75)
    np.testing.assert_allclose(moved[0], normal_curves(np.array([-0.45]), np.array([0.2]))[0], atol=1e-12)
    np.testing.assert_array_equal(moved[:, -31:], np.repeat(curves[:, -1:], 31, 1))


def test_student_of_an_inverse_gamma_variance_is_the_exact_one():
    """Of counts so large that tau^2 is all that is unknown: 2 a degrees of freedom (Smyth, 2004)."""
    variances = stats.invgamma.pdf(TAU2, 3, scale=0.3) * TAU2
    variances = variances[None] / variances.sum()
    x, p, between = np.full((1, 1), 1e9), np.full((1, 1), 0.5), np.full((1, 1), 2 / 3)
    tau2, nu = _student(x, p, np.zeros((1, 1)), between, variances)
    assert float(nu) == pytest.approx(6, rel=0.01)
    np.testing.assert_allclose(tau2, 0.1, rtol=0.01)


def test_student_has_the_mean_and_the_variance_of_the_log_precision():
    """Two strata, and two values of tau^2: 1 / Var U by hand."""
    variances = np.zeros((1, len(TAU2)))
    variances[0, [60, 80]] = 0.5
    x, p = np.array([[40.0], [100.0]]), np.array([[0.5], [0.3]])
    extra, between = np.array([[0.05], [0.02]]), np.array([[1.0], [0.4]])
    tau2, nu = _student(x, p, extra, between, variances)
    information = np.array([40 * 0.25, 100 * 0.21])

    def precision(value):
        return 1 / (information + information**2 * (extra[:, 0] + value * between[:, 0])).sum()

    log = np.log([precision(TAU2[60]), precision(TAU2[80])])
    shape = float(nu) / 2
    np.testing.assert_allclose(special.polygamma(1, shape), log.var(), rtol=1e-4)
    np.testing.assert_allclose(
        special.digamma(shape) + np.log(precision(tau2[0]) / shape), log.mean(), rtol=1e-4
    )


@pytest.mark.parametrize("paired", [False, True])
def test_likelihood_has_the_width_of_the_error_between_replicates(paired):
    """Over simulated genes, the curve's peak spreads as its own width says; by cells alone it is narrower."""
    x, side, donor, _ = donors(1, 8, 0.3, paired=paired, genes=1500, mean=4.0, equal=True)
    widths, spreads = [], []
    for one, zero, stratum in (arms_of_donors(x, side, donor), arms_of_donors(x, side, np.zeros_like(donor))):
        curves = quasi_likelihood(one, zero, stratum)
        weights = curves / curves.sum(1, keepdims=True)
        at = weights @ LFC
        widths.append(np.sqrt((weights * (LFC - at[:, None]) ** 2).sum(1)).mean())
        spreads.append(at.std())
    np.testing.assert_allclose(widths[0], spreads[0], rtol=0.1)
    assert widths[1] < 0.7 * spreads[1]


@pytest.mark.parametrize("paired", [False, True])
def test_genes_of_which_donors_differ_more_than_others_have_longer_tails(paired):
    """Variances between donors are an inverse chi-squared of six degrees of freedom times .09."""
    inside = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tau = 0.3 * np.sqrt(6 / rng.chisquare(6, 1000))
        x, side, donor, lfc = donors(seed, 8, tau, paired=paired, genes=1000, mean=4.0, equal=True)
        curves = quasi_likelihood(*arms_of_donors(x, side, donor))
        below = (curves / curves.sum(1, keepdims=True) * (lfc[:, None] >= LFC)).sum(1)
        inside.append((below > 0.005) & (below < 0.995))
    assert 0.98 < np.mean(inside) < 0.999


@pytest.mark.parametrize("lfc", [0.5, 3.0, 6.0])
def test_between_donors_the_likelihood_is_normal_in_the_logarithm(lfc):
    """Of counts so large that donors are all there is: (t - lfc)^2, however far from the likeliest t."""
    one, zero = arm_of_one_gene([2.0**lfc * 1e7], [1e9]), arm_of_one_gene([1e7], [1e9])
    known = np.zeros((1, len(TAU2)))
    known[0, 60] = 1.0
    log = _log_likelihood(one, zero, np.zeros(1, int), [np.zeros(1)] * 2, known)[0].numpy()
    normal = -(((LFC - lfc) * np.log(2)) ** 2) / (4 * TAU2[60])
    near = np.abs(LFC) < 6
    np.testing.assert_allclose(log[near], normal[near], rtol=0.02, atol=0.01)
