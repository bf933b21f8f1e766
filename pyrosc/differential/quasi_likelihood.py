"""Quasi-likelihood of the log2 fold change between the mean counts of two groups: a curve for each gene.

Curves of all genes are worked on in torch: numpy's threads and torch's, taking turns, wait for each other.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import digamma
from torch import Tensor

from pyrosc.differential.dispersion import dispersion
from pyrosc.differential.donor_variance import TAU2, donor_variance, shape_of
from pyrosc.differential.group_sums import Pseudobulk, pooling

LFC: Float[ndarray, "points"] = np.linspace(-10, 10, 801)
"""Log2 fold changes, .025 apart, at which likelihood, prior and posterior are held."""

STEP = LFC[1] - LFC[0]
"""Between two points of the grid."""

LOG_LEAST = -100.0
"""Logs of densities below are raised to this: subnormal numbers take ten times as long."""

_BLOCK = 256  # genes at a time, so that what is held between two operations stays in the cache


def quasi_likelihood(
    a: Pseudobulk,
    b: Pseudobulk,
    stratum: Int[ndarray, "units"] | None = None,
    within: Bool[ndarray, "units"] | None = None,
) -> Float[ndarray, "genes points"]:
    r"""Return the quasi-likelihood of each log2 fold change of a against b; its maximum is 1.

    In each stratum a gene has a rate of its own, and the arms' rates differ by the same factor 2^t in all. Of
    the sum x over both arms of a stratum, a's part is binomial with p = l_a 2^t / (l_a 2^t + l_b) if counts
    are Poisson; so score and information of t ln 2 are::

        U = sum_stratum x_a (1 - p) - x_b p
        I = sum_stratum x p (1 - p)
        Var U = I + sum_stratum x^2 p^2 (1 - p)^2 (d_a + d_b)
        d_a = (phi_a sum_cells l^2 + tau^2 sum_replicates (sum_cells l)^2) / (sum_cells l)^2,  of a's cells

    and the log quasi-likelihood of over-dispersed counts is the integral q of U I / Var U. It is exact for
    Poisson counts, skewed where they are few, and flat for a gene without counts: a normal approximation by
    the delta method is none of these, and where a small group meets a rare gene its errors all point one way.

    Where replicates are compared, t is known about as well at one value as at another, in logarithms, and
    the second term of Var U is taken times the mean information between t and the likeliest t over I.

    tau^2 is uncertain, and where genes differ in it a gene's own may be much larger than it seems. What it
    may be gives the log of 1 / Var U, at t = 0, a mean and a variance. The gamma distribution that has these,
    of shape nu / 2, makes the likelihood that of Student's t, (1 - 2 q / nu)^(-(nu + 1) / 2), in which tau^2
    is such that 1 / Var U is its mean.

    Replicates that are compared with themselves differ by less than those compared with others. Either kind
    has a tau^2 and a likelihood of its own, and these are multiplied.

    Parameters
    ----------
    a, b
        Sums over the two arms, of each unit. Strata without cells of both say nothing.
    stratum
        Of each unit, which is a replicate. None: each unit is a stratum, and tau^2 is 0.
    within
        Of each unit, whether it has cells of both arms and is compared with itself. None: one kind.

    References
    ----------
    McCullagh and Nelder, Generalized linear models, 1989, chapters 7 (conditional) and 9 (quasi-likelihood).
    """
    # An arm of single cells borrows the other's dispersion.
    phi = [dispersion(arm if (arm.cells > 1).any() else other) for arm, other in ((a, b), (b, a))]
    if stratum is None:
        return _as_density(_log_likelihood(a, b, np.arange(len(a.l)), phi, None))
    within = np.zeros(len(stratum), dtype=bool) if within is None else within
    kinds = [kind for kind in (within, ~within) if kind.any()]
    parts = [(a[kind], b[kind], np.unique(stratum[kind], return_inverse=True)[1]) for kind in kinds]
    each = (_log_likelihood(*part, phi, donor_variance(*part, phi)) for part in parts)
    return _as_density(reduce(add, each))


def _as_density(log: Float[Tensor, "genes points"]) -> Float[ndarray, "genes points"]:
    """Return a log likelihood's exponential, its maximum 1."""
    return log.sub_(log.amax(1, keepdim=True)).clamp_(min=LOG_LEAST).exp_().numpy()


def _log_likelihood(
    a: Pseudobulk,
    b: Pseudobulk,
    stratum: Int[ndarray, "units"],
    phi: Sequence[Float[ndarray, "genes"]],
    variances: Float[ndarray, "genes values"] | None,
) -> Float[Tensor, "genes points"]:
    """Return the logarithm of :func:`quasi_likelihood`, of units of one kind, by their `donor_variance`."""
    pool = pooling(stratum)
    (xa, la), (xb, lb) = ((pool @ arm.x, (pool @ arm.l)[:, None]) for arm in (a, b))
    extra, between = np.zeros_like(xa), np.zeros_like(la)
    for arm, f, l in ((a, phi[0], la), (b, phi[1], lb)):
        cells, replicates = ((pool @ v)[:, None] / np.maximum(l, 1) ** 2 for v in (arm.ll, arm.l**2))
        extra += f * cells
        between += replicates
    x = xa + xb
    if variances is not None:
        # (At no difference: what a call has to stand out from.)
        tau2, nu = _student(x, la / np.maximum(la + lb, 1), extra, between, variances)
        extra += tau2 * between
    odds = la * 2.0**LFC
    p = odds / np.maximum(odds + lb, 1e-300)
    pq = p * (1 - p)
    of_gene = (v.T for v in (x, x**2 * extra, xa.sum(0, keepdims=True)))
    blocks = zip(*(torch.from_numpy(v).split(_BLOCK) for v in of_gene), strict=True)
    p, pq, pq2 = (torch.from_numpy(v) for v in (p, pq, pq**2))
    curves = torch.zeros(x.shape[1], len(LFC), dtype=torch.float64)
    for (x_g, spread, x_a), log in zip(blocks, curves.split(_BLOCK), strict=True):
        information = x_g @ pq
        score, over = x_a - x_g @ p, spread @ pq2
        if variances is not None:
            over *= _on_log_scale(score, information)
        slope = score.mul_(information).div_(over.add_(information).clamp_(min=1e-300))
        torch.cumsum(slope[:, 1:].add(slope[:, :-1]), 1, out=log[:, 1:])
        log.sub_(log.amax(1, keepdim=True)).mul_(np.log(2) * STEP / 2)
    if variances is not None:
        curves.mul_(-2 / nu).log1p_().mul_(-(nu + 1) / 2)
    return curves


def _on_log_scale(
    score: Float[Tensor, "genes points"], information: Float[Tensor, "genes points"]
) -> Float[Tensor, "genes points"]:
    """Return the mean information between each point and the likeliest, over the point's own.

    The likeliest is where the score is 0; or half a count, where a side has none.
    """
    bound = 0.5 * (score > 0).all(1, keepdim=True).double() - 0.5 * (score <= 0).all(1, keepdim=True).double()
    after = (score > bound).sum(1, keepdim=True).clamp(1, len(LFC) - 1)
    above, below = score.gather(1, after - 1) - bound, score.gather(1, after) - bound
    likeliest = after - below / (below - above).clamp(max=-1e-300)
    away = (likeliest - torch.arange(len(LFC))) * (STEP * np.log(2))
    ratio = score / (away * information)
    return torch.where(away.abs() < 2 * STEP, 1.0, ratio.nan_to_num(1.0)).clamp_(0, 1e6)


def _student(
    x: Float[ndarray, "strata genes"],
    p: Float[ndarray, "strata 1"],
    extra: Float[ndarray, "strata genes"],
    between: Float[ndarray, "strata 1"],
    variances: Float[ndarray, "genes values"],
) -> tuple[Float[ndarray, "genes"], Float[Tensor, "genes 1"]]:
    """Return tau^2 and nu of :func:`quasi_likelihood`; nu is at least 1."""
    information = x * p * (1 - p)
    known, slope = (information + information**2 * extra).sum(0), (information**2 * between).sum(0)
    log = -np.log(np.maximum(known[:, None] + slope[:, None] * TAU2, 1e-100))
    mean = (variances * log).sum(1)
    shape = np.maximum(shape_of((variances * (log - mean[:, None]) ** 2).sum(1)), 0.5)
    precision = shape * np.exp(mean - digamma(shape))
    tau2 = np.maximum(1 / precision - known, 0) / np.maximum(slope, 1e-100)
    return tau2, torch.from_numpy(2 * shape)[:, None]


def beyond(curves: Float[ndarray, "genes points"], common: float) -> Float[ndarray, "genes points"]:
    """Return curves of fold changes as those of what these are more than `common`, a multiple of the step."""
    by = round(common / STEP)
    shifted = np.empty_like(curves)
    if by >= 0:
        shifted[:, : len(LFC) - by], shifted[:, len(LFC) - by :] = curves[:, by:], curves[:, -1:]
    else:
        shifted[:, -by:], shifted[:, :-by] = curves[:, :by], curves[:, :1]
    return shifted
