"""Fold changes between random cells of two groups, decoded by a fit."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from pyrosc.data.counts import Counts
from pyrosc.differential.calls import Draws, Number, describe, pooled
from pyrosc.differential.design import Contrast
from pyrosc.inference.fit import Fit
from pyrosc.posterior.draws import draws

_BLOCK = 2000  # pairs of cells that are held at a time


def between_cells(
    fit: Fit,
    data: Counts,
    contrast: Contrast,
    *,
    eps: float,
    delta: Number,
    interval: Number,
    batch: str | None,
    n_draws: int,
    site: str,
    parallel: bool,
    seed: int,
) -> tuple[pd.DataFrame, Float[ndarray, "sides genes"]]:
    """Summarise the fold changes between pairs of random cells; return the mean shares of either side too.

    Parameters
    ----------
    fit, data, delta, interval, batch, n_draws, site, parallel, seed
        See :func:`~pyrosc.differential_expression`.
    contrast
        Says which cells are on which side.
    eps
        Added to each share.
    """
    rows = [np.flatnonzero(contrast.side == side) for side in (0, 1)]
    rng = np.random.default_rng([seed, contrast.codes[0], contrast.codes[1] + 1])
    n_blocks = -(-n_draws // _BLOCK)
    sizes = [n_draws // n_blocks + (i < n_draws % n_blocks) for i in range(n_blocks)]

    def described(n: int) -> tuple[pd.DataFrame, ndarray]:
        chosen = [rng.choice(side, n) for side in rows]
        lfc, shares = _decoded(fit, data, chosen, rng, batch=batch, site=site, parallel=parallel, eps=eps)
        return describe(Draws(lfc), delta, interval), shares

    tables, shares = zip(*map(described, sizes), strict=True)
    return pooled(tables, sizes), np.average(shares, 0, sizes)


def _decoded(
    fit: Fit,
    data: Counts,
    chosen: Sequence[Int[ndarray, "draws"]],
    rng: np.random.Generator,
    *,
    batch: str | None,
    site: str,
    parallel: bool,
    eps: float,
) -> tuple[Float[ndarray, "draws genes"], Float[ndarray, "sides genes"]]:
    """Decode pairs of cells, by their rows on either side; return log2 fold changes and mean shares."""
    n_draws, known = len(chosen[0]), fit.schema.batches
    there: list[str | None] = [batch] if batch != "average" else [*known] if len(known) > 1 else [None]
    where = rng.integers(len(there), size=n_draws)
    lfc, done = torch.empty(data.n_genes, n_draws), 0
    total = [torch.zeros(data.n_genes, dtype=torch.float64, device=fit.device) for _ in chosen]
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
