"""Differential expression: which genes differ between groups of cells, by how much, and how sure that is.

`compare` knows only distributions of log2 fold changes; `differential_expression` gets them from
counts or from a fit. Fold changes are log2, probabilities posterior; false discoveries are counted over all
rows together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray

from pyrosc.data.counts import Counts
from pyrosc.differential.adaptive_shrinkage import shrink
from pyrosc.differential.calls import (
    Draws,
    Number,
    _features,
    _rows,
    by_evidence,
    check_numbers,
    decide,
    summarise,
)
from pyrosc.differential.design import check_batch, comparisons
from pyrosc.differential.group_sums import Arm
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws, counts_of
from pyrosc.posterior.draws import draws

_BLOCK = 2000  # pairs of cells that are held at a time


def _in_blocks(
    decoded: Callable[[int], tuple[Float[ndarray, "draws genes"], Float[ndarray, "sides genes"]]],
    n_draws: int,
    delta: Number,
    interval: Number,
) -> tuple[pd.DataFrame, Float[ndarray, "sides genes"]]:
    """Summarise so many draws, a block of them at a time: of the interval's ends this is the blocks' mean."""
    n_blocks = -(-n_draws // _BLOCK)
    sizes = [n_draws // n_blocks + (i < n_draws % n_blocks) for i in range(n_blocks)]

    def summarised(n: int) -> tuple[pd.DataFrame, ndarray]:
        lfc, shares = decoded(n)
        block = _features(Draws(lfc), delta, interval)
        return block.assign(square=block.lfc_sd**2 + block.lfc_mean**2), shares

    features, shares = zip(*map(summarised, sizes), strict=True)
    table = pd.DataFrame(np.average(features, 0, sizes), columns=features[0].columns)
    table["lfc_sd"] = np.sqrt(np.maximum(0, table.pop("square") - table.lfc_mean**2))
    return _rows(table, n_draws, 0.5), np.average(shares, 0, sizes)


@kept()
def differential_expression(
    fit: Fit,
    data: Counts | anndata.AnnData,
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

    Two questions can be asked. `"mean"`: is the groups' mean expression different? The fold change of gene
    g between groups A and B is a factor between rates, the same in each batch, in which the counts x of a
    cell with the total l have ::

        E x = l r_gb 2^(m + t_g)  in A,   l r_gb  in B,   Var x = E x + phi_g (E x)^2,  phi its own in each

    m + t_g has the quasi-likelihood of `likelihood`, and t_g a prior learned across
    the genes by `shrink`, of each comparison by itself. m is what most genes have in
    common: shares sum to 1, so where a few abundant genes rise, all others fall by as much, which says
    nothing of these. The fold change is t_g; that of the shares is m + t_g. Ten genes or more are needed to
    know m: of few, which are the ones that change is not in the counts.

    `"cell"` (Lopez 2018, Boyeau 2023): is a random cell of A different from a random cell of B? Each of
    `n_draws` pairs is a cell of either group, a draw of the shares rho of both from the fit, and ::

        t_g = log2(rho_ag + eps) - log2(rho_bg + eps),    eps = .01 / median total: a hundredth of a count

    Cells differ more than means do: expect few calls for a shift within a type.

    Parameters
    ----------
    fit
        Of :func:`~pyrosc.fit_svi`.
    data
        Counts, or an AnnData; genes are matched by name. Nothing is written into it.
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
        ``"average"``: compare within the fit's batches, so that no batch effect is taken for a difference.
        For means: a rate of each batch; batches without cells of both sides say nothing. For cells: each pair
        is decoded in one batch drawn at random, the same for both. A batch's name: for means, only the cells
        measured there; for cells, all, decoded there. None: batches are ignored, cells decoded in their own.
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
        A row for each gene of each comparison, by group and then by evidence: the error of the call, then
        |lfc_mean| / lfc_sd, then the fit's order: gene, group, reference; the columns of :func:`compare`;
        lfc_common (m; 0 with ``"cell"``), mean_share and mean_share_reference (of the counts of these genes;
        with ``"cell"``, of the draws),
        raw_mean and raw_mean_reference (counts per cell), expressing and expressing_reference (share of the
        cells that have a count). With ``"mean"`` these describe the cells that were compared; with
        `replicate_key` there are also replicates and replicates_reference, how many of either side were:
        where that is fewer than two, expected_fdr is NaN and is_de False, see Notes.
        Genes that the data of a query lack have no row. :func:`~pyrosc.to_scanpy` hands it to scanpy.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a group, reference, estimand or batch is unknown, a group has fewer than two cells or is the
        reference, no batch has cells of both, or a number is out of range.

    Notes
    -----
    Without a `replicate_key` cells count as independent: with few donors, intervals are too narrow for
    conclusions about donors. With one, the log rate of each donor, in each batch and on each side, has an
    error of variance tau_g^2, estimated from the counts by `between_replicates`. A
    donor with cells on both sides is compared with itself, the others with those of their batch. These two
    kinds have a tau_g^2 each, and what either shows is weighed by it, so that donors of one side take nothing
    from what those of both show (one alone against one alone, whose tau_g^2 nothing shows, is then not
    used); a single donor of both sides counts as one of the others. With fewer than two donors on a side
    tau_g^2 is the other side's, or taken for 0: fold changes, intervals and probabilities are then about
    these donors, which nothing tells from their group. There is a warning, nothing is called, and the
    comparison has no part in the false discovery rate of others. Where all donors of a side have a cell on
    the other too, a donor with cells on the other side alone has none to stand against, and is left out.

    The means do not use the fit's decoder, only its genes and batches, by evidence: an experiment, made once,
    before m was subtracted (what `benchmarks/differential.py` finds is in the README). 300 genes, 20 doubled
    and 20 halved in 750 of 1500 cells, NB counts with theta = 3, totals of some 360 (LogNormal(0, .3)); ten
    data sets, calls at a nominal .05. "ash": normal mixture with mode 0, delta-method errors, batches
    ignored. (ii): prior centred on the decoder's group contrast d_g, (iii): on d_g times a fitted slope.
    "offset": batches adjusted by the decoder's counterfactuals. "Batches": three, log-sd .5, two of them
    confounded 80/20 with the group. ::

        data     prior, likelihood             found  FDP   cover of 40  width  RMSE
        plain    this                          40.0   .048  .89          .17    .042
                 ash                           40.0   .078  .87          .12    .061
                 (ii) centred on d             40.0   .134  .72          .18    .100
                 (iii) on a fitted slope d     40.0   .255  .44          .15    .118
        batches  this                          40.0   .056  .92          .18    .048
                 ash, or this with batch=None  37.9   .75   .34          .32    .39
                 (ii)                          40.0   .127  .83          .20    .103
                 (iii)                         40.0   .348  .42          .15    .142
                 offset                        40.0   .050  .14          .19    .109
        30 v 30  this                           6.8   .071  .56          .82    .294
                 ash                            5.5   .087  .53          .60    .290
                 (ii)                          10.5   .481  .40          .49    .311

    The decoder saw the same counts, so its contrast repeats their noise: a prior centred there finds it
    confirmed. Adjusting within batches needs no such trust.

    References
    ----------
    Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018. Boyeau et al., An empirical
    Bayes method for differential expression analysis of single cells with deep generative models, 2023.
    """
    check_numbers(delta, fdr, interval)
    _check_estimand(estimand, n_draws, replicate_key)
    batch = None if batch is None else str(batch)
    data = counts_of(fit, data)
    check_batch(fit, batch)
    asked = {"groupby": groupby, "group": group, "reference": reference, "replicate_key": replicate_key}
    eps = 0.01 / float(np.median(data.library))
    tables = []
    # Random cells are compared wherever they are: only what is decoded has a batch.
    for pair in comparisons(fit, data, **asked, batch=batch if estimand == "mean" else None):
        if estimand == "cell":
            rows = [np.flatnonzero(pair.side == side) for side in (0, 1)]
            rng = np.random.default_rng([seed, pair.codes[0], pair.codes[1] + 1])
            decoded = partial(
                _cells, fit, data, rows, rng, batch=batch, site=site, parallel=parallel, eps=eps
            )
            found, shares = _in_blocks(decoded, n_draws, delta, interval)
            common = 0.0
        else:
            posterior = shrink(pair.likelihood)
            found, common = summarise(posterior, delta, interval), posterior.common
            shares = np.stack([arm.x.sum(0) / arm.l.sum() for arm in (pair.a, pair.b)])
        who = {"gene": fit.schema.genes, "group": pair.group, "reference": pair.reference}
        table = pd.DataFrame(who).join(found).assign(lfc_common=common).join(_raw(pair.a, pair.b, shares))
        if pair.replicates is not None:
            table["replicates"], table["replicates_reference"] = pair.replicates
        tables.append(by_evidence(table, fit.schema.absent, known=pair.replicated))
    table = decide(pd.concat(tables, ignore_index=True), fdr)
    table.attrs["groupby"] = groupby if isinstance(groupby, str) else ""
    return table


def _raw(a: Arm, b: Arm, shares: Float[ndarray, "sides genes"]) -> pd.DataFrame:
    """Return the columns that describe the counts of either side."""
    columns = {}
    for suffix, arm, share in (("", a, shares[0]), ("_reference", b, shares[1])):
        columns["mean_share" + suffix] = share
        columns["raw_mean" + suffix] = arm.x.sum(0) / arm.n
        columns["expressing" + suffix] = arm.expressing.sum(0) / arm.n
    return pd.DataFrame(columns)


def _check_estimand(estimand: str, n_draws: int, replicate_key: Any) -> None:
    if estimand not in ("mean", "cell"):
        msg = f'estimand must be "mean" or "cell", not {estimand!r}'
        raise ValueError(msg)
    if estimand == "cell" and replicate_key is not None:
        msg = 'replicates are of the means\' question: give estimand="mean", or no replicate_key'
        raise ValueError(msg)
    check_draws(n_draws)
    if estimand == "cell" and n_draws < 2:
        msg = "one pair of cells shows no spread of fold changes: n_draws must be at least 2, and better 2000"
        raise ValueError(msg)


def _cells(
    fit: Fit,
    data: Counts,
    rows: Sequence[ndarray],
    rng: np.random.Generator,
    n_draws: int,
    *,
    batch: str | None,
    site: str,
    parallel: bool,
    eps: float,
) -> tuple[Float[ndarray, "draws genes"], Float[ndarray, "sides genes"]]:
    """Decode pairs of random cells; return their log2 fold changes and the mean share of either side."""
    chosen = [rng.choice(side, n_draws) for side in rows]
    known = fit.schema.batches
    there: list[str | None] = [batch] if batch != "average" else [*known] if len(known) > 1 else [None]
    where = rng.integers(len(there), size=n_draws)
    lfc, done = torch.empty(data.n_genes, n_draws), 0
    total = [torch.zeros(data.n_genes, dtype=torch.float64, device=fit.device) for _ in rows]
    for i, name in enumerate(there):
        seeds = [int(s) for s in rng.integers(2**31, size=2)]
        if not (where == i).any():
            continue
        streams = [
            draws(fit, data[side[where == i]], site, n_draws=1, batch=name, parallel=parallel, seed=s)
            for side, s in zip(chosen, seeds, strict=True)
        ]
        for pair in zip(*streams, strict=True):
            rho = [drawn[site][0] for drawn in pair]
            if rho[0].shape[-1] != data.n_genes:
                msg = f"site {site!r} has {rho[0].shape[-1]} entries a cell, not a share of each gene"
                raise ValueError(msg)
            for a, b in zip(*(r.split(64) for r in rho), strict=True):  # (turned piece by piece: faster)
                lfc[:, done : done + len(a)] = ((a + eps) / (b + eps)).log2_().T
                done += len(a)
            for sum_, r in zip(total, rho, strict=True):
                sum_ += r.sum(0)
    if not lfc.isfinite().all():
        msg = f"site {site!r} of the fit is not finite, or below 0: look at pyrosc.draws(fit, data, {site!r})"
        raise ValueError(msg)
    return lfc.numpy().T, np.stack([(sum_ / n_draws).cpu().numpy() for sum_ in total])
