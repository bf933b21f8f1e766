"""Multiple imputation: data sets of rates, each a posterior draw, for an analysis to be repeated on."""

import anndata
import numpy as np

from pyrosc.data.read import IMPUTED
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws, columns_of
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.rates_given_counts import Size, map_rates, sizes_of


def multiple_imputation(
    fit: Fit,
    data: anndata.AnnData,
    m: int,
    seed: int = 0,
    *,
    library: Size | None = None,
    batch: str | int | None = None,
    site: str = "x",
    parallel: bool = True,
) -> list[anndata.AnnData]:
    """Return m data sets of the rates behind the counts, each one draw from the posterior.

    An analysis of means alone would take imputed values for known. Repeat it on each of the data sets, and
    pool by Rubin's rules: the estimate is the mean of the m estimates, its variance the mean of their squared
    standard errors and (1 + 1 / m) times the variance between them. Parameters of the model are taken as
    known, so that the variance between is, if anything, too small.

    Parameters
    ----------
    fit, parallel
        See :func:`~pyrosc.draws`.
    data
        Cells with counts where the fit found them.
    m
        Number of data sets.
    seed
        Of the draws.
    library, batch
        See :func:`~pyrosc.impute`, ``"rate"``.
    site
        Name of the site of counts.

    Returns
    -------
    list of AnnData
        Of the cells, and of the fit's genes in the order of `data`. ``X`` has draws of w, in counts (dense,
        float32); ``obs`` and ``var`` are copies. ``uns["pyrosc_imputed"]`` says what ``X`` is, and
        :func:`~pyrosc.from_anndata` refuses it.

    Raises
    ------
    TypeError
        If `data` is no AnnData, or the likelihood one whose rates are not known.
    ValueError
        If the batch is unknown, or a number is out of range.

    References
    ----------
    Rubin, Multiple imputation for nonresponse in surveys, 1987.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> imputed = pyrosc.multiple_imputation(fit, adata, 3)
    >>> [part.shape for part in imputed]
    [(60, 30), (60, 30), (60, 30)]
    >>> imputed[0].uns["pyrosc_imputed"]
    {'X': "posterior draw 1 of 3 of the rates of the cells' own counts"}
    """
    if not isinstance(data, anndata.AnnData):
        msg = f"data must be an AnnData, of which copies are made, not {type(data).__name__}"
        raise TypeError(msg)
    check_draws(m, "m")
    places = columns_of(fit, data, None)
    counts = asked(fit, data)
    x, done = np.empty((m, counts.n_cells, len(places)), np.float32), 0
    for w in map_rates(
        fit,
        counts,
        lambda rates, mean, _: mean * rates.draw_factor(),
        places,
        library=None if library is None else sizes_of(library, counts, "library"),
        batch=batch,
        n_draws=m,
        site=site,
        parallel=parallel,
        seed=seed,
    ):
        x[:, done : done + w.shape[1]] = w.cpu().numpy()
        done += w.shape[1]
    var = data.var.loc[np.array(fit.schema.genes)[places]]
    return [
        anndata.AnnData(
            x[k],
            obs=data.obs.copy(),
            var=var.copy(),
            uns={IMPUTED: {"X": f"posterior draw {k + 1} of {m} of the rates of the cells' own counts"}},
        )
        for k in range(m)
    ]
