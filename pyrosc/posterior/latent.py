"""latent: the state of each cell."""

import anndata
import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.fit import Fit
from pyrosc.posterior.draws import draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import Run, cells_second, map_runs, sites_of

_N_DRAWS = 16
"""Draws of what the site depends on, over which its mean is averaged."""


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

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> pyrosc.latent(fit, adata).shape
    (60, 2)
    >>> pyrosc.latent(fit, adata, n_draws=5).shape
    (5, 60, 2)
    """
    if n_draws is not None:
        drawn = draws(fit, data, site, n_draws=n_draws, parallel=parallel, seed=seed)
        return np.concatenate([some[site].cpu().numpy() for some in drawn], axis=1)

    def mean(_: Cells, runs: list[Run]) -> Tensor:
        return torch.stack([_mean(run.guide, site) for run in runs]).mean(0).mean(0)

    means = map_runs(fit, asked(fit, data), mean, _N_DRAWS, codes=(), parallel=parallel, seed=seed)
    return torch.cat([*means]).cpu().numpy()


def _mean(trace: poutine.Trace, name: str) -> Tensor:
    """Return the mean of a guide's site given what it depends on; its draw where no mean is known."""
    if name not in trace.nodes:
        msg = f"the guide has no site {name!r}; it has {sites_of(trace)}"
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
