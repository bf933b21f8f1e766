"""Differential expression of gene sets: the mean log2 fold change of a set's genes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from pyrosc.data.counts import Counts
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import Number, check_numbers
from pyrosc.differential.design import contrasts
from pyrosc.differential.fit_or_counts import fit_and_counts
from pyrosc.differential.quasi_likelihood import beyond
from pyrosc.differential.set_means import errors_of, set_means
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.fit import Fit


@kept()
def gene_sets(
    fit: Fit | Counts | anndata.AnnData | None = None,
    data: Counts | anndata.AnnData | Mapping[str, Sequence[str]] | None = None,
    sets: Mapping[str, Sequence[str]] | None = None,
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

    All of it comes from the counts, and needs no fit: ``gene_sets(adata, sets, groupby=...)``.

    Parameters
    ----------
    fit, data, groupby, group, reference, delta, fdr, replicate_key, batch, interval
        See :func:`~pyrosc.differential_expression`.
    sets
        Names of genes by the name of their set. Genes that the data (or the fit) does not know, or a query
        lacks, are left out.

    Returns
    -------
    DataFrame
        A row for each set of each comparison, by group and then by evidence: set, group, reference, n_genes
        (of those that are known), n_unknown, lfc_common (of all genes); lfc_mean, lfc_sd, lfc_lower,
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
        If sets have no gene that is known, a group is unknown or too small, or a number is out of range.

    Notes
    -----
    The estimate's error is taken for normal; with replicates for Student's t, with as many degrees of freedom
    as replicates show errors with: with three donors on a side correlations are not well known. Without a
    `replicate_key` errors that cells of a donor share are not seen, and sets that share them seem to change.

    This asks of the set's genes themselves, not whether they change more than others do.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(300, 40, n_types=2, log2_fold_change=2.0, seed=0)
    >>> sets = {"program": ["gene_24", "gene_25", "gene_32"], "others": ["gene_0", "gene_1", "gene_2"]}
    >>> table = pyrosc.gene_sets(adata, sets, groupby="cell_type", group="type_0", reference="type_1")
    >>> table[["set", "n_genes", "lfc_mean", "is_de"]].round(1)
           set  n_genes  lfc_mean  is_de
    0  program        3       2.0   True
    1   others        3      -0.1  False
    """
    from scipy import stats  # takes long to import

    check_numbers(delta, fdr, interval)
    batch = None if batch is None else str(batch)
    if sets is None and not isinstance(fit, Fit):
        fit, data, sets = None, fit, data
    _, data = fit_and_counts(fit, data)
    sets = _listed(sets)
    member = _membership(sets, data.schema.genes, data.schema.present)
    inside = np.flatnonzero(member.any(1))
    member, n = member[inside], member.sum(0).astype(int)
    x, library = data.x[:, inside], data.library
    asked = {"groupby": groupby, "group": group, "reference": reference, "replicate_key": replicate_key}
    tables = []
    for contrast in contrasts(data, **asked, batch=batch):
        errors, freedom = errors_of(contrast, x, library, inside)
        common = shrink(contrast.likelihood).common
        mean, variance = set_means(beyond(contrast.likelihood[inside], common), errors, member)
        table = pd.DataFrame({"set": list(sets), "group": contrast.group, "reference": contrast.reference})
        table["n_genes"] = n
        table["n_unknown"] = [len(set(genes)) for genes in sets.values()] - n
        table["lfc_common"] = common
        table = table.join(_described(mean, variance, freedom, delta, interval))
        likelier = table[["p_up", "p_down"]].max(axis=1)
        table["p"] = np.minimum(1, 2 * (1 - likelier))
        table = table.iloc[np.lexsort((-np.abs(mean) / np.sqrt(variance), -likelier))]
        if contrast.replicates is not None:
            table["replicates"], table["replicates_reference"] = contrast.replicates
        tables.append(table if contrast.replicated else table.assign(p=np.nan))
    found = pd.concat(tables, ignore_index=True)
    p = found.pop("p")
    found["fdr_bound"] = p
    found.loc[p.notna(), "fdr_bound"] = stats.false_discovery_control(p.dropna())
    found["is_de"] = found.fdr_bound <= fdr
    return found


def _described(
    mean: Float[ndarray, "sets"],
    variance: Float[ndarray, "sets"],
    freedom: Number,
    delta: Number,
    interval: Number,
) -> pd.DataFrame:
    """Return what is read off Student's t distributions of the means' errors; of infinite freedom, normal."""
    from scipy import stats  # takes long to import

    sd = np.sqrt(variance)
    t = stats.t(freedom, mean, sd)
    up, down = t.sf(delta), t.cdf(-delta)
    return pd.DataFrame(
        {
            "lfc_mean": mean,
            "lfc_sd": sd,
            "lfc_lower": t.ppf((1 - interval) / 2),
            "lfc_upper": t.ppf((1 + interval) / 2),
            "p_up": up,
            "p_down": down,
            "p_equivalent": np.maximum(0, 1 - up - down),
            "p_de": np.minimum(1, up + down),
        }
    )


def _is_list(genes: Any) -> bool:
    return isinstance(genes, Iterable) and not isinstance(genes, str)


def _listed(sets: Any) -> dict[str, list[str]]:
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
            f"no gene of {', '.join(none)} is among those compared: leave such sets out, or name genes as "
            "the data does"
        )
        raise ValueError(msg)
    return member
