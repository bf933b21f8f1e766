import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.sparse import csr_array

import pyrosc
from pyrosc.differential import expression as differential
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import compare, decide, summarise
from pyrosc.differential.expression import differential_expression
from pyrosc.differential.group_sums import sums
from pyrosc.differential.quasi_likelihood import LFC, likelihood

SHARED = ["lfc_mean", "lfc_sd", "lfc_lower", "lfc_upper", "p_up", "p_down", "p_equivalent", "p_de", "p_de_se"]
CALLS = ["bayes_factor", "expected_fdr", "is_de"]
RAW = ["lfc_common"] + [
    name + side for side in ("", "_reference") for name in ("mean_share", "raw_mean", "expressing")
]


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
    lfc = np.random.default_rng(0).normal([0, 3, -0.5], [1, 0.01, 0.3], (101, 3)).astype(dtype)
    lfc[:4, 0] = 0.25
    t, to = differential.Draws(lfc), {"rtol": 1e-5, "atol": 1e-6}
    wide = lfc.astype(np.float64)
    np.testing.assert_allclose(t.mean, wide.mean(0), **to)
    np.testing.assert_allclose(t.sd, wide.std(0), **to)
    np.testing.assert_array_equal(t.above(0.25), (lfc > 0.25).mean(0))
    np.testing.assert_array_equal(t.below(0.25), (lfc < 0.25).mean(0))
    for q in (0.05, 0.5, 0.951):
        np.testing.assert_allclose(t.quantile(q), np.quantile(wide, q, axis=0), **to)


# --- compare: arrays in, a table out


def test_compare_of_normal_draws():
    mean, sd = np.array([0.0, 1.0, -0.4]), np.array([0.5, 0.2, 0.3])
    table = compare(normal_draws(mean, sd), delta=0.25, interval=0.8)
    assert list(table) == SHARED + CALLS
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
    rng = np.random.default_rng(0)
    tables = [compare(rng.normal([0.0, 0.4], 0.5, (50, 2)), delta=0.25) for _ in range(400)]
    p, se = (np.array([table[name] for table in tables]) for name in ("p_de", "p_de_se"))
    np.testing.assert_allclose(np.sqrt((se**2).mean(0)), p.std(0), rtol=0.1)


def test_expected_fdr_by_hand():
    # Errors .1, .02, .1, .3, .4: their running means, the two of .1 together.
    table = compare(draws_with([0.9, 0.98, 0.0, 0.7, 0.6], [0, 0, 0.9, 0, 0]), fdr=0.1)
    np.testing.assert_allclose(table.expected_fdr, [0.22 / 3, 0.02, 0.22 / 3, 0.13, 0.184])
    assert table.is_de.tolist() == [True, True, True, False, False]
    assert compare(draws_with([0.98, 0.9]), fdr=0.05).is_de.tolist() == [True, False]
    assert compare(draws_with([0.98, 0.9]), fdr=0.06 + 1e-9).is_de.all()


def test_a_target_met_exactly_is_met():
    assert decide(pd.DataFrame({"error": [0.05]}), fdr=0.05).is_de.all()


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
    joint = decide(pd.concat([summarise(one), summarise(two)]), 0.05)
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


# --- differential_expression: a fit, of types that differ in known genes


@pytest.fixture(scope="module")
def adata():
    return pyrosc.datasets.simulate(
        600, 80, n_types=3, n_batches=2, de_fraction=0.2, log2_fold_change=1.5, batch_sd=0.3, seed=3
    )


@pytest.fixture(scope="module")
def fit(adata):
    data = pyrosc.from_anndata(adata, batch_key="batch")
    vae = pyrosc.VAE.for_data(data, n_latent=5, hidden=(32,))
    return pyrosc.fit_svi(vae, data, epochs=40, learning_rate=1e-2, progress=False, device="cpu")


def ask(fit, data, **options):
    return differential_expression(fit, data, **({"groupby": "cell_type"} | options))


def truth(adata, group, reference):
    return np.log2(adata.var[f"share_{group}"] / adata.var[f"share_{reference}"])


def by_gene(table):
    return table.set_index("gene")


@pytest.mark.parametrize(("estimand", "rmse", "power"), [("mean", 0.2, 0.85), ("cell", 0.45, 0.5)])
def test_true_fold_changes_are_found(adata, fit, estimand, rmse, power):
    table = by_gene(ask(fit, adata, group="type_0", reference="type_1", estimand=estimand))
    true = truth(adata, "type_0", "type_1").loc[table.index] - table.lfc_common
    assert np.sqrt(np.mean((table.lfc_mean - true) ** 2)) < rmse
    big = np.abs(true) > 1
    assert big.sum() > 20
    called = table.is_de
    assert (called & big).sum() > power * big.sum()
    assert (true * np.sign(table.lfc_mean) < 0.25)[called].mean() < 0.1
    assert ((table.lfc_lower <= true) & (true <= table.lfc_upper)).mean() > 0.8


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_the_table(adata, fit, estimand):
    table = ask(fit, adata, estimand=estimand, n_draws=50)
    assert list(table) == ["gene", "group", "reference", *SHARED, *CALLS, *RAW]
    assert len(table) == 3 * 80
    assert table.group.unique().tolist() == ["type_0", "type_1", "type_2"]
    assert (table.reference == "rest").all()
    for _, rows in table.groupby("group"):
        assert sorted(rows.gene) == sorted(adata.var_names)
        assert rows.expected_fdr.is_monotonic_increasing
        evidence = (rows.lfc_mean / rows.lfc_sd).abs().to_numpy()
        tied = rows.expected_fdr.diff().to_numpy() == 0
        assert (np.diff(evidence)[tied[1:]] <= 0).all()
    # One rate of false discoveries for the whole query.
    error = np.sort(1 - table[["p_up", "p_down"]].max(axis=1))
    if estimand == "mean":
        np.testing.assert_allclose(np.sort(table.expected_fdr), error.cumsum() / np.arange(1, 241), atol=1e-6)
    x, at = adata.X.toarray(), (adata.obs.cell_type == "type_2").to_numpy()
    rows = by_gene(table[table.group == "type_2"]).loc[adata.var_names]
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
    fit = pyrosc.fit_svi(pyrosc.criticism.NoStructure.for_data(data), data, epochs=1, progress=False)
    sides = {"group": "1", "reference": "0"} if sign > 0 else {"group": "0", "reference": "1"}
    table = (
        differential_expression(fit, data, groupby="group", **sides)
        .set_index("gene")
        .loc[list(data.schema.genes)]
    )
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


def test_several_groups_are_called_jointly(adata, fit):
    joint = ask(fit, adata, fdr=0.05)
    single = ask(fit, adata, group="type_0", fdr=0.05)
    mine = joint[joint.group == "type_0"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine[["gene", *SHARED]], single[["gene", *SHARED]])
    assert not np.allclose(mine.expected_fdr, single.expected_fdr)


def test_groups_are_those_asked_for_in_this_order(adata, fit):
    table = ask(fit, adata, group=["type_2", "type_0"], reference="type_1")
    assert table.group.unique().tolist() == ["type_2", "type_0"]
    assert (table.reference == "type_1").all()
    assert ask(fit, adata, reference="type_1").group.unique().tolist() == ["type_0", "type_2"]


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_no_calls_between_random_halves(adata, fit, estimand):
    half = np.random.default_rng(0).permutation(600) % 2
    table = ask(fit, adata, groupby=half, group=1, estimand=estimand, n_draws=500)
    assert not table.is_de.any()
    if estimand == "mean":
        assert ((table.lfc_lower < 0) & (table.lfc_upper > 0)).mean() > 0.9


def test_swapping_the_sides_swaps_the_signs(adata, fit):
    one = by_gene(ask(fit, adata, group="type_0", reference="type_1"))
    two = by_gene(ask(fit, adata, group="type_1", reference="type_0")).loc[one.index]
    np.testing.assert_allclose(one.lfc_mean, -two.lfc_mean, atol=1e-6)
    np.testing.assert_allclose(one.p_up, two.p_down, atol=1e-6)


def test_counts_and_anndata_in_any_order_of_genes_give_the_same(adata, fit):
    table = ask(fit, adata)
    pd.testing.assert_frame_equal(table, ask(fit, pyrosc.from_anndata(adata, batch_key="batch")))
    pd.testing.assert_frame_equal(table, ask(fit, adata[:, ::-1].copy()))
    pd.testing.assert_frame_equal(table, ask(fit, adata, groupby=adata.obs["cell_type"]))


@pytest.mark.parametrize("estimand", ["mean", "cell"])
def test_cells_of_no_group_are_left_out(adata, fit, estimand):
    partly = adata.copy()
    partly.obs["cell_type"] = partly.obs.cell_type.where(partly.obs.cell_type != "type_2")
    options = {"group": "type_0", "estimand": estimand, "n_draws": 20}
    rest = ask(fit, partly, **options)
    np.testing.assert_array_equal(
        by_gene(rest).raw_mean_reference.sort_index(),
        by_gene(ask(fit, adata, reference="type_1", **options)).raw_mean_reference.sort_index(),
    )
    if estimand == "mean":
        only = ask(fit, adata, reference="type_1", **options)
        pd.testing.assert_frame_equal(rest.drop(columns="reference"), only.drop(columns="reference"))


def test_same_seed_same_bits_and_nothing_is_touched(adata, fit, untouched):
    before = adata.copy()
    with untouched():
        one, two = (ask(fit, adata, estimand="cell", n_draws=30, seed=7) for _ in range(2))
        other = ask(fit, adata, estimand="cell", n_draws=30, seed=8)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not np.allclose(one.lfc_sd, other.lfc_sd)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0


# --- what is decoded


@pytest.fixture
def decoded(monkeypatch):
    """Each call of `draws`: its data, draws a cell and batch."""
    calls = []

    def recording(fit, data, *sites, **options):
        calls.append((data, options["n_draws"], options["batch"]))
        return pyrosc.draws(fit, data, *sites, **options)

    monkeypatch.setattr(differential, "draws", recording)
    return calls


def test_no_more_is_decoded_than_the_draws_asked_for(adata, fit, decoded):
    ask(fit, adata, group="type_0", estimand="cell", n_draws=30)
    assert sum(len(data) * n for data, n, _ in decoded) == 2 * 30
    decoded.clear()
    ask(fit, adata)
    assert not decoded


def test_draws_in_blocks_are_summarised_as_all_of_them_together(adata, fit, monkeypatch):
    of_blocks, cells = [], differential._cells
    monkeypatch.setattr(
        differential, "_cells", lambda *a, **k: of_blocks.append(cells(*a, **k)) or of_blocks[-1]
    )
    monkeypatch.setattr(differential, "_BLOCK", 400)
    table = ask(fit, adata, group="type_0", estimand="cell", n_draws=1001).set_index("gene")
    assert [len(lfc) for lfc, _ in of_blocks] == [334, 334, 333]
    together = compare(np.concatenate([lfc for lfc, _ in of_blocks]))
    together.index = pd.Index(fit.schema.genes)
    together = together.loc[table.index]
    ends = ["lfc_lower", "lfc_upper"]
    exact = [name for name in together if name not in ends]
    # Means of a thousand float32 numbers of size 1, summed in another order; some are near 0.
    pd.testing.assert_frame_equal(table[exact], together[exact], check_names=False, rtol=1e-6, atol=1e-6)
    off = (table[ends] - together[ends]).div(together.lfc_sd, axis=0)
    assert off.abs().max().max() < 0.1
    places = [fit.schema.genes.index(name) for name in table.index]
    mine = np.average([shares for _, shares in of_blocks], 0, [334, 334, 333])[0, places]
    np.testing.assert_allclose(table.mean_share, mine)


def test_pairs_are_random_cells_of_their_groups(adata, fit, decoded):
    ask(fit, adata, group="type_0", estimand="cell", n_draws=400, batch=None)
    (mine, _, _), (rest, _, _) = decoded
    assert set(mine.obs.cell_type) == {"type_0"}
    assert set(rest.obs.cell_type) == {"type_1", "type_2"}
    share = len(set(mine.cell_names)) / (adata.obs.cell_type == "type_0").sum()
    assert 0.7 < share < 0.95  # with replacement: 1 - exp(-400 / 200) = .86


def test_a_program_that_cannot_broadcast_is_run_one_draw_at_a_time(adata, fit, monkeypatch):
    asked = []
    draws = lambda *args, parallel, **options: asked.append(parallel) or pyrosc.draws(*args, **options)
    monkeypatch.setattr(differential, "draws", draws)
    ask(fit, adata, group="type_0", estimand="cell", n_draws=5, batch=None, parallel=False)
    assert asked == [False, False]


def test_cells_of_no_group_are_not_decoded(adata, fit, decoded):
    groups = adata.obs.cell_type.where(adata.obs.cell_type != "type_2")
    ask(fit, adata, groupby=groups, group="type_0", estimand="cell", n_draws=50, batch=None)
    assert set(decoded[1][0].obs.cell_type) == {"type_1"}


def test_cells_are_decoded_in_the_batch_asked_for(adata, fit, decoded):
    pair = {"group": "type_0", "estimand": "cell", "n_draws": 40}
    for batch, expected in (("batch_1", {"batch_1"}), (None, {None}), ("average", {"batch_0", "batch_1"})):
        decoded.clear()
        ask(fit, adata, batch=batch, **pair)
        assert {there for _, _, there in decoded} == expected
    sizes = [[len(data) for data, _, there in decoded if there == b] for b in ("batch_0", "batch_1")]
    assert all(mine == other > 5 for mine, other in sizes)  # both of a pair in the same batch


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
    data = pyrosc.from_anndata(anndata.AnnData(x, obs=obs), batch_key="batch")
    vae = pyrosc.VAE.for_data(data, n_latent=3, hidden=(16,))
    return data, pyrosc.fit_svi(vae, data, epochs=2, progress=False, device="cpu")


def test_a_batch_effect_is_not_taken_for_a_difference(confounded):
    data, fit = confounded
    query = {"groupby": "group", "group": "1"}
    assert differential_expression(fit, data, batch=None, **query).is_de.sum() > 20
    assert not differential_expression(fit, data, **query).is_de.any()


def test_the_name_of_a_batch_compares_the_cells_measured_there(confounded):
    data, fit = confounded
    query = {"groupby": "group", "group": "1"}
    there = data[data.obs.batch.to_numpy() == "1"]
    one = differential_expression(fit, data, batch="1", **query)
    pd.testing.assert_frame_equal(one, differential_expression(fit, there, batch="average", **query))


def test_groups_that_share_no_batch_cannot_be_compared_within_batches(confounded):
    data, fit = confounded
    apart = data[data.obs.group.to_numpy() == data.obs.batch.to_numpy()]
    with pytest.raises(ValueError, match="batch=None"):
        differential_expression(fit, apart, groupby="group", group="1")
    with pytest.raises(ValueError, match="in batch '0'"):
        differential_expression(fit, apart, groupby="group", group="1", batch="0")
    assert len(differential_expression(fit, apart, groupby="group", group="1", batch=None)) == 60


# --- programs of other makes


def test_a_program_without_l_and_with_other_names_will_do(adata):
    def model(cells):
        logits = pyro.param("logits", torch.zeros(80))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            share = pyro.deterministic("share", torch.softmax(logits + 0 * z[..., None], -1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * share).to_event(1), obs=cells.x)

    def guide(cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    fit = pyrosc.fit_svi(model, adata, guide, epochs=1, progress=False, device="cpu")
    assert ask(fit, adata, group="type_0").is_de.sum() > 10
    for parallel in (True, False):
        same = ask(fit, adata, estimand="cell", site="share", n_draws=20, parallel=parallel)
        np.testing.assert_allclose(same.lfc_mean, 0, atol=1e-5)


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
        ({"batch": "batch_9"}, ValueError, "no batch 'batch_9'; the fit knows batch_0, batch_1"),
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
def test_refusals_say_what_to_do(adata, fit, options, error, says):
    with pytest.raises(error, match=says):
        ask(fit, adata, **options)


def test_an_empty_category_is_not_asked_about(adata, fit):
    groups = pd.Categorical(["a", "b"] * 300, categories=["a", "none", "b"])
    assert ask(fit, adata, groupby=groups).group.unique().tolist() == ["a", "b"]


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
        other, arm = sums(csr_array(x), group, 2, group * 0, 1)
        table = compare(shrink(likelihood(arm, other)))
        called, null = table.is_de.to_numpy(), effect == 0
        found.append((called & ~null).sum())
        wrong.append((called & null).sum() / called.sum())
        covered.append(((table.lfc_lower <= effect) & (effect <= table.lfc_upper))[~null].mean())
    assert np.mean(found) > 39
    assert np.mean(wrong) < 0.07
    assert 0.86 < np.mean(covered) < 0.96
