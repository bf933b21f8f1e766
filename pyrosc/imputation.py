"""Imputation: what cells express, as a Fit has it, and how sure that is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anndata
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyrosc.asking import asked, batch_codes, check_draws, columns_of, stream
from pyrosc.counts import Counts
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
        See :func:`~pyrosc.draws`.
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
    data, columns = asked(fit, data), torch.as_tensor(columns_of(fit, data, genes), device=fit.device)
    own = what == "count" and library is None
    codes = batch_codes(fit, batch)
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
        See :func:`~pyrosc.draws`. A protein that was not measured is told from the genes.
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
    streamed = stream(fit, data, (site,), n_draws, batch_codes(fit, batch), parallel=parallel, seed=seed)
    values = (drawn[site].mean(0) for _, drawn in streamed)
    names = np.array(fit.schema.proteins)
    return _imputation(values, "counts of proteins without background", interval, data.cell_names, names)


def _check_interval(interval: float) -> None:
    if not 0 < interval < 1:
        msg = f"interval is a probability between 0 and 1, not {interval!r}"
        raise ValueError(msg)


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
