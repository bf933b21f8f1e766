"""Two imputations without a model of the counts: ALRA, and smoothing over neighbours."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd


def knn_smoothing(x: np.ndarray, k: int = 15, n_components: int = 10, seed: int = 0) -> np.ndarray:
    """Sum each cell's counts and those of its k nearest cells, found in steps (Wagner, Yan and Yanai 2018).

    The neighbours of each step, twice as many and one more than before, are nearest in the first principal
    components of the Freeman-Tukey transformed sums of the step before, scaled to the median total. The sums
    are brought back to each cell's own total.
    """
    smooth = x
    for step in range(1, int(np.ceil(np.log2(k + 1))) + 1):
        size = smooth.sum(1, keepdims=True)
        scaled = smooth / size * np.median(size)
        place = PCA(n_components, random_state=seed).fit_transform(np.sqrt(scaled) + np.sqrt(scaled + 1))
        near = min(2**step - 1, k) + 1  # the cell itself is one
        found = NearestNeighbors(n_neighbors=near).fit(place).kneighbors(place, return_distance=False)
        smooth = np.stack([x[rows].sum(0) for rows in found])
    return smooth / smooth.sum(1, keepdims=True) * x.sum(1, keepdims=True)


def alra(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Complete the log-normalised counts at low rank, and keep what may be zero at zero (Linderman 2022).

    The rank is the last at which the fall of the singular values is six standard deviations above the mean
    of falls 80 to 99. Of each gene what is not above the size of its .001 quantile becomes 0, and the rest
    gets the mean and sd of the gene's positive values; a positive value that was set to 0 is as observed.
    The logs are undone, and values brought to each cell's own total.
    """
    size = x.sum(1, keepdims=True)
    logs = np.log1p(1e4 * x / size)
    top = min(100, min(x.shape) - 1)
    fall = -np.diff(randomized_svd(logs, top, n_iter=2, random_state=seed)[1])
    noise = fall[int(0.8 * top) - 1 :]
    rank = 1 + np.flatnonzero(fall > noise.mean() + 6 * noise.std(ddof=1)).max(initial=0)
    u, s, v = randomized_svd(logs, rank, n_iter=10, random_state=seed)
    low = (u * s) @ v
    low[low <= np.abs(np.quantile(low, 0.001, axis=0))] = 0
    for gene, seen in zip(low.T, logs.T, strict=True):  # (columns: written in place)
        kept, positive = gene > 0, seen[seen > 0]
        if kept.sum() > 1 and len(positive) > 1 and gene[kept].std() > 0:
            scaled = (gene[kept] - gene[kept].mean()) / gene[kept].std(ddof=1)
            gene[kept] = np.maximum(0, scaled * positive.std(ddof=1) + positive.mean())
    counts = np.expm1(np.where((low == 0) & (logs > 0), logs, low))
    return counts / counts.sum(1, keepdims=True) * size
