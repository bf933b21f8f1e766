"""Differential expression of gene sets: the mean log2 fold change of a set's genes."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from pyrosc.counts import Counts
from pyrosc.differential import Number, check_numbers
from pyrosc.groups import comparable, count_replicates, groups_of, pairs_of, units_of
from pyrosc.reading import as_counts
from pyrosc.shrinkage import LFC, likelihood
from pyrosc.svi import Fit
from pyrosc.variation import Arm, fitted_share, strata, sums

_CELLS = 4096  # looked at together
_KNOWN, _LEAST = 0.25, 0.05**2  # variances of a fold change: of a known one, and of those of a set at least


def gene_sets(
    fit: Fit,
    data: Counts | anndata.AnnData,
    sets: Mapping[str, Sequence[str]],
    *,
    groupby: Any,
    group: Any = None,
    reference: Any = "rest",
    delta: Number = 0.25,
    fdr: Number = 0.05,
    replicate_key: Any = None,
    batch: str | None = "average",
    interval: Number = 0.9,
) -> pd.DataFrame:
    r"""Find the sets of genes whose mean log2 fold change between groups of cells is not small.

    The fold changes t_g are those of :func:`~pyrosc.differential_expression`, each with the quasi-likelihood
    that it has there, of mean e_g and variance C_gg. What is asked for is the mean T of the t_g of a set. Its
    genes have a centre in common and differ from it by a variance that all sets share, so that a rare gene,
    of which little is known, is taken to be like the others. Genes of a set go together, and so do the errors
    of their fold changes: their covariance has the correlations of the cells' (or the replicates') residuals.
    T has no prior: that of the genes, under which they have nothing in common, would draw all of a set to 0
    together, and sets are too few to learn one from.

    Parameters
    ----------
    fit, data, groupby, group, reference, delta, fdr, replicate_key, batch, interval
        See :func:`~pyrosc.differential_expression`.
    sets
        Names of genes by the name of their set. Genes that the fit does not know, or a query lacks, are left
        out.

    Returns
    -------
    DataFrame
        A row for each set of each comparison, by group and then by evidence: set, group, reference, n_genes
        (of those that the fit knows), n_unknown; lfc_mean, lfc_sd, lfc_lower, lfc_upper, p_up, p_down,
        p_equivalent, p_de, which say of T what those of :func:`~pyrosc.compare` say of a gene; fdr_bound, the
        largest false discovery rate, over all rows, of calling the sets with this much evidence in their
        direction (Benjamini and Hochberg, of 2 (1 - max(p_up, p_down))), and is_de, whether it is at most
        `fdr`.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If sets have no gene that the fit knows, a group is unknown or too small, or a number is out of range.

    Notes
    -----
    The estimate's error is taken for normal; with replicates for Student's t, with as many degrees of freedom
    as replicates show errors with: with three donors on a side correlations are not well known. Without a
    `replicate_key` errors that cells of a donor share are not seen, and sets that share them seem to change.
    Residuals of all cells of the groups are held, cells x genes of the sets.

    This asks of the set's genes themselves, not whether they change more than others do.
    """
    check_numbers(delta, fdr, interval)
    batch = None if batch is None else str(batch)
    data = as_counts(data, fit.schema)
    sets = _listed(sets)
    member = _membership(sets, fit.schema.genes, fit.schema.present)
    inside = np.flatnonzero(member.any(1))
    member, n = member[inside], member.sum(0)
    codes, names = groups_of(data, groupby)
    units = units_of(fit, data, replicate_key, batch)
    codes = np.where(units.of_cell < 0, -1, codes)
    arms = sums(data.x, codes, len(names), units.of_cell, len(units.batch))
    tables = []
    for a, b in pairs_of(codes, names, group, reference):
        arm, other = arms[a], reduce(add, [*arms[:a], *arms[a + 1 :]]) if b < 0 else arms[b]
        use, stratum = comparable(arm, other, units.batch, batch, fit.schema.batches, names[a])
        arm, other = arm[use], other[use]
        if units.replicate is None:
            curves, freedom = likelihood(arm, other), np.inf
            side = np.where(codes == a, 0, np.where((codes >= 0) & ((codes == b) | (b < 0)), 1, -1))
            of_unit = np.full(len(units.batch), -1)
            of_unit[use] = stratum
            errors = _of_cells(data, side, of_unit[units.of_cell], arm, other, stratum, inside)
        else:
            count_replicates(arm, other, units.replicate[use], names[a])
            curves = likelihood(arm, other, stratum)
            block, freedom = _of_replicates(arm, other, stratum, inside)
            errors = [block]
        of_set, variance = _means(curves[inside], errors, member)
        t = stats.t(freedom, of_set, np.sqrt(variance))
        up, down = t.sf(delta), t.cdf(-delta)
        table = pd.DataFrame(
            {
                "set": list(sets),
                "group": names[a],
                "reference": "rest" if b < 0 else names[b],
                "n_genes": n.astype(int),
                "n_unknown": [len(set(genes)) for genes in sets.values()] - n.astype(int),
                "lfc_mean": of_set,
                "lfc_sd": np.sqrt(variance),
                "lfc_lower": t.ppf((1 - interval) / 2),
                "lfc_upper": t.ppf((1 + interval) / 2),
                "p_up": up,
                "p_down": down,
                "p_equivalent": np.maximum(0, 1 - up - down),
                "p_de": np.minimum(1, up + down),
            }
        )
        tables.append(table.iloc[np.lexsort((-np.abs(of_set) / np.sqrt(variance), -np.maximum(up, down)))])
    found = pd.concat(tables, ignore_index=True)
    wrong = 1 - np.maximum(found.p_up, found.p_down)
    found["fdr_bound"] = stats.false_discovery_control(np.minimum(1, 2 * wrong))
    found["is_de"] = found.fdr_bound <= fdr
    return found


def _means(
    curves: Float[ndarray, "genes points"],
    errors: list[Float[ndarray, "_ genes"]],
    member: Float[ndarray, "genes sets"],
) -> tuple[Float[ndarray, "sets"], Float[ndarray, "sets"]]:
    """Return each set's mean fold change, and the variance of its error.

    The fold changes t_g of a set are normal about its centre, with the variance s^2. For each centre on the
    grid, every gene has an evidence, and t_g a mean and a variance; the centre's own distribution is the
    product of the evidences. Errors that go together widen it: to first order t_g is predicted by the centre
    plus b_g (e_g - centre), b = s^2 / (s^2 + C_gg), which says how much of each error there is in the mean.
    """
    n = member.sum(0)
    mass = curves / curves.sum(1, keepdims=True)
    e = mass @ LFC
    c = np.maximum(mass @ LFC**2 - e**2, 1e-12)
    s2 = _spread(e, c, errors, member)
    about = np.exp(-0.5 * (LFC - LFC[:, None]) ** 2 / s2)  # symmetric: (centre, t)
    about /= about.sum(0)
    evidence = np.maximum(curves @ about, 1e-300)
    first, second = ((curves * LFC**k) @ about / evidence for k in (1, 2))
    log = np.log(evidence).T @ member
    centre = np.exp(log - log.max(0))
    centre /= centre.sum(0)
    given = first.T @ member / n  # (centres, sets): the mean if that is the centre
    mean = (centre * given).sum(0)
    within = (second - first**2).T @ member / n**2
    own = (centre * (within + (given - mean) ** 2)).sum(0)
    w = member / (c + s2)[:, None]
    b = s2 / (s2 + c)
    part = w / w.sum(0) * (1 - b @ member / n) + member * b[:, None] / n
    return mean, own + np.maximum(0, _together(errors, np.sqrt(c)[:, None] * part))


def _spread(
    e: Float[ndarray, "genes"],
    c: Float[ndarray, "genes"],
    errors: list[Float[ndarray, "_ genes"]],
    member: Float[ndarray, "genes sets"],
) -> float:
    """Return s^2, the variance of fold changes about the centre of their set, by moments.

    Source: DerSimonian and Laird, 1986, of the genes whose fold change is known to within a half.
    """
    member = member * (c < _KNOWN)[:, None]
    member = member[:, member.sum(0) > 1]
    if not member.size:
        return _LEAST
    w = member / c[:, None]
    total = w.sum(0)
    squares = (w * (e[:, None] - e @ w / total) ** 2).sum()
    # Errors that go together move the centre, and make genes differ from it by less.
    expected = member.sum(0) - 1 - _together(errors, member / np.sqrt(c)[:, None]) / total
    scale = total - (w**2).sum(0) / total
    return max(_LEAST, (squares - expected.sum()) / scale.sum())


def _listed(sets: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the sets with their genes as lists; raise where they are none."""
    if not sets or any(isinstance(genes, str) or genes is None for genes in sets.values()):
        msg = 'sets is a dict of lists of genes\' names, {"name of a set": ["gene", ...]}'
        raise ValueError(msg)
    return {name: list(genes) for name, genes in sets.items()}


def _membership(
    sets: Mapping[str, list[str]], genes: Sequence[str], present: ndarray
) -> Float[ndarray, "genes sets"]:
    """Return 1 where a gene is in a set, else 0; raise where a set has none."""
    known = pd.Index(genes)
    member = np.stack([known.isin(named) & present for named in sets.values()], 1).astype(float)
    if not member.any(0).all():
        none = [name for name, n_found in zip(sets, member.sum(0), strict=True) if not n_found]
        msg = (
            f"the fit knows no gene of {', '.join(none)}: leave such sets out, or name genes as the data does"
        )
        raise ValueError(msg)
    return member


def _together(
    errors: list[Float[ndarray, "_ genes"]], weights: Float[ndarray, "genes sets"]
) -> Float[ndarray, "sets"]:
    """Return the sum over pairs of different genes g, h of w_g w_h times the correlation of their errors.

    Parameters
    ----------
    errors
        What cells, or replicates, contribute to the error of each gene's fold change, up to a factor of the
        gene: blocks of them.
    weights
        w, of each gene in each set.
    """
    size = np.sqrt(sum((block**2).sum(0) for block in errors))
    weights = weights * (size > 0)[:, None]
    scaled = weights / np.where(size > 0, size, 1)[:, None]
    return sum(((block @ scaled) ** 2).sum(0) for block in errors) - (weights**2).sum(0)


def _pooled(
    a: Arm, b: Arm, stratum: Int[ndarray, "units"], genes: Int[ndarray, "some"]
) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray], ndarray]:
    """Return counts and totals of each stratum on either side, and what part of the counts is a's."""
    pool = strata(stratum)
    (xa, la), (xb, lb) = ((pool @ arm.x[:, genes], (pool @ arm.l)[:, None]) for arm in (a, b))
    return (xa, la), (xb, lb), fitted_share(xa, la, xb, lb)


def _of_cells(
    data: Counts,
    side: Int[ndarray, "cells"],
    stratum_of_cell: Int[ndarray, "cells"],
    a: Arm,
    b: Arm,
    stratum: Int[ndarray, "units"],
    genes: Int[ndarray, "some"],
) -> list[Float[ndarray, "cells some"]]:
    """Return what each cell contributes to the score of a fold change: how far it is from its side's rate."""
    (xa, la), (xb, lb), p = _pooled(a, b, stratum, genes)
    rate = np.stack([xa / la, xb / lb], 1)
    weight = np.stack([1 - p, -p], 1)
    rows = np.flatnonzero((side >= 0) & (stratum_of_cell >= 0))
    blocks = []
    for some in np.array_split(rows, -(-len(rows) // _CELLS)):
        place = stratum_of_cell[some], side[some]
        x = data.x[some][:, genes].toarray()
        blocks.append((x - data.library[some, None] * rate[place]) * weight[place])
    return blocks


def _of_replicates(
    a: Arm, b: Arm, stratum: Int[ndarray, "units"], genes: Int[ndarray, "some"]
) -> tuple[Float[ndarray, "items some"], int]:
    """Return what each replicate contributes to the score, and the degrees of freedom that shows.

    One with cells on both sides contributes how far its fold change is from the common one.
    """
    (xa, la), (xb, lb), p = _pooled(a, b, stratum, genes)
    paired = ((a.cells > 0) & (b.cells > 0))[np.unique(stratum, return_index=True)[1]]
    blocks, freedom = [(xa - (xa + xb) * p)[paired]], max(0, int(paired.sum()) - 1)
    for arm, x, l, weight in ((a, xa, la, 1 - p), (b, xb, lb, -p)):
        mine = (arm.cells > 0) & ~paired[stratum]
        of = stratum[mine]
        blocks.append((arm.x[mine][:, genes] - arm.l[mine, None] * (x / np.maximum(l, 1))[of]) * weight[of])
        freedom += len(of) - len(np.unique(of))
    return np.concatenate(blocks), max(1, freedom)
