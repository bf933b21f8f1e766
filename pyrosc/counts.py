"""Counts (all cells) and Cells (a minibatch): AnnData in, tensors out. No Pyro here.

Data is checked once, here, at the door: whole, non-negative, finite, two-dimensional, uniquely named genes,
no empty cell. What lies behind the door may rely on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_COUNT = 2**24
"""The largest count that float32 holds exactly together with all smaller ones."""


@dataclass(frozen=True)
class Schema:
    """What a model was fitted to: the names that new data must bring, and where they were found.

    Attributes
    ----------
    genes : tuple of str
        Gene names, in the order of the fit.
    layer, batch_key, labels_key : str or None
        Where :func:`from_anndata` found the counts, the experimental batch and the labels.
    batches, labels : tuple of str
        Names of the batches (one, ``"all"``, where there is no key) and of the labels (none without a key).
    categorical : dict of str to tuple of str
        Categories of each categorical covariate.
    continuous : tuple of str
        Names of the continuous covariates.
    """

    genes: tuple[str, ...]
    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    batches: tuple[str, ...] = ("all",)
    labels: tuple[str, ...] = ()
    categorical: Mapping[str, tuple[str, ...]] = None  # type: ignore[assignment]
    continuous: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "categorical", dict(self.categorical or {}))


@dataclass(frozen=True)
class Cells:
    """A minibatch: all that a model may see.

    Attributes
    ----------
    x : Tensor of shape (cells, genes)
        Observed counts.
    index : Tensor of shape (cells,)
        The cells' places among `n_total`: what ``pyro.plate(..., subsample=cells.index)`` takes.
    n_total : int
        Cells in the whole data set that this minibatch stands for.
    batch, labels : Tensor of shape (cells,)
        Codes of the experimental batch and of the label; -1 is an unlabelled cell.
    categorical : Tensor of shape (cells, covariates)
        Codes of the categorical covariates.
    continuous : Tensor of shape (cells, covariates)
        Continuous covariates, in their own units.
    """

    x: Float[Tensor, "cells genes"]
    index: Int[Tensor, "cells"]
    n_total: int
    batch: Int[Tensor, "cells"]
    labels: Int[Tensor, "cells"]
    categorical: Int[Tensor, "cells categorical"]
    continuous: Float[Tensor, "cells continuous"]

    @property
    def library(self) -> Float[Tensor, "cells 1"]:
        """Observed total of each cell, in counts, over the genes of the fit."""
        return self.x.sum(-1, keepdim=True)

    def __len__(self) -> int:
        return len(self.index)

    def in_batch(self, code: int) -> "Cells":
        """Return the same cells as if measured in another experimental batch (a counterfactual)."""
        return replace(self, batch=torch.full_like(self.batch, code))


@dataclass(frozen=True)
class Resident:
    """Counts on a device, in CSR; minibatches are gathered and made dense there.

    Made by :meth:`Counts.on`.
    """

    start: Int[Tensor, "..."]
    gene: Int[Tensor, "..."]
    count: Float[Tensor, "..."]
    n_genes: int
    batch: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]
    categorical: Int[Tensor, "n categorical"]
    continuous: Float[Tensor, "n continuous"]

    def __len__(self) -> int:
        return len(self.batch)

    def cells(self, rows: Int[Tensor, "cells"], n_total: int | None = None) -> Cells:
        """Gather the minibatch of these rows.

        Parameters
        ----------
        rows : Tensor of shape (cells,)
            Rows to gather; they may repeat and stand in any order.
        n_total : int, optional
            Size of the data set that the minibatch stands for; all rows by default.
        """
        start, stop = self.start[rows], self.start[rows + 1]
        n = stop - start
        place = torch.arange(len(rows), device=rows.device).repeat_interleave(n)
        first = n.cumsum(0) - n
        entry = torch.arange(len(place), device=rows.device) + (start - first)[place]
        x = torch.zeros(len(rows) * self.n_genes, device=rows.device)
        x[place * self.n_genes + self.gene[entry]] = self.count[entry]
        return Cells(
            x=x.view(len(rows), self.n_genes),
            index=rows,
            n_total=len(self) if n_total is None else n_total,
            batch=self.batch[rows],
            labels=self.labels[rows],
            categorical=self.categorical[rows],
            continuous=self.continuous[rows],
        )

    def minibatches(self, size: int) -> Iterator[Cells]:
        """Yield all rows in their order, `size` at a time."""
        for start in range(0, len(self), size):  # none at all where there are no rows
            yield self.cells(torch.arange(start, min(start + size, len(self)), device=self.start.device))


@dataclass(frozen=True)
class Counts:
    """Counts of all cells, checked, with what is known of each cell. Made by :func:`from_anndata`.

    Attributes
    ----------
    x : scipy.sparse.csr_array of shape (cells, genes)
        Counts, float32, whole, non-negative.
    cell_names : ndarray of shape (cells,)
    obs : DataFrame of shape (cells, columns)
        The cells' annotation, for grouping in questions. A copy: the AnnData is left alone.
    batch, labels : ndarray of shape (cells,)
        Codes into ``schema.batches`` and ``schema.labels``; -1 is an unlabelled cell.
    categorical : ndarray of shape (cells, covariates)
        Codes into ``schema.categorical``.
    continuous : ndarray of shape (cells, covariates)
    schema : Schema
    """

    x: sp.csr_array
    cell_names: np.ndarray
    obs: pd.DataFrame
    batch: np.ndarray
    labels: np.ndarray
    categorical: np.ndarray
    continuous: np.ndarray
    schema: Schema

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.x.shape[0])

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return int(self.x.shape[1])

    @property
    def library(self) -> np.ndarray:
        """Observed total of each cell, shape (cells,), in counts, over these genes."""
        return np.asarray(self.x.sum(axis=1)).ravel()

    @property
    def share(self) -> np.ndarray:
        """Each gene's share of all counts, shape (genes,), with a count added to each gene: none is zero."""
        total = np.asarray(self.x.sum(axis=0), dtype=np.float64).ravel() + 1
        return total / total.sum()

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        s = self.schema
        density = self.x.nnz / max(1, self.n_cells * self.n_genes)
        parts = [f"{self.n_cells} cells x {self.n_genes} genes, {density:.1%} non-zero"]
        parts += [f"{len(s.batches)} batches by {s.batch_key!r}"] * (s.batch_key is not None)
        parts += [f"{len(s.labels)} labels by {s.labels_key!r}"] * (s.labels_key is not None)
        parts += [f"covariates {[*s.categorical, *s.continuous]}"] * bool([*s.categorical, *s.continuous])
        return f"Counts({', '.join(parts)})"

    def __getitem__(self, rows: np.ndarray | Sequence[int] | slice) -> "Counts":
        """Select cells by a slice, a mask, or an array of rows, which may repeat."""
        rows = np.atleast_1d(np.arange(self.n_cells)[rows])
        return replace(
            self,
            x=self.x[rows],
            cell_names=self.cell_names[rows],
            obs=self.obs.iloc[rows],
            batch=self.batch[rows],
            labels=self.labels[rows],
            categorical=self.categorical[rows],
            continuous=self.continuous[rows],
        )

    def on(self, device: torch.device | str) -> Resident:
        """Put the counts on a device, once; minibatches are made there."""
        to = lambda array, dtype: torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)
        return Resident(
            start=to(self.x.indptr, torch.int64),
            gene=to(self.x.indices, torch.int64),
            count=to(self.x.data, torch.float32),
            n_genes=self.n_genes,
            batch=to(self.batch, torch.int64),
            labels=to(self.labels, torch.int64),
            categorical=to(self.categorical, torch.int64),
            continuous=to(self.continuous, torch.float32),
        )

    def like(self, schema: Schema) -> "Counts":
        """Return these counts in the order and the codes of another schema (that of a fit).

        Genes are matched by name and reordered; genes that the fit does not know are left out.

        Raises
        ------
        ValueError
            If a gene, a category or a covariate of the fit is missing here, or a category here is unknown
            to the fit.
        """
        if self.schema == schema:
            return self
        genes = _places(self.schema.genes, schema.genes)
        x = sp.csr_array(self.x[:, genes])
        x.sort_indices()
        for key in (*schema.categorical, *schema.continuous):
            if key not in (*self.schema.categorical, *self.schema.continuous):
                msg = f"the fit uses the covariate {key!r}, which this data lacks: read it with from_anndata"
                raise ValueError(msg)
        mine, theirs = list(self.schema.categorical), self.schema.categorical
        categorical = [
            _recode(self.categorical[:, mine.index(key)], theirs[key], names, key)
            for key, names in schema.categorical.items()
        ]
        continuous = [self.continuous[:, self.schema.continuous.index(key)] for key in schema.continuous]
        batch_key = schema.batch_key or "batch"
        if schema.batch_key is None:
            batch = np.zeros(self.n_cells, np.int64)
        elif self.schema.batch_key is None:
            msg = (
                f"the fit knows the batches of {batch_key!r}, which this data was read without: "
                "read it with from_anndata(..., batch_key=...)"
            )
            raise ValueError(msg)
        else:
            batch = _recode(self.batch, self.schema.batches, schema.batches, batch_key)
        labels = _recode(self.labels, self.schema.labels, schema.labels, schema.labels_key, unknown_ok=True)
        return replace(
            self,
            x=x,
            batch=batch,
            labels=labels,
            categorical=_columns(categorical, self.n_cells, np.int64),
            continuous=_columns(continuous, self.n_cells, np.float32),
            schema=schema,
        )


def from_anndata(
    adata: anndata.AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    categorical_keys: Sequence[str] = (),
    continuous_keys: Sequence[str] = (),
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

    Returns
    -------
    Counts

    Raises
    ------
    KeyError
        If a layer or a column is missing.
    ValueError
        If the data is empty, or has values that are not whole, negative, not finite or over 2^24, a cell
        without counts, genes of the same name, or a missing value in a batch or covariate.
    TypeError
        If the counts are of a kind that can't be read.
    """
    if layer is not None and layer not in adata.layers:
        msg = f"no layer {layer!r}; this AnnData has {list(adata.layers)}"
        raise KeyError(msg)
    x = _checked(adata.X if layer is None else adata.layers[layer], where="X" if layer is None else layer)
    _check_names(adata.var_names)
    _check_cells(x, adata.obs_names)
    obs = adata.obs
    one_batch, no_labels = (np.zeros(len(obs), np.int64), ("all",)), (np.full(len(obs), -1), ())
    batch, batches = one_batch if batch_key is None else _codes(obs, batch_key)
    labels, label_names = no_labels if labels_key is None else _codes(obs, labels_key, missing_ok=True)
    categorical = {key: _codes(obs, key) for key in categorical_keys}
    continuous = [_numbers(obs, key) for key in continuous_keys]
    return Counts(
        x=x,
        cell_names=adata.obs_names.to_numpy(dtype=str),
        obs=obs.copy(),
        batch=batch,
        labels=labels.astype(np.int64),
        categorical=_columns([codes for codes, _ in categorical.values()], len(obs), np.int64),
        continuous=_columns(continuous, len(obs), np.float32),
        schema=Schema(
            genes=tuple(map(str, adata.var_names)),
            layer=layer,
            batch_key=batch_key,
            labels_key=labels_key,
            batches=batches,
            labels=label_names,
            categorical={key: names for key, (_, names) in categorical.items()},
            continuous=tuple(continuous_keys),
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
        # Of a large AnnData only the genes of the fit are read and checked.
        genes = _places([str(name) for name in data.var_names], schema.genes)
        has_labels = schema.labels_key is not None and schema.labels_key in data.obs
        data = from_anndata(
            data[:, genes],
            layer=schema.layer,
            batch_key=schema.batch_key,
            labels_key=schema.labels_key if has_labels else None,
            categorical_keys=tuple(schema.categorical),
            continuous_keys=schema.continuous,
        )
    if not isinstance(data, Counts):
        msg = f"data must be an AnnData or pyrosc.Counts, not {type(data).__name__}"
        raise TypeError(msg)
    return data if schema is None else data.like(schema)


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


def _check_values(values: np.ndarray, where: str) -> None:
    """Raise unless every value is finite, non-negative, whole and exact in float32."""
    if not np.isfinite(values).all():
        n = int((~np.isfinite(values)).sum())
        msg = f"{where} has {n} NaN or infinite values: counts must be finite; remove or repair those entries"
        raise ValueError(msg)
    if values.size and values.min() < 0:
        msg = (
            f"{where} has negative values (least {values.min():.4g}): these are no counts, perhaps scaled; "
            'give the raw counts, e.g. layer="counts"'
        )
        raise ValueError(msg)
    if values.dtype.kind == "f" and not (values == np.floor(values)).all():
        odd = float(values[values != np.floor(values)][0])
        msg = (
            f"{where} has values that are not whole (e.g. {odd:.4g}): perhaps log-normalised data; "
            'give the raw counts, e.g. layer="counts" or adata.raw.to_adata()'
        )
        raise ValueError(msg)
    if values.size and values.max() > MAX_COUNT:
        msg = f"{where} has a count of {values.max():.4g}, more than 2^24: are these counts of molecules?"
        raise ValueError(msg)


def _check_names(names: pd.Index) -> None:
    if not names.is_unique:
        twice = list(map(str, names[names.duplicated()].unique()[:5]))
        msg = f"gene names are not unique (e.g. {', '.join(twice)}): call adata.var_names_make_unique() first"
        raise ValueError(msg)


def _check_cells(x: sp.csr_array, names: pd.Index) -> None:
    empty = np.flatnonzero(np.diff(x.indptr) == 0)
    if len(empty):
        some = ", ".join(str(names[i]) for i in empty[:3])
        msg = (
            f"{len(empty)} of {x.shape[0]} cells have no counts (e.g. {some}): remove them, "
            "e.g. sc.pp.filter_cells(adata, min_counts=1), after choosing the genes"
        )
        raise ValueError(msg)


def _column(obs: pd.DataFrame, key: str) -> pd.Series:
    if key not in obs:
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
    return values.codes.astype(np.int64), tuple(map(str, values.categories))


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


def _columns(columns: Sequence[np.ndarray], n: int, dtype: Any) -> np.ndarray:
    return np.stack(columns, axis=1).astype(dtype) if columns else np.empty((n, 0), dtype)


def _places(have: Sequence[str], want: Sequence[str]) -> np.ndarray:
    """Return where each gene of the fit stands in the data."""
    _check_names(pd.Index(have))
    places = pd.Index(have).get_indexer(pd.Index(want))
    missing = [name for name, place in zip(want, places, strict=True) if place < 0]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        msg = f"{len(missing)} of the fit's {len(want)} genes are missing from this data: {some}"
        raise ValueError(msg)
    return places


def _recode(
    codes: np.ndarray, have: Sequence[str], want: Sequence[str], key: str | None, *, unknown_ok: bool = False
) -> np.ndarray:
    """Translate codes into the fit's: the same name, its code there; -1 stays."""
    table = np.array([want.index(name) if name in want else -1 for name in have] + [-1])
    unknown = sorted({have[code] for code in np.unique(codes) if code >= 0 and table[code] < 0})
    if unknown and not unknown_ok:
        msg = f"{key}: the fit does not know {', '.join(unknown)}; it knows {', '.join(want)}"
        raise ValueError(msg)
    return table[codes]
