"""Between replicates: how far donors differ, and that comparisons know it."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from pyrosc import differential_expression, fit_svi, from_anndata
from pyrosc.groups import comparable, comparisons
from pyrosc.replicates import TAU2, _probabilities, _ratio, _scatter, between_replicates, squares
from pyrosc.shrinkage import LFC, _student, likelihood, shrink
from pyrosc.variation import dispersion, sums


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
    """Squares of log-normal errors scatter more than a normal's: that is no difference between genes."""
    spread = [mean_variance(*arms_of(*donors(s, 6, 0.35, paired=paired)[:3])).std() for s in range(6)]
    assert np.mean(spread) < 0.1 * 0.35**2


@pytest.mark.parametrize("n_donors", [6, 12, 24])
@pytest.mark.parametrize("paired", [False, True])
def test_squares_have_the_mean_and_the_variance_that_they_are_given(paired, n_donors):
    """Over genes that donors differ in alike."""
    there, found = np.abs(TAU2 - 0.35**2).argmin(), []
    for seed in range(4):
        tau = np.sqrt(TAU2[there])
        x, side, donor, _ = donors(seed, n_donors, tau, paired=paired, genes=2000, mean=8.0, equal=True)
        one, zero, stratum = arms_of(x, side, donor)
        seen, mean, variance = squares(one, zero, stratum, [dispersion(one), dispersion(zero)])
        slope = (mean[-1] - mean[0]) / (TAU2[-1] - TAU2[0])  # what tau^2 is multiplied by
        error = (seen - mean[there]) / slope
        found.append((error.mean(), error.var(), np.mean(variance[there] / slope**2)))
    bias, empirical, claimed = np.mean(found, 0)
    assert abs(bias) < 0.1 * TAU2[there]
    assert 0.85 < claimed / empirical < 1.3


def test_a_variance_is_as_probable_as_by_quadrature():
    """Squares of four degrees of freedom of a variance whose logarithm is normal."""
    rng = np.random.default_rng(0)
    true = np.exp(rng.normal(np.log(0.1), 0.7, 4000))
    seen = true * rng.chisquare(4, len(true))
    mean = 4 * TAU2[:, None] * np.ones(len(true))
    found = _probabilities(seen, mean, mean**2 / 2)
    prior = stats.norm.pdf(np.log(TAU2), np.log(0.1), 0.7)
    exact = prior * stats.chi2.pdf(seen[:, None] / TAU2, 4) / TAU2
    exact /= exact.sum(1, keepdims=True)
    np.testing.assert_allclose(found @ np.log(TAU2), exact @ np.log(TAU2), atol=0.05)
    below = (found * (true[:, None] > TAU2)).sum(1)
    for level in (0.05, 0.5, 0.95):
        assert np.mean(below < level) == pytest.approx(level, abs=0.03)


def test_student_of_an_inverse_gamma_variance_is_the_exact_one():
    """Of counts so large that tau^2 is all that is unknown: 2 a degrees of freedom (Smyth, 2004)."""
    variances = stats.invgamma.pdf(TAU2, 3, scale=0.3) * TAU2
    variances = variances[None] / variances.sum()
    x, p, between = np.full((1, 1), 1e9), np.full((1, 1), 0.5), np.full((1, 1), 2 / 3)
    tau2, nu = _student(x, p, np.zeros((1, 1)), between, variances)
    assert float(nu) == pytest.approx(6, rel=0.01)
    np.testing.assert_allclose(tau2, 0.1, rtol=0.01)


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


@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_scatter_of_two_replicates_by_quadrature(tau):
    """Of two, the square is 2 tanh^2 of half the difference of their logs."""
    x, w = np.polynomial.hermite_e.hermegauss(101)
    w = w / w.sum()
    square = 2 * np.tanh(np.sqrt(2) * tau * x / 2) ** 2
    mean = w @ square
    expected = (w @ square**2 - mean**2) / (2 * mean**2)
    np.testing.assert_allclose(_scatter(tau**2, 2, _ratio), expected, rtol=0.05)


def test_scatter_of_many_replicates_is_the_kurtosis_of_log_normals():
    """Delta method: kurtosis less 4 skewness cv plus 4 cv^2, the mean that divides them being their own."""
    a = 1 + 0.2**2
    found = _scatter(0.2**2, 1000, _ratio)
    np.testing.assert_allclose(found, 1 + (a**4 + 2 * a**3 - a**2 - 2) / 2, rtol=0.07)


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
