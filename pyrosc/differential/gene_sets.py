"""Differential expression of gene sets: the mean log2 fold change of a set's genes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse

from pyrosc.data.counts import Counts
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import Number, check_numbers
from pyrosc.differential.design import Comparison, comparisons
from pyrosc.differential.donor_variance import one_on_each_side
from pyrosc.differential.group_sums import strata
from pyrosc.differential.quasi_likelihood import LFC, beyond
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import counts_of

_CELLS = 4096  # looked at together
_KNOWN, _LEAST = 0.25, 0.05**2  # variances of a fold change: of a known one, and of those of a set at least


@dataclass(frozen=True)
class Errors:
    """What cells, or replicates, contribute to the error of each gene's fold change, up to a gene's factor.

    Attributes
    ----------
    blocks : Callable
        Returns them anew whenever it is called, some at a time, (some, genes): all are as large as the data,
        and not sparse.
    """

    blocks: Callable[[], Iterable[Float[ndarray, "_ genes"]]]

    @cached_property
    def size(self) -> Float[ndarray, "genes"]:
        """Root of the sum of each gene's squares."""
        return np.sqrt(sum((block**2).sum(0) for block in self.blocks()))

    def together(self, weights: Float[ndarray, "genes sets"]) -> Float[ndarray, "sets"]:
        """Return the sum over pairs of different genes g, h of w_g w_h times the correlation of their errors.

        Parameters
        ----------
        weights
            w, of each gene in each set.
        """
        weights = weights * (self.size > 0)[:, None]
        scaled = weights / np.where(self.size > 0, self.size, 1)[:, None]
        return sum(((block @ scaled) ** 2).sum(0) for block in self.blocks()) - (weights**2).sum(0)


@kept()
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

    The fold changes t_g are those of :func:`~pyrosc.differential_expression`, beyond what most genes have in
    common, each with the quasi-likelihood that it has there, of mean e_g and variance C_gg. What is asked for
    is the mean T of the t_g of a set. Its genes have a centre in common and differ from it by a variance that
    all sets share, so that a rare gene, of which little is known, is taken to be like the others. Genes of a
    set go together, and so do the errors of their fold changes: their covariance has the correlations of the
    cells' (or the replicates') residuals. T has no prior: that of the genes, under which they have nothing in
    common, would draw all of a set to 0 together, and sets are too few to learn one from.

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
        (of those that the fit knows), n_unknown, lfc_common (of all genes); lfc_mean, lfc_sd, lfc_lower,
        lfc_upper, p_up, p_down, p_equivalent, p_de, which say of T what those of :func:`~pyrosc.compare` say
        of a gene; fdr_bound, the largest false discovery rate, over all rows, of calling the sets with this
        much evidence in their direction (Benjamini and Hochberg, of 2 (1 - max(p_up, p_down))), and is_de,
        whether it is at most `fdr`. With a `replicate_key` also replicates and replicates_reference: where
        that is fewer than two fdr_bound is NaN and nothing is called.

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

    This asks of the set's genes themselves, not whether they change more than others do.
    """
    from scipy import stats  # takes long to import

    check_numbers(delta, fdr, interval)
    batch = None if batch is None else str(batch)
    data = counts_of(fit, data)
    sets = _listed(sets)
    member = _membership(sets, fit.schema.genes, fit.schema.present)
    inside = np.flatnonzero(member.any(1))
    member, n = member[inside], member.sum(0)
    asked = {"groupby": groupby, "group": group, "reference": reference, "replicate_key": replicate_key}
    x, library = data.x[:, inside], data.library
    tables = []
    for pair in comparisons(fit, data, **asked, batch=batch):
        if pair.replicates is None:
            errors, freedom = Errors(partial(_of_cells, x, library, pair, inside)), np.inf
        else:
            block, freedom = _of_replicates(pair, inside)
            errors = Errors(partial(list, [block]))
        common = shrink(pair.likelihood).common
        of_set, variance = _means(beyond(pair.likelihood[inside], common), errors, member)
        t = stats.t(freedom, of_set, np.sqrt(variance))
        up, down = t.sf(delta), t.cdf(-delta)
        table = pd.DataFrame(
            {
                "set": list(sets),
                "group": pair.group,
                "reference": pair.reference,
                "n_genes": n.astype(int),
                "n_unknown": [len(set(genes)) for genes in sets.values()] - n.astype(int),
                "lfc_common": common,
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
        likelier = np.maximum(up, down)
        table["p"] = np.minimum(1, 2 * (1 - likelier))
        table = table.iloc[np.lexsort((-np.abs(of_set) / np.sqrt(variance), -likelier))]
        if pair.replicates is not None:
            table["replicates"], table["replicates_reference"] = pair.replicates
        tables.append(table if pair.replicated else table.assign(p=np.nan))
    found = pd.concat(tables, ignore_index=True)
    p = found.pop("p")
    found["fdr_bound"] = p
    found.loc[p.notna(), "fdr_bound"] = stats.false_discovery_control(p.dropna())
    found["is_de"] = found.fdr_bound <= fdr
    return found


def _means(
    curves: Float[ndarray, "genes points"],
    errors: Errors,
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
    return mean, own + np.maximum(0, errors.together(np.sqrt(c)[:, None] * part))


def _spread(
    e: Float[ndarray, "genes"],
    c: Float[ndarray, "genes"],
    errors: Errors,
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
    expected = member.sum(0) - 1 - errors.together(member / np.sqrt(c)[:, None]) / total
    scale = total - (w**2).sum(0) / total
    return max(_LEAST, (squares - expected.sum()) / scale.sum())


def _is_list(genes: Any) -> bool:
    return isinstance(genes, Iterable) and not isinstance(genes, str)


def _listed(sets: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the sets with their genes as lists; raise where they are none."""
    if not (isinstance(sets, Mapping) and sets and all(map(_is_list, sets.values()))):
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


def _pooled(
    pair: Comparison, genes: Int[ndarray, "some"]
) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray], ndarray]:
    """Return counts and totals of each stratum on either side, and what part of the counts is the group's."""
    pool = strata(pair.stratum)
    (xa, la), (xb, lb) = ((pool @ arm.x[:, genes], (pool @ arm.l)[:, None]) for arm in (pair.a, pair.b))
    return (xa, la), (xb, lb), _fitted_share(xa, la, xb, lb)


def _fitted_share(xa: ndarray, la: ndarray, xb: ndarray, lb: ndarray) -> ndarray:
    """Return the part of each stratum's counts that a has if the fold change is the same in all.

    Counts x are (strata, genes), totals l (strata, 1). Source: Mantel and Haenszel, 1959.
    """
    one, other = ((x * l / np.maximum(la + lb, 1)).sum(0) for x, l in ((xa, lb), (xb, la)))
    return la * one / np.maximum(la * one + lb * other, 1e-300)


def _of_cells(
    x: sparse.csr_array, library: Float[ndarray, "cells"], pair: Comparison, genes: Int[ndarray, "some"]
) -> Iterator[Float[ndarray, "_ some"]]:
    """Yield what cells contribute to the score of a fold change: how far each is from its side's rate."""
    (xa, la), (xb, lb), p = _pooled(pair, genes)
    rate = np.stack([xa / la, xb / lb], 1)
    weight = np.stack([1 - p, -p], 1)
    rows = np.flatnonzero(pair.side >= 0)
    for some in np.array_split(rows, -(-len(rows) // _CELLS)):
        place = pair.stratum_of_cell[some], pair.side[some]
        yield (x[some].toarray() - library[some, None] * rate[place]) * weight[place]


def _of_replicates(pair: Comparison, genes: Int[ndarray, "some"]) -> tuple[Float[ndarray, "items some"], int]:
    """Return what each replicate contributes to the score, and the degrees of freedom that shows.

    A pair of single ones on either side contributes how far its fold change is from the common one.
    """
    a, b, stratum = pair.a, pair.b, pair.stratum
    (xa, la), (xb, lb), p = _pooled(pair, genes)
    paired = one_on_each_side(a, b, stratum)
    blocks, freedom = [(xa - (xa + xb) * p)[paired]], max(0, int(paired.sum()) - 1)
    for arm, x, l, weight in ((a, xa, la, 1 - p), (b, xb, lb, -p)):
        mine = (arm.cells > 0) & ~paired[stratum]
        of = stratum[mine]
        blocks.append((arm.x[mine][:, genes] - arm.l[mine, None] * (x / np.maximum(l, 1))[of]) * weight[of])
        freedom += len(of) - len(np.unique(of))
    return np.concatenate(blocks), max(1, freedom)
