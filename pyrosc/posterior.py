"""Questions about cells put to a Fit: latent, impute, impute_proteins, posterior_predictive, ...

Site names are known here, models are not. Each summarises the stream of :func:`pyrosc.draws`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrosc.asking import (
    asked,
    batch_code,
    cells_second,
    check_draws,
    draws,
    innermost,
    rows_of,
    run,
    seed_of,
    stream,
)
from pyrosc.counts import Counts
from pyrosc.distributions import ZeroInflated
from pyrosc.svi import Fit


@dataclass(frozen=True, eq=False)
class Imputation:
    """Imputed expression of each cell and gene, and how sure it is.

    Attributes
    ----------
    mean, sd, lower, upper : ndarray of shape (cells, genes), float32
        Posterior mean and standard deviation, and a central interval of probability `interval`.
    unit : str
        What the numbers are.
    interval : float
    cell_names, gene_names : ndarray of str
    """

    mean: np.ndarray
    sd: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    unit: str
    interval: float
    cell_names: np.ndarray
    gene_names: np.ndarray

    def __repr__(self) -> str:
        cells, genes = self.mean.shape
        return (
            f"Imputation of {cells} cells x {genes} genes: {self.unit}; posterior mean and sd, "
            f"and {self.interval:.0%} interval in lower and upper"
        )


def latent(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int | None = None,
    *,
    site: str = "z",
    parallel: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Return the posterior mean of the cells' state, or draws of it.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    n_draws
        By default the mean: of the guide's distribution, averaged over draws of whatever it depends on.
    site
        Name of the latent site.

    Returns
    -------
    ndarray of shape (cells, latent), or (draws, cells, latent)
        float32.
    """
    if n_draws is not None:
        stream = draws(fit, data, site, n_draws=n_draws, parallel=parallel, seed=seed)
        return np.concatenate([drawn[site].cpu().numpy() for drawn in stream], axis=1)
    data = asked(fit, data)
    means = []
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, 1))):
        with fit.asking(seed_of(seed, i)):
            guided, _ = run(fit, cells, 16, [], parallel=parallel)
            means.append(torch.stack([_mean(trace, site) for trace in guided]).mean(0).mean(0))
    return torch.cat(means).cpu().numpy()


def impute(
    fit: Fit,
    data: Counts | anndata.AnnData,
    what: str = "share",
    *,
    library: float | None = None,
    batch: str | int | None = None,
    genes: Sequence[str] | None = None,
    n_draws: int = 50,
    interval: float = 0.9,
    site: str = "rho",
    parallel: bool = True,
    seed: int = 0,
) -> Imputation:
    """Return the posterior mean, sd and interval of each cell's expression of each gene.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    what
        ``"share"``: rho, each gene's share of the cell's counts, rows sum to 1. ``"count"``: the mean count
        at a library size, l rho (of a zero-inflated model: before dropout).
    library
        With ``"count"``: the library size, in counts. By default the cell's own: site ``"l"``, or the
        observed total where the program has no such site.
    batch
        Name of a batch: expression as if measured there. ``"average"``: the mean over all batches, each draw
        decoded in each. By default the cell's own.
    genes
        Names of the genes to return, in this order; by default all of the fit's, in the order of `data`.
    n_draws
        Posterior draws of each cell.
    interval
        Probability of the interval between `lower` and `upper`.
    site
        Name of the site of shares.

    Returns
    -------
    Imputation

    Raises
    ------
    ValueError
        If `what` is another one, a gene or batch is unknown, or a number is out of range.
    """
    if what not in ("share", "count"):
        msg = f'what must be "share" or "count", not {what!r}'
        raise ValueError(msg)
    if library is not None and (what != "count" or not library > 0):
        msg = f'library, a number of counts above 0, goes with what="count"; got {library!r} with {what!r}'
        raise ValueError(msg)
    _check_interval(interval)
    check_draws(n_draws)
    data, columns = asked(fit, data), torch.as_tensor(_columns(fit, data, genes), device=fit.device)
    own = what == "count" and library is None
    codes = _codes(fit, batch)
    streamed = stream(fit, data, (site,), n_draws, codes, parallel=parallel, seed=seed, library=own)

    def values() -> Iterator[Tensor]:
        for cells, drawn in streamed:
            rho = drawn[site].mean(0)[..., columns]
            if own:
                l = drawn["l"].mean(0) if "l" in drawn else cells.library
                yield rho * (l if l.shape[-1:] == (1,) else l[..., None])  # (draws, cells), or has one more
            else:
                yield rho * (library or 1.0)

    units = {
        "share": "share of the cell's counts",
        "count": f"counts at library size {library or 'of the cell'}",
    }
    names = np.array(fit.schema.genes)[columns.cpu().numpy()]
    return _imputation(values(), units[what], interval, data.cell_names, names)


def impute_proteins(
    fit: Fit,
    data: Counts | anndata.AnnData,
    *,
    batch: str | int | None = None,
    n_draws: int = 50,
    interval: float = 0.9,
    site: str = "protein_mean",
    parallel: bool = True,
    seed: int = 0,
) -> Imputation:
    """Return the posterior mean, sd and interval of each cell's proteins, without the background.

    Parameters
    ----------
    fit
        Of :class:`~pyrosc.TOTALVI`.
    data, n_draws, parallel, seed
        See :func:`draws`. A protein that was not measured is told from the genes.
    batch
        Name of a batch: foreground as if measured there, over the cell's own background. ``"average"``: the
        mean over all batches. By default the cell's own.
    interval
        See :func:`impute`.
    site
        Name of the site of the proteins' means.

    Returns
    -------
    Imputation
        In counts; `gene_names` are names of proteins.

    Raises
    ------
    KeyError
        If the model has no such site.
    ValueError
        If the batch is unknown, or a number is out of range.
    """
    _check_interval(interval)
    check_draws(n_draws)
    data = asked(fit, data)
    streamed = stream(fit, data, (site,), n_draws, _codes(fit, batch), parallel=parallel, seed=seed)
    values = (drawn[site].mean(0) for _, drawn in streamed)
    names = np.array(fit.schema.proteins)
    return _imputation(values, "counts of proteins without background", interval, data.cell_names, names)


def _check_interval(interval: float) -> None:
    if not 0 < interval < 1:
        msg = f"interval is a probability between 0 and 1, not {interval!r}"
        raise ValueError(msg)


def _codes(fit: Fit, batch: str | int | None) -> list[int | None]:
    """Return the codes of the batches to decode in; ``"average"`` is all."""
    return list(range(len(fit.schema.batches))) if batch == "average" else [batch_code(fit, batch)]


def _imputation(
    values: Iterator[Float[Tensor, "draws _ genes"]],
    unit: str,
    interval: float,
    cell_names: np.ndarray,
    names: np.ndarray,
) -> Imputation:
    """Summarise draws, some cells at a time."""
    tail = (1 - interval) / 2
    done, summary = 0, np.empty((4, len(cell_names), len(names)), np.float32)
    for value in values:
        mean = value.mean(0)
        parts = (mean, _sd(value, mean), _low_quantile(value, tail), -_low_quantile(-value, tail))
        summary[:, done : done + len(mean)] = torch.stack(parts).cpu().numpy()
        done += len(mean)
    center, sd, low, high = summary
    return Imputation(center, sd, low, high, unit, interval, cell_names, names)


def posterior_predictive(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 1,
    *,
    batch: str | int | None = None,
    site: str = "x",
    parallel: bool = True,
    seed: int = 0,
) -> list[sp.csr_matrix]:
    """Return draws of new counts of the same cells.

    Parameters
    ----------
    fit, data, n_draws, batch, parallel, seed
        See :func:`draws`.
    site
        Name of the observed site.

    Returns
    -------
    list of csr_matrix of shape (cells, genes)
        One for each draw, float32. Columns are the fit's genes in the order of `data`, so that of an AnnData
        with just these genes each can become a layer. A site that is not of the genes stays as it is.
    """
    parts: list[list[sp.csr_matrix]] = [[] for _ in range(n_draws)]
    columns = _columns(fit, data, None)
    for drawn in draws(fit, data, site, n_draws=n_draws, batch=batch, parallel=parallel, seed=seed):
        of_genes = drawn[site].shape[-1] == len(fit.schema.genes)
        for part, x in zip(parts, drawn[site].cpu().numpy(), strict=True):
            part.append(sp.csr_matrix(x[:, columns] if of_genes else x))
    return [sp.vstack(part, format="csr") for part in parts]


def dropout_probability(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 25,
    *,
    genes: Sequence[str] | None = None,
    site: str = "x",
    parallel: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Return the posterior probability that each zero is a dropout: that the count was not zero by itself.

    By Bayes' rule pi / (pi + (1 - pi) p0) for a zero, p0 the probability of a zero that is none, averaged
    over draws of the cell's state. A positive count is no dropout: 0.

    Parameters
    ----------
    fit
        Of a model with a zero-inflated likelihood: ``"zinb"`` or ``"zip"``.
    data, n_draws, parallel, seed
        See :func:`draws`.
    genes
        See :func:`impute`.
    site
        Name of the site of counts.

    Returns
    -------
    ndarray of shape (cells, genes)
        float32. Columns as in :func:`impute`. NaN of a gene that the data of a query lack.

    Raises
    ------
    TypeError
        If the likelihood has no zero inflation.
    """
    check_draws(n_draws)
    columns = torch.as_tensor(_columns(fit, data, genes), device=fit.device)
    data, present = asked(fit, data), torch.as_tensor(fit.schema.present, device=fit.device)
    parts = []
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, n_draws))):
        with fit.asking(seed_of(seed, i)):
            _, modelled = run(fit, cells, n_draws, [None], parallel=parallel)
            mean = torch.stack([_dropout(trace[0].nodes[site]["fn"]).mean(0) for trace in modelled]).mean(0)
        zero = torch.where(cells.x == 0, mean, 0.0).where(present, torch.nan)
        parts.append(zero[:, columns].cpu().numpy())
    return np.concatenate(parts)


def _dropout(counts: Any) -> Tensor:
    """Return P(dropout given a zero), (draws, cells, genes)."""
    counts = innermost(counts)
    if not isinstance(counts, ZeroInflated):
        msg = f'{type(counts).__name__} has no dropouts: fit a model with likelihood="zinb" or "zip"'
        raise TypeError(msg)
    return counts.dropout_probability()


def _mean(trace: poutine.Trace, name: str) -> Tensor:
    """Return the mean of a guide's site given what it depends on; its draw where no mean is known."""
    if name not in trace.nodes:
        msg = f"the guide has no site {name!r}; it has {[*trace.stochastic_nodes]}"
        raise KeyError(msg)
    site = trace.nodes[name]
    # An autoguide's site is a point at what this site drew; on the real line the two are the same.
    free = trace.nodes.get(f"{name}_unconstrained")
    if free is not None and site["fn"].support is constraints.real:
        site = free
    try:
        return cells_second(site["fn"].mean, site)
    except NotImplementedError:
        return cells_second(site["value"], site)


def _sd(values: Float[Tensor, "draws cells genes"], mean: Tensor) -> Tensor:
    """Return the standard deviation over draws: torch.std takes ten times as long over a leading axis."""
    return sum((value - mean).square_() for value in values).div_(len(values)).sqrt_()


def _low_quantile(values: Float[Tensor, "draws cells genes"], share: float) -> Tensor:
    """Return a quantile below the median over draws, linearly interpolated.

    Of the draws only the smallest need be in order: each is let sink to its place among those before it.
    """
    place = share * (len(values) - 1)
    below = int(place)
    n_smallest = min(below + 2, len(values))
    if n_smallest > 8:
        smallest = list(values.sort(0).values[:n_smallest])
    else:
        smallest = [torch.full_like(values[0], torch.inf) for _ in range(n_smallest)]
        for value in values:
            for i, other in enumerate(smallest):
                smallest[i], value = torch.minimum(other, value), torch.maximum(other, value)
    return torch.lerp(smallest[below], smallest[-1], place - below)


def _columns(fit: Fit, data: Counts | anndata.AnnData, genes: Sequence[str] | None) -> np.ndarray:
    """Return where the genes asked for stand in the fit; by default its genes, in the order of the data."""
    places = {name: i for i, name in enumerate(fit.schema.genes)}
    if genes is None:
        have = map(str, data.var_names) if isinstance(data, anndata.AnnData) else data.schema.genes
        return np.array([places[name] for name in have if name in places])
    genes = [genes] if isinstance(genes, str) else [str(name) for name in genes]
    if not genes:
        msg = "genes is empty: name at least one, or leave it out for all"
        raise ValueError(msg)
    unknown = [name for name in genes if name not in places]
    if unknown:
        msg = f"the fit has no gene {', '.join(unknown[:5])}"
        raise ValueError(msg)
    return np.array([places[name] for name in genes])
