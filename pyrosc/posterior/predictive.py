"""Questions about cells put to a Fit: latent, posterior_predictive, dropout_probability.

Site names are known here, models are not. Each summarises the stream of :func:`pyrosc.draws`.
"""

from collections.abc import Sequence

import anndata
import numpy as np
import scipy.sparse as sp
import torch

from pyrosc.data.counts import Counts
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws, columns_of
from pyrosc.posterior.draws import draws
from pyrosc.posterior.gamma_poisson import zero_inflated
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import innermost, rows_of, run, seed_of


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
    """
    check_draws(n_draws)
    places = columns_of(fit, data, genes)
    data, columns = asked(fit, data), torch.as_tensor(places, device=fit.device)
    present = torch.as_tensor(fit.schema.present, device=fit.device)
    parts = []
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, n_draws))):
        with fit.asking(seed_of(seed, i)):
            _, modelled = run(fit, cells, n_draws, [None], parallel=parallel)
            counts = [zero_inflated(innermost(trace[0].nodes[site]["fn"])) for trace in modelled]
            mean = torch.stack([x.dropout_probability().mean(0) for x in counts]).mean(0)
        zero = torch.where(cells.x == 0, mean, 0.0).where(present, torch.nan)
        parts.append(zero[:, columns].cpu().numpy())
    return np.concatenate(parts)
