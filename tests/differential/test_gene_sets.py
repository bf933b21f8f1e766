"""Mean fold changes of gene sets: coverage where genes go together, few donors, rare genes, errors."""

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyrosc import from_anndata, gene_sets

SIZE = 20


def simulated(seed, *, n=800, n_sets=10, program=0.0, tau=0.0, donors=None, batches=False, spread=0.3):
    """Sets of genes that share a program in cells, or in donors; and the sets' true mean log2 fold changes.

    `program`: sd over cells of a set's log rate; `tau`: over donors. `donors`: "one side" each, or "both".
    """
    rng = np.random.default_rng(seed)
    n_genes = SIZE * n_sets
    of = np.arange(n_genes) // SIZE
    side = rng.integers(0, 2, n)
    donor = rng.integers(0, 4, n) * 2 + side if donors == "one side" else rng.integers(0, 8, n)
    batch = rng.integers(0, 2, n) if batches else np.zeros(n, int)
    lfc = rng.normal(0, spread, n_sets)[of] + rng.normal(0, 0.2, n_genes) * (spread > 0)
    log = np.log(rng.gamma(0.6, 1.5, n_genes) + 0.5) + np.log(2) * lfc * side[:, None]
    log = log + rng.normal(0, 0.5, (2, n_genes))[batch] + program * rng.normal(0, 1, (n, n_sets))[:, of]
    log = log + tau * rng.normal(0, 1, (8, 2, n_sets))[donor, side][:, of]
    x = rng.poisson(rng.gamma(3, np.exp(log) / 3)).astype(np.float32)
    base = np.exp(log - np.log(2) * lfc * side[:, None]).mean(0)
    lfc = lfc - np.log2((base * 2**lfc).sum() / base.sum())
    obs = pd.DataFrame({"side": side.astype(str), "donor": donor.astype(str), "batch": batch.astype(str)})
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs.set_index(obs.index.map("c{}".format)))
    adata.var_names = [f"g{i}" for i in range(n_genes)]
    sets = {f"set {i}": [f"g{j}" for j in np.flatnonzero(of == i)] for i in range(n_sets)}
    return adata, sets, np.array([lfc[of == i].mean() for i in range(n_sets)])


def ask(adata, sets, **settings):
    data = from_anndata(adata, batch_key="batch")
    return gene_sets(data, sets, groupby="side", group="1", **settings)


def coverage(n_seeds, **kinds):
    inside = []
    settings = {"replicate_key": "donor"} if "donors" in kinds else {}
    for seed in range(n_seeds):
        adata, sets, true = simulated(seed, **kinds)
        table = ask(adata, sets, **settings).set_index("set").loc[list(sets)]
        beyond = true - table.lfc_common
        inside.append((table.lfc_lower <= beyond) & (beyond <= table.lfc_upper))
    return np.mean(inside)


CASES = {
    "independent": {},
    "a program": {"program": 0.5},
    "a program, batches": {"program": 0.5, "batches": True},
    "donors of one side": {"tau": 0.3, "donors": "one side"},
    "donors of both": {"tau": 0.3, "donors": "both"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES)
def test_intervals_cover_the_mean_fold_change(kinds):
    assert 0.84 < coverage(40, **kinds) < 0.96


def test_cells_looked_at_some_at_a_time_say_the_same(monkeypatch):
    adata, some, _ = simulated(0, n=300, n_sets=3, program=0.5, batches=True)
    table = ask(adata, some)
    monkeypatch.setattr("pyrosc.differential.set_means._CELLS", 37)
    other = ask(adata, some)
    pd.testing.assert_frame_equal(other, table)


def test_no_more_than_a_block_of_cells_is_held(monkeypatch):
    adata, some, _ = simulated(0, n=3000, n_sets=20)
    adata.X = adata.X.multiply(np.random.default_rng(0).random((3000, 400)) < 0.05).tocsr()
    data = from_anndata(adata)
    peaks = []
    for cells in (100, 3000):
        monkeypatch.setattr("pyrosc.differential.set_means._CELLS", cells)
        tracemalloc.start()
        try:
            gene_sets(data, some, groupby="side", group="1")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] > 8 * data.n_cells * data.n_genes


@pytest.mark.filterwarnings("ignore:group '1' has cells of 1 replicates")
def test_of_a_single_donor_on_a_side_nothing_is_called():
    adata, some, _ = simulated(0, n_sets=4, spread=1.0)
    assert ask(adata, some).is_de.any()
    adata.obs["donor"] = np.where(adata.obs.side == "1", "x", adata.obs.donor)
    table = ask(adata, some, replicate_key="donor")
    assert set(zip(table.replicates, table.replicates_reference, strict=True)) == {(1, 8)}
    assert table.fdr_bound.isna().all()
    assert not table.is_de.any()
    assert table.lfc_mean.notna().all()


@pytest.mark.parametrize(("n", "mean"), [((30, 1000), 0.003), ((40, 1000), 0.02), ((50, 50), 0.04)])
def test_rare_genes_in_a_small_group_do_not_err_to_one_side(n, mean):
    """Where most genes have no count on the smaller side, each by itself seems to have fallen."""
    side = np.repeat([1, 0], n)
    z, calls = [], 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.poisson(np.r_[np.full(150, mean), np.full(50, 2.0)], (sum(n), 200)).astype(np.float32)
        obs = pd.DataFrame({"side": side.astype(str), "batch": "b"}, index=[f"c{i}" for i in range(sum(n))])
        adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
        table = ask(adata, {"rare": [str(i) for i in range(150)], "few": [str(i) for i in range(20)]})
        z.extend(table.lfc_mean / table.lfc_sd)
        calls += table.is_de.sum()
    assert calls <= 1
    assert abs(np.mean(z)) < 0.8
    assert np.std(z) < 1.5


def test_silent_genes_say_nothing_however_many_they_are():
    adata, sets, _ = simulated(0, n_sets=3)
    x = adata.X.toarray()
    x[:, :40] = 0
    adata.X = sp.csr_matrix(x)
    table = ask(adata, {"silent": [*sets["set 0"], *sets["set 1"]], "other": sets["set 2"]})
    table = table.set_index("set")
    assert table.lfc_sd["silent"] > 4
    assert not table.is_de["silent"]
    assert table.lfc_sd["other"] < 0.2


@pytest.mark.slow
def test_sets_that_do_not_change_are_not_called():
    """Donors' effects that genes of a set share are no difference between conditions."""
    calls = 0
    for seed in range(10):
        kinds = {"tau": 0.3, "donors": "one side", "spread": 0.0}
        adata, sets, _ = simulated(seed, **kinds)
        calls += ask(adata, sets, replicate_key="donor").is_de.sum()
    assert calls <= 1  # of 100


def test_unknown_genes_are_counted_and_sets_are_ordered_by_evidence():
    adata, sets, true = simulated(1)
    sets["set 0"] = [*sets["set 0"], "unheard of", sets["set 0"][0]]
    table = ask(adata, sets)
    assert table.fdr_bound.is_monotonic_increasing
    row = table.set_index("set").loc["set 0"]
    assert (row.n_genes, row.n_unknown) == (SIZE, 1)
    assert np.corrcoef(table.set_index("set").loc[list(sets)].lfc_mean, true)[0, 1] > 0.9
    assert np.allclose(table.p_up + table.p_down + table.p_equivalent, 1)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({}, "dict of lists"),
        ({"a": "g1"}, "dict of lists"),
        ({"a": ["g1"], "b": ["G2"], "c": []}, "no gene of b, c is among those compared: leave"),
    ],
)
def test_sets_that_are_none_are_refused(sets, says):
    adata, _, _ = simulated(0, n=60, n_sets=2)
    with pytest.raises(ValueError, match=says):
        ask(adata, sets)


def test_an_unknown_batch_is_refused():
    adata, sets, _ = simulated(0, n=60, n_sets=2)
    with pytest.raises(ValueError, match="no batch 'b9'"):
        ask(adata, sets, batch="b9")
