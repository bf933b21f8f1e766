"""Contrasts of contrasts: what a condition does to one type of cell, less what it does to another."""

import warnings
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from pyrosc.data.alignment import categories_of
from pyrosc.data.counts import Counts
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import Number, call_at_fdr, check_numbers, ranked, summarise
from pyrosc.differential.design import contrasted, pairs_of, replicates_of, units_of
from pyrosc.differential.fit_or_counts import fit_and_counts
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.fit import Fit


@kept()
def interaction(
    fit: Fit | Counts | anndata.AnnData | None = None,
    data: Counts | anndata.AnnData | None = None,
    *,
    groupby: Any,
    group: str,
    reference: str,
    by: Any,
    level: str | Sequence[str] | None = None,
    baseline: str,
    delta: Number = 0.25,
    fdr: Number = 0.05,
    replicate_key: Any = None,
    batch: str | None = "average",
    interval: Number = 0.9,
) -> pd.DataFrame:
    r"""Find the genes whose fold change between two groups is another in one level of `by` than in another.

    With t_A and t_B the log2 fold changes of a gene between the groups' means in levels A and B, as
    :func:`~pyrosc.differential_expression` has them, the question is d = t_A - t_B. Of the two
    quasi-likelihoods that of d is the integral over what is common to both, ::

        L(d) = integral L_A(t + d) L_B(t) dt

    and its prior is learned across the genes, by adaptive shrinkage. A gene that responds alike in both has
    d = 0, however strongly it does; d, t_A and t_B each are beyond what most genes have in common.

    All of it comes from the counts, and needs no fit: ``interaction(adata, groupby=..., ...)``.

    Parameters
    ----------
    fit, data, groupby, delta, fdr, replicate_key, batch, interval
        See :func:`~pyrosc.differential_expression`.
    group, reference
        The two groups, such as ``"stimulated"`` and ``"control"``.
    by
        Column of ``obs``, or one value for each cell, such as ``"cell_type"``.
    level
        A, or several of them; all but the baseline by default, and but those with fewer than two cells of
        either group, of which there is a warning.
    baseline
        B.

    Returns
    -------
    DataFrame
        A row for each gene of each level, as of :func:`~pyrosc.differential_expression`: gene, level,
        baseline, group, reference, the columns of :func:`~pyrosc.compare` about d, lfc_common (what is
        subtracted from d), and lfc_level and lfc_baseline, the posterior means of t_A and t_B. Calls are made
        at one false discovery rate over all. With a `replicate_key` also replicates, how many the one of the
        four groups has that has the fewest: where that is one, expected_fdr is NaN and nothing is called.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a name is unknown, a group has fewer than two cells in a level, or a number is out of range.

    Notes
    -----
    The same d is the fold change between the levels in one group less that in the other. Where more donors
    have cells of both levels than of both groups, as donors of one condition each do, it is taken so: what
    a donor's levels have in common then cancels. The two parts' errors are taken for independent; donors that
    have all four share some, and intervals are then wider than they need be.

    Examples
    --------
    Three donors under each of two conditions. One gene rises four-fold in one type of cells alone:

    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(400, 40, n_types=2, n_donors=6, n_conditions=2, seed=0)
    >>> treated = (adata.obs.condition == "condition_1") & (adata.obs.cell_type == "type_1")
    >>> x = adata.X.toarray()
    >>> x[treated, 3] *= 4
    >>> adata.X = x
    >>> conditions = {"groupby": "condition", "group": "condition_1", "reference": "condition_0"}
    >>> types = {"by": "cell_type", "baseline": "type_0"}
    >>> table = pyrosc.interaction(adata, **conditions, **types, replicate_key="donor")
    >>> table.loc[table.is_de, ["gene", "level", "lfc_mean"]].round(0)
         gene   level  lfc_mean
    0  gene_3  type_1       2.0
    """
    check_numbers(delta, fdr, interval)
    _, data = fit_and_counts(fit, data)
    batch = None if batch is None else str(batch)
    kind, levels = categories_of(data, by, "by")
    asked = _asked(levels, level, str(baseline))
    codes, names = categories_of(data, groupby, "groupby")
    ((a, b),) = pairs_of(codes, names, str(group), reference)
    if b < 0:
        msg = "reference names a group: the rest is another mixture of groups in each level"
        raise ValueError(msg)
    units = units_of(data.schema, data.batch, replicates_of(data, replicate_key), batch)
    # Codes of a level and a group: 2 level + 0 in the group, + 1 in the reference.
    here = (kind >= 0) & (units.of_cell >= 0) & np.isin(codes, (a, b))
    crossed = np.where(here, 2 * kind + (codes == b), -1)
    crossed_names = [f"{names[g]}, {one}" for one in levels for g in (a, b)]
    unit = np.where(here, units.of_cell, -1)
    if level is None:
        asked = _of_enough_cells(asked, levels, crossed)
    base, at = levels.index(str(baseline)), [levels.index(name) for name in asked]
    within = [(2 * i, 2 * i + 1) for i in (base, *at)]
    of_baseline, *of_levels = contrasted(data, crossed, crossed_names, within, units, batch)
    lfc_baseline = shrink(of_baseline.likelihood).mean
    tables = []
    for name, i, of_level in zip(asked, at, of_levels, strict=True):
        parts = [of_level, of_baseline]
        if _paired(unit, kind, (i, base)) > _paired(unit, codes, (a, b)):
            across = [(2 * i + side, 2 * base + side) for side in (0, 1)]
            parts = list(contrasted(data, crossed, crossed_names, across, units, batch))
        lfc = shrink(_of_difference(*(part.likelihood for part in parts)))
        who = {"gene": data.schema.genes, "level": name, "baseline": str(baseline)}
        table = pd.DataFrame(who | {"group": names[a], "reference": names[b]})
        table = table.join(summarise(lfc, delta, interval)).assign(lfc_common=lfc.common)
        table["lfc_level"], table["lfc_baseline"] = shrink(of_level.likelihood).mean, lfc_baseline
        if units.replicate is not None:
            table["replicates"] = min(n for part in parts for n in part.replicates or ())
        known = all(part.replicated for part in parts)
        tables.append(ranked(table, data.schema.absent, known=known))
    return call_at_fdr(pd.concat(tables, ignore_index=True), fdr)


def _asked(levels: Sequence[str], level: Any, baseline: str) -> list[str]:
    """Return the names of the levels asked for; raise where one is unknown, or they are none, or not once."""
    names = [level] if isinstance(level, str) or np.isscalar(level) else level
    asked = [name for name in levels if name != baseline] if names is None else [str(name) for name in names]
    for name in [*asked, baseline]:
        if name not in levels:
            msg = f"no level {name!r}; there are {', '.join(levels)}"
            raise ValueError(msg)
    if baseline in asked or not asked or len(set(asked)) < len(asked):
        msg = f"levels other than the baseline {baseline!r}, each once, are needed, not {asked}"
        raise ValueError(msg)
    return asked


def _of_enough_cells(asked: list[str], levels: Sequence[str], crossed: Int[ndarray, "cells"]) -> list[str]:
    """Return the levels with two cells of either group at least, and warn of others; all if none has them."""
    n = np.bincount(crossed[crossed >= 0], minlength=2 * len(levels)).reshape(-1, 2).min(1)
    few = [name for name in asked if n[levels.index(name)] < 2]
    if not few or len(few) == len(asked):
        return asked
    what = "fewer than two cells of either group"
    warnings.warn(f"levels with {what} are left out: {', '.join(few)}", stacklevel=3)
    return [name for name in asked if name not in few]


def _paired(unit: ndarray, codes: ndarray, of: tuple[int, int]) -> int:
    """Return how many units have cells of both kinds."""
    one, other = (np.unique(unit[(codes == code) & (unit >= 0)]) for code in of)
    return len(np.intersect1d(one, other))


def _of_difference(
    a: Float[ndarray, "genes points"], b: Float[ndarray, "genes points"]
) -> Float[ndarray, "genes points"]:
    """Return the likelihood of t_a - t_b from those of t_a and t_b, over `LFC`.

    The integral over t_b is over the grid; beyond it the likelihood of t_a is that of the grid's end, so that
    a gene of which nothing is known in one of them, a flat curve, gives a flat one.
    """
    from scipy.signal import fftconvolve  # takes long to import

    n = a.shape[1]
    wide = np.pad(a, ((0, 0), (n // 2, n // 2)), mode="edge")
    curves = fftconvolve(wide, b[:, ::-1], mode="valid", axes=1)
    # (a Fourier transform has an error of 1e-16 of the largest)
    return np.maximum(curves / curves.max(axis=1, keepdims=True), 1e-14)
