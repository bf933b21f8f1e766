"""Pseudobulk: counts summed over the cells of a group in each unit, with the squares that show dispersion."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray

_CELLS = 4096  # summed at a time, so that little is copied


@dataclass(frozen=True)
class Pseudobulk:
    """Sums over one group's cells in each unit, a batch or a replicate in a batch.

    Of the counts nothing else is needed: neither cells nor a model are looked at again.

    Attributes
    ----------
    cells, expressing : ndarray of shape (units,) and (units, genes)
        Number of cells, and of cells with a count of the gene.
    l, ll : ndarray of shape (units,)
        Sums of the cells' totals l and of their squares, in counts.
    x, xx, xl : ndarray of shape (units, genes)
        Sums of the counts x, of x^2 and of x l.
    """

    cells: Float[ndarray, "units"]
    expressing: Float[ndarray, "units genes"]
    l: Float[ndarray, "units"]
    ll: Float[ndarray, "units"]
    x: Float[ndarray, "units genes"]
    xx: Float[ndarray, "units genes"]
    xl: Float[ndarray, "units genes"]

    def __getitem__(self, units: ndarray) -> "Pseudobulk":
        """Return the sums over some of the units' cells only."""
        return Pseudobulk(**{name: value[units] for name, value in vars(self).items()})

    def __add__(self, other: "Pseudobulk") -> "Pseudobulk":
        return Pseudobulk(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    @property
    def n(self) -> int:
        """Number of cells, over all units."""
        return int(self.cells.sum())


def pseudobulk(
    x: sp.csr_array, codes: ndarray, n_groups: int, unit: ndarray, n_units: int
) -> list[Pseudobulk]:
    """Sum over the cells of each group and unit, some cells at a time; nothing dense is made of them.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    codes, unit
        Of each cell's group, -1 for none, and unit; (cells,).
    n_groups, n_units
        Numbers of groups and of units.

    Returns
    -------
    list of Pseudobulk
        One for each group.
    """
    place = np.where(codes < 0, -1, codes * n_units + unit)
    of: dict[str, ndarray] = {}
    for start in range(0, max(1, x.shape[0]), _CELLS):
        some = slice(start, start + _CELLS)
        for name, value in _sums(x[some], place[some], n_groups * n_units).items():
            of[name] = of[name] + value if name in of else value
    by_group = {name: value.reshape(n_groups, n_units, *value.shape[1:]) for name, value in of.items()}
    return [Pseudobulk(**{name: value[i] for name, value in by_group.items()}) for i in range(n_groups)]


def _sums(x: sp.csr_array, place: ndarray, n_places: int) -> dict[str, ndarray]:
    """Return the sums over the cells of each place, those of -1 left out."""
    rows = np.flatnonzero(place >= 0)
    places = place[rows].astype(np.int32), rows.astype(np.int32)  # as x.indices, which is then not copied
    member = sp.csr_array((np.ones(len(rows)), places), shape=(n_places, x.shape[0]))
    x = x.astype(np.float64)
    l = np.asarray(x.sum(axis=1)).ravel()
    seen = sp.csr_array((np.ones(x.nnz), x.indices, x.indptr), shape=x.shape)
    return {
        "cells": member @ np.ones(len(l)),
        "expressing": (member @ seen).toarray(),
        "l": member @ l,
        "ll": member @ l**2,
        "x": (member @ x).toarray(),
        "xx": (member @ x.power(2)).toarray(),
        "xl": ((member * l) @ x).toarray(),
    }


def pooling(stratum: Int[ndarray, "units"]) -> Float[ndarray, "strata units"]:
    """Return the matrix that sums over the units of each stratum: 1 where the unit is of it, else 0."""
    return (stratum == np.arange(stratum.max() + 1)[:, None]).astype(float)
