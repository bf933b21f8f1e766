"""The rates behind the counts of a fit's cells: what its programs say of them, some genes at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import batch_codes, in_order
from pyrosc.posterior.gamma_poisson import Rates
from pyrosc.posterior.sampling import (
    Run,
    cells_second,
    check_guided,
    innermost,
    library_of,
    map_runs,
    site_of,
)

_CACHED = 2**20
"""Draws x cells x genes whose rates are worked out at a time."""

_Columns = slice | Tensor
"""Places of genes."""

_Site = dict[str, Any]
"""A site of a trace."""

Size = float | int | Sequence | np.ndarray | pd.Series
"""A number of counts, or one for each cell."""


def sizes_of(size: Size, data: Counts, name: str) -> Float[Tensor, "cells 1"]:
    """Return a number of counts for each cell, of one for all or one for each.

    Raises
    ------
    ValueError
        If there are more or fewer than cells, or a number is not above 0.
    """
    size = in_order(size, data, name)
    values = np.asarray(size)
    values = values.astype(np.float32) if values.dtype.kind in "fiu" else np.array(np.nan)
    if values.shape not in ((), (data.n_cells,)) or not ((values > 0) & (values < np.inf)).all():
        got = f"{values.shape}, the least {values.min(initial=np.inf)}" if values.ndim else f"{size!r:.40}"
        msg = f"{name} is a number of counts above 0, or one for each of the {data.n_cells} cells, not {got}"
        raise ValueError(msg)
    return torch.as_tensor(np.broadcast_to(values, data.n_cells).copy())[:, None]


def map_rates(
    fit: Fit,
    data: Counts,
    use: Callable[[Rates, Tensor, Tensor], Tensor],
    columns: np.ndarray,
    *,
    library: Tensor | None,
    batch: str | int | None,
    n_draws: int,
    site: str,
    parallel: bool,
    seed: int,
) -> Iterator[Tensor]:
    """Yield what `use` makes of the rates of each minibatch of cells, and of the mean counts asked for.

    Parameters
    ----------
    fit, data, n_draws, parallel, seed
        See :func:`~pyrosc.draws`.
    use
        Takes the rates, as the cells were measured; mu in the batch and at the library size asked for,
        (draws, cells, columns); and the cells' places in the data. It runs with the fit's random numbers.
    columns : ndarray of shape (columns,)
        Places of the genes wanted; `use` is given some of them at a time.
    library : Tensor of shape (cells, 1), optional
        Library size of each cell, in counts; by default its own.
    batch
        Name of a batch, or ``"average"``; by default the cell's own.
    site
        Name of the site of counts.
    """
    codes = [None] if batch is None else [None, *batch_codes(fit, batch)]
    present = torch.as_tensor(fit.schema.present, device=fit.device)

    def read(cells: Cells, runs: list[Run]) -> Tensor:
        check_guided(runs)
        by_batch = [[site_of(model, guide, site) for model in models] for guide, models in runs]
        counts = [_Counts.of(sites) for sites in zip(*by_batch, strict=True)]
        to = None if library is None else library.to(cells.x)[cells.index]
        scales = [1] * len(codes) if to is None else to / library_of(runs, cells)
        own, *others = zip(counts, scales, strict=True)

        def answer(some: _Columns) -> Tensor:
            there = [counts.mean(some) * scale for counts, scale in others or [own]]
            return use(own[0].rates(some, present), torch.stack(there).mean(0), cells.index)

        return torch.cat([answer(some) for some in parts_of(columns, n_draws * len(cells))], -1)

    return map_runs(fit, data, read, n_draws, codes, parallel=parallel, seed=seed)


def parts_of(columns: np.ndarray, n_rows: int) -> Iterator[_Columns]:
    """Yield some columns at a time, of which `n_rows` rows stay in the processor's cache."""
    size = max(1, _CACHED // n_rows)
    for start in range(0, len(columns), size):
        some = columns[start : start + size]
        whole = slice(int(some[0]), int(some[-1]) + 1)
        yield whole if np.array_equal(some, np.arange(whole.start, whole.stop)) else torch.from_numpy(some)


@dataclass(frozen=True, eq=False)
class _Counts:
    """The site of counts in all runs of the model together.

    Attributes
    ----------
    sites
        Of each run.
    parameters
        Of each run: mu, theta and the log odds of dropout; None of a distribution without.
    """

    sites: Sequence[_Site]
    parameters: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]

    @classmethod
    def of(cls, sites: Sequence[_Site]) -> "_Counts":
        """Return what there is in these."""
        return cls(sites, [_parameters(innermost(site["fn"])) for site in sites])

    def mean(self, columns: _Columns) -> Float[Tensor, "draws cells n"]:
        """Return the mean counts before dropout."""
        return _cellwise(self.sites, [mean for mean, _, _ in self.parameters], columns)

    def rates(self, columns: _Columns, present: Bool[Tensor, "genes"]) -> Rates:
        """Return the rates behind the counts of these genes."""
        x = _cellwise(self.sites, [site["value"] for site in self.sites], columns)
        _, thetas, gates = zip(*self.parameters, strict=True)
        mean = self.mean(columns)
        theta = None if thetas[0] is None else _cellwise(self.sites, thetas, columns)
        hidden = (~present[columns]).to(x).expand_as(x)
        if gates[0] is not None:
            base = Poisson(mean) if theta is None else NegativeBinomial(mean, theta)
            dropout = ZeroInflated(base, _cellwise(self.sites, gates, columns)).dropout_probability()
            hidden = dropout.where(x == 0, 0.0).maximum(hidden)
        return Rates(innermost(self.sites[0]["fn"]), x, mean, theta, hidden)


def _parameters(counts: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return mu, theta, which is None of a Poisson, and the log odds of dropout, None where there is none."""
    if isinstance(counts, ZeroInflated):
        mean, theta, _ = _parameters(counts.base)
        return mean, theta, counts.gate_logits
    if isinstance(counts, Poisson | dist.Poisson):
        return counts.mean, None, None
    if isinstance(counts, NegativeBinomial):
        return counts.mean, counts.inverse_dispersion, None
    if isinstance(counts, dist.GammaPoisson):
        return counts.mean, counts.concentration, None
    if isinstance(counts, dist.NegativeBinomial):
        return counts.mean, counts.total_count, None
    msg = (
        f"the rates behind counts are known where these are Poisson or negative binomial, not of "
        f'{type(counts).__name__}: fit a model with likelihood="nb", "zinb", "poisson" or "zip", or ask for '
        'shares with impute(..., what="share")'
    )
    raise TypeError(msg)


def _cellwise(sites: Sequence[_Site], values: Sequence[Any], columns: _Columns) -> Tensor:
    """Return columns of what each site has of every entry, (draws, cells, columns)."""
    shapes = [site["fn"].batch_shape + site["fn"].event_shape for site in sites]
    whole = zip(values, shapes, sites, strict=True)
    parts = [cells_second(value.expand(shape), site)[..., columns] for value, shape, site in whole]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
