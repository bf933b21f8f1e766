"""What a condition does to one type less what it does to another: known answers, truth recovered, errors."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from pyrosc import interaction
from pyrosc.differential.interaction import _of_difference
from pyrosc.differential.quasi_likelihood import LFC

QUESTION = {"groupby": "condition", "group": "stim", "reference": "ctrl", "by": "cell_type", "baseline": "T"}


def simulated(seed, n_genes=300, n=1600, response=0.0, changed=0, spread=0.0, tau=0.0, n_donors=8):
    """Two types under two conditions in each of some donors; the true difference of their fold changes.

    `response`: sd of the log2 fold change that both types have; `changed` genes have another +-1 in B, and
    all genes one of sd `spread`.
    """
    rng = np.random.default_rng(seed)
    stim, kind, donor = (rng.integers(0, k, n) for k in (2, 2, n_donors))
    log_mean = np.log(rng.gamma(0.6, 1.5, n_genes) + 0.3) + rng.normal(0, 0.5, (2, n_genes)) * [[0], [1]]
    lfc = rng.normal(0, response, (1, n_genes)) * np.ones((2, 1))
    lfc[1, :changed] += rng.choice([-1, 1], changed)
    lfc[1] += rng.normal(0, spread, n_genes)
    own = rng.normal(0, tau, (n_donors, 2, 2, n_genes))
    log = log_mean[kind] + np.log(2) * lfc[kind] * stim[:, None] + own[donor, kind, stim]
    of_shares = [
        np.log2(np.exp(m + np.log(2) * t).sum() / np.exp(m).sum()) for m, t in zip(log_mean, lfc, strict=True)
    ]
    lfc = lfc - np.array(of_shares)[:, None]
    x = rng.poisson(rng.gamma(3, np.exp(log) / 3 * rng.lognormal(0, 0.3, (n, 1)))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "condition": np.where(stim, "stim", "ctrl"),
            "cell_type": np.where(kind, "B", "T"),
            "donor": [f"d{d}" for d in donor],
        },
        index=[f"c{i}" for i in range(n)],
    )
    return ad.AnnData(sp.csr_matrix(x), obs=obs), lfc[1] - lfc[0]


@pytest.fixture(scope="module")
def adata():
    return simulated(0, n_genes=40, n=400)[0]


def in_order(table, adata):
    return table.set_index("gene").loc[adata.var_names]


# --- the likelihood of a difference


def test_of_normal_curves_it_is_normal():
    """The difference of N(m, s^2) and N(n, r^2) is N(m - n, s^2 + r^2)."""
    m, s, n, r = np.array([1.0, -2.0]), np.array([0.3, 0.5]), np.array([0.5, 1.0]), np.array([0.4, 0.1])
    a, b = (stats.norm.pdf(LFC, at[:, None], sd[:, None]) for at, sd in ((m, s), (n, r)))
    found = _of_difference(a / a.max(1, keepdims=True), b / b.max(1, keepdims=True))
    true = stats.norm.pdf(LFC, (m - n)[:, None], np.hypot(s, r)[:, None])
    np.testing.assert_allclose(found, true / true.max(1, keepdims=True), atol=1e-6)


def test_of_a_curve_that_knows_nothing_neither_does_it():
    known = np.exp(-0.5 * ((LFC - 1) / 0.2) ** 2)[None]
    flat = np.ones_like(known)
    for a, b in ((known, flat), (flat, known), (flat, flat)):
        found = _of_difference(a, b)[0]
        np.testing.assert_allclose(found[np.abs(LFC) < 8], 1, atol=1e-6)


def test_a_bound_stays_a_bound():
    """No count in one arm: a fold change of at least 2, less one of 0.5, is at least 1.5."""
    least = (1 / (1 + np.exp(-(LFC - 2) / 0.05)))[None]
    known = np.exp(-0.5 * ((LFC - 0.5) / 0.05) ** 2)[None]
    found = _of_difference(least, known)[0]
    assert found[LFC < 1].max() < 1e-3
    assert found[LFC > 2].min() > 0.99


# --- simulations


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_a_response_that_both_have_is_no_difference(tau):
    calls = []
    for seed in range(4):
        adata, _ = simulated(seed, response=1.0, tau=tau)
        key = {"replicate_key": "donor"} if tau else {}
        calls.append(interaction(adata, **QUESTION, **key).is_de.sum())
    assert np.median(calls) == 0
    assert max(calls) <= 2


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_genes_that_respond_otherwise_are_found(tau):
    found, false = [], []
    for seed in range(4):
        adata, _ = simulated(10 + seed, response=0.7, changed=40, tau=tau)
        key = {"replicate_key": "donor"} if tau else {}
        table = in_order(interaction(adata, **QUESTION, **key), adata)
        called, changed = table.is_de.to_numpy(), np.arange(300) < 40
        found.append(called[changed].sum())
        false.append(called[~changed].sum() / max(1, called.sum()))
    assert np.mean(found) > (28 if tau == 0 else 14)
    assert np.mean(false) < 0.1


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_intervals_cover_the_truth(tau):
    """Of 90%, over genes whose responses all differ, to some extent."""
    covered = []
    for seed in range(4):
        adata, true = simulated(20 + seed, response=0.7, spread=0.5, tau=tau)
        key = {"replicate_key": "donor"} if tau else {}
        table = in_order(interaction(adata, **QUESTION, **key), adata)
        covered.append(((table.lfc_lower <= true) & (true <= table.lfc_upper)).mean())
    assert np.mean(covered) == pytest.approx(0.9, abs=0.035)


# --- the table


def test_columns_and_order(adata):
    table = interaction(adata, **QUESTION)
    assert list(table)[:5] == ["gene", "level", "baseline", "group", "reference"]
    assert list(table)[-2:] == ["lfc_level", "lfc_baseline"]
    assert set(table.gene) == set(adata.var_names)
    assert (table.level == "B").all()
    assert (table.expected_fdr.diff().dropna() >= -1e-12).all()
    np.testing.assert_allclose(
        np.corrcoef(table.lfc_mean, table.lfc_level - table.lfc_baseline)[0, 1], 1, atol=0.1
    )


def test_what_most_genes_do_is_subtracted_and_named():
    """Where one gene takes two thirds of one group's counts, the shares of all others fall there alone."""
    adata, _ = simulated(3, n_genes=60, n=800)
    there = (adata.obs.condition == "stim") & (adata.obs.cell_type == "B")
    x = adata.X.toarray()
    x[there, 0] += np.random.default_rng(0).poisson(2 * x[there].sum(1))
    adata.X = sp.csr_matrix(x)
    table = in_order(interaction(adata, **QUESTION), adata)
    np.testing.assert_allclose(table.lfc_common, np.log2(1 / 3), atol=0.1)
    assert table.lfc_mean.iloc[1:].abs().median() < 0.1
    assert table.lfc_mean.iloc[0] > 3


def test_the_other_way_round_all_signs_change(adata):
    one = in_order(interaction(adata, **QUESTION), adata)
    other = in_order(interaction(adata, **QUESTION | {"baseline": "B"}), adata)
    np.testing.assert_allclose(one.lfc_mean, -other.lfc_mean, atol=0.01)
    np.testing.assert_allclose(one.p_up, other.p_down, atol=0.01)


def test_several_levels_are_called_jointly(adata):
    kind = adata.obs.cell_type.where(np.arange(adata.n_obs) % 3 > 0, "NK")
    table = interaction(adata, **QUESTION | {"by": kind})
    assert list(table.level.unique()) == ["B", "NK"]
    assert len(table) == 2 * adata.n_vars
    one = interaction(adata, **QUESTION | {"by": kind}, level="NK")
    assert list(one.level.unique()) == ["NK"]
    np.testing.assert_allclose(one.lfc_mean, table[table.level == "NK"].lfc_mean)


def test_nothing_is_written(adata):
    before = adata.copy()
    interaction(adata, **QUESTION)
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)


def test_a_single_donor_on_a_side_is_warned_of(adata):
    donor = np.where((adata.obs.cell_type == "B") & (adata.obs.condition == "stim"), "x", adata.obs.donor)
    with pytest.warns(UserWarning, match="group 'stim, B' has cells of 1 replicates"):
        table = interaction(adata, **QUESTION, replicate_key=donor)
    assert (table.replicates == 1).all()
    assert table.expected_fdr.isna().all()
    assert not table.is_de.any()
    assert (interaction(adata, **QUESTION, replicate_key="donor").replicates == 8).all()


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"baseline": "Z"}, ValueError, "no level 'Z'; there are B, T"),
        ({"level": "Z"}, ValueError, "no level 'Z'; there are B, T"),
        ({"level": ["T"]}, ValueError, "other than the baseline 'T'"),
        ({"level": []}, ValueError, "other than the baseline 'T'"),
        ({"by": "nothing"}, KeyError, "no column 'nothing'"),
        ({"group": "nobody"}, ValueError, "no group 'nobody'"),
        ({"reference": "rest"}, ValueError, "reference names a group"),
        ({"delta": -1}, ValueError, "at least 0"),
        ({"by": "condition", "baseline": "ctrl"}, ValueError, "'stim, ctrl' has 0 cells .* leave it out"),
    ],
)
def test_what_can_not_be_asked_is_refused(wrong, error, says, adata):
    with pytest.raises(error, match=says):
        interaction(adata, **QUESTION | wrong)


def test_a_level_without_both_groups_is_refused(adata):
    kind = np.where(adata.obs.condition == "stim", "T", adata.obs.cell_type)
    with pytest.raises(ValueError, match="group 'stim, B' has 0 cells"):
        interaction(adata, **QUESTION | {"by": kind})


def test_by_default_levels_of_too_few_cells_are_left_out_with_a_warning(adata):
    kind = adata.obs.cell_type.astype(str).to_numpy(copy=True)
    kind[np.flatnonzero((kind == "B") & (adata.obs.condition == "ctrl"))[:1]] = "rare"
    told = {"groupby": "condition", "group": "stim", "reference": "ctrl", "by": kind, "baseline": "T"}
    with pytest.warns(UserWarning, match="fewer than two cells of either group are left out: rare"):
        table = interaction(adata, **told)
    pd.testing.assert_frame_equal(table, interaction(adata, **told, level="B"))


def test_what_the_types_of_a_donor_have_in_common_cancels():
    """Three donors of either condition, whose effects both their types share."""
    found, false, inside = 0, 0, []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        donor, kind = rng.integers(0, 6, 1200), rng.integers(0, 2, 1200)
        stim = donor % 2
        lfc = np.r_[np.ones(20), -np.ones(10), np.zeros(270)]
        log = np.log(rng.gamma(0.6, 1.5, 300) + 0.5) + rng.normal(0, 0.3, (6, 300))[donor]
        log = log + np.log(2) * lfc * (stim * kind)[:, None]
        x = rng.poisson(rng.gamma(3, np.exp(log) / 3)).astype(np.float32)
        obs = pd.DataFrame(
            {
                "condition": np.where(stim, "stim", "ctrl"),
                "cell_type": np.where(kind, "B", "T"),
                "donor": [f"d{d}" for d in donor],
            },
            index=[f"c{i}" for i in range(1200)],
        )
        adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
        table = in_order(interaction(adata, **QUESTION, replicate_key="donor"), adata)
        called = table.is_de.to_numpy()
        found, false = found + called[:30].sum(), false + called[30:].sum()
        inside.append(((table.lfc_lower <= lfc) & (lfc <= table.lfc_upper))[:30])
    assert found > 60  # of 90
    assert false <= 0.1 * found
    assert np.mean(inside) > 0.8


def test_levels_are_named_once(adata):
    with pytest.raises(ValueError, match="each once"):
        interaction(adata, **QUESTION, level=["B", "B"])


def test_cells_of_another_condition_do_not_change_how_donors_are_paired():
    adata, _ = simulated(3, n_genes=60, tau=0.3, n_donors=6, changed=10)
    rng = np.random.default_rng(0)
    other = rng.random(adata.n_obs) < 0.2
    of_type = np.isin(adata.obs.donor, ["d0", "d1", "d2"]) == (adata.obs.cell_type == "T")
    donor = np.where(other, [f"x{i}" for i in rng.integers(0, 10, adata.n_obs)], adata.obs.donor)
    adata.obs = adata.obs.assign(donor=donor, condition=np.where(other, "other", adata.obs.condition))
    adata = adata[other | of_type].copy()  # each donor of one type, but those of the third condition of both
    alone = interaction(adata[adata.obs.condition != "other"], **QUESTION, replicate_key="donor")
    assert alone.replicates.eq(3).all()
    pd.testing.assert_frame_equal(interaction(adata, **QUESTION, replicate_key="donor"), alone)
