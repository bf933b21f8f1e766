"""Counts and Cells: what comes in, what is refused, and what a minibatch holds."""

import re
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyrosc import Counts, from_anndata
from pyrosc.data.read import as_counts
from pyrosc.data.schema import Schema

X = np.array([[0, 3, 1], [2, 0, 0], [0, 0, 7], [1, 1, 1]])


def adata_of(x=X, **layers):
    n, g = x.shape
    obs = pd.DataFrame(
        {"batch": ["b", "a", "b", "a"][:n], "type": ["T", None, "B", "T"][:n], "age": [1.5, 2, 3, 4][:n]},
        index=[f"c{i}" for i in range(n)],
    )
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(g)]), layers=layers)


# --- every kind of matrix


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize(
    "kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("layer", [None, "counts"])
def test_every_kind_of_matrix_gives_the_same_counts(kind, dtype, layer):
    if dtype == "f2" and kind is not np.asarray:
        pytest.skip("scipy has no sparse float16")
    matrix = kind(X.astype(dtype))
    adata = adata_of(matrix) if layer is None else adata_of(np.full(X.shape, 0.5), counts=matrix)
    data = from_anndata(adata, layer=layer)
    assert isinstance(data.x, sp.csr_array)
    assert data.x.dtype == np.float32
    np.testing.assert_array_equal(data.x.toarray(), X)


def test_bool_counts():
    np.testing.assert_array_equal(from_anndata(adata_of(X > 0)).x.toarray(), X > 0)
    np.testing.assert_array_equal(from_anndata(adata_of(sp.csr_matrix(X > 0))).x.toarray(), X > 0)


def test_fortran_order_and_explicit_zeros_and_unsorted_duplicates():
    np.testing.assert_array_equal(from_anndata(adata_of(np.asfortranarray(X))).x.toarray(), X)
    matrix = sp.csr_matrix(
        (np.array([1.0, 2, 3, 0, 5]), np.array([2, 0, 2, 1, 1]), np.array([0, 4, 5])), (2, 3)
    )
    x = from_anndata(adata_of(matrix)).x
    np.testing.assert_array_equal(x.toarray(), [[2, 0, 4], [0, 5, 0]])
    assert (x.data != 0).all()


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_backed_file(tmp_path, kind):
    adata_of(kind(X.astype("f4")), counts=kind(X.astype("f4"))).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        np.testing.assert_array_equal(from_anndata(backed).x.toarray(), X)
        np.testing.assert_array_equal(from_anndata(backed, layer="counts").x.toarray(), X)
        asked = as_counts(backed, Schema(genes=("g2", "g1", "g0")))
        np.testing.assert_array_equal(asked.x.toarray(), X[:, [2, 1, 0]])
    finally:
        backed.file.close()


def test_views():
    for kind in (np.asarray, sp.csr_matrix, sp.csc_matrix):
        adata = adata_of(kind(X), counts=kind(X))
        view = adata[[3, 0], ["g2", "g1"]]
        np.testing.assert_array_equal(from_anndata(view).x.toarray(), X[[3, 0]][:, [2, 1]])
        data = from_anndata(view, layer="counts", batch_key="batch")
        np.testing.assert_array_equal(data.x.toarray(), X[[3, 0]][:, [2, 1]])
        assert list(data.cell_names) == ["c3", "c0"]
        assert data.schema.genes == ("g2", "g1")
        assert view.is_view


# --- covariates


def test_batches_labels_and_covariates():
    adata = adata_of()
    adata.obs["donor"] = [1, 2, 1, 10]
    adata.obs["sex"] = pd.Categorical(["m", "f", "f", "m"], categories=["x", "m", "f"])
    data = from_anndata(
        adata,
        batch_key="batch",
        labels_key="type",
        categorical_keys=["donor", "sex"],
        continuous_keys=["age"],
    )
    s = data.schema
    assert (s.batches, data.batch.tolist()) == (("a", "b"), [1, 0, 1, 0])
    assert (s.labels, data.labels.tolist()) == (("B", "T"), [1, -1, 0, 1])
    # Categories that do not occur are left out; those that do keep the column's order.
    assert s.categorical == {"donor": ("1", "2", "10"), "sex": ("m", "f")}
    np.testing.assert_array_equal(data.categorical, [[0, 0], [1, 1], [0, 1], [2, 0]])
    assert s.continuous == ("age",)
    np.testing.assert_array_equal(data.continuous, np.array([[1.5], [2], [3], [4]], "f4"))
    assert (s.batch_key, s.labels_key, s.layer) == ("batch", "type", None)


def test_without_keys_there_is_one_batch_and_no_label():
    data = from_anndata(adata_of())
    assert data.schema.batches == ("all",)
    assert data.batch.tolist() == [0] * 4
    assert data.labels.tolist() == [-1] * 4
    assert data.categorical.shape == (4, 0)
    assert data.continuous.shape == (4, 0)


def test_sizes_library_share_and_repr():
    data = from_anndata(adata_of(), batch_key="batch", labels_key="type", continuous_keys=["age"])
    assert (data.n_cells, data.n_genes, len(data)) == (4, 3, 4)
    np.testing.assert_array_equal(data.library, X.sum(1))
    np.testing.assert_allclose(data.share, (X.sum(0) + 1) / (X.sum() + 3))
    for word in ("4 cells", "3 genes", "58.3%", "2 batches by 'batch'", "2 labels by 'type'", "age"):
        assert word in repr(data)


# --- what is refused: each message names the remedy


def refused(error, *words, **arguments):
    adata = arguments.pop("adata")
    with pytest.raises(error) as caught:
        from_anndata(adata, **arguments)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


BIG = np.ones((300, 40))


def with_last(value, kind=np.asarray, dtype="f8"):
    x = BIG.astype(dtype)
    x[-1, -1] = value
    return anndata.AnnData(kind(x))


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_array], ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.5, ["whole", "log-norm", "raw", "layer="]),
        (2 + 1e-6, ["whole"]),
        (-1.0, ["negative", "raw counts", "layer="]),
        (np.nan, ["NaN or infinite", "remove or repair"]),
        (np.inf, ["NaN or infinite", "1 "]),
        (2.0**24 + 2, ["2\\^24"]),
    ],
)
def test_one_bad_value_in_the_last_entry_is_found(kind, value, words):
    refused(ValueError, *words, "X", adata=with_last(value, kind))
    adata = anndata.AnnData(BIG, layers={"counts": with_last(value, kind).X})
    refused(ValueError, *words, "counts", adata=adata, layer="counts")


def test_negative_integers_are_refused():
    refused(ValueError, "negative", adata=with_last(-3, dtype="i8"))


def test_the_largest_count_is_let_in():
    assert from_anndata(with_last(2.0**24)).x[[299], [39]] == 2**24


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix], ids=lambda k: k.__name__)
def test_empty_data_and_empty_cells_are_refused(kind):
    refused(ValueError, "no data", "0 cells", adata=anndata.AnnData(kind(np.ones((0, 3)))))
    refused(ValueError, "no data", "0 genes", adata=anndata.AnnData(kind(np.ones((3, 0)))))
    x = X.copy()
    x[2] = 0
    refused(ValueError, "1 of 4 cells", "c2", "filter_cells|remove", adata=adata_of(kind(x)))


def test_no_x_is_refused():
    adata = anndata.AnnData(obs=pd.DataFrame(index=["c0"]), var=pd.DataFrame(index=["g0"]))
    refused(ValueError, "None", "layer", adata=adata)


def test_missing_layer_or_key_is_named_with_what_there_is():
    adata = adata_of(counts=X)
    refused(KeyError, "cuonts", "counts", adata=adata, layer="cuonts")
    for argument, value in [
        ("batch_key", "donor"),
        ("labels_key", "donor"),
        ("categorical_keys", ["donor"]),
        ("continuous_keys", ["donor"]),
    ]:
        refused(KeyError, "donor", "age", adata=adata, **{argument: value})


def test_nan_in_a_category_is_refused_but_in_a_label_is_an_unlabelled_cell():
    for argument, value in [("batch_key", "type"), ("categorical_keys", ["type"])]:
        refused(ValueError, "type", "1 cells", "fill it in or remove", adata=adata_of(), **{argument: value})
    assert from_anndata(adata_of(), labels_key="type").labels[1] == -1


def test_continuous_covariates_must_be_finite_numbers():
    adata = adata_of()
    refused(ValueError, "batch", "categorical_keys", adata=adata, continuous_keys=["batch"])
    adata.obs["age"] = [1, np.nan, 2, np.inf]
    refused(ValueError, "age", "2 cells", "fill it in or remove", adata=adata, continuous_keys=["age"])


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_duplicate_gene_names_are_refused():
    adata = adata_of()
    adata.var_names = ["g0", "g1", "g0"]
    refused(ValueError, "g0", "var_names_make_unique", adata=adata)


def test_other_things_than_numbers_are_refused():
    refused(TypeError, "complex128", adata=anndata.AnnData(X.astype(complex)))
    with pytest.raises(TypeError):
        as_counts(X)


# --- the AnnData stays as it is


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
@pytest.mark.parametrize("dtype", ["f4", "i8"])
def test_the_anndata_is_left_as_it_was(kind, dtype):
    x = kind(X.astype(dtype))
    if sp.issparse(x) and x.format == "csr":  # unsorted, with a duplicate and a stored zero
        x = type(x)(
            (np.array([1, 2, 3, 0, 5], dtype), np.array([2, 0, 2, 1, 1]), np.array([0, 4, 5])), (2, 3)
        )
    adata = adata_of(x, counts=x.copy())
    parts = lambda m: [m.copy()] if not sp.issparse(m) else [m.data.copy(), m.indices.copy(), m.indptr.copy()]
    kept = (parts(adata.X), parts(adata.layers["counts"]), adata.obs.copy(), adata.var.copy())
    data = from_anndata(adata, layer="counts", batch_key="batch", labels_key="type", continuous_keys=["age"])
    data.obs["mine"] = 1
    data.x.data[:] = 9
    from_anndata(adata).x.data[:] = 9
    as_counts(adata, Schema(genes=("g2", "g0", "g1"))).x.data[:] = 9
    now = (parts(adata.X), parts(adata.layers["counts"]))
    for before, after in zip(kept, now, strict=False):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    pd.testing.assert_frame_equal(adata.obs, kept[2])
    pd.testing.assert_frame_equal(adata.var, kept[3])
    assert list(adata.layers) == ["counts"]


# --- questions: matched by name


def test_genes_are_matched_by_name_reordered_and_extra_ones_left_out():
    schema = from_anndata(adata_of()).schema
    other = adata_of(np.column_stack([X, X[:, :1] + 5]))
    other.var_names = ["g0", "g1", "g2", "new"]
    shuffled = other[:, ["g2", "new", "g0", "g1"]]
    for asked in (shuffled, shuffled.copy(), from_anndata(shuffled.copy())):
        data = as_counts(asked, schema)
        np.testing.assert_array_equal(data.x.toarray(), X)
        assert data.schema == schema
        assert data.x.has_sorted_indices


def test_missing_genes_are_named():
    schema = from_anndata(adata_of()).schema
    few = adata_of(X + 1)[:, ["g1", "g2"]].copy()
    for asked in (few, from_anndata(few)):
        with pytest.raises(ValueError, match=r"1 of the fit's 3 genes.*g0"):
            as_counts(asked, schema)


def test_only_the_genes_of_the_fit_are_checked_at_query_time():
    schema = from_anndata(adata_of()).schema
    other = adata_of(np.column_stack([X, np.full(4, 0.5)]))
    other.var_names = ["g0", "g1", "g2", "score"]
    np.testing.assert_array_equal(as_counts(other, schema).x.toarray(), X)


def test_batches_and_categories_are_recoded_by_name():
    adata = adata_of()
    adata.obs["site"] = ["u", "v", "w", "u"]
    keys = {"batch_key": "batch", "labels_key": "type", "categorical_keys": ["site"]}
    schema = from_anndata(adata, **keys).schema
    part = adata[[0, 2]].copy()  # only batch b, sites u and w, and types T and B
    assert from_anndata(part, **keys).batch.tolist() == [0, 0]
    for asked in (part, from_anndata(part, **keys)):
        data = as_counts(asked, schema)
        assert data.batch.tolist() == [1, 1]
        assert data.categorical.tolist() == [[0], [2]]
        assert data.labels.tolist() == [1, 0]


def test_unknown_categories_are_named_but_unknown_labels_are_unlabelled():
    adata = adata_of()
    keys = {"batch_key": "batch", "labels_key": "type", "categorical_keys": ["batch"]}
    schema = from_anndata(adata, **keys).schema
    other = adata.copy()
    other.obs["batch"] = ["a", "b", "zz", "a"]
    for asked in (other, from_anndata(other, **keys)):
        with pytest.raises(ValueError, match=r"batch.*zz.*a, b"):
            as_counts(asked, schema)
    other = adata.copy()
    other.obs["type"] = ["T", "new", "B", None]
    assert as_counts(other, schema).labels.tolist() == [1, -1, 0, -1]
    assert as_counts(from_anndata(other, **keys), schema).labels.tolist() == [1, -1, 0, -1]


def test_labels_are_not_needed_to_ask_but_covariates_are():
    adata = adata_of()
    keys = {"batch_key": "batch", "labels_key": "type", "continuous_keys": ["age"]}
    schema = from_anndata(adata, **keys).schema
    assert as_counts(adata[:, :], schema).schema == schema
    bare = adata.copy()
    del bare.obs["type"]
    assert as_counts(bare, schema).labels.tolist() == [-1] * 4
    del bare.obs["age"]
    with pytest.raises(KeyError, match="age"):
        as_counts(bare, schema)
    with pytest.raises(ValueError, match=r"age.*from_anndata"):
        as_counts(from_anndata(bare, batch_key="batch"), schema)


def test_counts_read_without_the_batches_of_the_fit_are_told_so():
    schema = from_anndata(adata_of(), batch_key="batch").schema
    with pytest.raises(ValueError, match=r"batch.*from_anndata"):
        as_counts(from_anndata(adata_of()), schema)


def test_an_equal_schema_changes_nothing():
    data = from_anndata(adata_of(), batch_key="batch")
    assert as_counts(data, data.schema) is data
    assert as_counts(data) is data


def test_batches_of_the_data_do_not_matter_to_a_fit_without():
    schema = from_anndata(adata_of()).schema
    data = as_counts(from_anndata(adata_of(), batch_key="batch"), schema)
    assert data.batch.tolist() == [0] * 4


# --- selection and minibatches


def test_selection_by_rows_and_by_mask():
    data = from_anndata(adata_of(), batch_key="batch", labels_key="type", continuous_keys=["age"])
    rows = np.array([3, 0, 3])
    part = data[rows]
    assert isinstance(part, Counts)
    np.testing.assert_array_equal(part.x.toarray(), X[rows])
    assert list(part.cell_names) == ["c3", "c0", "c3"]
    assert part.batch.tolist() == [0, 1, 0]
    assert part.labels.tolist() == [1, 1, 1]
    assert part.obs["age"].tolist() == [4, 1.5, 4]
    assert part.continuous[:, 0].tolist() == [4, 1.5, 4]
    assert part.categorical.shape == (3, 0)
    assert part.schema is data.schema
    masked = data[np.array([True, False, False, True])]
    np.testing.assert_array_equal(masked.x.toarray(), X[[0, 3]])
    assert list(masked.cell_names) == ["c0", "c3"]
    assert len(data[np.array([], dtype=int)]) == 0


@pytest.mark.parametrize("rows", [[0], [3, 1, 0], [2, 2, 2], [1, 0, 1, 3, 1], []])
def test_minibatches_equal_dense_rows_repeated_and_in_any_order(rows):
    data = from_anndata(adata_of(), batch_key="batch", labels_key="type", continuous_keys=["age"])
    resident = data.on("cpu")
    cells = resident.cells(torch.tensor(rows, dtype=torch.int64))
    np.testing.assert_array_equal(cells.x.numpy(), X[np.array(rows, dtype=int)])
    assert cells.x.dtype == torch.float32
    assert cells.index.tolist() == rows
    assert cells.n_total == len(resident) == 4
    assert len(cells) == len(rows)
    np.testing.assert_array_equal(cells.batch, data.batch[np.array(rows, dtype=int)])
    np.testing.assert_array_equal(cells.labels, data.labels[np.array(rows, dtype=int)])
    np.testing.assert_array_equal(cells.continuous, data.continuous[np.array(rows, dtype=int)])
    np.testing.assert_array_equal(cells.library[:, 0], X[np.array(rows, dtype=int)].sum(1))
    assert resident.cells(torch.tensor(rows, dtype=torch.int64), n_total=9).n_total == 9


def test_minibatches_cover_all_cells_in_order(data):
    blocks = list(data.on("cpu").minibatches(64))
    assert [len(block) for block in blocks] == [64, 64, 64, 8]
    np.testing.assert_array_equal(torch.cat([b.x for b in blocks]).numpy(), data.x.toarray())
    assert torch.cat([b.index for b in blocks]).tolist() == list(range(200))


def test_in_batch_changes_the_batch_only(data):
    cells = data.on("cpu").cells(torch.arange(5))
    there = cells.in_batch(1)
    assert there.batch.tolist() == [1] * 5
    assert there.x is cells.x
    np.testing.assert_array_equal(cells.batch, data.batch[:5])


@pytest.mark.parametrize("key", ["batch_key", "labels_key", "categorical_keys"])
def test_numbers_are_no_categories(key):
    adata = adata_of(X)
    adata.obs["share"] = np.linspace(0, 1, adata.n_obs)
    with pytest.raises(ValueError, match=r"numbers that are not whole, .* list it among continuous_keys"):
        from_anndata(adata, **{key: "share"})
    adata.obs["share"] = np.arange(adata.n_obs, dtype=float)
    from_anndata(adata, **{key: "share"})


def test_categories_that_are_written_alike_are_refused():
    adata = adata_of(X)
    adata.obs["batch"] = pd.Series([1, "1"] * adata.n_obs, dtype=object).to_numpy()[: adata.n_obs]
    with pytest.raises(ValueError, match=r"different types that are written alike \(1\)"):
        from_anndata(adata, batch_key="batch")


def test_a_minibatch_of_other_counts_has_their_library(rich):
    cells = rich.on("cpu").cells(torch.tensor([5, 1]))
    assert torch.equal(cells.library, cells.x.sum(1, keepdim=True))
    assert torch.equal(replace(cells, x=2 * cells.x).library, 2 * cells.library)
    assert cells.in_batch(0).library.shape == (2, 1)


def test_a_library_depends_on_counts_that_require_a_gradient(rich):
    cells = rich.on("cpu").cells(torch.tensor([5, 1]))
    cells = replace(cells, x=cells.x.clone().requires_grad_())
    (slope,) = torch.autograd.grad(cells.library.sum(), cells.x)
    assert torch.equal(slope, torch.ones_like(cells.x))


def test_minibatches_of_inference_mode(rich):
    with torch.inference_mode():
        cells = rich.on("cpu").cells(torch.tensor([5, 1]))
        assert torch.equal(cells.library, cells.x.sum(1, keepdim=True))
