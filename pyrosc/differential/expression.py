"""Differential expression: which genes differ between groups of cells, by how much, and how sure that is."""

from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from pyrosc.data.counts import Counts
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import Number, call_at_fdr, check_numbers, ranked, summarise
from pyrosc.differential.cell_pairs import between_cells
from pyrosc.differential.design import check_batch, contrasts
from pyrosc.differential.fit_or_counts import fit_and_counts
from pyrosc.differential.group_sums import Pseudobulk
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws


@kept()
def differential_expression(
    fit: Fit | Counts | anndata.AnnData | None = None,
    data: Counts | anndata.AnnData | None = None,
    *,
    groupby: Any,
    group: Any = None,
    reference: Any = "rest",
    estimand: str = "mean",
    delta: Number = 0.25,
    fdr: Number = 0.05,
    replicate_key: Any = None,
    batch: str | None = "average",
    interval: Number = 0.9,
    n_draws: int = 2000,
    site: str = "rho",
    parallel: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Find the genes whose expression differs between groups of cells.

    Means come from the counts, cells from the decoder. ``estimand="mean"`` is an empirical-Bayes regression
    of the counts and needs no fit, ``differential_expression(adata, groupby=...)``; of one it takes the genes
    and batches, never the decoder. ``estimand="cell"`` asks what the decoder of a fit says of random cells.

    `"mean"`: is the groups' mean expression different? The fold change of gene g between groups A and B is a
    factor between rates, the same in each batch, in which the counts x of a cell with the total l have ::

        E x = l r_gb 2^(m + t_g)  in A,   l r_gb  in B,   Var x = E x + phi_g (E x)^2,  phi its own in each

    m + t_g has a quasi-likelihood given the sums over both groups, and t_g a prior learned across the genes
    of the comparison (adaptive shrinkage). m is what most genes have in common: shares sum to 1, so where a
    few abundant genes rise, all others fall by as much, which says nothing of these. The fold change is t_g;
    that of the shares is m + t_g. Ten genes or more are needed to know m: of few, which are the ones that
    change is not in the counts.

    `"cell"` (Lopez 2018, Boyeau 2023): is a random cell of A different from a random cell of B? Each of
    `n_draws` pairs is a cell of either group, a draw of the shares rho of both from the fit, and ::

        t_g = log2(rho_ag + eps) - log2(rho_bg + eps),    eps = .01 / median total: a hundredth of a count

    Cells differ more than means do: expect few calls for a shift within a type.

    Parameters
    ----------
    fit
        Of :func:`~pyrosc.fit_svi`. Without one, the data stands first.
    data
        Counts, or an AnnData. With a fit, genes are matched by name, and layer and batches are the fit's.
        Without one, the counts of an AnnData are those in ``X``, of one batch; for another layer, or batches,
        give ``from_anndata(adata, layer=..., batch_key=...)``. Nothing is written into it.
    groupby
        Column of ``obs``, or one value for each cell (a Series is matched by cells' names). A cell without a
        value (NaN) is in no group and in no rest.
    group
        Name of a group, or a list of names; all by default (but the reference).
    reference
        Name of the group to compare with; or ``"rest"``: the cells of all other groups together.
    estimand
        ``"mean"`` or ``"cell"``.
    delta
        Smallest log2 fold change of interest, at least 0.
    fdr
        Target of the false discovery rate over all rows of the table together, between 0 and 1.
    replicate_key
        Column of ``obs``, or one value for each cell, that names the donor or sample a cell is of; with
        ``"mean"``. What a donor's cells have in common then widens the intervals, see Notes, and the
        conclusions are about donors, not about these donors' cells. A cell without one is left out.
    batch
        ``"average"``: compare within batches, so that no batch effect is taken for a difference. For means: a
        rate of each batch; batches without cells of both sides say nothing. For cells: each pair is decoded
        in one batch drawn at random, the same for both. A batch's name: for means, only the cells measured
        there; for cells, all, decoded there. None: batches are ignored, cells decoded in their own.
    interval
        Probability of the central interval between `lfc_lower` and `lfc_upper`.
    n_draws
        Pairs of cells in each comparison, with ``"cell"``: so many draws of either group are decoded, and
        no more. Probabilities are good to about .5 / sqrt(n_draws). No more than 2000 are held at a time:
        of more, the interval's ends are means over blocks.
    site
        Name of the site of shares, with ``"cell"``.
    parallel
        False for a program that can't broadcast; see :func:`~pyrosc.draws`.
    seed
        Of the draws, with ``"cell"``.

    Returns
    -------
    DataFrame
        A row for each gene of each comparison, by group and then by evidence: the probability that a call is
        wrong, then |lfc_mean| / lfc_sd, then the genes' order. Columns: gene, group, reference; those of
        :func:`~pyrosc.compare`; lfc_common (m; 0 with ``"cell"``), mean_share and mean_share_reference (of
        the counts of these genes; with ``"cell"``, of the draws), raw_mean and raw_mean_reference (counts per
        cell), expressing and expressing_reference (share of the cells that have a count). With ``"mean"``
        these describe the cells that were compared; with `replicate_key` there are also replicates and
        replicates_reference, how many of either side were: where that is fewer than two, expected_fdr is NaN
        and is_de False, see Notes. Genes that the data of a query lack have no row. :func:`~pyrosc.to_scanpy`
        hands it to scanpy.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a group, reference, estimand or batch is unknown, a group has fewer than two cells or is the
        reference, no batch has cells of both, a number is out of range, or ``"cell"`` is asked without a fit.
    TypeError
        If something else stands where a fit or data is expected.

    Notes ----- Without a `replicate_key` cells count as independent: with few donors, intervals are too
    narrow for conclusions about donors. With one, the log rate of each donor, in each batch and on each side,
    has an error of variance tau_g^2, estimated from the counts. A donor with cells on both sides is compared
    with itself, the others with those of their batch. These two kinds have a tau_g^2 each, and what either
    shows is weighed by it, so that donors of one side take nothing from what those of both show (one alone
    against one alone, whose tau_g^2 nothing shows, is then not used); a single donor of both sides counts as
    one of the others. With fewer than two donors on a side tau_g^2 is the other side's, or taken for 0: fold
    changes, intervals and probabilities are then about these donors, which nothing tells from their group.
    There is a warning, nothing is called, and the comparison has no part in the false discovery rate of
    others. Where all donors of a side have a cell on the other too, a donor with cells on the other side
    alone has none to stand against, and is left out.

    How far this can be trusted, and why means do not use the decoder, is measured in
    ``docs/differential_expression.md``.

    References
    ----------
    Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018. Boyeau et al., An empirical
    Bayes method for differential expression analysis of single cells with deep generative models, 2023.

    Examples
    --------
    Means of two types of cells, by their counts alone; eight of the 40 genes differ four-fold, one is rare:

    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(300, 40, n_types=2, log2_fold_change=2.0, seed=0)
    >>> types = {"groupby": "cell_type", "group": "type_0", "reference": "type_1"}
    >>> table = pyrosc.differential_expression(adata, **types)
    >>> sorted(table.gene[table.is_de])
    ['gene_13', 'gene_24', 'gene_25', 'gene_28', 'gene_32', 'gene_34', 'gene_9']
    >>> table[["gene", "lfc_mean", "p_up", "p_down", "is_de"]].round(1).head(2)
          gene  lfc_mean  p_up  p_down  is_de
    0  gene_25       2.0   1.0     0.0   True
    1  gene_28      -2.0   0.0     1.0   True

    Random cells, as a fit decodes them; batches, and counts in another layer, are named where data is read:

    >>> data = pyrosc.from_anndata(adata, batch_key="batch")
    >>> model = pyrosc.VAE.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, data, epochs=1, progress=False)
    >>> pyrosc.differential_expression(fit, data, estimand="cell", n_draws=100, **types).shape
    (40, 22)
    """
    check_numbers(delta, fdr, interval)
    fit, data = fit_and_counts(fit, data)
    _check_estimand(estimand, n_draws, replicate_key, fit)
    batch = None if batch is None else str(batch)
    check_batch(data.schema, batch)
    asked = {"groupby": groupby, "group": group, "reference": reference, "replicate_key": replicate_key}
    decoding: dict[str, Any] = {
        "batch": batch,
        "n_draws": n_draws,
        "site": site,
        "parallel": parallel,
        "seed": seed,
    }
    eps = 0.01 / float(np.median(data.library))
    tables = []
    # Random cells are compared wherever they are: only what is decoded has a batch.
    for contrast in contrasts(data, **asked, batch=batch if estimand == "mean" else None):
        if fit is not None and estimand == "cell":
            found, shares = between_cells(
                fit, data, contrast, eps=eps, delta=delta, interval=interval, **decoding
            )
            common = 0.0
        else:
            posterior = shrink(contrast.likelihood)
            found, common = summarise(posterior, delta, interval), posterior.common
            shares = np.stack([arm.x.sum(0) / arm.l.sum() for arm in (contrast.a, contrast.b)])
        table = pd.DataFrame({"gene": data.schema.genes})
        table = table.assign(group=contrast.group, reference=contrast.reference).join(found)
        table = table.assign(lfc_common=common).join(_raw(contrast.a, contrast.b, shares))
        if contrast.replicates is not None:
            table["replicates"], table["replicates_reference"] = contrast.replicates
        tables.append(ranked(table, data.schema.absent, known=contrast.replicated))
    table = call_at_fdr(pd.concat(tables, ignore_index=True), fdr)
    table.attrs["groupby"] = groupby if isinstance(groupby, str) else ""
    return table


def _raw(a: Pseudobulk, b: Pseudobulk, shares: Float[ndarray, "sides genes"]) -> pd.DataFrame:
    """Return the columns that describe the counts of either side."""
    columns = {}
    for suffix, arm, share in (("", a, shares[0]), ("_reference", b, shares[1])):
        columns["mean_share" + suffix] = share
        columns["raw_mean" + suffix] = arm.x.sum(0) / arm.n
        columns["expressing" + suffix] = arm.expressing.sum(0) / arm.n
    return pd.DataFrame(columns)


def _check_estimand(estimand: str, n_draws: int, replicate_key: Any, fit: Fit | None) -> None:
    """Raise unless the estimand is one, and what it needs is there."""
    if estimand not in ("mean", "cell"):
        msg = f'estimand must be "mean" or "cell", not {estimand!r}'
        raise ValueError(msg)
    if estimand == "cell" and fit is None:
        msg = (
            "random cells are decoded by a fit: give it first, differential_expression(fit, data, ...), or "
            'compare means, estimand="mean", which needs none'
        )
        raise ValueError(msg)
    if estimand == "cell" and replicate_key is not None:
        msg = 'replicates are of the means\' question: give estimand="mean", or no replicate_key'
        raise ValueError(msg)
    check_draws(n_draws)
    if estimand == "cell" and n_draws < 2:
        msg = "one pair of cells shows no spread of fold changes: n_draws must be at least 2, and better 2000"
        raise ValueError(msg)
