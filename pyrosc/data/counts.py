"""Counts of all cells, with what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrosc.data.minibatch import DeviceCounts
from pyrosc.data.schema import Schema


@dataclass(frozen=True, eq=False)
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
    proteins : ndarray of shape (cells, proteins)
        Counts of surface proteins, float32; -1 is one that was not measured.
    schema : Schema

    Examples
    --------
    Cells are selected as in numpy; the names of genes and categories stay.

    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(100, 20, n_batches=2)
    >>> data = pyrosc.from_anndata(adata, batch_key="batch")
    >>> some = data[data.batch == 0]
    >>> some.n_cells, some.n_genes, some.schema.batches
    (50, 20, ('batch_0', 'batch_1'))
    >>> some.obs["batch"].unique().tolist()
    ['batch_0']
    """

    x: sp.csr_array
    cell_names: np.ndarray
    obs: pd.DataFrame
    batch: np.ndarray
    labels: np.ndarray
    categorical: np.ndarray
    continuous: np.ndarray
    proteins: np.ndarray
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

    @property
    def fingerprint(self) -> str:
        """A hash of the counts and of the names of cells and genes, 16 hexadecimal digits."""
        digest = blake2b(digest_size=8)
        for array in (self.x.indptr.astype(np.int64), self.x.indices.astype(np.int64), self.x.data):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        digest.update("\n".join([*map(str, self.cell_names), *self.schema.genes]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        s = self.schema
        density = self.x.nnz / max(1, self.n_cells * self.n_genes)
        parts = [f"{self.n_cells} cells x {self.n_genes} genes, {density:.1%} non-zero"]
        parts += [f"{len(s.batches)} batches by {s.batch_key!r}"] * (s.batch_key is not None)
        parts += [f"{len(s.labels)} labels by {s.labels_key!r}"] * (s.labels_key is not None)
        parts += [f"covariates {[*s.categorical, *s.continuous]}"] * bool([*s.categorical, *s.continuous])
        parts += [f"{len(s.proteins)} proteins in {s.protein_key!r}"] * (s.protein_key is not None)
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
            proteins=self.proteins[rows],
        )

    def on(self, device: torch.device | str) -> DeviceCounts:
        """Put the counts on a device, once; minibatches are made there. A CPU shares them, without a copy."""

        def to(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            array = array if array.flags.c_contiguous and array.flags.writeable else array.copy()
            return torch.as_tensor(array, dtype=dtype, device=device)

        start = to(self.x.indptr, torch.int64)
        return DeviceCounts(
            start=start[:-1],
            stop=start[1:],
            gene=to(self.x.indices, torch.int32),
            count=to(self.x.data, torch.float32),
            total=to(self.library, torch.float32),
            n_genes=self.n_genes,
            batch=to(self.batch, torch.int64),
            labels=to(self.labels, torch.int64),
            categorical=to(self.categorical, torch.int64),
            continuous=to(self.continuous, torch.float32),
            proteins=to(self.proteins, torch.float32),
        )

    def like(self, schema: Schema) -> "Counts":
        """Return these counts in the order and the codes of another schema (that of a fit).

        Genes and proteins are matched by name and reordered; those that the fit does not know are left out.
        Proteins that are missing here were not measured. Genes that are absent in the schema have no counts.

        Raises
        ------
        ValueError
            If a gene, a category or a covariate of the fit is missing here, or a category here is unknown
            to the fit.
        """
        if self.schema == schema:
            return self
        kept = np.flatnonzero(schema.present)
        x = sp.csr_array(self.x[:, places(self.schema.genes, np.array(schema.genes)[kept])])
        x = sp.csr_array((x.data, kept[x.indices], x.indptr), shape=(self.n_cells, len(schema.genes)))
        x.sort_indices()
        check_cells(x, self.cell_names)
        for kind in ("categorical", "continuous"):
            if lacking := [key for key in getattr(schema, kind) if key not in getattr(self.schema, kind)]:
                msg = (
                    f"the fit uses the {kind} covariates {lacking}, which this data lacks: "
                    f"read them with from_anndata(..., {kind}_keys=...)"
                )
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
            remedy = "; pyrosc.fit_query(fit, data) trains what belongs to new batches"
            batch = _recode(self.batch, self.schema.batches, schema.batches, batch_key, remedy)
        labels = _recode(self.labels, self.schema.labels, schema.labels, schema.labels_key, unknown_ok=True)
        return replace(
            self,
            x=x,
            batch=batch,
            labels=labels,
            categorical=columns(categorical, self.n_cells, np.int64),
            continuous=columns(continuous, self.n_cells, np.float32),
            proteins=columns(
                [self._protein(name) for name in schema.proteins],
                self.n_cells,
                np.float32,
            ),
            schema=schema,
        )

    def _protein(self, name: str) -> np.ndarray:
        """Return the counts of a protein, (cells,); -1 of one that this data lacks."""
        mine = self.schema.proteins
        return self.proteins[:, mine.index(name)] if name in mine else np.full(self.n_cells, -1.0)


def columns(columns: Sequence[np.ndarray], n: int, dtype: Any) -> np.ndarray:
    """Put columns of `n` values side by side, (n, columns); there may be none."""
    return np.stack(columns, axis=1).astype(dtype) if columns else np.empty((n, 0), dtype)


def places(have: Sequence[str], want: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return where each gene of the fit stands in the data."""
    check_names(pd.Index(have))
    places = pd.Index(have).get_indexer(pd.Index(want))
    missing = [name for name, place in zip(want, places, strict=True) if place < 0]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        msg = (
            f"{len(missing)} of the fit's {len(want)} genes are missing from this data: {some}; give it with "
            "all of them, or, if its batches are new, pyrosc.fit_query(fit, data): it can do without some"
        )
        raise ValueError(msg)
    return places


def _recode(
    codes: np.ndarray,
    have: Sequence[str],
    want: Sequence[str],
    key: str | None,
    remedy: str = "",
    *,
    unknown_ok: bool = False,
) -> np.ndarray:
    """Translate codes into the fit's: the same name, its code there; -1 stays."""
    table = np.array([want.index(name) if name in want else -1 for name in have] + [-1])
    unknown = sorted({have[code] for code in np.unique(codes) if code >= 0 and table[code] < 0})
    if unknown and not unknown_ok:
        msg = f"{key}: the fit does not know {', '.join(unknown)}; it knows {', '.join(want)}{remedy}"
        raise ValueError(msg)
    return table[codes]


def check_names(names: pd.Index) -> None:
    """Raise unless gene names are unique."""
    if not names.is_unique:
        twice = list(map(str, names[names.duplicated()].unique()[:5]))
        msg = f"gene names are not unique (e.g. {', '.join(twice)}): call adata.var_names_make_unique() first"
        raise ValueError(msg)


def check_cells(x: sp.csr_array, names: Sequence[str] | np.ndarray | pd.Index) -> None:
    """Raise if a cell has no counts."""
    empty = np.flatnonzero(np.diff(x.indptr) == 0)
    if len(empty):
        some = ", ".join(str(names[i]) for i in empty[:3])
        msg = (
            f"{len(empty)} of {x.shape[0]} cells have no counts (e.g. {some}): remove them, "
            "e.g. sc.pp.filter_cells(adata, min_counts=1), after choosing the genes"
        )
        raise ValueError(msg)
