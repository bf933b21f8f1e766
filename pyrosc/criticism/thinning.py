"""Counts split in two, as if the cells had been sequenced twice."""

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from pyrosc.data.read import from_anndata


def thin(
    adata: AnnData, fraction: float | int = 0.9, *, layer: str | None = None, seed: int = 0
) -> tuple[AnnData, AnnData]:
    """Split each count at random in two, as if the cells had been sequenced twice.

    Of x molecules Binomial(x, fraction) are in the first part, the others in the second. Given a cell's rate,
    Poisson counts make parts that are independent of each other: what imputes the first is scored on the
    second, at (1 - fraction) / fraction of its depth, and can't have seen its noise.

    Parameters
    ----------
    adata
        Cells x genes, with counts. Nothing is written into it.
    fraction
        Share of the first part, between 0 and 1.
    layer
        Layer that holds the counts; ``X`` by default.
    seed
        Of the draws.

    Returns
    -------
    tuple of AnnData
        The parts, with their counts in ``X`` (csr, float32), and ``obs`` and ``var`` of the whole. A cell of
        few counts may have none left in one of them.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If these are no counts, or `fraction` is out of range.

    References
    ----------
    Batson, Royer and Webber, Molecular cross-validation for single-cell RNA-seq, 2019. Neufeld et al.,
    Inference after latent variable estimation for single-cell RNA sequencing data, 2024.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> first, second = pyrosc.criticism.thin(adata, 0.8)
    >>> float(abs(first.X + second.X - adata.X).max())
    0.0
    """
    if not 0 < fraction < 1:
        msg = f"fraction is a share between 0 and 1, not {fraction!r}"
        raise ValueError(msg)
    x = from_anndata(adata, layer=layer).x
    first = np.random.default_rng(seed).binomial(x.data.astype(np.int64), fraction)
    parts = []
    for counts in (first, x.data - first):
        part = sp.csr_matrix((counts.astype(np.float32), x.indices, x.indptr), shape=x.shape, copy=True)
        part.eliminate_zeros()
        parts.append(AnnData(part, obs=adata.obs.copy(), var=adata.var.copy()))
    return parts[0], parts[1]
