"""How counts vary: sums over the cells of groups, dispersion between cells, and between replicates.

Cells of one donor, or sample, are no independent replicates of a group: what they have in common varies from
donor to donor, and a comparison of groups has to know by how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from numpy import ndarray

_CELLS = 4096  # summed at a time, so that little is copied
_SIMULATIONS = 10_000
_MANY = 30  # replicates: more do not change how their squares scatter


@dataclass(frozen=True)
class Arm:
    """Sums over one side's cells in each unit, a batch or a replicate in a batch: all that is needed of them.

    Attributes
    ----------
    cells, expressing : ndarray of shape (units,) and (units, genes)
        Number of cells, and of cells with a count of the gene.
    l, ll : ndarray of shape (units,)
        Sums of the cells' totals l and of their squares, in counts.
    x, xx, xl : ndarray of shape (units, genes)
        Sums of the counts x, of x^2 and of x l.
    """

    cells: Float[ndarray, "units"]
    expressing: Float[ndarray, "units genes"]
    l: Float[ndarray, "units"]
    ll: Float[ndarray, "units"]
    x: Float[ndarray, "units genes"]
    xx: Float[ndarray, "units genes"]
    xl: Float[ndarray, "units genes"]

    def __getitem__(self, units: ndarray) -> "Arm":
        """Return the sums over some of the units' cells only."""
        return Arm(**{name: value[units] for name, value in vars(self).items()})

    def __add__(self, other: "Arm") -> "Arm":
        return Arm(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    @property
    def n(self) -> int:
        """Number of cells, over all units."""
        return int(self.cells.sum())


def sums(x: sp.csr_array, codes: ndarray, n_groups: int, unit: ndarray, n_units: int) -> list[Arm]:
    """Sum over the cells of each group and unit, some cells at a time; nothing dense is made of them.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    codes, unit
        Of each cell's group, -1 for none, and unit; (cells,).
    n_groups, n_units
        Numbers of groups and of units.

    Returns
    -------
    list of Arm
        One for each group.
    """
    place = np.where(codes < 0, -1, codes * n_units + unit)
    of: dict[str, ndarray] = {}
    for start in range(0, max(1, x.shape[0]), _CELLS):
        some = slice(start, start + _CELLS)
        for name, value in _sums(x[some], place[some], n_groups * n_units).items():
            of[name] = of[name] + value if name in of else value
    by_group = {name: value.reshape(n_groups, n_units, *value.shape[1:]) for name, value in of.items()}
    return [Arm(**{name: value[i] for name, value in by_group.items()}) for i in range(n_groups)]


def _sums(x: sp.csr_array, place: ndarray, n_places: int) -> dict[str, ndarray]:
    """Return the sums over the cells of each place, those of -1 left out."""
    rows = np.flatnonzero(place >= 0)
    places = place[rows].astype(np.int32), rows.astype(np.int32)  # as x.indices, which is then not copied
    member = sp.csr_array((np.ones(len(rows)), places), shape=(n_places, x.shape[0]))
    x = x.astype(np.float64)
    l = np.asarray(x.sum(axis=1)).ravel()
    seen = sp.csr_array((np.ones(x.nnz), x.indices, x.indptr), shape=x.shape)
    return {
        "cells": member @ np.ones(len(l)),
        "expressing": (member @ seen).toarray(),
        "l": member @ l,
        "ll": member @ l**2,
        "x": (member @ x).toarray(),
        "xx": (member @ x.power(2)).toarray(),
        "xl": ((member * l) @ x).toarray(),
    }


def dispersion(arm: Arm) -> Float[ndarray, "genes"]:
    r"""Return each gene's dispersion phi: a count of mean mu has the variance mu + phi mu^2.

    By moments: within unit b, where r = sum x / sum l, the sum of (x - l r)^2 is that of l r + phi l^2 r^2.
    A gene's value is noisy, so it is drawn towards the precision-weighted mean over the genes, as far as the
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

    return _drawn_together((squares - arm.x).sum(0), (r**2 * ll).sum(0), noise)[0]


def between_replicates(
    a: Arm, b: Arm, stratum: Int[ndarray, "units"], phi: Sequence[Float[ndarray, "genes"]]
) -> tuple[Float[ndarray, "genes"], Float[ndarray, "genes"]] | None:
    r"""Return the variance tau^2 of each gene's log rate between replicates that are alike by design.

    A replicate's sum x of counts over cells with totals l has the variance ::

        v + tau^2 (r sum l)^2,    v = r sum l + phi r^2 sum l^2

    about r sum l, with the rate r of its arm and stratum. Replicates of one side show tau^2 by how far they
    are from their common rate. A stratum with a single replicate on either side (one that has cells on both
    has a stratum of its own, or one against one in a batch) has a rate r of its own, and a tau^2 on either
    side; such pairs show it by how far their fold changes are from the common one (Mantel and Haenszel,
    1959). Both by moments, with what the common rate or fold change takes up of the squares
    counted, and drawn together as in :func:`dispersion`.

    Parameters
    ----------
    a, b
        Sums over the two arms, of each replicate in each batch.
    stratum
        Of each of these: those of one stratum and one arm are alike but for tau^2.
    phi
        Dispersion between the cells of either arm.

    Returns
    -------
    tuple of ndarray, or None
        tau^2, and the variance of the error that it may have. None if no stratum of an arm has two
        replicates, and no two have a single one on either side.
    """
    single = one_on_each_side(a, b, stratum)[stratum]
    matched = [arm[_in_order(stratum, single & (arm.cells > 0))] for arm in (a, b)]
    parts = [
        _within_side(a, phi[0], stratum),
        _within_side(b, phi[1], stratum),
        _within_pairs(matched[0], matched[1], phi),
    ]
    sizes = [n[stratum] for n in _replicates_of(a, b, stratum)]
    sizes.append(np.full(len(matched[0].cells), len(matched[0].cells)))
    excess = sum((residual**2 - w * known).sum(0) for w, residual, known, _ in parts)
    scale = sum((w * factor).sum(0) for w, _, _, factor in parts)
    if not scale.any():
        return None

    def noise(tau2: float) -> ndarray:
        squares = []
        for (w, _, known, factor), n, seen in zip(parts, sizes, (_ratio, _ratio, _fold_change), strict=True):
            v, (different, which) = known + tau2 * factor, np.unique(n, return_inverse=True)
            log_normal = np.array([_scatter(tau2, int(k), seen) for k in different])[which, None]
            squares.append(w * (v + 2 * v**2) + 2 * (log_normal - 1) * (w * tau2 * factor) ** 2)
        return np.concatenate(squares).sum(0)

    return _drawn_together(excess, scale, noise)


def _scatter(tau2: float, n: int, seen: Callable[[ndarray], ndarray]) -> float:
    """Return the variance of tau^2's estimate from n log-normal replicates, over that from normal ones.

    By simulation: of few replicates it is less than 1, since no square is larger than their number allows, of
    many more, since log-normal squares have long tails. Of one there is no estimate.

    Parameters
    ----------
    seen
        What is seen of log effects with the variance tau^2, (2, simulations, n).
    """
    if n < 2 or tau2 <= 0:
        return 1.0
    squares = seen(np.sqrt(tau2) * _standard_normal(min(n, _MANY))).var(1, ddof=1)
    return float(squares.var() / (2 * squares.mean() ** 2 / (min(n, _MANY) - 1)))


def _ratio(log: Float[ndarray, "2 simulations n"]) -> Float[ndarray, "simulations n"]:
    """Each replicate's rate over the mean of its side's."""
    rate = np.exp(log[0])
    return rate / rate.mean(1, keepdims=True)


def _fold_change(log: Float[ndarray, "2 simulations n"]) -> Float[ndarray, "simulations n"]:
    """How far the part that one side has of a pair's counts is from a half, as a log fold change."""
    return np.tanh((log[0] - log[1]) / 2) * 2


@cache
def _standard_normal(n: int) -> Float[ndarray, "2 simulations n"]:
    return np.random.default_rng(0).standard_normal((2, _SIMULATIONS, n))


def strata(stratum: Int[ndarray, "units"]) -> Float[ndarray, "strata units"]:
    """Return the matrix that sums over the units of each stratum: 1 where the unit is of it, else 0."""
    return (stratum == np.arange(stratum.max() + 1)[:, None]).astype(float)


def one_on_each_side(a: Arm, b: Arm, stratum: Int[ndarray, "units"]) -> Bool[ndarray, "strata"]:
    """Say which strata have a single replicate in either arm."""
    n, m = _replicates_of(a, b, stratum)
    return (n == 1) & (m == 1)


def shows_variance(a: Arm, b: Arm, stratum: Int[ndarray, "units"]) -> bool:
    """Say whether replicates alike by design are there: two of an arm in a stratum, or two pairs."""
    n, m = _replicates_of(a, b, stratum)
    return bool(max(n.max(), m.max()) > 1 or one_on_each_side(a, b, stratum).sum() > 1)


def _replicates_of(a: Arm, b: Arm, stratum: Int[ndarray, "units"]) -> tuple[ndarray, ndarray]:
    """Return how many replicates each stratum has in either arm."""
    pool = strata(stratum)
    return pool @ (a.cells > 0), pool @ (b.cells > 0)


def _in_order(stratum: Int[ndarray, "units"], chosen: Bool[ndarray, "units"]) -> Int[ndarray, "some"]:
    """Return places of the chosen units, stratum by stratum."""
    places = np.flatnonzero(chosen)
    return places[np.argsort(stratum[places], kind="stable")]


_Part = tuple[ndarray, ndarray, ndarray, ndarray]
"""Weights w, residuals e, variance v and factor f: the expected squares e^2 are w (v + tau^2 f)."""


def _within_side(arm: Arm, phi: Float[ndarray, "genes"], stratum: Int[ndarray, "units"]) -> _Part:
    """Return how far replicates of one side are from the rate that they have in common."""
    pool, l = strata(stratum), arm.l[:, None]
    total = np.maximum(pool @ l, 1)[stratum]
    mean = l * (pool @ arm.x)[stratum] / total
    known = mean + phi * (mean / np.maximum(l, 1)) ** 2 * arm.ll[:, None]
    return _left(l / total, pool), arm.x - mean, known, mean**2


def _within_pairs(a: Arm, b: Arm, phi: Sequence[Float[ndarray, "genes"]]) -> _Part:
    """Return how far pairs of replicates, one on either side, are from their common fold change."""
    la, lb = a.l[:, None], b.l[:, None]
    p = fitted_share(a.x, la, b.x, lb)
    x = a.x + b.x
    poisson, square = x * p * (1 - p), (x * p * (1 - p)) ** 2
    spread = phi[0] * (a.ll / a.l**2)[:, None] + phi[1] * (b.ll / b.l**2)[:, None]
    share = poisson / np.maximum(poisson.sum(0), 1e-300)
    return _left(share, np.ones((1, len(x)))), a.x - x * p, poisson + spread * square, 2 * square


def fitted_share(xa: ndarray, la: ndarray, xb: ndarray, lb: ndarray) -> ndarray:
    """Return the part of each stratum's counts that a has if the fold change is the same in all.

    Counts x are (strata, genes), totals l (strata, 1). Source: Mantel and Haenszel, 1959.
    """
    one, other = ((x * l / np.maximum(la + lb, 1)).sum(0) for x, l in ((xa, lb), (xb, la)))
    return la * one / np.maximum(la * one + lb * other, 1e-300)


def _left(share: ndarray, pool: Float[ndarray, "strata units"]) -> ndarray:
    """Return the part of a unit's variance that its mean, of which it is a share, leaves in its residual."""
    return 1 - 2 * share + pool.T @ (pool @ share**2)


def _drawn_together(
    excess: Float[ndarray, "genes"],
    scale: Float[ndarray, "genes"],
    noise: Callable[[float], Float[ndarray, "genes"]],
) -> tuple[Float[ndarray, "genes"], Float[ndarray, "genes"]]:
    """Return excess / scale, at least 0, drawn to the genes' mean as far as noise makes them differ.

    The second is the variance of its error: the linear Bayes estimate's, of which a gene has as much as the
    square of its own value is of the genes' mean square, since a scale errs in proportion to itself; and that
    of the mean (DerSimonian and Laird's, of genes that are independent).

    Parameters
    ----------
    excess, scale
        Squares less what is known of them, and the factor that the parameter has in them.
    noise
        From the parameter's mean to the variance of the excess.
    """
    known = scale > 0
    if not known.any():
        return np.zeros_like(scale), np.zeros_like(scale)
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
    whole = spread + of_raw
    drawn, error = np.full_like(scale, mean), np.full_like(scale, spread)
    drawn[known] = np.maximum(0, (raw * spread + mean * of_raw) / whole)
    own = (np.maximum(raw, 0) * spread + mean * of_raw) / whole
    error[known] = own**2 * (spread * of_raw / whole) / (mean**2 + spread**2 / whole + 1e-300)
    error[known] += (of_raw / whole) ** 2 / (1 / whole).sum()
    return drawn, error
