"""Donors and batches in a question: who is compared with whom, and what few donors can not say."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from arms import counts_of_donors, donors

from pyrosc import differential_expression
from pyrosc.differential.design import _comparable, contrasts
from pyrosc.differential.group_sums import pseudobulk


def asked(x, side, donor, batches=None, **told):
    told = {"groupby": "side", "group": "case", "replicate_key": "donor"} | told
    return differential_expression(counts_of_donors(x, side, donor, batches), **told)


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
    (contrast,) = contrasts(
        counts_of_donors(x, side, donor, twice),
        groupby="side",
        group="case",
        reference="ref",
        replicate_key="donor",
        batch="average",
    )
    assert ((contrast.a.cells > 0) & (contrast.b.cells > 0)).sum() == 2
    assert not contrast.within.any()
    assert contrast.replicated


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
    zero, one = pseudobulk(sp.csr_array(x), np.array([0, 0, 1, 1, 1, 1]), 2, np.array([0, 0, 0, 0, 1, 1]), 2)
    used, stratum = _comparable(one, zero, np.array([0, 2]), "average", ["a", "b", "c"], "case")
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


def test_a_large_change_is_found_though_donors_differ_much():
    """Eight donors a side differ by .2 in most genes; by .5 in one, which changes 64-fold."""
    tau, lfc = np.r_[0.5, np.full(799, 0.2)], np.r_[6.0, np.repeat([1.5, -1.5, 0.0], [20, 20, 759])]
    x, side, donor, _ = donors(0, 16, tau, genes=800, equal=True, lfc=lfc, mean=3.0)
    table = asked(x, side, donor).set_index("gene").loc["0"]
    assert table.is_de
    assert table.lfc_lower > 3
