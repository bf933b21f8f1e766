"""Independent components of log counts: where the loadings of a sparse linear code start."""

import warnings

import numpy as np
from jaxtyping import Float

from pyrosc.data.counts import Counts

_MOST_CELLS = 5000  # that are looked at


def independent_components(data: Counts, n: int) -> Float[np.ndarray, "genes components"]:
    """Return how the genes' log counts change per unit of each independent component, whose variance is 1.

    FastICA with contrast log cosh (Hyvarinen 1999) of the leading principal components of log(1 + x), from
    which each cell's mean over the genes is taken off: shares are known up to a factor, and with that factor
    in the data components come out mixed.

    Parameters
    ----------
    data
        Counts.
    n
        Components; fewer come back where cells or genes are not more than that.
    """
    from sklearn.decomposition import PCA, FastICA  # take long to import
    from sklearn.exceptions import ConvergenceWarning

    some = np.random.default_rng(0).permutation(data.n_cells)[:_MOST_CELLS]
    y = np.log1p(data.x[np.sort(some)].toarray())
    y -= y.mean(1, keepdims=True)
    n = min(n, len(y) - 1, data.n_genes - 1)
    if n < 1 or not y.std(0).any():
        return np.zeros((data.n_genes, 0))
    leading = PCA(n, random_state=0)
    ica = FastICA(whiten="unit-variance", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start need not be the end
        ica.fit(leading.fit_transform(y))
    return leading.components_.T @ ica.mixing_
