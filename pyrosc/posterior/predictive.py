"""New counts of the same cells (posterior_predictive), and which zeros are dropouts."""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws, columns_of
from pyrosc.posterior.draws import draws
from pyrosc.posterior.gamma_poisson import zero_inflated
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import Run, cells_second, check_guided, innermost, map_runs, site_of


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

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> [new] = pyrosc.posterior_predictive(fit, adata)
    >>> new.shape, new.format
    ((60, 30), 'csr')
    """
    check_draws(n_draws)
    parts: list[list[sp.csr_matrix]] = [[] for _ in range(n_draws)]
    columns = columns_of(fit, data, None)
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
    """Return the posterior probability that each observed zero is a dropout.

    Under a zero-inflated likelihood a count is 0 with probability pi, whatever the cell expresses: a dropout.
    Otherwise it is drawn from the negative binomial or Poisson, which may give 0 as well, with probability
    p0. Which of the two a zero came from is told by Bayes' rule: given the cell's state it is a dropout with
    probability pi / (pi + (1 - pi) p0), which is averaged over posterior draws of the state. A positive
    count is no dropout: 0.

    Parameters
    ----------
    fit
        Of a model with a zero-inflated likelihood: ``"zinb"`` or ``"zip"``.
    data, n_draws, parallel, seed
        See :func:`draws`.
    genes
        See :func:`~pyrosc.impute`.
    site
        Name of the site of counts.

    Returns
    -------
    ndarray of shape (cells, genes)
        float32. Columns as in :func:`~pyrosc.impute`. NaN of a gene that the data of a query lack.

    Raises
    ------
    TypeError
        If the likelihood has no zero inflation.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,), likelihood="zinb")
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, progress=False)
    >>> probability = pyrosc.dropout_probability(fit, adata)
    >>> probability.shape, float(probability[adata.X.toarray() > 0].max())
    ((60, 30), 0.0)
    """
    check_draws(n_draws)
    columns = torch.as_tensor(columns_of(fit, data, genes), device=fit.device)
    present = torch.as_tensor(fit.schema.present, device=fit.device)

    def probability(cells: Cells, runs: list[Run]) -> np.ndarray:
        check_guided(runs)
        sites = [site_of(model, guide, site) for guide, (model,) in runs]
        mean = torch.stack([_of_a_zero(there).mean(0) for there in sites]).mean(0)
        return torch.where(cells.x == 0, mean, 0.0).where(present, torch.nan)[:, columns].cpu().numpy()

    parts = map_runs(fit, asked(fit, data), probability, n_draws, parallel=parallel, seed=seed)
    return np.concatenate([*parts])


def _of_a_zero(site: Any) -> Tensor:
    """Return the probability that a zero is a dropout, (draws, cells, genes)."""
    return cells_second(zero_inflated(innermost(site["fn"])).dropout_probability(), site)
