"""Distributions of fold changes in, calls out."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import Draws, call_at_fdr, compare, summarise
from pyrosc.differential.quasi_likelihood import LFC

COLUMNS = ["lfc_mean", "lfc_sd", "lfc_lower", "lfc_upper", "p_up", "p_down", "p_equivalent", "p_de"]
COLUMNS += ["p_de_se", "bayes_factor", "expected_fdr", "is_de"]


def normal_draws(mean, sd, n=2000):
    """Draws at the quantiles of normal distributions: no Monte Carlo noise."""
    at = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return np.asarray(mean) + np.asarray(sd) * at[:, None]


def draws_with(up, down=None, n=1000):
    """Draws of which these shares are 1 and -1, the others 0."""
    place = ((np.arange(n) + 0.5) / n)[:, None]
    down = np.zeros(len(up)) if down is None else np.asarray(down)
    return np.where(place < up, 1.0, np.where(place > 1 - down, -1.0, 0.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_are_summarised_as_numpy_does(dtype):
    """A sum of n numbers, in any order, is off by n u sum|terms| at most, and n times a mean; u = eps / 2."""
    lfc = np.random.default_rng(0).normal([0, 3, -0.5], [1, 0.01, 0.3], (101, 3)).astype(dtype)
    lfc[:4, 0] = 0.25
    t, wide, u = Draws(lfc), lfc.astype(np.float64), np.finfo(dtype).eps / 2
    off = u * np.abs(wide).sum(0)
    assert (np.abs(t.mean - wide.mean(0)) <= 2 * off).all()
    # Of squares about a mean that is off by so much, the mean is larger by its square; and their sum by n u.
    assert (np.abs(t.sd**2 - wide.var(0)) <= 2 * (101 * u * wide.var(0) + off**2)).all()
    np.testing.assert_array_equal(t.above(0.25), (lfc > 0.25).mean(0))
    np.testing.assert_array_equal(t.below(0.25), (lfc < 0.25).mean(0))
    for q in (0.05, 0.5, 0.951):  # two draws, and between them in float64
        np.testing.assert_allclose(t.quantile(q), np.quantile(wide, q, axis=0), rtol=0, atol=1e-12)


def test_compare_of_normal_draws():
    mean, sd = np.array([0.0, 1.0, -0.4]), np.array([0.5, 0.2, 0.3])
    table = compare(normal_draws(mean, sd), delta=0.25, interval=0.8)
    assert list(table) == COLUMNS
    up, down = stats.norm.sf(0.25, mean, sd), stats.norm.cdf(-0.25, mean, sd)
    np.testing.assert_allclose(table.lfc_mean, mean, atol=1e-9)
    np.testing.assert_allclose(table.lfc_sd, sd, rtol=2e-3)
    np.testing.assert_allclose(table.p_up, up, atol=1e-3)
    np.testing.assert_allclose(table.p_down, down, atol=1e-3)
    np.testing.assert_allclose(table.p_de, up + down, atol=1e-3)
    np.testing.assert_allclose(table.p_de + table.p_equivalent, 1)
    np.testing.assert_allclose(table.lfc_lower, stats.norm.ppf(0.1, mean, sd), atol=2e-3)
    np.testing.assert_allclose(table.lfc_upper, stats.norm.ppf(0.9, mean, sd), atol=2e-3)


def test_the_standard_error_of_a_probability_is_how_far_it_is_from_that_of_all_draws():
    """Two fold changes, 50 draws of each 400 times."""
    table = compare(np.random.default_rng(0).normal(np.tile([0.0, 0.4], 400), 0.5, (50, 800)), delta=0.25)
    p, se = (table[name].to_numpy().reshape(400, 2) for name in ("p_de", "p_de_se"))
    np.testing.assert_allclose(np.sqrt((se**2).mean(0)), p.std(0), rtol=0.1)


def test_expected_fdr_by_hand():
    # Errors .1, .02, .1, .3, .4: their running means, the two of .1 together.
    table = compare(draws_with([0.9, 0.98, 0.0, 0.7, 0.6], [0, 0, 0.9, 0, 0]), fdr=0.1)
    np.testing.assert_allclose(table.expected_fdr, [0.22 / 3, 0.02, 0.22 / 3, 0.13, 0.184])
    assert table.is_de.tolist() == [True, True, True, False, False]
    assert compare(draws_with([0.98, 0.9]), fdr=0.05).is_de.tolist() == [True, False]
    assert compare(draws_with([0.98, 0.9]), fdr=0.06 + 1e-9).is_de.all()


def test_a_target_met_exactly_is_met():
    assert call_at_fdr(pd.DataFrame({"lfsr": [0.05]}), fdr=0.05).is_de.all()


def test_wide_and_centred_on_zero_is_no_evidence():
    table = compare(normal_draws([0.0], [2.0]), delta=0.25, fdr=0.3)
    assert table.p_de[0] > 0.85
    assert table.expected_fdr[0] > 0.5
    assert not table.is_de[0]


def test_bayes_factor_is_finite_and_relative_to_the_prior():
    lfc = draws_with([1.0, 0.0, 0.8])
    factors = compare(lfc).bayes_factor
    np.testing.assert_allclose(factors, [np.log(1999), -np.log(1999), np.log(4)])
    np.testing.assert_allclose(compare(lfc, prior_de=0.2).bayes_factor, factors + np.log(4))
    # No draw against a direction is no proof: half a draw.
    np.testing.assert_allclose(compare(lfc).expected_fdr[0], 0.5 / 1000)


def test_compare_reads_posteriors_and_their_fitted_prior():
    r = np.array([0.0] * 18 + [1.0, -1.5])
    posterior = shrink(np.exp(-0.5 * ((LFC - r[:, None]) / 0.15) ** 2))
    table = compare(posterior)
    np.testing.assert_array_equal(table.lfc_mean, posterior.mean)
    assert table.is_de.tolist() == [False] * 18 + [True, True]
    p = table.p_de.iloc[-2]
    prior = posterior.prior_de(0.25)
    assert 0.05 < prior < 0.3
    expected = np.log(p / (1 - p)) - np.log(prior / (1 - prior))
    np.testing.assert_allclose(table.bayes_factor.iloc[-2], expected, rtol=1e-4)


def test_rows_of_several_tables_share_one_fdr():
    one, two = draws_with([0.99, 0.93]), draws_with([0.99, 0.6])
    assert compare(one).is_de.tolist() == [True, True]
    joint = call_at_fdr(pd.concat([summarise(one), summarise(two)]), 0.05)
    np.testing.assert_allclose(joint.expected_fdr, [0.01, 0.03, 0.01, 0.1225])


@pytest.mark.parametrize(
    ("lfc", "options", "says"),
    [
        ([[0.0]], {"delta": -0.1}, "delta"),
        ([[0.0]], {"delta": np.inf}, "delta"),
        ([[0.0]], {"fdr": 0}, "fdr"),
        ([[0.0]], {"fdr": 1.0}, "fdr"),
        ([[0.0]], {"interval": 1.5}, "interval"),
        ([[np.nan]], {}, "finite"),
        (np.empty((0, 3)), {}, "one draw"),
    ],
)
def test_compare_refuses(lfc, options, says):
    with pytest.raises(ValueError, match=says):
        compare(np.array(lfc), **options)
