"""How donors, or samples, differ: the variance between replicates that are alike by design.

Cells of one donor are no independent replicates of a group: what they have in common varies from donor to
donor, in some genes by much more than in others, and a comparison of groups has to know by how much.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import polygamma
from torch import Tensor

from pyrosc.differential.group_sums import Pseudobulk, pooling

TAU2: Float[ndarray, "values"] = np.logspace(-4, 1, 101)
"""Variances of a log rate (natural) between replicates, an eighth apart, that are given a probability."""

_EVERY = 4  # of TAU2 has its likelihood worked out; in between it is a cubic spline, to some .03 nats
_GENES = 512  # at a time, so that little is held
_STEPS = 3  # towards the common rate, or fold change, that fits best for a tau^2
_LEAST_INFORMATION = 1e-3  # about a log fold change, which of next to no counts is nothing
# Of log TAU2, the priors that genes may have: normal, with one of these medians and sds, but for a share of
# the genes, whose variance is larger than the median.
_MEDIANS = np.log(TAU2[TAU2 <= 1])
_SDS = np.geomspace(0.15, 2, 11)
_UNLIKE = np.array([0.001, 0.01, 0.05])
_LARGER = 2.0  # sd of the half of a normal distribution that those have
_LIKELY = 1e-6  # priors of less than this probability are left out
_SHAPES = np.geomspace(1e9, 1e-2, 10_000)
_LOG_VARIANCES = np.log(polygamma(1, _SHAPES))


def shape_of(variance: Float[ndarray, "*_"]) -> Float[ndarray, "*_"]:
    """Return the shape of the gamma distribution whose logarithm has this variance: trigamma(shape)."""
    return np.exp(np.interp(np.log(np.maximum(variance, 1e-300)), _LOG_VARIANCES, np.log(_SHAPES)))


_ALPHA = 1 / shape_of(TAU2)  # squares of these gamma distributions' coefficients of variation


def donor_variance(
    a: Pseudobulk, b: Pseudobulk, stratum: Int[ndarray, "units"], phi: Sequence[Float[ndarray, "genes"]]
) -> Float[ndarray, "genes values"] | None:
    r"""Return how probable each of :data:`TAU2` is as the variance of a gene's log rate between replicates.

    A replicate's sum x of counts over cells with totals l is negative binomial, of its arm's and stratum's
    rate r::

        E x = r sum l,    Var x = E x + d (E x)^2,    d = alpha + phi sum l^2 / (sum l)^2

    that is, replicates' rates have a gamma distribution, whose logarithm has the variance
    tau^2 = trigamma(1 / alpha), for which it is about alpha.

    A stratum with a single replicate on either side (one that has cells on both has a stratum of its own, or
    one against one in a batch) has a rate of its own. Given the sum of both, either is beta-binomial: the log
    ratio of their rates is the fold change, the same in all pairs, but for the variance d_a + d_b. What the
    common rate, or fold change, takes up of the likelihood is adjusted for.

    Over the genes log tau^2 has a normal distribution, but for a few that have a larger one (what sexes
    differ in, immunoglobulins). Median and sd of the one and number of the others are averaged over, by how
    well they foretell the counts of all genes. So genes that differ between donors alike have one variance,
    known as well as all of them show it, and others each its own, as uncertain as few donors leave it.

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
    Cox and Reid, Parameter orthogonality and approximate conditional inference, 1987 (the adjustment).
    McCarthy, Chen and Smyth, Differential expression analysis of multifactor RNA-Seq experiments with respect
    to biological variation, 2012 (the same for a dispersion, which there is drawn to that of other genes).
    """
    if not shows_variance(a, b, stratum):
        return None
    return _posterior(_adjusted_profile_likelihood(a, b, stratum, phi)).numpy()


def _adjusted_profile_likelihood(
    a: Pseudobulk, b: Pseudobulk, stratum: Int[ndarray, "units"], phi: Sequence[Float[ndarray, "genes"]]
) -> Float[Tensor, "genes values"]:
    """Return each gene's adjusted log likelihood of each of TAU2, up to a constant.

    Parameters
    ----------
    a, b, stratum, phi
        See :func:`donor_variance`; there are replicates that show it.
    """
    from scipy.interpolate import CubicSpline  # takes long to import

    single = one_on_each_side(a, b, stratum)
    pair_of = [_in_order(stratum, single[stratum] & (arm.cells > 0)) for arm in (a, b)]
    several = [
        _in_order(stratum, (n > 1)[stratum] & (arm.cells > 0))
        for arm, n in zip((a, b), _replicates_of(a, b, stratum), strict=True)
    ]
    parts = []
    for start in range(0, a.x.shape[1], _GENES):
        some = slice(start, start + _GENES)
        counts = [_counts(arm, f, some) for arm, f in zip((a, b), phi, strict=True)]
        log: list[Tensor] = []
        for (x, l, d), mine in zip(counts, several, strict=True):
            if len(mine):
                log.append(_of_side(x[mine], l[mine], d[mine], stratum[mine]))
        if single.sum() > 1:
            pairs = [tuple(v[mine] for v in of) for of, mine in zip(counts, pair_of, strict=True)]
            log.append(_of_pairs(*pairs))
        parts.append(torch.stack(log).sum(0))
    spline = CubicSpline(np.log(TAU2[::_EVERY]), torch.cat(parts).numpy(), axis=1)
    return torch.from_numpy(spline(np.log(TAU2)))


def _counts(arm: Pseudobulk, phi: Float[ndarray, "genes"], genes: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return some genes' counts of each unit, its total, and the dispersion that its cells alone make."""
    l = np.maximum(arm.l, 1)[:, None]
    own = phi[genes] * arm.ll[:, None] / l**2
    return torch.from_numpy(arm.x[:, genes]), torch.from_numpy(l), torch.from_numpy(own)


def _of_side(
    x: Float[Tensor, "units genes"],
    l: Float[Tensor, "units 1"],
    own: Float[Tensor, "units genes"],
    stratum: Int[ndarray, "units"],
) -> Float[Tensor, "genes some"]:
    """Return the log likelihood of some of TAU2 that replicates with a common rate have."""
    pool = torch.from_numpy(pooling(np.unique(stratum, return_inverse=True)[1]))
    of = pool.argmax(0)
    total = pool @ x
    rate, found = total / (pool @ l), []
    for alpha in _ALPHA[::_EVERY]:
        d = own + alpha
        for _ in range(_STEPS):
            weight = 1 / (1 + d * l * rate[of])
            rate = (pool @ (weight * x)) / (pool @ (weight * l))
        mean, size = l * rate[of], 1 / d
        log = torch.lgamma(x + size) - torch.lgamma(size) + torch.xlogy(x, d * mean)
        log -= (x + size) * torch.log1p(d * mean)
        information = pool @ (mean / (1 + d * mean))  # about the log rate
        found.append(log.sum(0) - 0.5 * torch.where(total > 0, information, 1).log().sum(0))
    return torch.stack(found, 1)


def _of_pairs(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, "genes some"]:
    """Return the log likelihood of some of TAU2 that pairs with a common fold change have."""
    (xa, la, own_a), (xb, lb, own_b) = a, b
    x, offset = xa + xb, (la / lb).log()
    far = torch.log(2 * x.sum(0) + 1)  # what half a count on the one side and all on the other are
    least, most = -offset.max() - far, -offset.min() + far
    one, other = ((count * l / (la + lb)).sum(0) for count, l in ((xa, lb), (xb, la)))
    lfc, found = torch.log((one + 0.5) / (other + 0.5)), []  # (Mantel and Haenszel's, 1959)
    for alpha in _ALPHA[::_EVERY]:
        d = own_a + own_b + 2 * alpha
        for step in range(_STEPS + 1):
            p = torch.sigmoid(lfc + offset)
            precision = 1 / (p * (1 - p) * d)  # at p = 1/2 exactly that of two gamma distributions' ratio
            weight = 1 / (1 + (x - 1).clamp(min=0) / (precision + 1))
            information = (weight * x * p * (1 - p)).sum(0).clamp(min=_LEAST_INFORMATION)
            if step < _STEPS:
                lfc = lfc + ((weight * (xa - x * p)).sum(0) / information).clamp(-1, 1)
                lfc = lfc.clamp(least, most)
        log = torch.lgamma(precision) - torch.lgamma(x + precision)
        for count, part in ((xa, p * precision), (xb, (1 - p) * precision)):
            log += torch.lgamma(count + part) - torch.lgamma(part)
        found.append(log.sum(0) - 0.5 * information.log())
    return torch.stack(found, 1)


def _posterior(log: Float[Tensor, "genes values"]) -> Float[Tensor, "genes values"]:
    """Return the probabilities of TAU2 given all genes' log likelihoods."""
    likelihood = (log - log.amax(1, keepdim=True)).exp()
    priors, parts = _priors(), likelihood.split(_GENES)
    weights = sum((some @ priors).log_().sum(0) for some in parts).softmax(0)
    priors, weights = priors[:, weights > _LIKELY], weights[weights > _LIKELY]
    posterior = torch.cat([some * ((weights / (some @ priors)) @ priors.T) for some in parts])
    return posterior / posterior.sum(1, keepdim=True)


@cache
def _priors() -> Float[Tensor, "values priors"]:
    """Return the distributions that log TAU2 may have over the genes, each of mass 1."""
    log = np.log(TAU2)[:, None, None, None]
    median, sd, unlike = np.meshgrid(_MEDIANS, _SDS, _UNLIKE, indexing="ij")
    like, larger = (np.exp(-0.5 * ((log - median) / s) ** 2) for s in (sd, _LARGER))
    larger = larger * (log >= median)
    mass = (1 - unlike) * like / like.sum(0) + unlike * larger / larger.sum(0)
    return torch.from_numpy(mass.reshape(len(TAU2), -1))


def one_on_each_side(a: Pseudobulk, b: Pseudobulk, stratum: Int[ndarray, "units"]) -> Bool[ndarray, "strata"]:
    """Say which strata have a single replicate in either arm."""
    n, m = _replicates_of(a, b, stratum)
    return (n == 1) & (m == 1)


def shows_variance(a: Pseudobulk, b: Pseudobulk, stratum: Int[ndarray, "units"]) -> bool:
    """Say whether replicates alike by design are there: two of an arm in a stratum, or two pairs."""
    n, m = _replicates_of(a, b, stratum)
    return bool(max(n.max(), m.max()) > 1 or one_on_each_side(a, b, stratum).sum() > 1)


def _replicates_of(a: Pseudobulk, b: Pseudobulk, stratum: Int[ndarray, "units"]) -> tuple[ndarray, ndarray]:
    """Return how many replicates each stratum has in either arm."""
    pool = pooling(stratum)
    return pool @ (a.cells > 0), pool @ (b.cells > 0)


def _in_order(stratum: Int[ndarray, "units"], chosen: Bool[ndarray, "units"]) -> Int[ndarray, "some"]:
    """Return places of the chosen units, stratum by stratum."""
    places = np.flatnonzero(chosen)
    return places[np.argsort(stratum[places], kind="stable")]
