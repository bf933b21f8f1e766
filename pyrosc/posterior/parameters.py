"""What a fit says of genes, without cells: loadings, zero_inflation."""

import pandas as pd
from torch import Tensor

from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_fit


def loadings(fit: Fit) -> pd.DataFrame:
    """Return each gene's loading on each latent, natural log of the share per unit of z, (genes, latent).

    Each column has mean 0 over the genes: shares don't tell a shift common to all.

    Parameters
    ----------
    fit
        Of :class:`~pyrosc.LDVAE`, of a :class:`~pyrosc.VSC` with ``decoder="linear"``, or of another program
        with a property `loadings`.

    Raises
    ------
    TypeError
        If the program has none.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.LDVAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, progress=False)
    >>> table = pyrosc.loadings(fit)
    >>> table.shape, list(table.columns)
    ((30, 2), ['z0', 'z1'])
    """
    table = _property(fit, "loadings", "an LDVAE").cpu().numpy()
    return pd.DataFrame(table, list(fit.schema.genes), [f"z{i}" for i in range(table.shape[1])])


def zero_inflation(fit: Fit) -> pd.Series:
    """Return the probability that each gene's counts are zero-inflated, (genes,).

    Parameters
    ----------
    fit
        Of :class:`~pyrosc.AutoZI`, or of another program with a property `zero_inflation`.

    Raises
    ------
    TypeError
        If the program has none.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.AutoZI.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, progress=False)
    >>> probability = pyrosc.zero_inflation(fit)
    >>> probability.shape, bool(probability.between(0, 1).all())
    ((30,), True)
    """
    probability = _property(fit, "zero_inflation", "an AutoZI").cpu().numpy()
    return pd.Series(probability, list(fit.schema.genes), name="zero_inflation")


def _property(fit: Fit, name: str, example: str) -> Tensor:
    check_fit(fit)
    try:
        return getattr(fit.program, name)
    except AttributeError:
        msg = f"{type(fit.program).__name__} has no {name}: fit {example}, or give the program the property"
        raise TypeError(msg) from None
