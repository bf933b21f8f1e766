"""Adaptive shrinkage of fold changes: a prior learned across genes, and each gene's posterior under it.

Likelihood, prior and posterior are curves over a grid, :data:`~pyrosc.differential.quasi_likelihood.LFC`.
Curves of all genes are worked on in torch: numpy's threads and torch's, taking turns, wait for each other.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from pyrosc.differential.quasi_likelihood import LFC, LOG_LEAST, STEP, beyond

_CENTRES = np.r_[np.zeros(7), np.arange(-4, 0, 0.5), np.arange(0.5, 4.5, 0.5)]
_SDS = np.r_[0.05 * 2.0 ** np.arange(7), np.full(16, 0.35)]
_MODES = 200  # the prior's mode is one of so many points to either side of 0
_UNLIKE = -8.0  # log probability that the one gene which holds the mode at 0 is unlike the others
# Not yet of mass 1: the components of the prior with mode 0, on a grid that has room for the others.
_WIDE = np.arange(-_MODES, len(LFC) + _MODES) * STEP + LFC[0]
_LEAST32 = 1e-30  # densities below are raised to this in float32, for the same reason
_DENSITY = (
    torch.from_numpy(-0.5 * ((_WIDE - _CENTRES[:, None]) / _SDS[:, None]) ** 2).clamp(min=LOG_LEAST).exp()
)
_SUMS = torch.nn.functional.pad(_DENSITY.cumsum(1), (1, 0))
_MASS = (_SUMS[:, len(LFC) :] - _SUMS[:, : -len(LFC)]).flip(1)  # of each component with each mode, on LFC


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
        return np.sqrt(np.maximum(0, self._expected(LFC**2) - self.mean**2) + STEP**2 / 12)

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
        return LFC[i] + STEP * (0.5 - short / np.maximum(self.mass[gene, i], 1e-300))

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
            f"what most genes' fold changes have in common is not within +-{_MODES * STEP:.0f}: a few genes "
            "have most counts of one side, and all others seem to change; leave such genes out",
            stacklevel=2,
        )
    prior, common = weights @ _components(0), round(float(mode * STEP), 3)
    mass = torch.from_numpy(beyond(likelihood, common)) * prior
    mass /= mass.sum(1, keepdim=True)
    return Posterior(mass.numpy(), prior.numpy(), common)


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
        pseudo = torch.logaddexp(-0.5 * (torch.tensor(modes) * STEP / 0.05) ** 2, torch.tensor(_UNLIKE))
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
    return np.clip((LFC - t) / STEP + 0.5, 0, 1)
