import sys

import anndata
import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_matrix, issparse

from pyrosc.datasets import pbmc68k
from pyrosc.datasets.pbmc68k import pbmc68k_reduced
from pyrosc.datasets.simulate import simulate

RICH = {"n_types": 3, "n_batches": 2, "n_donors": 4, "n_conditions": 2, "dropout": 0.2, "dropout_slope": 0.5}


def codes(data, column):
    return data.obs[column].cat.codes.to_numpy()


def same(a, b):
    """Whether two simulations agree to the bit."""
    layers = all(
        (a.layers[name] != b.layers[name]).nnz == 0
        if issparse(a.layers[name])
        else np.array_equal(a.layers[name], b.layers[name])
        for name in a.layers
    )
    return (a.X != b.X).nnz == 0 and layers and a.obs.equals(b.obs) and a.var.equals(b.var)


# --- simulate: what is in it


def test_simulate_gives_whole_sparse_counts_and_the_truth():
    data = simulate(60, 30, **RICH)
    assert data.shape == (60, 30)
    assert data.X.format == "csr"
    assert data.X.dtype == np.float32
    assert (data.X.data == np.rint(data.X.data)).all()
    assert (data.X.data > 0).all()
    assert set(data.layers) == {"rate", "share", "counts_before_dropout", "dropped"}
    assert list(data.obs) == ["cell_type", "batch", "donor", "condition", "library"]
    for column, n in {"cell_type": 3, "batch": 2, "donor": 4, "condition": 2}.items():
        stem = column.removeprefix("cell_")
        assert list(data.obs[column].cat.categories) == [f"{stem}_{i}" for i in range(n)]
    assert data.obs_names.is_unique
    assert data.var_names.is_unique


def test_x_is_the_counts_before_dropout_where_nothing_dropped():
    data = simulate(100, 50, dropout=0.3)
    before, dropped = (data.layers[name].toarray() for name in ("counts_before_dropout", "dropped"))
    assert dropped.dtype == bool
    assert (before[dropped] == 0).any()  # a dropout of nothing is marked too
    assert (before[dropped] > 0).any()
    np.testing.assert_array_equal(data.X.toarray(), before * ~dropped)


def test_share_follows_from_the_effects_it_reports():
    data = simulate(200, 40, **RICH)
    f = np.stack([data.var[f"log2_fold_change_type_{i}"] for i in range(3)])
    h = np.stack([np.zeros(40), data.var["log2_fold_change_condition_1"]])
    log_share = (
        np.log2(data.var["base_share"].to_numpy()) + f[codes(data, "cell_type")] + h[codes(data, "condition")]
    )
    effects = (
        data.varm["log_batch_effect"].T[codes(data, "batch")]
        + data.varm["log_donor_effect"].T[codes(data, "donor")]
    )
    expected = 2**log_share * np.exp(effects)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(data.layers["share"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        data.layers["rate"], data.obs["library"].to_numpy()[:, None] * expected, rtol=1e-5
    )


def test_share_of_a_type_is_the_share_in_its_cells_when_nothing_else_acts():
    data = simulate(50, 40)
    for i in range(4):
        cells = codes(data, "cell_type") == i
        assert cells.any()
        np.testing.assert_allclose(
            data.layers["share"][cells] / data.var[f"share_type_{i}"].to_numpy(), 1, rtol=1e-5
        )


def test_without_conditions_there_are_no_condition_columns():
    assert not [name for name in simulate(5, 5).var if "condition" in name]


def test_arguments_in_uns_give_the_same_data_again():
    data = simulate(40, 20, **RICH, seed=3)
    assert same(data, simulate(**data.uns["simulate"]))


def test_simulation_survives_h5ad(tmp_path):
    data = simulate(30, 20, **RICH)
    data.write_h5ad(tmp_path / "truth.h5ad")
    again = anndata.read_h5ad(tmp_path / "truth.h5ad")
    assert same(data, again)
    np.testing.assert_array_equal(again.varm["log_donor_effect"], data.varm["log_donor_effect"])
    assert again.uns["simulate"]["dropout_slope"] == 0.5


# --- simulate: the counts follow the truth


@pytest.mark.parametrize("theta", [0.5, 5.0, np.inf])
def test_counts_have_the_mean_and_variance_of_a_negative_binomial(theta):
    data = simulate(2000, 100, inverse_dispersion=theta)
    x, mu = data.X.toarray().astype(float), data.layers["rate"].astype(float)
    variance = mu + mu**2 / theta
    z = (x - mu).sum(0) / np.sqrt(variance.sum(0))  # one per gene, standard normal
    assert abs(z).max() < 4.5
    assert 0.7 < z.std() < 1.3
    assert ((x - mu) ** 2 / variance).mean() == pytest.approx(1, abs=0.04)


def test_every_gene_can_have_its_own_inverse_dispersion():
    theta = np.repeat([0.5, 50.0], 40)
    data = simulate(3000, 80, inverse_dispersion=theta, library_mean=4000)
    np.testing.assert_array_equal(data.var["inverse_dispersion"], theta)
    x, mu = data.X.toarray().astype(float), data.layers["rate"].astype(float)
    estimate = ((x - mu) ** 2 - mu).sum(0) / (mu**2).sum(0)
    assert np.median(estimate[:40]) == pytest.approx(2, rel=0.1)
    assert np.median(estimate[40:]) == pytest.approx(0.02, rel=0.1)


def test_libraries_are_lognormal_with_the_mean_asked_for():
    library = simulate(20_000, 2, library_mean=500, library_sd=0.6).obs["library"]
    assert library.mean() == pytest.approx(500, rel=0.02)
    assert np.log(library).std() == pytest.approx(0.6, rel=0.03)
    assert stats.kstest(np.log(library), "norm", args=(np.log(500) - 0.18, 0.6)).pvalue > 1e-3


def test_base_expression_is_gamma():
    base = simulate(2, 5000, base_shape=0.7).var["base_share"] * 5000 * 0.7
    assert stats.kstest(base, "gamma", args=(0.7,)).pvalue > 1e-3


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_dropout_hits_the_share_asked_for_as_the_rate_says(slope):
    data = simulate(1000, 200, dropout=0.3, dropout_slope=slope)
    dropped, log_rate = data.layers["dropped"].toarray().ravel(), np.log(data.layers["rate"].ravel())
    assert dropped.mean() == pytest.approx(0.3, abs=0.006)
    bins = np.digitize(log_rate, np.quantile(log_rate, np.linspace(0, 1, 41)[1:-1]))
    p = np.array([dropped[bins == i].mean() for i in range(1, 39)])
    middle = np.array([log_rate[bins == i].mean() for i in range(1, 39)])
    assert np.polyfit(middle, np.log(p / (1 - p)), 1)[0] == pytest.approx(-slope, abs=0.03)


def test_no_dropout_unless_asked_for():
    data = simulate(50, 20)
    assert data.layers["dropped"].nnz == 0
    assert (data.layers["counts_before_dropout"] != data.X).nnz == 0


def test_fold_changes_have_the_number_size_and_sign_asked_for():
    data = simulate(2, 1000, n_types=3, de_fraction=0.25, log2_fold_change=1.5)
    f = np.stack([data.var[f"log2_fold_change_type_{i}"] for i in range(3)])
    assert ((f != 0).sum(1) == 250).all()
    assert set(np.abs(f[f != 0])) == {1.5}
    assert 0.4 < (f[f != 0] > 0).mean() < 0.6
    np.testing.assert_array_equal(data.var["is_de"], (f != 0).any(0))
    assert 0.5 < data.var["is_de"].mean() < 0.65  # types pick their genes independently: 1 - .75^3


def test_fold_changes_spread_as_asked_for():
    data = simulate(2, 4000, de_fraction=1.0, log2_fold_change=2, log2_fold_change_sd=0.3)
    size = data.var["log2_fold_change_type_0"].abs()
    assert size.mean() == pytest.approx(2, abs=0.03)
    assert size.std() == pytest.approx(0.3, abs=0.02)


def test_counts_of_two_types_show_the_fold_change_of_their_shares():
    data = simulate(4000, 100, n_types=2, de_fraction=0.3, base_shape=5, inverse_dispersion=20)
    by_type = [data.X[codes(data, "cell_type") == i].sum(0).A1 for i in range(2)]
    seen = np.log2(by_type[0] / by_type[0].sum()) - np.log2(by_type[1] / by_type[1].sum())
    truth = np.log2(data.var["share_type_0"] / data.var["share_type_1"])
    np.testing.assert_allclose(seen, truth, atol=0.1)
    shift = truth - (data.var["log2_fold_change_type_0"] - data.var["log2_fold_change_type_1"])
    assert shift.std() < 1e-9  # the effects, up to what is common to all genes
    assert truth.abs().max() > 0.8


def test_counts_of_two_conditions_show_the_condition_effect():
    data = simulate(
        4000, 100, n_types=1, n_donors=2, n_conditions=2, donor_sd=0, de_fraction=0, base_shape=5,
        condition_de_fraction=0.2, condition_log2_fold_change=2, inverse_dispersion=20,
    )  # fmt: skip
    totals = [data.X[codes(data, "condition") == i].sum(0).A1 for i in range(2)]
    seen = np.log2(totals[1] / totals[0])
    h = data.var["log2_fold_change_condition_1"].to_numpy()
    assert (h != 0).sum() == 20
    assert set(np.abs(h[h != 0])) == {2.0}
    np.testing.assert_array_equal(data.var["is_de_condition"], h != 0)
    np.testing.assert_allclose(seen - np.median(seen), h, atol=0.2)


def test_batch_and_donor_effects_have_the_spread_asked_for():
    data = simulate(2, 5000, n_batches=2, n_donors=3, batch_sd=0.5, donor_sd=0.2)
    assert data.varm["log_batch_effect"].shape == (5000, 2)
    assert data.varm["log_donor_effect"].shape == (5000, 3)
    assert data.varm["log_batch_effect"].std() == pytest.approx(0.5, rel=0.03)
    assert data.varm["log_donor_effect"].std() == pytest.approx(0.2, rel=0.03)


def test_a_single_batch_or_donor_has_no_effect():
    data = simulate(2, 20, batch_sd=1, donor_sd=1)
    assert not data.varm["log_batch_effect"].any()
    assert not data.varm["log_donor_effect"].any()


# --- simulate: the design


def test_types_have_the_proportions_asked_for():
    data = simulate(10_000, 2, n_types=3, type_proportions=[1, 2, 5])
    np.testing.assert_allclose(
        np.bincount(codes(data, "cell_type")) / 10_000, [1 / 8, 2 / 8, 5 / 8], atol=0.015
    )
    np.testing.assert_allclose(data.uns["simulate"]["type_proportions"], [1 / 8, 2 / 8, 5 / 8])
    assert np.ptp(np.bincount(codes(simulate(10_000, 2), "cell_type"))) < 300


def test_donors_are_nested_in_conditions_and_all_else_crosses():
    data = simulate(6000, 2, n_types=3, n_batches=3, n_donors=6, n_conditions=2)
    np.testing.assert_array_equal(codes(data, "condition"), codes(data, "donor") % 2)
    for column, n in (("batch", 3), ("donor", 6)):
        assert set(np.bincount(codes(data, column))) == {6000 // n}
    for a, b in (("batch", "donor"), ("cell_type", "batch"), ("cell_type", "donor")):
        table = stats.contingency.crosstab(codes(data, a), codes(data, b)).count
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_more_batches_or_donors_leave_types_and_libraries_as_they_are():
    one, many = simulate(80, 20), simulate(80, 20, n_batches=3, n_donors=4, n_conditions=2, dropout=0.2)
    assert one.obs[["cell_type", "library"]].equals(many.obs[["cell_type", "library"]])
    assert one.var.equals(many.var[one.var.columns])


def test_no_cell_is_empty():
    data = simulate(2000, 20, library_mean=3, dropout=0.4)
    assert data.X.sum(1).min() == 1
    assert (
        data.layers["counts_before_dropout"].multiply(data.layers["dropped"].toarray() == 0) != data.X
    ).nnz == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1)])
def test_one_cell_or_one_gene(shape):
    data = simulate(*shape, n_types=2, n_batches=2, n_donors=2, n_conditions=2, dropout=0.1, dropout_slope=1)
    assert data.shape == shape
    assert np.isfinite(data.layers["rate"]).all()


def test_extreme_base_expression_stays_finite():
    data = simulate(
        20, 50, base_shape=1e-3, dropout=0.2, dropout_slope=1, log2_fold_change=90, de_fraction=0.5
    )
    assert np.isfinite(data.layers["share"]).all()
    np.testing.assert_allclose(data.layers["share"].sum(1), 1, rtol=1e-5)


# --- simulate: seeds and errors


def test_same_seed_same_bits():
    assert same(simulate(50, 30, **RICH, seed=7), simulate(50, 30, **RICH, seed=7))


def test_another_seed_changes_every_draw():
    a, b = simulate(50, 30, **RICH, seed=7), simulate(50, 30, **RICH, seed=8)
    for column in ("cell_type", "batch", "donor", "library"):
        assert not a.obs[column].equals(b.obs[column])
    for column in ("base_share", "log2_fold_change_type_0", "log2_fold_change_condition_1"):
        assert not a.var[column].equals(b.var[column])
    for name in ("log_batch_effect", "log_donor_effect"):
        assert not np.array_equal(a.varm[name], b.varm[name])
    assert (a.layers["dropped"] != b.layers["dropped"]).nnz > 0
    assert (a.layers["counts_before_dropout"] != b.layers["counts_before_dropout"]).nnz > 0


def test_numpys_global_state_is_neither_read_nor_changed():
    def global_state():
        return np.random.get_state()[1].tolist()  # noqa: NPY002

    before = global_state()
    first = simulate(20, 10, **RICH)
    assert global_state() == before
    saved = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(12345)  # noqa: NPY002
        assert same(first, simulate(20, 10, **RICH))
    finally:
        np.random.set_state(saved)  # noqa: NPY002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": 0}, "n_cells=0.*at least 1"),
        ({"n_genes": 0}, "n_genes=0.*at least 1"),
        ({"n_types": 0}, "n_types=0.*at least 1"),
        ({"n_batches": -1}, "n_batches=-1.*at least 1"),
        ({"n_conditions": 2}, "n_donors=1.*2 conditions.*raise n_donors"),
        ({"de_fraction": 1.5}, "de_fraction=1.5.*0 to 1"),
        ({"condition_de_fraction": -0.1}, "condition_de_fraction=-0.1.*0 to 1"),
        ({"log2_fold_change": -1.0}, "log2_fold_change=-1.0.*at least 0"),
        ({"condition_log2_fold_change": np.inf}, "condition_log2_fold_change=inf.*finite"),
        ({"log2_fold_change_sd": np.nan}, "log2_fold_change_sd=nan.*finite"),
        ({"batch_sd": -1.0}, "batch_sd"),
        ({"donor_sd": -1.0}, "donor_sd"),
        ({"library_sd": np.float64(-1.0)}, "library_sd"),
        ({"library_mean": 0}, "library_mean=0.*above 0"),
        ({"base_shape": 0.0}, "base_shape=0.0.*above 0"),
        ({"dropout": 1.0}, "dropout=1.0.*below 1"),
        ({"dropout_slope": -1.0}, "dropout_slope=-1.0.*at least 0"),
        ({"seed": -1}, "seed=-1.*at least 0"),
        ({"inverse_dispersion": 0.0}, "inverse_dispersion=0.0.*above 0"),
        ({"inverse_dispersion": [1.0, 2.0]}, "inverse_dispersion.*each of 10 genes"),
        ({"type_proportions": [0.5, 0.5]}, "type_proportions.*give 4, one per type"),
        ({"type_proportions": [1, 1, 1, -1]}, "type_proportions.*none below 0"),
        ({"type_proportions": [0, 0, 0, 0]}, "type_proportions.*not all 0"),
        ({"type_proportions": [1, 1, 1, np.nan]}, "type_proportions"),
        ({"library_mean": 1e-12}, "5 cells got no count.*raise library_mean or lower dropout"),
    ],
)
def test_bad_arguments_name_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**({"n_cells": 5, "n_genes": 10} | arguments))


# --- pbmc68k_reduced


@pytest.fixture(scope="module")
def source():
    return pytest.importorskip("scanpy").datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def pbmc(source):
    return pbmc68k_reduced()


def test_pbmc_counts_give_scanpys_values_back_cell_by_cell(pbmc, source):
    assert pbmc.shape == (700, 765)
    assert list(pbmc.obs_names) == list(source.obs_names)
    assert list(pbmc.var_names) == list(source.raw.var_names)
    raw = source.raw.X.toarray().astype(float)
    np.testing.assert_allclose(
        raw * 1000, np.rint(raw * 1000), atol=1e-3
    )  # kept to three decimals, as documented
    for i in range(700):
        x = pbmc.X[i].toarray().ravel().astype(float)
        np.testing.assert_array_equal(x, np.floor(x))
        total = float(source.obs["n_counts"].iloc[i])
        np.testing.assert_allclose(np.log1p(x / total * 1e4), raw[i], atol=5.01e-4, rtol=0)
        neighbours = np.log1p((x[x > 0] + [[-1], [1]]) / total * 1e4)  # no other whole number would
        assert (np.abs(neighbours - raw[i][x > 0]) > 2e-3).all()


def test_pbmc_is_as_documented(pbmc):
    assert pbmc.X.format == "csr"
    assert pbmc.X.dtype == np.float32
    assert pbmc.X.has_canonical_format
    totals, n_counts = pbmc.X.sum(1).A1, pbmc.obs["n_counts"].to_numpy()
    assert (totals.min(), totals.max(), n_counts.min(), n_counts.max()) == (342, 1654, 2141, 9497)
    assert 0.105 < (totals / n_counts).min() < (totals / n_counts).max() < 0.285
    assert (pbmc.X > 0).sum(0).min() == 3
    assert 1 - pbmc.X.nnz / (700 * 765) == pytest.approx(0.67, abs=0.005)
    assert pbmc.X.max() == 259
    assert pbmc.obs["cell_type"].cat.categories.size == 10
    assert (pbmc.obs["cell_type"] == "Dendritic").mean() == pytest.approx(1 / 3, abs=0.02)
    assert {"n_counts", "n_genes", "percent_mito", "phase", "louvain"} < set(pbmc.obs)
    assert (pbmc.obsm["X_pca"].shape, pbmc.obsm["X_umap"].shape) == ((700, 50), (700, 2))
    assert (pbmc.obs["n_genes"] > (pbmc.X > 0).sum(1).A1).all()
    assert pbmc.raw is None


@pytest.mark.parametrize(
    ("gene", "cell_type"),
    [
        ("CD79A", "CD19+ B"),
        ("MS4A1", "CD19+ B"),
        ("NKG7", "CD56+ NK"),
        ("GNLY", "CD56+ NK"),
        ("CD8A", "CD8+/CD45RA+ Naive Cytotoxic"),
        ("FCER1A", "Dendritic"),
        ("S100A8", "CD14+ Monocyte"),
    ],
)
def test_pbmc_markers_peak_in_their_cells(pbmc, gene, cell_type):
    share = pbmc[:, gene].X.toarray().ravel() / pbmc.obs["n_counts"].to_numpy()
    means = {
        name: share[(pbmc.obs["cell_type"] == name).to_numpy()].mean()
        for name in pbmc.obs["cell_type"].cat.categories
    }
    assert max(means, key=means.get) == cell_type


def test_pbmc_is_fresh_each_time(pbmc):
    other = pbmc68k_reduced()
    other.X.data[:] = 0
    other.obsm["X_umap"][:] = 0
    other = pbmc68k_reduced()
    assert other.X.sum() == pbmc.X.sum()
    assert other.obsm["X_umap"].any()


@pytest.mark.parametrize("wrong", [1.3, -0.5, np.nan])
def test_pbmc_values_that_are_not_of_counts_are_refused(wrong):
    pytest.importorskip("scanpy")
    totals = np.array([2000.0, 3000.0, 4000.0])
    x = np.array([[1.0, 0.0, 5.0], [2.0, 7.0, 0.0], [0.0, 3.0, 1.0]])
    logged = csr_matrix(np.round(np.log1p(1e4 * x / totals[:, None]), 3).astype(np.float32))
    np.testing.assert_array_equal(pbmc68k._whole_counts(logged, totals).toarray(), x)
    logged[1, 0] = logged[1, 1] = wrong
    with pytest.raises(RuntimeError, match=r"1 of 3 cells .* scanpy \d+\.\d+"):
        pbmc68k._whole_counts(logged, totals)


def test_pbmc_counts_too_large_for_the_rounding_are_refused():
    pytest.importorskip("scanpy")
    totals = np.array([20_000.0])
    logged = csr_matrix(np.round(np.log1p(1e4 * np.array([[6000.0]]) / totals[:, None]), 3))
    with pytest.raises(RuntimeError, match="1 of 1 cells"):
        pbmc68k._whole_counts(logged, totals)


def test_pbmc_without_scanpy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(ImportError, match=r'pip install "pyrosc\[demo\]"'):
        pbmc68k_reduced()
