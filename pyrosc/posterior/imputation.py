"""Imputed expression: the answer, in memory or on disk, and its way into an AnnData."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from pyrosc.data.read import IMPUTED
from pyrosc.posterior.intervals import Summary

_CHUNK = 2**20  # entries that are written to disk together

_Array = Any
"""A numpy array, or one of zarr."""


@dataclass(frozen=True, eq=False)
class Imputation:
    """Imputed expression of each cell and gene, and how sure it is.

    Attributes
    ----------
    mean, sd, lower, upper : ndarray or zarr.Array of shape (cells, genes), float32 or float16
        Posterior mean and standard deviation, and a central interval of probability `interval`.
    unit : str
        What the numbers are, and their unit.
    interval : float
    cell_names, gene_names : ndarray of str

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> imputed = pyrosc.impute(fit, adata, interval=0.8)
    >>> imputed.mean.shape, imputed.unit
    ((60, 30), "share of the cell's counts")
    >>> bool((imputed.lower <= imputed.upper).all())
    True
    """

    mean: _Array
    sd: _Array
    lower: _Array
    upper: _Array
    unit: str
    interval: float
    cell_names: np.ndarray
    gene_names: np.ndarray

    def __repr__(self) -> str:
        cells, genes = self.mean.shape
        return (
            f"Imputation of {cells} cells x {genes} genes: {self.unit}; posterior mean and sd, "
            f"and {self.interval:.0%} interval in lower and upper"
        )

    @property
    def information(self) -> np.ndarray:
        """How much is known of each entry, from 0, nothing but that it is one of these cells, to 1, all.

        One less the entry's posterior variance over the gene's total variance over these cells, the mean
        posterior variance and the variance of posterior means. 0 where the entry is less sure than a random
        cell would be, and of a gene without any variance. Shape (cells, genes), float32.

        Examples
        --------
        >>> import pyrosc
        >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
        >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
        >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
        >>> information = pyrosc.impute(fit, adata).information
        >>> information.shape, bool(information.min() >= 0), bool(information.max() <= 1)
        ((60, 30), True, True)
        """
        variance = np.asarray(self.sd, np.float64) ** 2
        total = variance.mean(0) + np.asarray(self.mean).var(0, dtype=np.float64)
        known = 1 - np.divide(variance, total, out=np.ones_like(variance), where=total > 0)
        return known.clip(0, 1).astype(np.float32)

    def to_layer(self, adata: anndata.AnnData, name: str) -> None:
        """Write the posterior mean into a layer, and what it is into ``uns["pyrosc_imputed"]``.

        :func:`~pyrosc.from_anndata` refuses such a layer: imputed values are no counts.

        Parameters
        ----------
        adata
            Cells x genes, all of them imputed here; they are matched by name.
        name
            Of the layer. One that was imputed before is replaced.

        Raises
        ------
        ValueError
            If a cell or gene was not imputed, names are not unique, or there is such a layer of other values.

        Examples
        --------
        >>> import pyrosc
        >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
        >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
        >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
        >>> pyrosc.impute(fit, adata).to_layer(adata, "imputed")
        >>> adata.layers["imputed"].shape, adata.uns["pyrosc_imputed"]
        ((60, 30), {'imputed': "posterior mean of share of the cell's counts"})
        """
        noted = dict(adata.uns.get(IMPUTED, {}))
        if name == "X" or (name in adata.layers and name not in noted):
            msg = f"adata has {name!r}, which is not imputed: choose another name, or delete that layer first"
            raise ValueError(msg)
        rows = _places(self.cell_names, adata.obs_names, "cells")
        columns = _places(self.gene_names, adata.var_names, "genes")
        adata.layers[name] = np.asarray(self.mean)[rows[:, None], columns]
        adata.uns[IMPUTED] = {**noted, name: f"posterior mean of {self.unit}"}


def imputation(
    answers: Iterator[Summary],
    unit: str,
    interval: float,
    cell_names: np.ndarray,
    gene_names: np.ndarray,
    *,
    dtype: str = "float32",
    store: str | Path | None = None,
    progress: bool = False,
) -> Imputation:
    """Put together what is answered, some cells at a time.

    Parameters
    ----------
    answers
        Summaries of the cells, in their order.
    unit, interval, cell_names, gene_names
        See :class:`Imputation`.
    dtype, store, progress
        See :func:`~pyrosc.impute`.
    """
    shape = (len(cell_names), len(gene_names))
    if store is not None:
        _make(Path(store))
        answers = _blocks(answers, _CHUNK // len(gene_names))
    arrays: dict[str, _Array] = {}
    done = 0
    try:
        with tqdm(total=len(cell_names), desc="impute", unit="cell", delay=2, disable=not progress) as bar:
            for answer in answers:
                n = answer.shape[1]
                arrays = arrays or _arrays(store, shape, n, dtype)
                values = answer.cpu().numpy()
                _check(values, dtype, cell_names[done : done + n])
                for array, part in zip(arrays.values(), _rounded(values, dtype), strict=True):
                    array[done : done + n] = part
                done += n
                bar.update(n)
    except BaseException:
        if store is not None:
            shutil.rmtree(store, ignore_errors=True)
        raise
    return Imputation(**arrays, unit=unit, interval=interval, cell_names=cell_names, gene_names=gene_names)


def _blocks(answers: Iterator[Summary], n_cells: int) -> Iterator[Summary]:
    """Put answers together until they are of so many cells at least."""
    some: list[Summary] = []
    for answer in answers:
        some.append(answer)
        if sum(one.shape[1] for one in some) >= n_cells:
            yield torch.cat(some, 1)
            some = []
    if some:
        yield torch.cat(some, 1)


def _make(folder: Path) -> None:
    """Make a new folder."""
    try:
        folder.mkdir()
    except FileNotFoundError as error:
        msg = f"there is no folder {folder.parent} to make {folder.name} in: make it first, or name another"
        raise FileNotFoundError(msg) from error
    except FileExistsError as error:
        msg = f"{folder} is there already: name another folder to store to, or delete it first"
        raise FileExistsError(msg) from error


def _arrays(store: str | Path | None, shape: tuple[int, int], n_rows: int, dtype: str) -> dict[str, _Array]:
    """Return room for each part of the answer; on disk in chunks of as many cells as come at a time."""
    parts = ("mean", "sd", "lower", "upper")
    if store is None:
        return dict(zip(parts, np.empty((4, *shape), dtype), strict=True))
    import zarr  # which comes with anndata

    zarr.open_group(str(store), mode="w")
    chunks = (n_rows, shape[1])
    return {
        part: zarr.open_array(str(Path(store) / part), mode="w", shape=shape, chunks=chunks, dtype=dtype)
        for part in parts
    }


def _check(values: np.ndarray, dtype: str, cell_names: np.ndarray) -> None:
    """Raise if a value is not finite, or too large for the type."""
    if not np.isfinite(values).all():
        cell = cell_names[np.flatnonzero(~np.isfinite(values).all((0, 2)))[0]]
        msg = (
            f"the fit's answer for cell {cell} is not finite: what it decodes there is NaN or too large. "
            "Look at pyrosc.draws of this cell, or ask for a smaller library size"
        )
        raise ValueError(msg)
    if (most := np.abs(values).max()) > np.finfo(dtype).max:
        msg = f'{dtype} has no room for {most:.4g}: ask for dtype="float32", or for a smaller library size'
        raise ValueError(msg)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return them in the type, where intervals are no narrower for it."""
    rounded = values.astype(dtype, copy=False)
    for end, inwards, wide in ((2, np.greater, -np.inf), (3, np.less, np.inf)):
        narrower = inwards(rounded[end], values[end])
        rounded[end][narrower] = np.nextafter(rounded[end][narrower], np.asarray(wide, dtype))
    return rounded


def _places(have: np.ndarray, want: pd.Index, kind: str) -> np.ndarray:
    """Return where each name stands."""
    if np.array_equal(have, want):
        return np.arange(len(have))
    if not (pd.Index(have).is_unique and want.is_unique):
        msg = f"names of {kind} are not unique and can't be matched: make them unique, and impute again"
        raise ValueError(msg)
    places = pd.Index(have).get_indexer(want)
    if missing := [str(name) for name in want[places < 0]]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        msg = f"{len(missing)} of adata's {len(want)} {kind} were not imputed ({some}): select others"
        raise ValueError(msg)
    return places
