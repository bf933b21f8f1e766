"""Groups of cells, and the units within which they are compared: batches, or replicates in batches."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from pyrosc.counts import Counts
from pyrosc.svi import Fit
from pyrosc.variation import Arm


def groups_of(data: Counts, groupby: Any, what: str = "groupby") -> tuple[ndarray, list[str]]:
    """Return each cell's group as a code, -1 for none, and the groups' names, in the column's order."""
    if isinstance(groupby, str):
        if groupby not in data.obs:
            msg = f"no column {groupby!r} in obs; it has {list(data.obs.columns)}"
            raise KeyError(msg)
        groupby = data.obs[groupby]
    if isinstance(groupby, pd.Series) and groupby.index.isin(data.cell_names).any():
        names = pd.Index(data.cell_names)
        if not (names.is_unique and groupby.index.is_unique and set(groupby.index) == set(names)):
            msg = (
                f"{what} is a Series whose names are not those of the cells, each once: give its values, "
                ".to_numpy(), if they are in the cells' order, or make names unique, obs_names_make_unique()"
            )
            raise ValueError(msg)
        groupby = groupby.loc[names]  # by its own names of cells, in whatever order
    if len(groupby) != data.n_cells:
        msg = (
            f"{what} has {len(groupby)} values for {data.n_cells} cells: give one a cell, or a column's name"
        )
        raise ValueError(msg)
    values = pd.Categorical(groupby)
    return values.codes.astype(np.int64), [str(name) for name in values.categories]


def pairs_of(codes: ndarray, names: list[str], group: Any, reference: Any) -> list[tuple[int, int]]:
    """Return the codes of the groups to compare, -1 for the rest; raise where a comparison makes no sense."""
    n = dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)), strict=True))
    rest = reference == "rest"
    if rest and "rest" in names:
        msg = (
            'a group is called "rest", which also means all other cells: rename it, or name another reference'
        )
        raise ValueError(msg)
    reference = str(reference)
    if group is None:
        asked = [name for name in names if n[name] and name != reference]
    else:
        asked = [str(name) for name in ([group] if isinstance(group, str) or np.isscalar(group) else group)]
    for name in asked + [reference] * (not rest):
        if name not in n:
            msg = f"no group {name!r}; there are {', '.join(names)}"
            raise ValueError(msg)
    if not asked or reference in asked or len(set(asked)) < len(asked):
        msg = f"can't compare {asked} with {reference!r}: name other groups, each once, or another reference"
        raise ValueError(msg)
    for name in asked + [reference] * (not rest):
        if n[name] < 2:
            msg = f"group {name!r} has {n[name]} cells, 2 are needed: leave it out, or merge it with another"
            raise ValueError(msg)
    if rest and any(sum(n.values()) - n[name] < 2 for name in asked):
        msg = f"fewer than 2 cells are outside of {asked[0]!r}: a comparison needs two groups of 2 cells each"
        raise ValueError(msg)
    return [(names.index(name), -1 if rest else names.index(reference)) for name in asked]


@dataclass(frozen=True)
class Units:
    """What counts are summed over: batches, or replicates in batches."""

    of_cell: Int[ndarray, "cells"]  # -1: none
    batch: Int[ndarray, "units"]
    replicate: Int[ndarray, "units"] | None  # None: units are whole batches


def units_of(fit: Fit, data: Counts, replicate_key: Any, batch: str | None) -> Units:
    """Return the units of a question, batches being one where they are ignored."""
    if batch not in (None, "average", *fit.schema.batches):
        there = ", ".join(fit.schema.batches)
        msg = f'no batch {batch!r}; the fit knows {there}; or give "average" or None'
        raise ValueError(msg)
    batches = np.zeros(data.n_cells, dtype=np.int64) if batch is None else data.batch.astype(np.int64)
    if replicate_key is None:
        each = np.arange(1 if batch is None else len(fit.schema.batches))
        return Units(batches, each, None)
    replicate, names = groups_of(data, replicate_key, "replicate_key")
    known = replicate >= 0
    if not known.any():
        msg = "no cell has a replicate: replicate_key names a column, or has a value for each cell"
        raise ValueError(msg)
    units, of_known = np.unique((batches * len(names) + replicate)[known], return_inverse=True)
    of_cell = np.full(data.n_cells, -1)
    of_cell[known] = of_known
    return Units(of_cell, units // len(names), units % len(names))


def comparable(
    a: Arm, b: Arm, of_batch: Int[ndarray, "units"], batch: str | None, batches: Sequence[str], name: str
) -> tuple[Int[ndarray, "used"], Int[ndarray, "used"]]:
    """Return the units whose means are compared, and their strata: those that have a rate in common.

    A unit that has both sides is compared with itself, the others with those of their batch.
    """
    asked = batch in (None, "average") or of_batch == batches.index(batch)
    own = -1 - np.arange(len(of_batch))  # no batch has such a code
    stratum = np.where((a.cells > 0) & (b.cells > 0), own, of_batch)
    has_both = np.logical_and(*(np.isin(stratum, stratum[arm.cells > 0]) for arm in (a, b)))
    use = np.flatnonzero(asked & has_both & (a.cells + b.cells > 0))
    n, m = a[use].n, b[use].n
    if min(n, m) < 2:
        where, remedy = f"in batch {batch!r}", 'give another batch, or "average"'
        if batch in (None, "average"):
            where, remedy = "in batches that have both", "give batch=None to ignore batches"
        msg = f"group {name!r} has {n} cells and its reference {m} {where}, each needs 2 at least: {remedy}"
        raise ValueError(msg)
    return use, np.unique(stratum[use], return_inverse=True)[1]


def count_replicates(a: Arm, b: Arm, replicate: Int[ndarray, "units"], name: str) -> tuple[int, int]:
    """Return how many replicates either side has; warn of fewer than two."""
    n, m = (len(np.unique(replicate[arm.cells > 0])) for arm in (a, b))
    if min(n, m) < 2:
        warnings.warn(
            f"group {name!r} has cells of {n} replicates and its reference of {m}: how far replicates differ "
            "is seen with two of each at least, and conclusions are about these replicates only",
            stacklevel=3,
        )
    return n, m
