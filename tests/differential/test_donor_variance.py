"""How far donors differ: known likelihoods, and variances that are those of the simulation."""

import numpy as np
import pytest
import torch
from arms import arm_of_one_gene, arms_of_donors, donors, poisson_arms
from scipy import optimize, special, stats

from pyrosc.differential import donor_variance as module
from pyrosc.differential.dispersion import dispersion
from pyrosc.differential.donor_variance import (
    TAU2,
    _adjusted_profile_likelihood,
    _posterior,
    _priors,
    donor_variance,
)

# Log likelihoods are sums, in any order, of logs of gamma functions as large as 1e5 nats, in float64, and may
# be near 0 themselves.
ROUNDED = {"rtol": 0, "atol": 1e-9}


def mean_variance(one, zero, stratum):
    """Each gene's expected tau^2."""
    return donor_variance(one, zero, stratum, [dispersion(one), dispersion(zero)]) @ TAU2


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.35])
def test_variance_between_replicates_is_that_of_the_simulation(paired, tau):
    found = [
        mean_variance(*arms_of_donors(*donors(seed, 12, tau, paired=paired)[:3])).mean() for seed in range(3)
    ]
    np.testing.assert_allclose(np.mean(found), tau**2, rtol=0.15, atol=0.003)


@pytest.mark.parametrize("paired", [False, True])
def test_genes_that_donors_differ_in_alike_get_one_variance(paired):
    spread = [mean_variance(*arms_of_donors(*donors(s, 6, 0.35, paired=paired)[:3])).std() for s in range(6)]
    assert np.mean(spread) < 0.1 * 0.35**2


def adjusted(log_likelihood, information, start):
    """Largest log likelihood of a common rate or fold change, less half the log of what is known of it."""
    best = optimize.minimize_scalar(lambda at: -log_likelihood(at), bracket=(start - 0.5, start + 0.5))
    return -best.fun - 0.5 * np.log(information(best.x))


@pytest.mark.parametrize("tau2", [0.01, 0.3, 3.0])
def test_the_likelihood_of_one_side_is_the_negative_binomials(tau2):
    """Two strata of one side and another side that says nothing: by scipy and a search for the rate."""
    x, l = np.array([12, 3, 40, 0, 9, 5]), np.array([900, 700, 1500, 400, 600, 800])
    stratum, phi = [0, 0, 0, 0, 1, 1], 0.7
    one, zero = arm_of_one_gene(x, l), arm_of_one_gene(0 * x, 0 * l)
    found = _adjusted_profile_likelihood(one, zero, np.array(stratum), [np.array([phi]), np.array([0.0])])[0]
    alpha = 1 / optimize.brentq(lambda k: special.polygamma(1, k) - tau2, 1e-3, 1e5)
    d, expected = alpha + phi / 30, []
    for at, dispersion_ in ((np.abs(TAU2 - tau2).argmin(), d), (0, 1e-4 + phi / 30)):
        total = 0.0
        for one_of in (slice(0, 4), slice(4, 6)):
            counts, sizes = x[one_of], l[one_of]

            def log_likelihood(log_rate, counts=counts, sizes=sizes, d=dispersion_):
                mean = np.exp(log_rate) * sizes
                return stats.nbinom.logpmf(counts, 1 / d, 1 / (1 + d * mean)).sum()

            def information(log_rate, sizes=sizes, d=dispersion_):
                mean = np.exp(log_rate) * sizes
                return (mean / (1 + d * mean)).sum()

            total += adjusted(log_likelihood, information, np.log(counts.sum() / sizes.sum()))
        expected.append((at, total))
    (there, high), (least, low) = expected
    value = np.interp(np.log(tau2), np.log(TAU2), found)
    assert float(value - found[least]) == pytest.approx(high - low, abs=0.01)
    assert there > least


@pytest.mark.parametrize("tau2", [0.01, 0.3])
def test_the_likelihood_of_pairs_is_the_beta_binomials(tau2):
    """Totals and dispersions unlike; by scipy, and a search for the fold change by the same equation."""
    xa, xb, phi = np.array([12, 3, 40, 7, 9]), np.array([5, 4, 31, 6, 2]), [0.5, 3.0]
    la, lb = np.array([2000, 500, 900, 1000, 3000]), np.array([700, 800, 1200, 2500, 600])
    one, zero = arm_of_one_gene(xa, la), arm_of_one_gene(xb, lb)
    found = _adjusted_profile_likelihood(one, zero, np.arange(5), [np.array([f]) for f in phi])[0]
    x, expected = xa + xb, []
    for value in (tau2, TAU2[0]):
        d = 2 / optimize.brentq(lambda k, v=value: special.polygamma(1, k) - v, 1e-3, 1e5) + sum(phi) / 30

        def parts(lfc, d=d):
            p = special.expit(lfc + np.log(la / lb))
            precision = 1 / (p * (1 - p) * d)
            return p, precision, 1 / (1 + np.maximum(x - 1, 0) / (precision + 1))

        def score(lfc, parts=parts):
            p, _, weight = parts(lfc)
            return (weight * (xa - x * p)).sum()

        p, precision, weight = parts(optimize.brentq(score, -5, 5))
        log = stats.betabinom.logpmf(xa, x, p * precision, (1 - p) * precision).sum()
        expected.append(log - 0.5 * np.log((weight * x * p * (1 - p)).sum()))
    value = np.interp(np.log(tau2), np.log(TAU2), found)
    assert float(value - found[0]) == pytest.approx(expected[0] - expected[1], abs=0.01)


def test_donors_of_a_batch_are_pairs_whatever_their_order():
    """Three batches, a donor of either side in each; on one side listed from the last."""
    x, l = np.array([12, 3, 40, 6, 9, 22]), np.full(6, 1000.0)
    on = np.arange(6) < 3
    one, zero = (arm_of_one_gene(x * side, l * side) for side in (on, ~on))
    stratum, alike = np.array([0, 1, 2, 2, 1, 0]), np.arange(3)
    paired = [arm_of_one_gene(v, l[:3]) for v in (x[:3], x[:2:-1])]
    phi = [np.array([0.5])] * 2
    found = _adjusted_profile_likelihood(one, zero, stratum, phi)
    np.testing.assert_allclose(found, _adjusted_profile_likelihood(*paired, alike, phi), **ROUNDED)


def test_a_single_pair_beside_others_shows_nothing():
    on = np.array([1, 1, 0, 0, 1, 0])
    x, l = np.array([12, 3, 40, 6, 9, 22]), np.full(6, 1000.0)
    one, zero = (arm_of_one_gene(x * side, l * side) for side in (on, 1 - on))
    phi = [np.array([0.5])] * 2
    four = np.arange(4)
    without = _adjusted_profile_likelihood(one[four], zero[four], np.zeros(4, int), phi)
    found = _adjusted_profile_likelihood(one, zero, np.array([0, 0, 0, 0, 1, 1]), phi)
    np.testing.assert_allclose(found, without, **ROUNDED)


def test_the_fold_change_of_pairs_is_found_where_pooled_counts_mislead():
    """Donors have most cells on opposite sides, two of them 1e4 times more of the gene."""
    one = arm_of_one_gene([50_000, 52_000, 0, 1, 4], [1e6, 1e6, 2e4, 2e4, 1e6])
    zero = arm_of_one_gene([1000, 950, 5, 4, 5], [2e4, 2e4, 1e6, 1e6, 1e6])
    arms = one, zero, np.arange(5), [np.zeros(1)] * 2
    found = _adjusted_profile_likelihood(*arms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STEPS", 40)
        np.testing.assert_allclose(found, _adjusted_profile_likelihood(*arms), atol=0.1)


@pytest.mark.parametrize("paired", [False, True])
def test_cells_of_any_dispersion_can_be_compared(paired):
    one, zero = (arm_of_one_gene([60, 3, 0, 2], l, cells=1) for l in ([9e3, 10, 8e3, 20], [10, 9e3, 20, 8e3]))
    stratum = np.arange(4) if paired else np.zeros(4, int)
    assert _adjusted_profile_likelihood(one, zero, stratum, [np.array([1e5])] * 2).isfinite().all()


@pytest.mark.parametrize("paired", [False, True])
def test_the_likelihood_of_large_counts_is_that_of_normal_logs(paired):
    """Of ten donors a side, or ten pairs, chi-squared with 18 or 9 degrees of freedom."""
    one, zero, stratum = poisson_arms(0, 10, 0.03, paired=paired, genes=40, mean=1e7)
    found = _adjusted_profile_likelihood(one, zero, stratum, [np.zeros(40)] * 2).numpy()
    found -= found.max(1, keepdims=True)
    if paired:
        log = np.log(one.x / one.l[:, None]) - np.log(zero.x / zero.l[:, None])
        squares, freedom, scale = ((log - log.mean(0)) ** 2).sum(0), 9, 2
    else:
        there = [arm.cells > 0 for arm in (one, zero)]
        logs = [np.log(arm.x[i] / arm.l[i, None]) for arm, i in zip((one, zero), there, strict=True)]
        squares, freedom, scale = sum(((v - v.mean(0)) ** 2).sum(0) for v in logs), 18, 1
    exact = stats.chi2.logpdf(squares[:, None] / (scale * TAU2), freedom) - np.log(TAU2)
    exact -= exact.max(1, keepdims=True)
    near = exact > -2
    np.testing.assert_allclose(found[near], exact[near], atol=0.15)


@pytest.mark.parametrize("tau", [0.15, 0.35])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("paired", [False, True])
def test_variances_are_found_from_few_counts(paired, n, unequal, tau):
    """The genes' median, down to a count a donor."""
    arms = poisson_arms(0, n, tau, paired=paired, mean=np.repeat([1.0, 5.0, 30.0], 1000), unequal=unequal)
    found = donor_variance(*arms, [np.zeros(3000)] * 2) @ TAU2
    np.testing.assert_allclose(np.median(found), tau**2, rtol=0.2)


@pytest.mark.parametrize("paired", [False, True])
def test_rare_genes_show_no_variance_where_there_is_none(paired):
    arms = poisson_arms(0, 6, 0.0, paired=paired, mean=np.repeat([0.2, 30.0], 1500))
    found = donor_variance(*arms, [np.zeros(3000)] * 2) @ TAU2
    assert found.mean() < 0.003


def test_a_variance_is_as_probable_as_by_quadrature():
    """Squares of three to six degrees of freedom, of a variance whose logarithm is normal."""
    rng = np.random.default_rng(0)
    true, freedom = np.exp(rng.normal(np.log(0.1), 0.7, 4000)), rng.integers(3, 7, 4000)
    seen = true * rng.chisquare(freedom)
    log = stats.chi2.logpdf(seen[:, None] / TAU2, freedom[:, None]) - np.log(TAU2)
    found = _posterior(torch.from_numpy(log)).numpy()
    exact = stats.norm.pdf(np.log(TAU2), np.log(0.1), 0.7) * np.exp(log)
    exact /= exact.sum(1, keepdims=True)
    np.testing.assert_allclose(found @ np.log(TAU2), exact @ np.log(TAU2), atol=0.2)
    below = (found * (true[:, None] > TAU2)).sum(1)
    for level in (0.05, 0.5, 0.95):
        assert np.mean(below < level) == pytest.approx(level, abs=0.03)


def test_of_few_genes_all_priors_are_averaged_over():
    seen = 0.1 * np.random.default_rng(0).chisquare(4, 5)
    log = stats.chi2.logpdf(seen[:, None] / TAU2, 4) - np.log(TAU2)
    found = _posterior(torch.from_numpy(log)).numpy()
    likelihoods, priors = np.exp(log), _priors().numpy().T
    weights = np.array([np.prod(likelihoods @ prior) for prior in priors])
    each = np.array([likelihoods * prior / (likelihoods @ prior)[:, None] for prior in priors])
    np.testing.assert_allclose(found, np.average(each, axis=0, weights=weights), atol=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_genes_unlike_all_others_keep_a_variance_of_their_own(paired):
    """Of four donors a side, or four pairs, who differ by .2, 20 genes of 1000 differ by 1.5."""
    arms = poisson_arms(0, 4, np.repeat([1.5, 0.2], [20, 980]), paired=paired, genes=1000, mean=50.0)
    found = donor_variance(*arms, [np.zeros(1000)] * 2) @ TAU2
    assert np.median(found[:20]) > 1
    np.testing.assert_allclose(np.median(found[20:]), 0.04, rtol=0.15)


def test_a_gene_that_one_technical_replicate_has_spoils_no_other():
    one, zero, stratum = poisson_arms(0, 20, 0.0, paired=False, mean=1e4)
    for arm in (one, zero):
        arm.x[:, 0] = np.where(np.arange(len(arm.l)) == np.flatnonzero(arm.cells)[0], 2e5, 0)
    found = donor_variance(one, zero, stratum, [np.zeros(3000)] * 2)
    assert np.isfinite(found).all()
    assert found[0] @ TAU2 > 3
    assert (found[1:] @ TAU2).max() < 0.01


def test_genes_with_the_same_count_in_every_donor_show_no_variance():
    one, zero, stratum = poisson_arms(0, 20, 0.15, paired=False, genes=300)
    for arm in (one, zero):
        arm.x[:, 0] = 10.0 * arm.l / arm.l.max()
    found = donor_variance(one, zero, stratum, [np.zeros(300)] * 2) @ TAU2
    assert found[0] < 0.03


@pytest.mark.parametrize("tau", [0.0, 0.35])
def test_donors_one_on_each_side_of_a_batch_show_it_too(tau):
    found = []
    for seed in range(3):
        one, zero, _ = arms_of_donors(*donors(seed, 12, tau)[:3])
        # A donor of either side in each of six batches.
        found.append(mean_variance(one, zero, np.arange(12) // 2).mean())
    np.testing.assert_allclose(np.mean(found), tau**2, rtol=0.15, atol=0.003)


def test_one_replicate_a_side_says_nothing_of_their_variance():
    one, zero, stratum = arms_of_donors(*donors(0, 2, 0.3)[:3])
    assert donor_variance(one, zero, stratum, [dispersion(one), dispersion(zero)]) is None
