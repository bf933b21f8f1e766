"""AnnData in, Counts out.

Data is checked once, here, at the door: whole, non-negative, finite, two-dimensional, uniquely named genes,
no empty cell. What lies behind the door may rely on it.
"""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data.counts import Counts, check_cells, check_names, columns, places
from pyrosc.data.schema import Schema

_MAX_COUNT = 2**24
"""The largest count that float32 holds exactly together with all smaller ones."""

IMPUTED = "pyrosc_imputed"
"""Entry of ``uns`` that says of each imputed layer, or ``X``, what it is."""


def from_anndata(
    adata: anndata.AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    categorical_keys: Sequence[str] = (),
    continuous_keys: Sequence[str] = (),
    protein_key: str | None = None,
) -> Counts:
    """Read and check the counts and covariates of an AnnData. Nothing is written into it.

    Parameters
    ----------
    adata
        Cells x genes. Counts may be sparse (csr, csc; matrix or array) or dense, of any integer or float
        type, in memory or backed.
    layer
        Layer that holds the counts; ``X`` by default.
    batch_key
        Column of ``obs``: the experimental batch.
    labels_key
        Column of ``obs``: known cell labels. Missing values are unlabelled cells.
    categorical_keys, continuous_keys
        Columns of ``obs``: further covariates.
    protein_key
        Entry of ``obsm``: counts of surface proteins (CITE-seq), a DataFrame with their names or an array;
        NaN or -1 is a protein that was not measured in a cell.

    Returns
    -------
    Counts

    Raises
    ------
    KeyError
        If a layer, a column or an entry of ``obsm`` is missing.
    ValueError
        If the data is empty, or has values that are not whole, negative, not finite or over 2^24, a cell
        without counts, genes or proteins of the same name, or a missing value in a batch or covariate; or if
        the values are imputed (see :meth:`Imputation.to_layer`).
    TypeError
        If the counts are of a kind that can't be read.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(100, 20, n_batches=2)
    >>> data = pyrosc.from_anndata(adata, batch_key="batch", labels_key="cell_type")
    >>> data.x.shape, data.schema.batches
    ((100, 20), ('batch_0', 'batch_1'))

    Values that are no counts are refused:

    >>> pyrosc.from_anndata(adata, layer="share")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: share has values that are not whole (e.g. ...): perhaps log-normalised data; ...
    """
    if not isinstance(adata, anndata.AnnData):
        msg = f"from_anndata reads an AnnData, not {type(adata).__name__}: anndata.read_h5ad(file) makes one"
        raise TypeError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"no layer {layer!r}; this AnnData has {list(adata.layers)}"
        raise KeyError(msg)
    where = "X" if layer is None else layer
    if note := adata.uns.get(IMPUTED, {}).get(where):
        msg = (
            f"{where} has imputed values ({note}), which are no counts: fit and test the raw counts, and for "
            "what lies behind them ask the fit, whose posterior knows how sure it is. If counts are there "
            f"now, delete uns[{IMPUTED!r}][{where!r}]"
        )
        raise ValueError(msg)
    x = _checked(adata.X if layer is None else adata.layers[layer], where)
    check_names(adata.var_names)
    check_cells(x, adata.obs_names)
    obs = adata.obs
    categorical_keys = [categorical_keys] if isinstance(categorical_keys, str) else categorical_keys
    continuous_keys = [continuous_keys] if isinstance(continuous_keys, str) else continuous_keys
    one_batch, no_labels = (np.zeros(len(obs), np.int64), ("all",)), (np.full(len(obs), -1), ())
    batch, batches = one_batch if batch_key is None else _codes(obs, batch_key)
    labels, label_names = no_labels if labels_key is None else _codes(obs, labels_key, missing_ok=True)
    categorical = {key: _codes(obs, key) for key in categorical_keys}
    continuous = [_numbers(obs, key) for key in continuous_keys]
    no_proteins = (np.empty((len(obs), 0), np.float32), ())
    proteins, protein_names = no_proteins if protein_key is None else _proteins(adata, protein_key)
    return Counts(
        x=x,
        cell_names=adata.obs_names.to_numpy(dtype=str),
        obs=obs.copy(),
        batch=batch,
        labels=labels.astype(np.int64),
        categorical=columns([codes for codes, _ in categorical.values()], len(obs), np.int64),
        continuous=columns(continuous, len(obs), np.float32),
        proteins=proteins,
        schema=Schema(
            genes=tuple(map(str, adata.var_names)),
            layer=layer,
            batch_key=batch_key,
            labels_key=labels_key,
            batches=batches,
            labels=label_names,
            categorical={key: names for key, (_, names) in categorical.items()},
            continuous=tuple(continuous_keys),
            protein_key=protein_key,
            proteins=protein_names,
        ),
    )


def as_counts(data: Counts | anndata.AnnData, schema: Schema | None = None) -> Counts:
    """Return `data` as Counts: an AnnData is read, by the keys of `schema` if there is one.

    Parameters
    ----------
    data
        Counts, or an AnnData with counts in ``X`` (or in the schema's layer).
    schema
        Of the fit that is asked: genes are matched by name, categories by their names.
    """
    if isinstance(data, anndata.AnnData):
        if schema is None:
            return from_anndata(data)
        data = read_as(data, schema)
    if not isinstance(data, Counts):
        msg = (
            f"data must be an AnnData or pyrosc.Counts, not {type(data).__name__}; of an array or a table, "
            "cells x genes, anndata.AnnData(...) makes one"
        )
        raise TypeError(msg)
    return data if schema is None else data.like(schema)


def read_as(adata: anndata.AnnData, schema: Schema) -> Counts:
    """Read an AnnData by the keys of a schema: of its genes, only those that the schema has."""
    genes = places([str(name) for name in adata.var_names], np.array(schema.genes)[schema.present])
    has_labels = schema.labels_key is not None and schema.labels_key in adata.obs
    has_proteins = schema.protein_key is not None and schema.protein_key in adata.obsm
    return from_anndata(
        adata[:, genes],
        layer=schema.layer,
        batch_key=schema.batch_key,
        labels_key=schema.labels_key if has_labels else None,
        categorical_keys=tuple(schema.categorical),
        continuous_keys=schema.continuous,
        protein_key=schema.protein_key if has_proteins else None,
    )


def _checked(matrix: Any, where: str) -> sp.csr_array:
    """Return the counts as CSR float32, every value checked."""
    if hasattr(matrix, "to_memory"):  # a backed sparse data set
        matrix = matrix.to_memory()
    if matrix is None:
        msg = f"{where} is empty (None): put the counts there or name the layer that has them"
        raise ValueError(msg)
    if not sp.issparse(matrix):
        try:
            matrix = np.asarray(matrix[:] if hasattr(matrix, "file") else matrix)
        except Exception as error:
            msg = (
                f"can't read counts from {type(matrix).__name__}: give a numpy array or a scipy sparse matrix"
            )
            raise TypeError(msg) from error
    if matrix.dtype.kind not in "buif" or matrix.ndim != 2:
        msg = f"counts must be a 2-d array of numbers, not {matrix.ndim}-d of {matrix.dtype}"
        raise TypeError(msg)
    if 0 in matrix.shape:
        msg = f"no data: {where} has {matrix.shape[0]} cells and {matrix.shape[1]} genes"
        raise ValueError(msg)
    # scipy has no sparse float16; whole numbers survive the step up.
    x = sp.csr_array(matrix.astype(np.float32) if matrix.dtype == np.float16 else matrix)
    _check_values(x.data, where)
    x = x.astype(np.float32)  # a copy, which the next two lines change
    x.sum_duplicates()
    x.eliminate_zeros()
    return x


def _check_values(values: np.ndarray, where: str, remedy: str = 'layer="counts"') -> None:
    """Raise unless every value is finite, non-negative, whole and exact in float32."""
    if not np.isfinite(values).all():
        n = int((~np.isfinite(values)).sum())
        msg = f"{where} has {n} NaN or infinite values: counts must be finite; remove or repair those entries"
        raise ValueError(msg)
    if values.size and values.min() < 0:
        msg = (
            f"{where} has negative values (least {values.min():.4g}): these are no counts, perhaps scaled; "
            f"give the raw counts, e.g. {remedy}"
        )
        raise ValueError(msg)
    if values.dtype.kind == "f" and not (values == np.floor(values)).all():
        odd = float(values[values != np.floor(values)][0])
        msg = (
            f"{where} has values that are not whole (e.g. {odd:.4g}): perhaps log-normalised data; "
            f"give the raw counts, e.g. {remedy}"
        )
        raise ValueError(msg)
    if values.size and values.max() > _MAX_COUNT:
        msg = f"{where} has a count of {values.max():.4g}, more than 2^24: are these counts of molecules?"
        raise ValueError(msg)


def _proteins(adata: anndata.AnnData, key: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return counts of proteins, -1 where there is none, (cells, proteins), and their names."""
    if key not in adata.obsm:
        msg = f"no {key!r} in obsm; it has {list(adata.obsm)}"
        raise KeyError(msg)
    table = adata.obsm[key]
    try:
        if isinstance(table, pd.DataFrame):
            names, table = table.columns.map(str), table.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            dense = table.toarray() if sp.issparse(table) else table  # type: ignore[attr-defined]
            table = np.asarray(dense, dtype=np.float64)
            names = pd.Index([f"protein_{i}" for i in range(table.shape[1])])
    except (TypeError, ValueError) as error:
        msg = f"obsm[{key!r}] has values that are no numbers ({error}): give counts, and NaN or -1 for none"
        raise ValueError(msg) from error
    if not names.is_unique:
        twice = ", ".join(names[names.duplicated()].unique()[:5])
        msg = f"obsm[{key!r}] has columns of the same name, {twice}: rename them"
        raise ValueError(msg)
    measured = ~(np.isnan(table) | (table == -1))
    _check_values(table[measured], f"obsm[{key!r}]", "another protein_key")
    return np.where(measured, table, -1).astype(np.float32), tuple(names)


def _column(obs: pd.DataFrame, key: str) -> pd.Series:
    if not isinstance(key, str) or key not in obs:
        msg = f"no column {key!r} in obs; it has {list(obs.columns)}"
        raise KeyError(msg)
    return obs[key]


def _codes(obs: pd.DataFrame, key: str, *, missing_ok: bool = False) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return codes and names of a column's categories; only categories that occur, in the column's order."""
    column = _column(obs, key)
    missing = int(column.isna().sum())
    if missing and not missing_ok:
        msg = f"obs[{key!r}] is missing (NaN) in {missing} cells: fill it in or remove those cells"
        raise ValueError(msg)
    values = pd.Categorical(column).remove_unused_categories()
    names = tuple(map(str, values.categories))
    if len(set(names)) < len(names):
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1})[:5])
        msg = (
            f"obs[{key!r}] has values of different types that are written alike ({twice}): make them one "
            f"type, obs[{key!r}].astype(str)"
        )
        raise ValueError(msg)
    if values.categories.dtype.kind == "f" and not (values.categories % 1 == 0).all():
        msg = (
            f"obs[{key!r}] has numbers that are not whole, {names[0]}, ..., where categories are asked for: "
            f"list it among continuous_keys, or make them names, obs[{key!r}].astype(str)"
        )
        raise ValueError(msg)
    return values.codes.astype(np.int64), names


def _numbers(obs: pd.DataFrame, key: str) -> np.ndarray:
    try:
        values = _column(obs, key).to_numpy(dtype=np.float32)
    except (TypeError, ValueError) as error:
        msg = f"obs[{key!r}] is not numeric: list it among categorical_keys"
        raise ValueError(msg) from error
    if not np.isfinite(values).all():
        n = int((~np.isfinite(values)).sum())
        msg = f"obs[{key!r}] is missing or infinite in {n} cells: fill it in or remove those cells"
        raise ValueError(msg)
    return values
