"""draws: the primitive that every question could be written with."""

from collections.abc import Iterator

import anndata
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import batch_code, check_draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import posterior_draws


def draws(
    fit: Fit,
    data: Counts | anndata.AnnData,
    *sites: str,
    n_draws: int = 25,
    batch: str | int | None = None,
    parallel: bool = True,
    seed: int = 0,
) -> Iterator[dict[str, Float[Tensor, "..."]]]:
    """Yield draws of sites from the posterior, one minibatch of cells after the other, in the data's order.

    Parameters
    ----------
    fit
        Of :func:`~pyrosc.fit_svi`.
    data
        Counts, or an AnnData; genes are matched by name. A program with parameters of each cell has them only
        for the cells it was fitted to: ask it about those, in that order.
    sites
        Names of sites of the model or of the guide; deterministic ones too. Of an observed site (``"x"``),
        draws of new counts.
    n_draws
        Number of draws for each cell.
    batch
        Name of a batch: what the cells would have been there. The guide sees the true batch, the model this
        one. By default each cell's own.
    parallel
        Run all draws at once, in a plate left of the program's own. A program that can't broadcast needs
        False: one run a draw.
    seed
        Of the draws.

    Yields
    ------
    dict of str to Tensor of shape (draws, cells, ...)
        Genes are in the fit's order.

    Raises
    ------
    ValueError
        If the batch is unknown, `n_draws` is below 1, or the data does not suit the fit.
    KeyError
        If there is no such site.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> for drawn in pyrosc.draws(fit, adata, "z", "rho", n_draws=5):
    ...     print({site: tuple(values.shape) for site, values in drawn.items()})
    {'z': (5, 60, 2), 'rho': (5, 60, 30)}
    """
    data = asked(fit, data)
    code = batch_code(fit, batch)
    check_draws(n_draws)
    drawn = posterior_draws(fit, data, sites, n_draws, [code], parallel=parallel, seed=seed)
    return ({name: values[0] for name, values in some.items()} for some in drawn)


def mean_over_draws(drawn: Iterator[dict[str, Tensor]], site: str) -> np.ndarray:
    """Return the mean over the draws of a site, (cells, ...), float64.

    Parameters
    ----------
    drawn
        Of :func:`draws`.
    site
        Name of one of its sites.
    """
    return torch.cat([some[site].mean(0) for some in drawn]).double().cpu().numpy()
