"""Dispersion of counts between cells, by moments: each gene's own, shrunk to that of all genes."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from pyrosc.differential.group_sums import Pseudobulk


def dispersion(arm: Pseudobulk) -> Float[ndarray, "genes"]:
    r"""Return each gene's dispersion phi: a count of mean mu has the variance mu + phi mu^2.

    By moments: within unit b, where r = sum x / sum l, the sum of (x - l r)^2 is that of l r + phi l^2 r^2.
    A gene's value is noisy, so it is shrunk towards the precision-weighted mean over the genes, as far as the
    spread between genes is what the noise alone would make (DerSimonian and Laird, 1986).

    Parameters
    ----------
    arm
        Units of a single cell say nothing; with no others, phi is 0.
    """
    arm = arm[arm.cells > 1]
    n, l, ll = (v[:, None] for v in (arm.cells, arm.l, arm.ll))
    r = arm.x / np.maximum(l, 1)
    squares = (arm.xx - 2 * r * arm.xl + r**2 * ll) * n / (n - 1)
    mu = arm.x / n

    def noise(phi: float) -> ndarray:
        v = mu + phi * mu**2
        return (n * (v + 2 * v**2)).sum(0)

    return _shrunk((squares - arm.x).sum(0), (r**2 * ll).sum(0), noise)


def _shrunk(
    excess: Float[ndarray, "genes"],
    scale: Float[ndarray, "genes"],
    noise: Callable[[float], Float[ndarray, "genes"]],
) -> Float[ndarray, "genes"]:
    """Return excess / scale, at least 0, shrunk to the genes' mean as far as noise makes them differ.

    Parameters
    ----------
    excess, scale
        Squares less what is known of them, and the factor that the parameter has in them.
    noise
        From the parameter's mean to the variance of the excess.
    """
    known = scale > 0
    if not known.any():
        return np.zeros_like(scale)
    raw = excess[known] / scale[known]
    mean = max(0.0, excess.sum() / scale.sum())
    for _ in range(3):
        of_raw = noise(mean)[known] / scale[known] ** 2
        mean = max(0.0, np.average(raw, weights=1 / of_raw))
    spread = 0.0
    for _ in range(5):  # noise is that of the genes' mean square, of which the spread is a part
        of_raw = noise(np.sqrt(mean**2 + spread))[known] / scale[known] ** 2
        w = 1 / of_raw
        left = max(w.sum() - (w**2).sum() / w.sum(), 1e-9 * w.sum())  # (nothing of a single gene)
        spread = max(0.0, (w * (raw - mean) ** 2).sum() - len(raw) + 1) / left
    shrunk = np.full_like(scale, mean)
    shrunk[known] = np.maximum(0, (raw * spread + mean * of_raw) / (spread + of_raw))
    return shrunk
