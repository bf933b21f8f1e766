"""The prior that genes share, and posteriors under it."""

import numpy as np
import pytest
import torch
from arms import arms_of, arms_of_donors, donors, negative_binomial, normal_curves
from scipy import stats

from pyrosc.differential import adaptive_shrinkage as shrinkage
from pyrosc.differential.adaptive_shrinkage import Posterior, shrink
from pyrosc.differential.quasi_likelihood import LFC, quasi_likelihood


def covered(posterior, truth, interval=0.9):
    low, high = (posterior.quantile(q) for q in ((1 - interval) / 2, (1 + interval) / 2))
    return (low <= truth) & (truth <= high)


def test_posterior_under_a_known_prior_is_the_conjugate_one():
    """With many genes of lfc ~ Normal(0, .8^2), which is a component, the prior is found."""
    rng = np.random.default_rng(7)
    se = rng.uniform(0.1, 0.5, 3000)
    truth = rng.normal(0, 0.8, 3000)
    r = rng.normal(truth, se)
    posterior = shrink(normal_curves(r, se))
    kept = 0.64 / (0.64 + se**2)
    bulk = np.abs(r) < 2
    np.testing.assert_allclose(posterior.mean[bulk], (kept * r)[bulk], atol=0.1)
    np.testing.assert_allclose(posterior.sd[bulk], (np.sqrt(kept) * se)[bulk], rtol=0.2)
    assert abs(covered(posterior, truth).mean() - 0.9) < 0.02


def test_weights_are_the_most_likely():
    """Where they are, each component's share of the genes and of the pseudo-gene is its weight."""
    rng = np.random.default_rng(3)
    curves = torch.from_numpy(normal_curves(rng.normal(0, 0.5, 400), rng.uniform(0.05, 0.5, 400)))
    evidence = curves @ shrinkage._components(3).T
    n = evidence.shape[1]
    weights = shrinkage._weights(evidence, torch.full((n,), 1 / n, dtype=torch.float64))
    share = (evidence * weights / (evidence @ weights)[:, None]).sum(0) + 1 / n
    np.testing.assert_allclose(share / 401, weights, rtol=1e-3)


def test_components_are_those_of_their_mode():
    mode = -5 * (LFC[1] - LFC[0])
    wanted = np.exp(-0.5 * ((LFC - mode) / 0.4) ** 2)
    np.testing.assert_allclose(shrinkage._components(-5)[3], wanted / wanted.sum(), atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -3.2, 1.275])
def test_the_mode_is_the_best_of_all_there_are(shift):
    """By trying each; some genes are as narrow as counts make them, some say nothing."""
    rng = np.random.default_rng(8)
    se = np.r_[rng.uniform(0.02, 0.5, 200), np.full(50, 30.0)]
    curves = torch.from_numpy(normal_curves(rng.normal(shift, 0.3, 250) + rng.normal(0, se).clip(-4, 4), se))
    weights = torch.from_numpy(rng.dirichlet(np.ones(len(shrinkage._SDS))))
    modes = range(-shrinkage._MODES, shrinkage._MODES + 1)
    priors = torch.stack([weights @ shrinkage._components(mode) for mode in modes], 1)
    torch.testing.assert_close(shrinkage._priors(weights, modes), priors, rtol=1e-10, atol=0)
    step = LFC[1] - LFC[0]
    alone = np.logaddexp(-0.5 * (np.array(modes) * step / 0.05) ** 2, shrinkage._UNLIKE)
    height = (curves @ priors).log().sum(0).numpy() + alone
    rough = curves.float().clamp(min=1e-30)
    assert shrinkage._mode(curves, rough, weights) == modes[height.argmax()]


def test_verbs_of_a_normal_posterior():
    m, s = np.array([0.3, -1.2, 2.0]), np.array([0.2, 0.5, 0.06])
    mass = normal_curves(m, s)
    posterior = Posterior(mass / mass.sum(1, keepdims=True), np.full(801, 1 / 801))
    np.testing.assert_allclose(posterior.mean, m, atol=1e-6)
    np.testing.assert_allclose(posterior.sd, s, rtol=0.01)
    for t in (-1.0, 0.25, 0.33, 1.999):
        np.testing.assert_allclose(posterior.above(t), stats.norm.sf(t, m, s), atol=3e-3)
        np.testing.assert_allclose(posterior.above(t) + posterior.below(t), 1, atol=1e-12)
    for q in (0.05, 0.5, 0.975):
        np.testing.assert_allclose(posterior.quantile(q), stats.norm.ppf(q, m, s), atol=3e-3)
    np.testing.assert_allclose(posterior.prior_de(2.0), 0.8, atol=2e-3)


def test_a_point_of_the_grid_is_spread_over_its_surroundings():
    mass = np.zeros((1, 801))
    mass[0, 400] = 1  # at 0
    posterior = Posterior(mass, mass[0])
    np.testing.assert_allclose(posterior.above(0.0), 0.5)
    np.testing.assert_allclose(posterior.quantile(0.05), 0.025 * (0.05 - 0.5), atol=1e-12)
    np.testing.assert_allclose(posterior.sd, 0.025 / np.sqrt(12))


def test_probabilities_are_no_more_than_1_where_a_sum_was_rounded_up():
    mass = normal_curves(np.array([3.0]), np.array([0.2]))
    posterior = Posterior(mass / mass.sum() * (1 + 1e-12), mass[0] / mass.sum())
    assert posterior.above(-1.0)[0] == posterior.below(7.0)[0] == 1


@pytest.mark.parametrize("prior", ["spikes", "gauss", "laplace"])
def test_intervals_cover_what_they_should(prior):
    rng = np.random.default_rng(8)
    n, hits, wrong, expected = 1500, [], 0, 0.0
    for _ in range(6):
        some = rng.random(n) < 0.2
        truth = {
            "spikes": some * rng.choice([-1.0, 1.0], n),
            "gauss": rng.normal(0, 0.5, n),
            "laplace": some * rng.laplace(0, 0.7, n),
        }[prior]
        se = rng.uniform(0.1, 0.4, n)
        posterior = shrink(normal_curves(rng.normal(truth, se), se))
        hits.append(covered(posterior, truth).mean())
        up, down = posterior.above(0.25), posterior.below(-0.25)
        called = np.maximum(up, down) > 0.7
        wrong += (truth * np.sign(up - down) <= 0.25)[called].sum()
        expected += (1 - np.maximum(up, down))[called].sum()
    # Of genes that change by nothing at all, more: the narrowest component has an sd of .05.
    assert 0.88 < np.mean(hits) < (0.92 if prior == "gauss" else 1.0)
    assert abs(wrong - expected) < 4 * np.sqrt(expected)


def test_the_prior_can_have_more_modes_than_one():
    rng = np.random.default_rng(9)
    truth = np.repeat([0.0, 1.0, -1.0], [800, 100, 100])
    prior = shrink(normal_curves(rng.normal(truth, 0.15), np.full(1000, 0.15))).prior
    at = lambda t: prior[np.argmin(abs(LFC - t))]
    assert at(1.0) > 2 * at(0.5)
    assert at(-1.0) > 2 * at(-0.5)


@pytest.mark.parametrize("shift", [-0.2, -1.5, 0.8, -3.1, 4.5])
def test_what_most_genes_have_in_common_is_subtracted(shift):
    rng = np.random.default_rng(10)
    truth = np.where(np.arange(400) < 360, shift, shift + 1.2)
    posterior = shrink(normal_curves(rng.normal(truth, 0.2), np.full(400, 0.2)))
    assert posterior.common == pytest.approx(shift, abs=0.051)
    assert LFC[posterior.prior.argmax()] == 0
    assert np.abs(posterior.mean[:360].mean()) < 0.03
    assert covered(posterior, truth - posterior.common).mean() > 0.88
    assert (posterior.above(0.25)[360:] > 0.9).mean() > 0.9


def test_few_genes_are_not_shrunk_onto_themselves():
    posterior = shrink(normal_curves(np.array([0.2]), np.array([0.1])))
    assert 0.1 < posterior.mean[0] < 0.18
    assert posterior.sd[0] > 0.08
    assert shrink(normal_curves(np.zeros(3), np.full(3, 0.1))).prior_de(0.25) > 0.1


@pytest.mark.parametrize("n", [0, 1, 7])
def test_genes_that_say_nothing_leave_the_prior(n):
    posterior = shrink(np.vstack([np.ones((n, 801)), normal_curves(np.zeros(2), np.full(2, 0.3))]))
    assert np.isfinite(posterior.mass).all()
    np.testing.assert_allclose(posterior.mass.sum(1), 1)
    for gene in range(n):
        np.testing.assert_allclose(posterior.mass[gene], posterior.prior / posterior.prior.sum())


@pytest.mark.parametrize("depth", [1.0, 0.05])
def test_a_small_group_of_sparse_cells_has_no_calls_where_nothing_differs(depth):
    """30 cells against 1470: normal approximations of log ratios err to one side here, and call all genes."""
    rng = np.random.default_rng(11)
    calls = 0
    for _ in range(5):
        base = (rng.gamma(0.6, 1.5, 300) + 0.3) * depth
        x = negative_binomial(rng, base * rng.lognormal(0, 0.3, (1500, 1)))
        x = x[x.sum(1) > 0]
        posterior = shrink(quasi_likelihood(*arms_of(x, (np.arange(len(x)) < 30).astype(int))))
        calls += (np.maximum(posterior.above(0.25), posterior.below(-0.25)) > 0.95).sum()
        assert np.abs(np.median(posterior.mean)) < 0.1
    assert calls <= 1  # of 1500 genes


def test_a_common_fold_change_out_of_reach_is_warned_of():
    curves = np.exp(-0.5 * ((LFC - 7) / 0.1) ** 2) * np.ones((30, 1))
    with pytest.warns(UserWarning, match=r"not within \+-5"):
        shrink(curves)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_cover_what_donors_make_of_fold_changes(paired):
    covered = []
    for seed in range(6):
        x, side, donor, lfc = donors(seed, 10, 0.3, paired=paired, mean=3.0, lfc_sd=0.6)
        posterior = shrink(quasi_likelihood(*arms_of_donors(x, side, donor)))
        covered.append(((posterior.quantile(0.05) <= lfc) & (lfc <= posterior.quantile(0.95))).mean())
    assert 0.865 < np.mean(covered) < 0.935  # 90%, and three standard errors
