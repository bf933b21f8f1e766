"""Independent components of log counts: where the loadings of a sparse linear code start."""

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from pyrosc.counts import Counts


def independent_components(data: Counts, n: int) -> Float[np.ndarray, "genes components"]:
    """Return how the genes' log counts change per unit of each independent component, whose variance is 1.

    FastICA with contrast log cosh (Hyvarinen 1999), symmetric, of the leading principal components of
    log(1 + x m / l), l a cell's total and m their median.

    Parameters
    ----------
    data
        Counts.
    n
        Components; fewer come back where cells or genes are fewer.
    """
    rng = np.random.default_rng(0)
    library = np.maximum(data.library, 1).astype(np.float64)
    y = (sp.diags_array(np.median(library) / library) @ sp.csr_array(data.x, dtype=np.float64)).log1p()
    mean = y.mean(axis=0)
    axes = rng.normal(size=(data.n_genes, n + 10))
    for _ in range(8):  # of the power method, for all axes at once
        scores, _ = np.linalg.qr(y @ axes - mean @ axes)
        axes, _ = np.linalg.qr(y.T @ scores - np.outer(mean, scores.sum(0)))
    left, *_ = np.linalg.svd(y @ axes - mean @ axes, full_matrices=False)
    white = left[:, :n] * data.n_cells**0.5
    rotation, _ = np.linalg.qr(rng.normal(size=(white.shape[1], white.shape[1])))
    for _ in range(200):
        bent, before = np.tanh(white @ rotation), rotation
        u, _, v = np.linalg.svd(white.T @ bent / data.n_cells - before * (1 - bent**2).mean(0))
        rotation = u @ v
        if np.abs((rotation * before).sum(0)).min(initial=1) > 1 - 1e-9:
            break
    parts = white @ rotation
    return (y.T @ parts - np.outer(mean, parts.sum(0))) / data.n_cells
