"""impute: what cells express, as a fit has it, and how sure that is."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import batch_codes, check_draws, check_interval, columns_of
from pyrosc.posterior.gamma_poisson import Rates
from pyrosc.posterior.imputation import Imputation, imputation
from pyrosc.posterior.intervals import (
    Summary,
    of_draws,
    of_logs,
    of_logs_of_new_counts,
    of_new_counts,
    of_rates,
    of_repaired,
)
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.rates_given_counts import Size, map_rates, parts_of, sizes_of
from pyrosc.posterior.sampling import Run, check_guided, library_of, map_runs, values_of


def impute(
    fit: Fit,
    data: Counts | anndata.AnnData,
    what: str = "share",
    *,
    library: Size | None = None,
    depth: Size | None = None,
    batch: str | int | None = None,
    threshold: float | None = None,
    genes: Sequence[str] | None = None,
    n_draws: int = 50,
    interval: float = 0.9,
    site: str | None = None,
    parallel: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    store: str | Path | None = None,
    progress: bool = True,
) -> Imputation:
    """Return the posterior mean, sd and interval of each cell's expression of each gene.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`~pyrosc.draws`.
    what
        What the decoder has: ``"share"``, rho, each gene's share of the cell's counts, rows sum to 1; or
        ``"count"``, the mean count at a library size, l rho (of a zero-inflated model: before dropout).

        What this very cell expresses, the decoder's opinion and the cell's own counts combined by conjugacy
        (`pyrosc.posterior.gamma_poisson`): ``"rate"``, the mean w of the cell's own count, in counts;
        ``"log1p"``, the mean of log(1 + w), natural logarithm, by default at a library size of 10^4; or
        ``"predictive"``, the count x' ~ Poisson(w) of a new measurement of the cell (before dropout), with an
        interval of whole counts.

        Of a zero-inflated likelihood: ``"repaired"``, the count before dropout. A positive count is as
        observed, a zero becomes P(dropout given the zero) times the mean count.
    library
        Of ``"count"``, ``"rate"``, ``"log1p"`` and ``"predictive"``: the library size, in counts; a number,
        or one for each cell (a Series is matched by cells' names). By default the cell's own: site ``"l"``,
        or the observed total where the program has no such site.
    depth
        Of ``"log1p"``: the library size of a new measurement; a number, or one for each cell. The answer is
        then about what people compute of counts, log(1 + library x' / depth), x' the new count at that depth,
        and not about rates, which a measurement without end would show.
    batch
        Name of a batch: expression as if measured there. ``"average"``: the mean over all batches, each draw
        decoded in each. By default the cell's own. What sets a cell's rate apart from the decoder's mean in
        its own batch, the factor between them, it takes with it.
    threshold
        Of ``"repaired"``: zeros that are dropouts with more than this probability become the mean count, and
        other zeros stay (the rule of DCA).
    genes
        Names of the genes to return, in this order; by default all of the fit's, in the order of `data`. The
        network decodes all, since shares sum to 1; what is drawn, and its quantiles, are of these alone.
    n_draws
        Posterior draws of each cell.
    interval
        Probability of the interval between `lower` and `upper`. One of 90% takes 19 draws: with fewer it is
        from the least to the greatest, and with one it says nothing, nor do `sd` and `information` of
        shares and counts. One of whole counts has at least this probability.
    site
        Name of the site of shares, by default ``"rho"``; unless `what` is one of these two, name of the site
        of counts, by default ``"x"``.
    dtype
        Of the answer: ``"float32"``, or ``"float16"``: half the size, three digits, values up to 65504;
        intervals are rounded outwards.
        Shares, most of which are less than it can hold, are not given in it.
    store
        Path of a new folder: the answer is written there as four zarr arrays, some cells at a time, and is
        nowhere in memory as a whole. By default numpy arrays.
    progress
        Show a progress bar, of what takes more than two seconds.

    Returns
    -------
    Imputation
        Of ``"rate"``, ``"predictive"`` and ``"repaired"`` the mean is that of the conditional means given
        each draw of the cell's state, which has less noise than the mean of draws. Of ``"log1p"`` with a
        `depth` that is so of what small counts add to it.

    Raises
    ------
    ValueError
        If `what` or `dtype` is another one, a gene or batch is unknown, a number is out of range, or a value
        is too large for float16.
    FileExistsError, FileNotFoundError
        If there is something at `store`, or no folder to make it in. On any other error nothing is left
        there.
    TypeError
        If the likelihood is one whose rates are not known, or, to be repaired, without zero inflation.

    Notes
    -----
    Parameters of the model are taken as known. A gene that the data of a query lack has the decoder's
    opinion alone. Imputed values are no counts: put no test to them, but to the fit.

    Posterior means invent correlations between genes: what two genes share through the cell's state stays,
    and the noise in which they differ is gone; rates of a cell moreover rise and fall with its total. Take no
    correlations from them: repeat the analysis on each data set of :func:`~pyrosc.multiple_imputation`.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> imputed = pyrosc.impute(fit, adata)
    >>> imputed.mean.shape, bool(abs(imputed.mean.sum(1) - 1).max() < 1e-4)
    ((60, 30), True)
    >>> pyrosc.impute(fit, adata, "count", library=1e4, genes=["gene_3"]).unit
    'counts at library size 10000'
    """
    _check_question(what, library, depth, batch, threshold)
    check_interval(interval)
    _check_dtype(dtype, what)
    check_draws(n_draws)
    columns = columns_of(fit, data, genes)
    data = asked(fit, data)
    at = {"share": 1.0, "log1p": 1e4}.get(what) if library is None else library
    size = None if at is None else sizes_of(at, data, "library")
    asking: dict[str, Any] = {"n_draws": n_draws, "batch": batch, "parallel": parallel, "seed": seed}
    if what in ("share", "count"):
        answers = _decoded(fit, data, columns, interval, library=size, site=site or "rho", **asking)
    else:
        scale = None
        if size is not None and depth is not None:
            new = sizes_of(depth, data, "depth")
            size, scale = new, size / new
        use = _summary(what, scale, threshold, interval)
        answers = map_rates(fit, data, use, columns, library=size, site=site or "x", **asking)
    unit, names = _unit(what, library, depth, threshold), np.array(fit.schema.genes)[columns]
    return imputation(
        answers, unit, interval, data.cell_names, names, dtype=dtype, store=store, progress=progress
    )


def _decoded(
    fit: Fit,
    data: Counts,
    columns: np.ndarray,
    interval: float,
    *,
    library: Tensor | None,
    batch: str | int | None,
    n_draws: int,
    site: str,
    parallel: bool,
    seed: int,
) -> Iterator[Summary]:
    """Summarise l rho, some cells at a time; l is the library size asked for, else each cell's own."""

    def summary(cells: Cells, runs: list[Run]) -> Summary:
        check_guided(runs)
        rho = values_of(runs, site)
        l = library_of(runs, cells).mean(0) if library is None else library.to(cells.x)[cells.index]
        parts = parts_of(columns, n_draws * len(cells))
        return torch.cat([of_draws(rho[..., some].mean(0) * l, interval) for some in parts], -1)

    return map_runs(fit, data, summary, n_draws, batch_codes(fit, batch), parallel=parallel, seed=seed)


def _summary(
    what: str, scale: Tensor | None, threshold: float | None, interval: float
) -> Callable[[Rates, Tensor, Tensor], Summary]:
    """Return what summarises rates; `scale`, of each cell, makes new counts what is asked for."""

    def summary(rates: Rates, mean: Tensor, index: Tensor) -> Summary:
        if what == "rate":
            return of_rates(rates, mean, interval)
        if what == "predictive":
            return of_new_counts(rates, mean, interval)
        if what == "repaired":
            return of_repaired(rates, threshold, interval)
        if scale is None:
            return of_logs(rates, mean, interval)
        return of_logs_of_new_counts(rates, mean, scale.to(mean)[index], interval)

    return summary


def _unit(what: str, library: Size | None, depth: Size | None, threshold: float | None) -> str:
    """Return what the numbers are, and their unit."""

    def size(number: Size | None) -> str:
        if number is None:
            return "of the cell"
        return f"{number:g}" if np.ndim(number) == 0 else "given for the cell"

    at = f"library size {size(1e4 if what == 'log1p' and library is None else library)}"
    logs = "rates of the cell's own counts" if depth is None else f"new counts at depth {size(depth)}, taken"
    filled = "P(dropout) x mean" if threshold is None else f"the mean where P(dropout) > {threshold}"
    units = {
        "share": "share of the cell's counts",
        "count": f"counts at {at}",
        "rate": f"rates of the cell's own counts, in counts at {at}",
        "log1p": f"log1p of {logs} at {at}",
        "predictive": f"new counts of the cell at {at}",
        "repaired": f"counts before dropout: as observed, but zeros are {filled}",
    }
    return units[what]


def _check_question(
    what: str,
    library: Size | None,
    depth: Size | None,
    batch: str | int | None,
    threshold: float | None,
) -> None:
    """Raise unless these go together."""
    if what not in ("share", "count", "rate", "log1p", "predictive", "repaired"):
        msg = f'what must be "share", "count", "rate", "log1p", "predictive" or "repaired", not {what!r}'
        raise ValueError(msg)
    if library is not None and what in ("share", "repaired"):
        msg = f'library goes with what="count", "rate", "log1p" or "predictive", not with {what!r}'
        raise ValueError(msg)
    if depth is not None and what != "log1p":
        msg = f'depth goes with what="log1p", not with {what!r}: new counts are of the library size asked for'
        raise ValueError(msg)
    if batch is not None and what == "repaired":
        msg = f'"repaired" counts are those of their own batch, not of {batch!r}: ask for what="rate" there'
        raise ValueError(msg)
    if threshold is not None and (what != "repaired" or not 0 <= threshold <= 1):
        msg = f'threshold, a probability, goes with what="repaired"; got {threshold!r} with {what!r}'
        raise ValueError(msg)


def _check_dtype(dtype: str, what: str) -> None:
    if dtype not in ("float32", "float16"):
        msg = f'dtype must be "float32" or "float16", not {dtype!r}'
        raise ValueError(msg)
    if dtype == "float16" and what == "share":
        msg = 'shares are too small for float16: ask for what="count", library=1e4, or for dtype="float32"'
        raise ValueError(msg)
