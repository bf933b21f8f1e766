"""posterior.draws."""

from collections.abc import Iterator

import anndata
from jaxtyping import Float
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import batch_code, check_draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import stream


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
    """
    data = asked(fit, data)
    code = batch_code(fit, batch)
    check_draws(n_draws)
    return (
        {name: values[0] for name, values in drawn.items()}
        for _, drawn in stream(fit, data, sites, n_draws, [code], parallel=parallel, seed=seed)
    )
