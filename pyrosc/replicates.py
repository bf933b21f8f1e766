"""How donors, or samples, differ: the variance between replicates that are alike by design.

Cells of one donor are no independent replicates of a group: what they have in common varies from donor to
donor, in some genes by much more than in others, and a comparison of groups has to know by how much.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import gammaln
from torch import Tensor

from pyrosc.variation import Arm, strata

TAU2: Float[ndarray, "values"] = np.logspace(-4, 1, 101)
"""Variances of a log rate between replicates, an eighth apart, at which their probabilities are held."""

_SIMULATIONS = 10_000
_MANY = 30  # replicates: more do not change how their squares scatter
_GENES = 1024  # at a time, so that little is held
# Of log TAU2, the priors that genes may have: normal, with these means and sds.
_MEANS = np.log(TAU2[::2])
_SDS = np.array([0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0])
_LIKELY = 1e-6  # priors of less than this probability are left out


def between_replicates(
    a: Arm, b: Arm, stratum: Int[ndarray, "units"], phi: Sequence[Float[ndarray, "genes"]]
) -> Float[ndarray, "genes values"] | None:
    r"""Return how probable each of :data:`TAU2` is as the variance of a gene's log rate between replicates.

    A replicate's sum x of counts over cells with totals l has the variance ::

        v + tau^2 (r sum l)^2,    v = r sum l + phi r^2 sum l^2

    about r sum l, with the rate r of its arm and stratum. Replicates of one side show tau^2 by how far they
    are from their common rate. A stratum with a single replicate on either side (one that has cells on both
    has a stratum of its own, or one against one in a batch) has a rate r of its own, and a tau^2 on either
    side; such pairs show it by how far their fold changes are from the common one (Mantel and Haenszel,
    1959). The sum of a gene's squares has, given tau^2, about a gamma distribution with their mean and
    variance, what the common rate or fold change takes up of them counted.

    Over the genes log tau^2 has a normal distribution; all that these may have are weighed by how well they
    foretell the squares of all genes. So genes that differ between donors alike have one variance, known as
    well as all of them show it, and others each its own, as uncertain as few donors leave it.

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
    ndarray, or None
        Rows sum to 1. None if no stratum of an arm has two replicates, and no two have a single one on
        either side.

    References
    ----------
    Smyth, Linear models and empirical Bayes methods for assessing differential expression in microarray
    experiments, 2004 (variances drawn together; there their prior is an inverse gamma distribution).
    """
    found = squares(a, b, stratum, phi)
    return None if found is None else _probabilities(*found)


def squares(
    a: Arm, b: Arm, stratum: Int[ndarray, "units"], phi: Sequence[Float[ndarray, "genes"]]
) -> tuple[Float[ndarray, "genes"], Float[ndarray, "values genes"], Float[ndarray, "values genes"]] | None:
    """Return each gene's sum of squares, and the mean and the variance that it has given each of TAU2.

    Parameters
    ----------
    a, b, stratum, phi
        See :func:`between_replicates`.
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
    if not any((w * factor).any() for w, _, _, factor in parts):
        return None
    tau2 = TAU2[:, None]
    found, (mean, variance) = np.zeros(a.x.shape[1]), np.zeros((2, len(TAU2), a.x.shape[1]))
    for (w, residual, known, factor), n, seen in zip(
        parts, sizes, (_ratio, _ratio, _fold_change), strict=True
    ):
        found += (residual**2).sum(0)
        # The sums over units of w v and of w (v + 2 v^2), where v = known + tau^2 factor.
        v, v2 = (w * known).sum(0) + tau2 * (w * factor).sum(0), (w * known**2).sum(0)
        v2 = v2 + 2 * tau2 * (w * known * factor).sum(0) + tau2**2 * (w * factor**2).sum(0)
        mean += v
        variance += v + 2 * v2
        for k in np.unique(n):
            log_normal = np.array([_scatter(t, min(int(k), _MANY), seen) for t in TAU2])[:, None]
            variance += 2 * (log_normal - 1) * tau2**2 * ((w * factor)[n == k] ** 2).sum(0)
    return found, mean, variance


def _probabilities(
    squares: Float[ndarray, "genes"],
    mean: Float[ndarray, "values genes"],
    variance: Float[ndarray, "values genes"],
) -> Float[ndarray, "genes values"]:
    """Return :func:`between_replicates` of what :func:`squares` returns."""
    shape = np.maximum(mean, 1e-12) ** 2 / np.maximum(variance, 1e-12)
    x = shape * np.maximum(squares, 1e-12) / np.maximum(mean, 1e-12)
    log = np.where(mean > 0, shape * np.log(x) - x - gammaln(shape), 0).T  # (less log of the squares)
    evidence = torch.from_numpy(np.exp(log - log.max(1, keepdims=True)))
    priors = _priors()
    of_genes = (some @ priors for some in evidence.split(_GENES))
    weights = sum(each.clamp_(min=1e-300).log_().sum(0) for each in of_genes).softmax(0)
    priors, weights = priors[:, weights > _LIKELY], weights[weights > _LIKELY]
    found = evidence * ((weights / (evidence @ priors).clamp_(min=1e-300)) @ priors.T)
    return (found / found.sum(1, keepdim=True)).numpy()


@cache
def _priors() -> Float[Tensor, "values priors"]:
    """Return the normal distributions of log TAU2, each of mass 1."""
    mean, sd = (v.ravel() for v in np.meshgrid(_MEANS, _SDS))
    mass = np.exp(-0.5 * ((np.log(TAU2)[:, None] - mean) / sd) ** 2)
    return torch.from_numpy(mass / mass.sum(0))


@cache
def _scatter(tau2: float, n: int, seen: Callable[[ndarray], ndarray]) -> float:
    """Return the variance of tau^2's estimate from n log-normal replicates, over that from normal ones.

    By simulation: of few replicates it is less than 1, since no square is larger than their number allows, of
    many more, since log-normal squares have long tails. Of one there is no estimate.

    Parameters
    ----------
    seen
        What is seen of log effects with the variance tau^2, (2, simulations, n).
    """
    if n < 2:
        return 1.0
    squares = seen(np.sqrt(tau2) * _standard_normal(n)).var(1, ddof=1)
    return float(squares.var() / (2 * squares.mean() ** 2 / (n - 1)))


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
