"""Log2 fold changes between mean counts: their likelihood, a prior learned across genes, the posterior.

It knows sums of counts, not models. Each of the three is a curve over :data:`LFC`, a grid.
Curves of all genes are worked on in torch: numpy's threads and torch's, taking turns, wait for each other.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.special import digamma
from torch import Tensor

from pyrosc.replicates import TAU2, between_replicates, shape_of
from pyrosc.variation import Arm, dispersion, strata

LFC: Float[ndarray, "points"] = np.linspace(-10, 10, 801)
"""Log2 fold changes, .025 apart, at which likelihood, prior and posterior are held."""

_STEP = LFC[1] - LFC[0]
_CENTRES = np.r_[np.zeros(7), np.arange(-4, 0, 0.5), np.arange(0.5, 4.5, 0.5)]
_SDS = np.r_[0.05 * 2.0 ** np.arange(7), np.full(16, 0.35)]
_MODES = 200  # the prior's mode is one of so many points to either side of 0
_UNLIKE = -8.0  # log probability that the one gene which holds the mode at 0 is unlike the others
_WIDE = np.arange(-_MODES, len(LFC) + _MODES) * _STEP + LFC[0]
# Not yet of mass 1: the components of the prior with mode 0, on a grid that has room for the others.
_LEAST = -100.0  # logs of densities below are raised to this: subnormal numbers take ten times as long
_LEAST32 = 1e-30  # the same, of float32 numbers
_DENSITY = torch.from_numpy(-0.5 * ((_WIDE - _CENTRES[:, None]) / _SDS[:, None]) ** 2).clamp(min=_LEAST).exp()
_SUMS = torch.nn.functional.pad(_DENSITY.cumsum(1), (1, 0))
_MASS = (_SUMS[:, len(LFC) :] - _SUMS[:, : -len(LFC)]).flip(1)  # of each component with each mode, on LFC
_BLOCK = 256  # genes at a time, so that what is held between two operations stays in the cache


def likelihood(
    a: Arm,
    b: Arm,
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
    each = (_log_likelihood(*part, phi, between_replicates(*part, phi)) for part in parts)
    return _as_density(reduce(add, each))


def _as_density(log: Float[Tensor, "genes points"]) -> Float[ndarray, "genes points"]:
    """Return a log likelihood's exponential, its maximum 1."""
    return log.sub_(log.amax(1, keepdim=True)).clamp_(min=_LEAST).exp_().numpy()


def _log_likelihood(
    a: Arm,
    b: Arm,
    stratum: Int[ndarray, "units"],
    phi: Sequence[Float[ndarray, "genes"]],
    variances: Float[ndarray, "genes values"] | None,
) -> Float[Tensor, "genes points"]:
    """Return the logarithm of :func:`likelihood`, of units of one kind, by their `between_replicates`."""
    pool = strata(stratum)
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
        log.sub_(log.amax(1, keepdim=True)).mul_(np.log(2) * _STEP / 2)
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
    away = (likeliest - torch.arange(len(LFC))) * (_STEP * np.log(2))
    ratio = score / (away * information)
    return torch.where(away.abs() < 2 * _STEP, 1.0, ratio.nan_to_num(1.0)).clamp_(0, 1e6)


def _student(
    x: Float[ndarray, "strata genes"],
    p: Float[ndarray, "strata 1"],
    extra: Float[ndarray, "strata genes"],
    between: Float[ndarray, "strata 1"],
    variances: Float[ndarray, "genes values"],
) -> tuple[Float[ndarray, "genes"], Float[Tensor, "genes 1"]]:
    """Return tau^2 and nu of :func:`likelihood`; nu is at least 1."""
    information = x * p * (1 - p)
    known, slope = (information + information**2 * extra).sum(0), (information**2 * between).sum(0)
    log = -np.log(np.maximum(known[:, None] + slope[:, None] * TAU2, 1e-100))
    mean = (variances * log).sum(1)
    shape = np.maximum(shape_of((variances * (log - mean[:, None]) ** 2).sum(1)), 0.5)
    precision = shape * np.exp(mean - digamma(shape))
    tau2 = np.maximum(1 / precision - known, 0) / np.maximum(slope, 1e-100)
    return tau2, torch.from_numpy(2 * shape)[:, None]


@dataclass(frozen=True)
class Posterior:
    """Distribution of each gene's log2 fold change beyond the common one, and the prior that all genes share.

    Attributes
    ----------
    mass : ndarray of shape (genes, points)
        Probability of each point's surroundings, half a step to either side. Rows sum to 1.
    prior : ndarray of shape (points,)
        The same before the gene's own counts.
    common : float
        Log2 fold change that most genes have, and that the others are given beyond.
    """

    mass: Float[ndarray, "genes points"]
    prior: Float[ndarray, "points"]
    common: float = 0.0

    @property
    def mean(self) -> Float[ndarray, "genes"]:
        """Posterior mean, log2 fold change."""
        return self._expected(LFC)

    @property
    def sd(self) -> Float[ndarray, "genes"]:
        """Posterior standard deviation, log2 fold change; the grid's own width is part of it."""
        return np.sqrt(np.maximum(0, self._expected(LFC**2) - self.mean**2) + _STEP**2 / 12)

    def above(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc > t)."""
        return self._expected(_share_above(t)).clip(0, 1)  # (a sum of mass may be rounded up)

    def below(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc < t)."""
        return self._expected(1 - _share_above(t)).clip(0, 1)

    def quantile(self, q: float) -> Float[ndarray, "genes"]:
        """Return the log2 fold change with probability q below it."""
        level = torch.full((len(self.mass), 1), q, dtype=torch.float64)
        i = torch.searchsorted(torch.from_numpy(self._cdf), level)[:, 0].clamp(max=len(LFC) - 1).numpy()
        gene = np.arange(len(i))
        short = self._cdf[gene, i] - q
        return LFC[i] + _STEP * (0.5 - short / np.maximum(self.mass[gene, i], 1e-300))

    def _expected(self, f: Float[ndarray, "points"]) -> Float[ndarray, "genes"]:
        return (torch.from_numpy(self.mass) @ torch.from_numpy(f)).numpy()

    @cached_property
    def _cdf(self) -> Float[ndarray, "genes points"]:
        return torch.from_numpy(self.mass).cumsum(1).numpy()

    def prior_de(self, delta: float) -> float:
        """P(|lfc| > delta) before the gene's own counts."""
        return float(self.prior @ (_share_above(delta) + 1 - _share_above(-delta)))


def shrink(likelihood: Float[ndarray, "genes points"], n_rounds: int = 5) -> Posterior:
    """Learn the prior of the fold changes from all genes, and return each gene's posterior under it.

    The prior is a mixture of normal distributions, its weights and its mode m fitted by maximum likelihood:
    seven with mean m and sd .05, .1, ..., 3.2, and one of sd .35 at every half from m - 4 to m + 4 but m. The
    former are those of Stephens; the latter let the prior have more modes than one, as fold changes of +-1
    among many of 0 need. No component is a point: that a gene changes by nothing at all is no claim that
    counts can support.

    The mode is what most genes have in common, and is subtracted: shares sum to 1, so where some genes rise,
    all others fall, and of a gene without counts that would be all that is known. It is found between -5 and
    5, and of fewer than ten genes hardly: which of three are the ones that change, shares do not say.

    One pseudo-gene, spread evenly over the components, keeps the weights of few genes from the edge, and
    one, at 0 and of sd .05, the mode.

    Parameters
    ----------
    likelihood
        Of each gene, up to a factor, at the points of :data:`LFC`.
    n_rounds
        How often, at most, the weights are fitted to the mode and the mode to the weights.

    References
    ----------
    Stephens, False discovery rates: a new deal, 2017.
    """
    curves = torch.from_numpy(likelihood)
    rough = curves.float().clamp_(min=_LEAST32)
    # The first mode is that of a prior without the components beside it, one of which would else stand in.
    mode = _mode(curves, rough, torch.from_numpy((_CENTRES == 0) / (_CENTRES == 0).sum()))
    weights = torch.full((len(_SDS),), 1 / len(_SDS), dtype=torch.float64)
    for _ in range(n_rounds):
        before = mode
        weights = _weights(curves @ _components(mode).T, weights)
        mode = _mode(curves, rough, weights)
        if mode == before:
            break
    if abs(mode) == _MODES:
        warnings.warn(
            f"what most genes' fold changes have in common is not within +-{_MODES * _STEP:.0f}: a few genes "
            "have most counts of one side, and all others seem to change; leave such genes out",
            stacklevel=2,
        )
    prior, common = weights @ _components(0), round(float(mode * _STEP), 3)
    mass = torch.from_numpy(beyond(likelihood, common)) * prior
    mass /= mass.sum(1, keepdim=True)
    return Posterior(mass.numpy(), prior.numpy(), common)


def beyond(curves: Float[ndarray, "genes points"], common: float) -> Float[ndarray, "genes points"]:
    """Return curves of fold changes as those of what these are more than `common`, a multiple of the step."""
    by = round(common / _STEP)
    shifted = np.empty_like(curves)
    if by >= 0:
        shifted[:, : len(LFC) - by], shifted[:, len(LFC) - by :] = curves[:, by:], curves[:, -1:]
    else:
        shifted[:, -by:], shifted[:, :-by] = curves[:, :by], curves[:, :1]
    return shifted


def _components(mode: int) -> Float[Tensor, "components points"]:
    """Return the components of the prior with its mode `mode` steps above 0, each of mass 1 on the grid."""
    return _DENSITY[:, _MODES - mode :][:, : len(LFC)] / _MASS[:, [_MODES + mode]]


def _priors(weights: Float[Tensor, "components"], modes: Sequence[int]) -> Float[Tensor, "points modes"]:
    """Return the prior with each of these modes."""
    above = torch.tensor(modes)
    wide = (weights[:, None] / _MASS[:, _MODES + above]).T @ _DENSITY
    return wide.gather(1, torch.arange(len(LFC)) + (_MODES - above)[:, None]).T


def _mode(
    curves: Float[Tensor, "genes points"],
    rough: Float[Tensor, "genes points"],
    weights: Float[Tensor, "components"],
) -> int:
    """Return the mode, in steps above 0, of highest posterior density; where to look, by `rough` curves."""

    def best(modes: range, curves: Tensor) -> int:
        priors = _priors(weights, modes).clamp(min=_LEAST32).to(curves.dtype)
        pseudo = torch.logaddexp(-0.5 * (torch.tensor(modes) * _STEP / 0.05) ** 2, torch.tensor(_UNLIKE))
        height = (curves @ priors).log_().sum(0, dtype=torch.float64)
        return modes[int((height + pseudo).argmax())]

    coarse = best(range(-_MODES, _MODES + 1, 4), rough)
    return best(range(max(coarse - 3, -_MODES), min(coarse + 3, _MODES) + 1), curves)


def _weights(
    evidence: Float[Tensor, "genes components"], weights: Float[Tensor, "components"], n_steps: int = 100
) -> Float[Tensor, "components"]:
    r"""Return the components' weights w of highest posterior density, by Newton's method from the given ones.

    With K components and evidence E the density's log is sum_i log (E w)_i + sum_k log(w_k) / K. Less
    (genes + 1) sum_k w_k it is concave, and has its maximum where the weights sum to 1.
    """
    evidence = evidence / evidence.amax(1, keepdim=True)
    n_genes, n_components = evidence.shape

    def height(w: Tensor) -> float:
        return float((evidence @ w).log_().sum() + w.log().sum() / n_components - (n_genes + 1) * w.sum())

    now = height(weights)
    for _ in range(n_steps):
        responsible = evidence / (evidence @ weights)[:, None]
        slope = responsible.sum(0) + 1 / (n_components * weights) - (n_genes + 1)
        curvature = responsible.T @ responsible + torch.diag(1 / (n_components * weights**2))
        step = torch.linalg.solve(curvature, slope)
        gain = float(slope @ step)  # twice what a quadratic function would gain
        if gain < 1e-6:  # nats
            break
        # Weights stay above 0.
        share = 1 / max(1.0, float((-step / weights).max()) / 0.99)
        while (then := height(weights + share * step)) < now + 0.1 * share * gain and share > 1e-10:
            share /= 2
        weights, now = weights + share * step, then
    return weights / weights.sum()


def _share_above(t: float) -> Float[ndarray, "points"]:
    """Return the share of each point's surroundings that lies above t."""
    return np.clip((LFC - t) / _STEP + 0.5, 0, 1)
