"""The design of a question: groups to be contrasted, and the units of cells within which they are.

Units are batches, or replicates (donors, samples) in batches. It knows codes of cells and sums of counts.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from pyrosc.data.alignment import categories_of
from pyrosc.data.counts import Counts
from pyrosc.data.schema import Schema
from pyrosc.differential.donor_variance import shows_variance
from pyrosc.differential.group_sums import Pseudobulk, pseudobulk
from pyrosc.differential.quasi_likelihood import quasi_likelihood


def pairs_of(
    codes: Int[ndarray, "cells"], names: Sequence[str], group: Any, reference: Any
) -> list[tuple[int, int]]:
    """Return the codes of the groups to contrast, -1 for the rest; raise where a contrast makes no sense.

    Parameters
    ----------
    codes, names
        Of each cell's group, -1 for none, and the groups' names.
    group, reference
        See :func:`~pyrosc.differential_expression`.
    """
    n = dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)), strict=True))
    if not (isinstance(reference, str) or np.isscalar(reference) or reference is None):
        msg = f'reference is the name of one group, or "rest", not {type(reference).__name__}'
        raise ValueError(msg)
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
    if not any(n.values()):
        msg = "no cell is in a group: groupby has a value, not NaN, for those that are to be compared"
        raise ValueError(msg)
    for name in asked + [reference] * (not rest):
        if name not in n:
            other = ', or "rest"' if name == reference else ""
            msg = f"no group {name!r}; there are {', '.join(names)}{other}"
            raise ValueError(msg)
    if not asked or reference in asked or len(set(asked)) < len(asked):
        msg = f"can't compare {asked} with {reference!r}: name other groups, each once, or another reference"
        raise ValueError(msg)
    for name in asked + [reference] * (not rest):
        if n[name] < 2:
            msg = f"group {name!r} has {n[name]} cells, 2 are needed: leave it out, or merge it with another"
            raise ValueError(msg)
    for name in asked if rest else ():
        if sum(n.values()) - n[name] < 2:
            msg = f"fewer than 2 cells are outside of {name!r}: a comparison needs two groups of 2 cells each"
            raise ValueError(msg)
    return [(names.index(name), -1 if rest else names.index(reference)) for name in asked]


@dataclass(frozen=True)
class _Units:
    """What counts are summed over: batches, or replicates in batches."""

    of_cell: Int[ndarray, "cells"]  # -1: none
    batch: Int[ndarray, "units"]
    replicate: Int[ndarray, "units"] | None  # None: units are whole batches


def check_batch(schema: Schema, batch: str | None) -> None:
    """Raise unless it is "average", None, or the name of a batch."""
    if batch in (None, "average", *schema.batches):
        return
    if schema.batch_key is None:
        msg = f'no batch {batch!r}: counts were read without batches; from_anndata(adata, batch_key="...")'
    else:
        msg = f'no batch {batch!r}; there are {", ".join(schema.batches)}; or give "average" or None'
    raise ValueError(msg)


def units_of(
    schema: Schema,
    of_batch: Int[ndarray, "cells"],
    replicate: Int[ndarray, "cells"] | None,
    batch: str | None,
) -> _Units:
    """Return the units of a question, batches being one where they are ignored.

    Parameters
    ----------
    schema
        Has the names of batches.
    of_batch, replicate
        Codes of each cell's batch and replicate, -1 for none. Without replicates units are whole batches.
    batch
        See :func:`~pyrosc.differential_expression`.

    Raises
    ------
    ValueError
        If the batch is unknown, or no cell has a replicate.
    """
    check_batch(schema, batch)
    batches = np.zeros(len(of_batch), dtype=np.int64) if batch is None else of_batch.astype(np.int64)
    if replicate is None:
        each = np.arange(1 if batch is None else len(schema.batches))
        return _Units(batches, each, None)
    known = replicate >= 0
    if not known.any():
        msg = "no cell has a replicate: replicate_key names a column, or has a value for each cell"
        raise ValueError(msg)
    n = replicate.max() + 1
    units, of_known = np.unique((batches * n + replicate)[known], return_inverse=True)
    of_cell = np.full(len(batches), -1)
    of_cell[known] = of_known
    return _Units(of_cell, units // n, units % n)


@dataclass(frozen=True)
class Contrast:
    """Two groups of cells, summed over the units in which they can be compared.

    Attributes
    ----------
    group, reference : str
        Names; the reference may be ``"rest"``.
    codes : tuple of int
        Of the two; -1 is the rest.
    side : ndarray of shape (cells,)
        0 of a cell of the group, 1 of one of its reference, -1 of one that is not compared.
    a, b : Pseudobulk
        Sums over the cells of side 0 and of side 1, in each unit.
    stratum : ndarray of shape (units,)
        Of each unit: those of one stratum have a rate in common.
    stratum_of_cell : ndarray of shape (cells,)
        The same of each cell's unit, -1 where it is not compared.
    within : ndarray of shape (units,)
        Of each unit, whether it has cells of both sides, in two replicates at least: of a single one nobody
        knows how its fold change differs from others', so it counts as one of those that have one side.
    replicates : tuple of int, or None
        How many replicates either side has, where units are replicates.
    """

    group: str
    reference: str
    codes: tuple[int, int]
    side: Int[ndarray, "cells"]
    a: Pseudobulk
    b: Pseudobulk
    stratum: Int[ndarray, "units"]
    stratum_of_cell: Int[ndarray, "cells"]
    within: Bool[ndarray, "units"]
    replicates: tuple[int, int] | None

    @property
    def replicated(self) -> bool:
        """Whether conclusions are about cells, or both sides show how far their replicates differ."""
        return self.replicates is None or min(self.replicates) > 1

    @cached_property
    def likelihood(self) -> Float[ndarray, "genes points"]:
        """Quasi-likelihood of each gene's log2 fold change, a curve over the grid."""
        if self.replicates is None:
            return quasi_likelihood(self.a, self.b)
        return quasi_likelihood(self.a, self.b, self.stratum, self.within)


def contrasts(
    data: Counts,
    *,
    groupby: Any,
    group: Any,
    reference: Any,
    replicate_key: Any,
    batch: str | None,
) -> Iterator[Contrast]:
    """Return the contrasts that a question asks for, one after the other.

    Parameters
    ----------
    data, groupby, group, reference, replicate_key, batch
        See :func:`~pyrosc.differential_expression`.
    """
    codes, names = categories_of(data, groupby, "groupby")
    units = units_of(data.schema, data.batch, replicates_of(data, replicate_key), batch)
    known = np.where(units.of_cell < 0, -1, codes)
    try:
        pairs = pairs_of(known, names, group, reference)
    except ValueError as error:
        without = [name for code, name in enumerate(names) if code in codes and code not in known]
        if without:
            msg = f"{error.args[0]}; no cell of {', '.join(without)} has a value of replicate_key"
            raise ValueError(msg) from error
        raise
    return contrasted(data, known, names, pairs, units, batch)


def replicates_of(data: Counts, replicate_key: Any) -> Int[ndarray, "cells"] | None:
    """Return the codes of each cell's replicate, -1 for none; None where no key is given."""
    return None if replicate_key is None else categories_of(data, replicate_key, "replicate_key")[0]


def contrasted(
    data: Counts,
    codes: Int[ndarray, "cells"],
    names: Sequence[str],
    pairs: Iterable[tuple[int, int]],
    units: _Units,
    batch: str | None,
) -> Iterator[Contrast]:
    """Yield a contrast for each pair of codes, the second -1 for the rest; warn of too few replicates.

    Cells without a unit have the code -1.
    """
    arms = pseudobulk(data.x, codes, len(names), units.of_cell, len(units.batch))
    for a, b in pairs:
        whole = arms[a], reduce(add, [*arms[:a], *arms[a + 1 :]]) if b < 0 else arms[b]
        use, stratum = _comparable(*whole, units.batch, batch, data.schema.batches, names[a])
        arm, other = (each[use] for each in whole)
        within = _within(arm, other, None if units.replicate is None else units.replicate[use])
        if within.any() and not (
            within.all() or shows_variance(arm[~within], other[~within], stratum[~within])
        ):
            arm, other = arm[within], other[within]
            use, stratum, within = (v[within] for v in (use, stratum, within))
            stratum = np.unique(stratum, return_inverse=True)[1]
        of_unit = np.full(len(units.batch) + 1, -1)  # (the last is of cells that have none)
        of_unit[use] = stratum
        of_cell = of_unit[units.of_cell]
        side = np.select([of_cell < 0, codes == a, codes >= 0 if b < 0 else codes == b], [-1, 0, 1], -1)
        n = None
        if units.replicate is not None:
            n = _count_replicates(arm, other, units.replicate[use])
            if min(n) < 2:
                others = min(_count_replicates(*whole, units.replicate)) > 1
                left = (
                    "; others are in batches of one side only: batch=None ignores batches" if others else ""
                )
                warnings.warn(
                    f"group {names[a]!r} has cells of {n[0]} replicates and its reference of {n[1]} to "
                    f"compare{left}: how far replicates differ is seen with two of each at least; fold "
                    "changes and intervals are about these replicates only, and nothing is called",
                    stacklevel=3,
                )
        reference = "rest" if b < 0 else names[b]
        yield Contrast(names[a], reference, (a, b), side, arm, other, stratum, of_cell, within, n)


def _within(a: Pseudobulk, b: Pseudobulk, replicate: Int[ndarray, "units"] | None) -> Bool[ndarray, "units"]:
    """Return :attr:`Contrast.within`; none without replicates."""
    both = (a.cells > 0) & (b.cells > 0)
    return both & (replicate is not None and len(np.unique(replicate[both])) > 1)


def _comparable(
    a: Pseudobulk,
    b: Pseudobulk,
    of_batch: Int[ndarray, "units"],
    batch: str | None,
    batches: Sequence[str],
    name: str,
) -> tuple[Int[ndarray, "used"], Int[ndarray, "used"]]:
    """Return the units whose means are compared, and their strata: those that have a rate in common.

    A unit that has both sides is compared with itself, the others with those of their batch.
    """
    if min(a.n, b.n) < 2:
        msg = (
            f"group {name!r} has {a.n} cells and its reference {b.n}, each needs 2 at least: leave it out, "
            "or merge it with another"
        )
        raise ValueError(msg)
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


def _count_replicates(a: Pseudobulk, b: Pseudobulk, replicate: Int[ndarray, "units"]) -> tuple[int, int]:
    """Return how many replicates either side has."""
    n, m = (len(np.unique(replicate[arm.cells > 0])) for arm in (a, b))
    return n, m
