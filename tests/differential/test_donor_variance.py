"""Between replicates: how far donors differ, and that comparisons know it."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import optimize, special, stats

from pyrosc import differential_expression, fit_svi, from_anndata
from pyrosc.differential import donor_variance as replicates
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.design import comparable, comparisons
from pyrosc.differential.dispersion import dispersion
from pyrosc.differential.donor_variance import TAU2, _posterior, _priors, between_replicates, evidence
from pyrosc.differential.group_sums import Arm, sums
from pyrosc.differential.quasi_likelihood import LFC, _log_likelihood, _student, likelihood


def donors(seed, n_donors, tau, *, paired=False, genes=300, lfc_sd=0.0, mean=None, equal=False, lfc=None):
    """Counts, each cell's side and donor, and true log2 fold changes; tau: of a donor on a side."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.6, 1.5, genes) + 0.3 if mean is None else np.full(genes, mean)
    donor = np.repeat(np.arange(n_donors), 100 if equal else rng.integers(30, 170, n_donors))
    side = rng.integers(0, 2, len(donor)) if paired else donor % 2
    lfc = rng.normal(0, lfc_sd, genes) if lfc is None else lfc
    own = rng.normal(0, 0.5, (n_donors, genes)) * paired  # of the donor, the same on either side
    rates = np.log(mean) + np.log(2) * lfc * side[:, None] + own[donor]
    rates = rates + rng.normal(0, tau, (n_donors, 2, genes))[donor, side]
    lfc = lfc - np.log2((mean * 2**lfc).sum() / mean.sum())  # of shares
    mu = np.exp(rates) * rng.lognormal(0, 0.3, (len(donor), 1))
    return rng.poisson(rng.gamma(3, mu / 3)).astype(np.float32), side, donor, lfc


def arms_of(x, side, donor):
    """Sums over the donors' cells of side 1 and side 0, and the strata: of paired donors each its own."""
    zero, one = sums(sp.csr_array(x), side, 2, donor, int(donor.max()) + 1)
    paired = (one.cells > 0) & (zero.cells > 0)
    stratum = np.unique(np.where(paired, 1 + np.arange(len(paired)), 0), return_inverse=True)[1]
    return one, zero, stratum


def mean_variance(one, zero, stratum):
    """Each gene's expected tau^2."""
    return between_replicates(one, zero, stratum, [dispersion(one), dispersion(zero)]) @ TAU2


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.35])
def test_variance_between_replicates_is_that_of_the_simulation(paired, tau):
    found = [mean_variance(*arms_of(*donors(seed, 12, tau, paired=paired)[:3])).mean() for seed in range(3)]
    np.testing.assert_allclose(np.mean(found), tau**2, rtol=0.15, atol=0.003)


@pytest.mark.parametrize("paired", [False, True])
def test_genes_that_donors_differ_in_alike_get_one_variance(paired):
    spread = [mean_variance(*arms_of(*donors(s, 6, 0.35, paired=paired)[:3])).std() for s in range(6)]
    assert np.mean(spread) < 0.1 * 0.35**2


def poisson_arms(seed, n, tau, *, paired, genes=3000, mean=10.0, unequal=False):
    """Arms of n donors a side, each one unit of Poisson counts: there is no dispersion between cells."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(np.arange(n), 2) if paired else np.arange(2 * n)
    depth = rng.uniform(0.3, 1.7, 2 * n) if unequal else np.ones(2 * n)
    mu = mean * depth[:, None] * np.exp(tau * rng.normal(0, 1, (2 * n, genes)))
    return arms_of(rng.poisson(mu).astype(np.float32), np.arange(2 * n) % 2, donor)


def arm_of_one_gene(x, l, cells=30):
    """Sums over units of so many cells alike, of which a gene has x counts."""
    x, l = np.array(x, float), np.array(l, float)
    column = x[:, None]
    return Arm(np.where(l > 0, cells, 0.0), column, l, l**2 / cells, column, column, column)


def adjusted(log_likelihood, information, start):
    """Largest log likelihood of a common rate or fold change, less half the log of what is known of it."""
    best = optimize.minimize_scalar(lambda at: -log_likelihood(at), bracket=(start - 0.5, start + 0.5))
    return -best.fun - 0.5 * np.log(information(best.x))


@pytest.mark.parametrize("tau2", [0.01, 0.3, 3.0])
def test_evidence_of_one_side_is_the_negative_binomials(tau2):
    """Two strata of one side and another side that says nothing: by scipy and a search for the rate."""
    x, l = np.array([12, 3, 40, 0, 9, 5]), np.array([900, 700, 1500, 400, 600, 800])
    stratum, phi = [0, 0, 0, 0, 1, 1], 0.7
    one, zero = arm_of_one_gene(x, l), arm_of_one_gene(0 * x, 0 * l)
    found = evidence(one, zero, np.array(stratum), [np.array([phi]), np.array([0.0])])[0]
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
def test_evidence_of_pairs_is_the_beta_binomials(tau2):
    """Totals and dispersions unlike; by scipy, and a search for the fold change by the same equation."""
    xa, xb, phi = np.array([12, 3, 40, 7, 9]), np.array([5, 4, 31, 6, 2]), [0.5, 3.0]
    la, lb = np.array([2000, 500, 900, 1000, 3000]), np.array([700, 800, 1200, 2500, 600])
    one, zero = arm_of_one_gene(xa, la), arm_of_one_gene(xb, lb)
    found = evidence(one, zero, np.arange(5), [np.array([f]) for f in phi])[0]
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
    np.testing.assert_allclose(evidence(one, zero, stratum, phi), evidence(*paired, alike, phi))


def test_a_single_pair_beside_others_shows_nothing():
    on = np.array([1, 1, 0, 0, 1, 0])
    x, l = np.array([12, 3, 40, 6, 9, 22]), np.full(6, 1000.0)
    one, zero = (arm_of_one_gene(x * side, l * side) for side in (on, 1 - on))
    phi = [np.array([0.5])] * 2
    four = np.arange(4)
    without = evidence(one[four], zero[four], np.zeros(4, int), phi)
    np.testing.assert_allclose(evidence(one, zero, np.array([0, 0, 0, 0, 1, 1]), phi), without)


def test_the_fold_change_of_pairs_is_found_where_pooled_counts_mislead():
    """Donors have most cells on opposite sides, two of them 1e4 times more of the gene."""
    one = arm_of_one_gene([50_000, 52_000, 0, 1, 4], [1e6, 1e6, 2e4, 2e4, 1e6])
    zero = arm_of_one_gene([1000, 950, 5, 4, 5], [2e4, 2e4, 1e6, 1e6, 1e6])
    arms = one, zero, np.arange(5), [np.zeros(1)] * 2
    found = evidence(*arms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicates, "_STEPS", 40)
        np.testing.assert_allclose(found, evidence(*arms), atol=0.1)


@pytest.mark.parametrize("paired", [False, True])
def test_cells_of_any_dispersion_can_be_compared(paired):
    one, zero = (arm_of_one_gene([60, 3, 0, 2], l, cells=1) for l in ([9e3, 10, 8e3, 20], [10, 9e3, 20, 8e3]))
    stratum = np.arange(4) if paired else np.zeros(4, int)
    assert evidence(one, zero, stratum, [np.array([1e5])] * 2).isfinite().all()


@pytest.mark.parametrize("paired", [False, True])
def test_evidence_of_large_counts_is_that_of_normal_logs(paired):
    """Of ten donors a side, or ten pairs, chi-squared with 18 or 9 degrees of freedom."""
    one, zero, stratum = poisson_arms(0, 10, 0.03, paired=paired, genes=40, mean=1e7)
    found = evidence(one, zero, stratum, [np.zeros(40)] * 2).numpy()
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
    found = between_replicates(*arms, [np.zeros(3000)] * 2) @ TAU2
    np.testing.assert_allclose(np.median(found), tau**2, rtol=0.2)


@pytest.mark.parametrize("paired", [False, True])
def test_rare_genes_show_no_variance_where_there_is_none(paired):
    arms = poisson_arms(0, 6, 0.0, paired=paired, mean=np.repeat([0.2, 30.0], 1500))
    found = between_replicates(*arms, [np.zeros(3000)] * 2) @ TAU2
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
    found = between_replicates(*arms, [np.zeros(1000)] * 2) @ TAU2
    assert np.median(found[:20]) > 1
    np.testing.assert_allclose(np.median(found[20:]), 0.04, rtol=0.15)


def test_a_gene_that_one_technical_replicate_has_spoils_no_other():
    one, zero, stratum = poisson_arms(0, 20, 0.0, paired=False, mean=1e4)
    for arm in (one, zero):
        arm.x[:, 0] = np.where(np.arange(len(arm.l)) == np.flatnonzero(arm.cells)[0], 2e5, 0)
    found = between_replicates(one, zero, stratum, [np.zeros(3000)] * 2)
    assert np.isfinite(found).all()
    assert found[0] @ TAU2 > 3
    assert (found[1:] @ TAU2).max() < 0.01


def test_genes_with_the_same_count_in_every_donor_show_no_variance():
    one, zero, stratum = poisson_arms(0, 20, 0.15, paired=False, genes=300)
    for arm in (one, zero):
        arm.x[:, 0] = 10.0 * arm.l / arm.l.max()
    found = between_replicates(one, zero, stratum, [np.zeros(300)] * 2) @ TAU2
    assert found[0] < 0.03


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


@pytest.mark.parametrize("tau", [0.0, 0.35])
def test_donors_one_on_each_side_of_a_batch_show_it_too(tau):
    found = []
    for seed in range(3):
        one, zero, _ = arms_of(*donors(seed, 12, tau)[:3])
        # A donor of either side in each of six batches.
        found.append(mean_variance(one, zero, np.arange(12) // 2).mean())
    np.testing.assert_allclose(np.mean(found), tau**2, rtol=0.15, atol=0.003)


def test_one_replicate_a_side_says_nothing_of_their_variance():
    one, zero, stratum = arms_of(*donors(0, 2, 0.3)[:3])
    assert between_replicates(one, zero, stratum, [dispersion(one), dispersion(zero)]) is None


@pytest.mark.parametrize("paired", [False, True])
def test_likelihood_has_the_width_of_the_error_between_replicates(paired):
    """Over simulated genes, the curve's peak spreads as its own width says; by cells alone it is narrower."""
    x, side, donor, _ = donors(1, 8, 0.3, paired=paired, genes=1500, mean=4.0, equal=True)
    widths, spreads = [], []
    for one, zero, stratum in (arms_of(x, side, donor), arms_of(x, side, np.zeros_like(donor))):
        curves = likelihood(one, zero, stratum)
        weights = curves / curves.sum(1, keepdims=True)
        at = weights @ LFC
        widths.append(np.sqrt((weights * (LFC - at[:, None]) ** 2).sum(1)).mean())
        spreads.append(at.std())
    np.testing.assert_allclose(widths[0], spreads[0], rtol=0.1)
    assert widths[1] < 0.7 * spreads[1]


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_cover_what_donors_make_of_fold_changes(paired):
    covered = []
    for seed in range(6):
        x, side, donor, lfc = donors(seed, 10, 0.3, paired=paired, mean=3.0, lfc_sd=0.6)
        posterior = shrink(likelihood(*arms_of(x, side, donor)))
        covered.append(((posterior.quantile(0.05) <= lfc) & (lfc <= posterior.quantile(0.95))).mean())
    assert 0.865 < np.mean(covered) < 0.935  # 90%, and three standard errors


# --- as a question


class Shares(torch.nn.Module):
    """A program that has nothing to train but shares: means are compared without it."""

    def __init__(self, n_genes):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(n_genes))

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            rho = pyro.deterministic("rho", self.logits.softmax(-1).expand(len(cells), -1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        pass


def fitted(x, side, donor, batches=None):
    names = [f"cell {i}" for i in range(len(x))]
    obs = pd.DataFrame({"side": np.array(["ref", "case"])[side], "donor": [f"d{i}" for i in donor]}, names)
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
    if batches is not None:
        adata.obs["batch"] = [f"b{i}" for i in batches]
    data = from_anndata(adata, batch_key=None if batches is None else "batch")
    return fit_svi(Shares(x.shape[1]), data, epochs=1, progress=False), adata


def asked(x, side, donor, batches=None, **told):
    told = {"groupby": "side", "group": "case", "replicate_key": "donor"} | told
    return differential_expression(*fitted(x, side, donor, batches), **told)


@pytest.mark.parametrize("paired", [False, True])
def test_donors_that_differ_are_no_difference_of_their_groups(paired):
    x, side, donor, _ = donors(0, 6, 0.35, paired=paired)
    table = asked(x, side, donor)
    assert not table.is_de.any()
    assert (table.replicates == (6 if paired else 3)).all()
    assert (table.replicates_reference == (6 if paired else 3)).all()
    assert asked(x, side, donor, replicate_key=None).is_de.sum() > 3


def test_donors_one_on_each_side_of_a_batch_are_no_difference_of_their_groups():
    x, side, donor, lfc = donors(0, 8, 0.35, equal=True)
    table = asked(x, side, donor, batches=donor // 2)
    assert not table.is_de.any()
    lfc = lfc[table.gene.astype(int)]
    assert ((table.lfc_lower <= lfc) & (lfc <= table.lfc_upper)).mean() > 0.85
    assert (table.replicates == 4).all()


def donors_of_both_kinds(seed, n_paired, others):
    """Cells, sides, donors and batches: paired donors in batch 0; others, in batches of `others` a side."""
    x, side, donor, lfc = donors(
        seed, n_paired + 2 * sum(others), 0.05, paired=True, genes=1000, mean=3.0, lfc_sd=0.7
    )
    batch = np.repeat(np.arange(1 + len(others)), [n_paired, *(2 * n for n in others)])[donor]
    keep = (batch == 0) | (side == donor % 2)  # each of the others has one side only
    return x[keep], side[keep], donor[keep], batch[keep], lfc


@pytest.mark.parametrize("others", [[1], [1, 1], [3]])
def test_donors_of_one_side_take_nothing_from_those_of_both(others):
    """Donors differ by .5, the sides of one by .05: with the others no fewer genes are found than without."""
    x, side, donor, batch, lfc = donors_of_both_kinds(0, 4, others)
    found = []
    for use in (batch == 0, batch >= 0):
        table = asked(x[use], side[use], donor[use], batches=batch[use])
        true = lfc[table.gene.astype(int)] - table.lfc_common
        found.append((table.is_de & (np.abs(true) > 0.25)).sum())
        assert ((table.lfc_lower <= true) & (true <= table.lfc_upper)).mean() > 0.88
    assert found[1] > 0.98 * found[0]


def test_a_lone_pair_of_donors_beside_those_of_both_sides_is_left_out():
    """Nothing shows how far the two differ: they are in no column of the table."""
    x, side, donor, batch, _ = donors_of_both_kinds(0, 2, [1])
    table, without = (asked(x[use], side[use], donor[use]) for use in (batch >= 0, batch == 0))
    pd.testing.assert_frame_equal(table, without)
    assert (table.replicates == 2).all()
    assert table.is_de.any()


@pytest.mark.parametrize("n_donors", [4, 6])
def test_genes_of_which_few_donors_differ_most_are_no_difference_of_their_groups(n_donors):
    """Two or three a side, the sd of a gene's donors log-normal: sides that agree by chance say little."""
    called = 0
    for seed in range(4):
        tau = 0.5 * np.exp(np.random.default_rng(seed).normal(0, 0.5, 800))
        x, side, donor, _ = donors(seed, n_donors, tau, genes=800, equal=True)
        called += asked(x, side, donor).is_de.sum()
    assert called <= 1


@pytest.mark.parametrize("paired", [False, True])
def test_genes_of_which_donors_differ_little_are_found_among_those_of_which_they_differ_much(paired):
    """Six a side, or six of both; sd log-normal about .35: calls are right, and there are some."""
    found, false = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tau, lfc = 0.35 * np.exp(rng.normal(0, 0.5, 600)), np.repeat([1.0, -1.0, 0.0], [40, 40, 520])
        x, side, donor, _ = donors(
            seed, 6 if paired else 12, tau, paired=paired, genes=600, equal=True, lfc=lfc
        )
        table = asked(x, side, donor)
        changed = lfc[table.gene.astype(int)] != 0
        found.append((table.is_de & changed).sum())
        false.append((table.is_de & ~changed).sum())
    assert np.mean(found) > (3 if paired else 15)
    assert np.sum(false) <= 0.1 * np.sum(found)


def test_a_single_donor_of_both_sides_is_one_of_those_of_one():
    """In two batches it has two fold changes, which says nothing of how other donors' differ."""
    x, side, donor, batch, _ = donors_of_both_kinds(0, 1, [4])
    twice = np.where(donor == 0, 2 * (np.arange(len(x)) % 2), batch)
    fit, adata = fitted(x, side, donor, twice)
    (pair,) = comparisons(
        fit,
        from_anndata(adata, batch_key="batch"),
        groupby="side",
        group="case",
        reference="ref",
        replicate_key="donor",
        batch="average",
    )
    assert ((pair.a.cells > 0) & (pair.b.cells > 0)).sum() == 2
    assert not pair.within.any()
    assert pair.replicated


def test_fold_changes_beyond_what_donors_do_are_found():
    x, side, donor, lfc = donors(1, 12, 0.2, lfc_sd=1.0, mean=3.0)
    table = asked(x, side, donor).set_index("gene").loc[[str(g) for g in range(len(lfc))]]
    assert table.is_de[np.abs(lfc) > 1].mean() > 0.7
    wrong = np.sign(table.lfc_mean) != np.sign(lfc)
    assert (wrong & table.is_de).sum() <= 0.05 * table.is_de.sum()


def test_cells_of_no_donor_are_left_out():
    x, side, donor, _ = donors(2, 6, 0.2)
    known = donor > 0
    names = pd.Series([f"d{i}" for i in donor]).where(known, None).to_numpy()
    table, without = asked(x, side, donor, replicate_key=names), asked(x[known], side[known], donor[known])
    pd.testing.assert_frame_equal(table, without)


def test_a_donor_of_both_sides_shares_its_stratum_with_no_batch():
    """Two units of three batches: batch 2 has one side only, and says nothing, whatever the others' codes."""
    x = np.ones((6, 3), np.float32)
    zero, one = sums(sp.csr_array(x), np.array([0, 0, 1, 1, 1, 1]), 2, np.array([0, 0, 0, 0, 1, 1]), 2)
    used, stratum = comparable(one, zero, np.array([0, 2]), "average", ["a", "b", "c"], "case")
    assert used.tolist() == [0]
    assert stratum.tolist() == [0]


def test_a_single_donor_on_a_side_is_warned_of():
    x, side, donor, _ = donors(3, 3, 0.2)
    with pytest.warns(UserWarning, match="1 replicates .* about these replicates only"):
        asked(x, side, donor)


def test_donors_whose_batch_has_one_side_only_are_named_as_the_reason():
    x, side, donor, _ = donors(3, 6, 0.2)
    batch = np.where(donor < 2, 0, 1 + donor % 2)
    with pytest.warns(UserWarning, match="others are in batches of one side only: batch=None"):
        asked(x, side, donor, batches=batch)


def test_a_group_without_any_donor_is_named():
    x, side, donor, _ = donors(3, 6, 0.2)
    names = pd.Series([f"d{i}" for i in donor]).where(side == 0, None).to_numpy()
    with pytest.raises(ValueError, match=r"'case' has 0 cells.*no cell of case has a value of replicate_key"):
        asked(x, side, donor, replicate_key=names)


@pytest.mark.filterwarnings("ignore:group 'case' has cells of 1 replicates")
@pytest.mark.parametrize("on_both", [False, True])
def test_of_a_single_donor_on_a_side_nothing_is_called(on_both):
    """What its cells show is in the table; whether it is more than what donors differ by nobody knows."""
    x, side, donor, _ = donors(3, 2 if on_both else 3, 0.2, lfc_sd=1.0)
    donor = donor if on_both else np.where(side == 1, 9, donor)
    table = asked(x, side, donor)
    assert not table.is_de.any()
    assert table.expected_fdr.isna().all()
    assert (table.replicates == 1).all()
    assert (table.p_de > 0.99).sum() > 10
    assert table[["lfc_mean", "lfc_lower", "lfc_upper"]].notna().all(axis=None)
    wrong = 1 - table[["p_up", "p_down"]].max(axis=1)
    assert wrong.clip(lower=1e-9).is_monotonic_increasing


@pytest.mark.filterwarnings("ignore:group 'few' has cells of 1 replicates")
def test_what_a_single_donor_shows_lowers_no_others_false_discovery_rate():
    x, side, donor, _ = donors(1, 12, 0.2, lfc_sd=1.0, mean=3.0)
    kind = np.array(["ref", "case"])[side]
    kind[(donor == donor[side == 1][0]) & (np.arange(len(x)) % 2 == 0)] = "few"
    both = asked(x, side, donor, groupby=kind, group=["case", "few"], reference="ref")
    alone = asked(x, side, donor, groupby=kind, group="case", reference="ref")
    pd.testing.assert_frame_equal(both[both.group == "case"], alone)
    assert alone.is_de.any()
    few = both[both.group == "few"]
    assert not few.is_de.any()
    assert few.expected_fdr.isna().all()


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        ({"replicate_key": "patient"}, KeyError, "no column 'patient'"),
        ({"replicate_key": ["d"]}, ValueError, "replicate_key has 1 values"),
        ({"estimand": "cell"}, ValueError, 'estimand="mean"'),
    ],
)
def test_replicates_are_refused_with_a_reason(told, error, says):
    with pytest.raises(error, match=says):
        asked(*donors(4, 4, 0.2, genes=20)[:3], **told)


def test_cells_without_any_donor_are_refused():
    x, side, donor, _ = donors(4, 4, 0.2, genes=20)
    with pytest.raises(ValueError, match="no cell has a replicate"):
        asked(x, side, donor, replicate_key=np.full(len(x), None))


@pytest.mark.parametrize("paired", [False, True])
def test_genes_of_which_donors_differ_more_than_others_have_longer_tails(paired):
    """Variances between donors are an inverse chi-squared of six degrees of freedom times .09."""
    inside = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tau = 0.3 * np.sqrt(6 / rng.chisquare(6, 1000))
        x, side, donor, lfc = donors(seed, 8, tau, paired=paired, genes=1000, mean=4.0, equal=True)
        curves = likelihood(*arms_of(x, side, donor))
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


def test_a_large_change_is_found_though_donors_differ_much():
    """Eight donors a side differ by .2 in most genes; by .5 in one, which changes 64-fold."""
    tau, lfc = np.r_[0.5, np.full(799, 0.2)], np.r_[6.0, np.repeat([1.5, -1.5, 0.0], [20, 20, 759])]
    x, side, donor, _ = donors(0, 16, tau, genes=800, equal=True, lfc=lfc, mean=3.0)
    table = asked(x, side, donor).set_index("gene").loc["0"]
    assert table.is_de
    assert table.lfc_lower > 3
