"""Tables of differential expression: truth found, calls, groups, batches, refusals."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

import pyrosc
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import compare
from pyrosc.differential.expression import differential_expression
from pyrosc.differential.group_sums import pseudobulk
from pyrosc.differential.quasi_likelihood import quasi_likelihood

EACH = ["lfc_mean", "lfc_sd", "lfc_lower", "lfc_upper", "p_up", "p_down", "p_equivalent", "p_de", "p_de_se"]
CALLS = ["bayes_factor", "expected_fdr", "is_de"]
RAW = ["lfc_common"] + [
    name + side for side in ("", "_reference") for name in ("mean_share", "raw_mean", "expressing")
]


def ask(fit, data, **options):
    return differential_expression(fit, data, **({"groupby": "cell_type"} | options))


def truth(typed, group, reference):
    return np.log2(typed.var[f"share_{group}"] / typed.var[f"share_{reference}"])


def by_gene(table):
    return table.set_index("gene")


# --- the table, and its groups


@pytest.mark.parametrize(("estimand", "rmse", "power"), [("mean", 0.2, 0.85), ("cell", 0.45, 0.5)])
def test_true_fold_changes_are_found(typed, typed_fit, estimand, rmse, power):
    table = by_gene(ask(typed_fit, typed, group="type_0", reference="type_1", estimand=estimand))
    true = truth(typed, "type_0", "type_1").loc[table.index] - table.lfc_common
    assert np.sqrt(np.mean((table.lfc_mean - true) ** 2)) < rmse
    big = np.abs(true) > 1
    assert big.sum() > 20
    called = table.is_de
    assert (called & big).sum() > power * big.sum()
    assert (true * np.sign(table.lfc_mean) < 0.25)[called].mean() < 0.1
    assert ((table.lfc_lower <= true) & (true <= table.lfc_upper)).mean() > 0.8


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_the_table(typed, typed_fit, estimand):
    table = ask(typed_fit, typed, estimand=estimand, n_draws=50)
    assert list(table) == ["gene", "group", "reference", *EACH, *CALLS, *RAW]
    assert len(table) == 3 * 80
    assert table.group.unique().tolist() == ["type_0", "type_1", "type_2"]
    assert (table.reference == "rest").all()
    for _, rows in table.groupby("group"):
        assert sorted(rows.gene) == sorted(typed.var_names)
        assert rows.expected_fdr.is_monotonic_increasing
        evidence = (rows.lfc_mean / rows.lfc_sd).abs().to_numpy()
        tied = rows.expected_fdr.diff().to_numpy() == 0
        assert (np.diff(evidence)[tied[1:]] <= 0).all()
    # One rate of false discoveries for the whole query.
    error = np.sort(1 - table[["p_up", "p_down"]].max(axis=1))
    if estimand == "mean":
        np.testing.assert_allclose(np.sort(table.expected_fdr), error.cumsum() / np.arange(1, 241), atol=1e-6)
    x, at = typed.X.toarray(), (typed.obs.cell_type == "type_2").to_numpy()
    rows = by_gene(table[table.group == "type_2"]).loc[typed.var_names]
    for side, cells in (("", x[at]), ("_reference", x[~at])):
        np.testing.assert_allclose(rows["raw_mean" + side], cells.mean(0), rtol=1e-5)
        np.testing.assert_allclose(rows["expressing" + side], (cells > 0).mean(0), rtol=1e-5)
        share = cells.sum(0) / cells.sum()
        np.testing.assert_allclose(rows["mean_share" + side], share, rtol=1e-5 if estimand == "mean" else 1)
        np.testing.assert_allclose(rows["mean_share" + side].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_where_abundant_genes_change_the_others_do_not(sign):
    """Fifteen genes take half of the counts in one group: the shares of all others fall, and say nothing."""
    rng = np.random.default_rng(0)
    effect = np.r_[np.full(15, 2.5), np.zeros(385)]
    base = np.r_[np.full(15, 10.0), rng.gamma(0.6, 1.5, 363) + 0.3, np.zeros(22)]
    group = np.arange(400) % 2
    mean = base * 2.0 ** (effect * group[:, None]) * rng.lognormal(0, 0.3, (400, 1))
    x = rng.poisson(rng.gamma(3, mean / 3)).astype(np.float32)
    obs = pd.DataFrame({"group": group.astype(str)}, index=[f"c{i}" for i in range(400)])
    data = pyrosc.from_anndata(anndata.AnnData(x, obs=obs))
    sides = {"group": "1", "reference": "0"} if sign > 0 else {"group": "0", "reference": "1"}
    table = by_gene(differential_expression(data, groupby="group", **sides)).loc[list(data.schema.genes)]
    common = np.log2(base.sum() / (base * 2.0**effect).sum())
    assert common < -0.9
    np.testing.assert_allclose(sign * table.lfc_common, common, atol=0.06)
    assert table.is_de[:15].all()
    assert (table.lfc_mean[:15] * sign > 2).all()
    assert table.is_de[15:].sum() <= 1
    assert not table.is_de[378:].any()  # of which nothing was counted
    np.testing.assert_allclose(
        np.log2(table.mean_share / table.mean_share_reference)[:15],
        table.lfc_mean[:15] + table.lfc_common[:15],
        atol=0.1,
    )


def test_several_groups_are_called_jointly(typed, typed_fit):
    joint = ask(typed_fit, typed, fdr=0.05)
    single = ask(typed_fit, typed, group="type_0", fdr=0.05)
    mine = joint[joint.group == "type_0"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine[["gene", *EACH]], single[["gene", *EACH]])
    assert not np.allclose(mine.expected_fdr, single.expected_fdr)


def test_groups_are_those_asked_for_in_this_order(typed, typed_fit):
    table = ask(typed_fit, typed, group=["type_2", "type_0"], reference="type_1")
    assert table.group.unique().tolist() == ["type_2", "type_0"]
    assert (table.reference == "type_1").all()
    assert ask(typed_fit, typed, reference="type_1").group.unique().tolist() == ["type_0", "type_2"]


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_no_calls_between_random_halves(typed, typed_fit, estimand):
    half = np.random.default_rng(0).permutation(600) % 2
    table = ask(typed_fit, typed, groupby=half, group=1, estimand=estimand, n_draws=500)
    assert not table.is_de.any()
    if estimand == "mean":
        assert ((table.lfc_lower < 0) & (table.lfc_upper > 0)).mean() > 0.9


def test_swapping_the_sides_swaps_the_signs(typed, typed_fit):
    one = by_gene(ask(typed_fit, typed, group="type_0", reference="type_1"))
    two = by_gene(ask(typed_fit, typed, group="type_1", reference="type_0")).loc[one.index]
    np.testing.assert_allclose(one.lfc_mean, -two.lfc_mean, atol=1e-6)
    np.testing.assert_allclose(one.p_up, two.p_down, atol=1e-6)


def test_counts_and_anndata_in_any_order_of_genes_give_the_same(typed, typed_fit):
    table = ask(typed_fit, typed)
    pd.testing.assert_frame_equal(table, ask(typed_fit, pyrosc.from_anndata(typed, batch_key="batch")))
    pd.testing.assert_frame_equal(table, ask(typed_fit, typed[:, ::-1].copy()))
    pd.testing.assert_frame_equal(table, ask(typed_fit, typed, groupby=typed.obs["cell_type"]))


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_cells_of_no_group_are_left_out(typed, typed_fit, estimand):
    partly = typed.copy()
    partly.obs["cell_type"] = partly.obs.cell_type.where(partly.obs.cell_type != "type_2")
    options = {"group": "type_0", "estimand": estimand, "n_draws": 20}
    rest = ask(typed_fit, partly, **options)
    np.testing.assert_array_equal(
        by_gene(rest).raw_mean_reference.sort_index(),
        by_gene(ask(typed_fit, typed, reference="type_1", **options)).raw_mean_reference.sort_index(),
    )
    if estimand == "mean":
        only = ask(typed_fit, typed, reference="type_1", **options)
        pd.testing.assert_frame_equal(rest.drop(columns="reference"), only.drop(columns="reference"))


def test_same_seed_same_bits_and_nothing_is_touched(typed, typed_fit, untouched):
    before = typed.copy()
    with untouched():
        one, two = (ask(typed_fit, typed, estimand="cell", n_draws=30, seed=7) for _ in range(2))
        other = ask(typed_fit, typed, estimand="cell", n_draws=30, seed=8)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not np.allclose(one.lfc_sd, other.lfc_sd)
    pd.testing.assert_frame_equal(typed.obs, before.obs)
    assert (typed.X != before.X).nnz == 0


# --- batches confounded with the groups


@pytest.fixture(scope="module")
def confounded():
    """Two groups without a difference, 80 and 20 % of them in the first of two batches, which differ."""
    rng = np.random.default_rng(5)
    group, n, genes = np.arange(400) % 2, 400, 60
    batch = (rng.random(n) < np.where(group == 1, 0.8, 0.2)).astype(int)
    mean = rng.gamma(2, 2, genes) * np.exp(rng.normal(0, 0.7, (2, genes)))[batch]
    x = rng.poisson(rng.gamma(5, mean / 5)).astype(np.float32)
    obs = pd.DataFrame({"group": group, "batch": batch}).astype(str)
    obs.index = [f"cell_{i}" for i in range(n)]
    return pyrosc.from_anndata(anndata.AnnData(x, obs=obs), batch_key="batch")


def test_a_batch_effect_is_not_taken_for_a_difference(confounded):
    query = {"groupby": "group", "group": "1"}
    assert differential_expression(confounded, batch=None, **query).is_de.sum() > 20
    assert not differential_expression(confounded, **query).is_de.any()


def test_the_name_of_a_batch_compares_the_cells_measured_there(confounded):
    query = {"groupby": "group", "group": "1"}
    there = confounded[confounded.obs.batch.to_numpy() == "1"]
    one = differential_expression(confounded, batch="1", **query)
    pd.testing.assert_frame_equal(one, differential_expression(there, batch="average", **query))


def test_groups_that_share_no_batch_cannot_be_compared_within_batches(confounded):
    apart = confounded[confounded.obs.group.to_numpy() == confounded.obs.batch.to_numpy()]
    with pytest.raises(ValueError, match="batch=None"):
        differential_expression(apart, groupby="group", group="1")
    with pytest.raises(ValueError, match="in batch '0'"):
        differential_expression(apart, groupby="group", group="1", batch="0")
    assert len(differential_expression(apart, groupby="group", group="1", batch=None)) == 60


# --- refusals


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"groupby": "type"}, KeyError, "no column 'type' in obs; it has"),
        ({"groupby": ["a"] * 5}, ValueError, "5 values for 600 cells"),
        ({"group": "type_9"}, ValueError, "no group 'type_9'; there are type_0, type_1, type_2"),
        ({"reference": "type_9"}, ValueError, "no group 'type_9'"),
        ({"reference": np.array(["type_1", "type_2"])}, ValueError, "name of one group.*not ndarray"),
        ({"estimand": "cell", "n_draws": 1}, ValueError, "n_draws must be at least 2"),
        ({"group": "type_0", "reference": "type_0"}, ValueError, "another reference"),
        ({"group": ["type_0", "type_0"]}, ValueError, "each once"),
        ({"group": []}, ValueError, "can't compare"),
        ({"estimand": "median"}, ValueError, '"mean" or "cell"'),
        ({"batch": "batch_9"}, ValueError, "no batch 'batch_9'; there are batch_0, batch_1"),
        ({"delta": -1}, ValueError, "delta"),
        ({"fdr": 1.0}, ValueError, "fdr"),
        ({"interval": 0}, ValueError, "interval"),
        ({"n_draws": 0}, ValueError, "n_draws"),
        ({"estimand": "cell", "site": "z"}, ValueError, "site 'z' has 5 entries a cell"),
        ({"estimand": "cell", "batch": "batch_9"}, ValueError, "no batch 'batch_9'"),
        ({"groupby": np.full(600, np.nan)}, ValueError, "no cell is in a group"),
        ({"groupby": np.zeros((600, 2))}, ValueError, "groupby names a column of obs, or has one value"),
        ({"reference": None}, ValueError, "no group 'None'; there are type_0, type_1, type_2, or \"rest\""),
        ({"groupby": np.repeat(["rest", "b"], 300)}, ValueError, "rename it"),
        ({"groupby": np.repeat("a", 600)}, ValueError, "fewer than 2 cells are outside of 'a'"),
        ({"groupby": np.r_[["one"], ["many"] * 599], "group": "one"}, ValueError, "'one' has 1 cells"),
        ({"groupby": np.r_[["one"], ["many"] * 599], "reference": "one"}, ValueError, "'one' has 1 cells"),
        (
            {"groupby": pd.Categorical(["a", "b"] * 300, categories=["a", "b", "none"]), "group": "none"},
            ValueError,
            "'none' has 0 cells",
        ),
    ],
)
def test_refusals_say_what_to_do(typed, typed_fit, options, error, says):
    with pytest.raises(error, match=says):
        ask(typed_fit, typed, **options)


def test_an_empty_category_is_not_asked_about(typed, typed_fit):
    groups = pd.Categorical(["a", "b"] * 300, categories=["a", "none", "b"])
    assert ask(typed_fit, typed, groupby=groups).group.unique().tolist() == ["a", "b"]


# --- calibration (slow): the evidence for the choice of method


@pytest.mark.slow
def test_two_fold_changes_are_found_at_the_nominal_rate():
    """1500 cells, 300 genes, 20 doubled and 20 halved in half of the cells."""
    found, wrong, covered = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        group = np.arange(1500) % 2
        effect = np.repeat([1.0, -1.0, 0.0], [20, 20, 260])
        base = rng.gamma(0.6, 1.5, 300) + 0.3
        mean = base * 2.0 ** (effect * group[:, None]) * rng.lognormal(0, 0.3, (1500, 1))
        x = rng.poisson(rng.gamma(3, mean / 3)).astype(np.float32)
        other, arm = pseudobulk(csr_array(x), group, 2, group * 0, 1)
        table = compare(shrink(quasi_likelihood(arm, other)))
        called, null = table.is_de.to_numpy(), effect == 0
        found.append((called & ~null).sum())
        wrong.append((called & null).sum() / called.sum())
        covered.append(((table.lfc_lower <= effect) & (effect <= table.lfc_upper))[~null].mean())
    assert np.mean(found) > 39
    assert np.mean(wrong) < 0.07
    assert 0.86 < np.mean(covered) < 0.96
