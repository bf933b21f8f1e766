"""Surface proteins: whether a cell has them (foreground), and how many (impute_proteins)."""

import anndata
import numpy as np
import pandas as pd

from pyrosc.data.counts import Counts
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import batch_codes, check_draws, check_interval, counts_of
from pyrosc.posterior.draws import draws, mean_over_draws
from pyrosc.posterior.imputation import Imputation, imputation
from pyrosc.posterior.intervals import of_draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import posterior_draws


def foreground(
    fit: Fit, data: Counts | anndata.AnnData, n_draws: int = 25, *, parallel: bool = True, seed: int = 0
) -> pd.DataFrame:
    """Return the posterior probability that a cell has each protein: its counts are not background alone.

    Parameters
    ----------
    fit
        Of :class:`~pyrosc.TOTALVI`, or of another program with a site ``"foreground"``.
    data, n_draws, parallel, seed
        See :func:`draws`.

    Returns
    -------
    DataFrame of shape (cells, proteins)
        Given the cell's counts of genes and proteins; of genes alone where the protein was not measured.

    Raises
    ------
    KeyError
        If the model has no such site.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate_proteins(pyrosc.datasets.simulate(60, 30, seed=0), 4)
    >>> data = pyrosc.from_anndata(adata, protein_key="protein_expression")
    >>> model = pyrosc.TOTALVI.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, data, epochs=2, progress=False)
    >>> pyrosc.foreground(fit, data).shape
    (60, 4)
    """
    data = counts_of(fit, data)
    _check_proteins(fit)
    drawn = draws(fit, data, "foreground", n_draws=n_draws, parallel=parallel, seed=seed)
    return pd.DataFrame(mean_over_draws(drawn, "foreground"), data.cell_names, list(fit.schema.proteins))


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
        See :func:`~pyrosc.impute`.
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

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate_proteins(pyrosc.datasets.simulate(60, 30, seed=0), 4)
    >>> data = pyrosc.from_anndata(adata, protein_key="protein_expression")
    >>> model = pyrosc.TOTALVI.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, data, epochs=2, progress=False)
    >>> imputed = pyrosc.impute_proteins(fit, data)
    >>> imputed.mean.shape, imputed.unit
    ((60, 4), 'counts of proteins without background')
    """
    check_interval(interval)
    check_draws(n_draws)
    data = asked(fit, data)
    _check_proteins(fit)
    codes = batch_codes(fit, batch)
    drawn = posterior_draws(fit, data, (site,), n_draws, codes, parallel=parallel, seed=seed)
    values = (of_draws(some[site].mean(0), interval) for some in drawn)
    names = np.array(fit.schema.proteins)
    return imputation(values, "counts of proteins without background", interval, data.cell_names, names)


def _check_proteins(fit: Fit) -> None:
    """Raise if the fit knows none."""
    if not fit.schema.proteins:
        msg = (
            f"this {type(fit.program).__name__} knows no proteins: fit a TOTALVI to "
            'from_anndata(..., protein_key="...")'
        )
        raise KeyError(msg)
