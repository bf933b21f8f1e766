"""Log2 fold changes between mean counts: their likelihood, a prior learned across genes, the posterior.

It knows sums of counts over cells, not models. Each of the three is a curve over :data:`LFC`, a grid.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from numpy import ndarray

LFC: Float[ndarray, "points"] = np.linspace(-10, 10, 801)
"""Log2 fold changes, .025 apart, at which likelihood, prior and posterior are held."""

_STEP = LFC[1] - LFC[0]
_CENTRES = np.r_[np.zeros(7), np.arange(-4, 0, 0.5), np.arange(0.5, 4.5, 0.5)]
_SDS = np.r_[0.05 * 2.0 ** np.arange(7), np.full(16, 0.35)]
_MODES = np.arange(-40, 41) * _STEP


@dataclass(frozen=True)
class Arm:
    """Sums over one side's cells in each batch: all that the comparison needs of them.

    Attributes
    ----------
    cells, expressing : ndarray of shape (batches,) and (batches, genes)
        Number of cells, and of cells with a count of the gene.
    l, ll : ndarray of shape (batches,)
        Sums of the cells' totals l and of their squares, in counts.
    x, xx, xl : ndarray of shape (batches, genes)
        Sums of the counts x, of x^2 and of x l.
    """

    cells: Float[ndarray, "batches"]
    expressing: Float[ndarray, "batches genes"]
    l: Float[ndarray, "batches"]
    ll: Float[ndarray, "batches"]
    x: Float[ndarray, "batches genes"]
    xx: Float[ndarray, "batches genes"]
    xl: Float[ndarray, "batches genes"]

    def __getitem__(self, batches: ndarray) -> "Arm":
        """Return the sums over some of the batches' cells only."""
        return Arm(**{name: value[batches] for name, value in vars(self).items()})

    def __add__(self, other: "Arm") -> "Arm":
        return Arm(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    @property
    def n(self) -> int:
        """Number of cells, over all batches."""
        return int(self.cells.sum())


def sums(x: sp.csr_array, codes: ndarray, n_groups: int, batch: ndarray, n_batches: int) -> list[Arm]:
    """Sum over the cells of each group and batch, in one pass over the counts; nothing dense is made of them.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    codes, batch
        Of each cell's group, -1 for none, and batch; (cells,).
    n_groups, n_batches
        Numbers of groups and of batches.

    Returns
    -------
    list of Arm
        One for each group.
    """
    rows = np.flatnonzero(codes >= 0)
    stratum = codes[rows] * n_batches + batch[rows]
    member = sp.csr_array((np.ones(len(rows)), (stratum, rows)), shape=(n_groups * n_batches, x.shape[0]))
    x = x.astype(np.float64)
    l = np.asarray(x.sum(axis=1)).ravel()
    seen = sp.csr_array((np.ones(x.nnz), x.indices, x.indptr), shape=x.shape)
    of = {
        "cells": member @ np.ones(len(l)),
        "expressing": (member @ seen).toarray(),
        "l": member @ l,
        "ll": member @ l**2,
        "x": (member @ x).toarray(),
        "xx": (member @ x.power(2)).toarray(),
        "xl": ((member * l) @ x).toarray(),
    }
    by_group = {name: value.reshape(n_groups, n_batches, *value.shape[1:]) for name, value in of.items()}
    return [Arm(**{name: value[i] for name, value in by_group.items()}) for i in range(n_groups)]


def dispersion(arm: Arm) -> Float[ndarray, "genes"]:
    r"""Return each gene's dispersion phi: a count of mean mu has the variance mu + phi mu^2.

    By moments: within batch b, where r = sum x / sum l, the sum of (x - l r)^2 is that of l r + phi l^2 r^2.
    A gene's value is noisy, so it is drawn towards the precision-weighted mean over the genes, as far as the
    spread between genes is what the noise alone would make (DerSimonian and Laird, 1986).

    Parameters
    ----------
    arm
        Batches of a single cell say nothing; with no others, phi is 0.
    """
    arm = arm[arm.cells > 1]
    n, l, ll = (v[:, None] for v in (arm.cells, arm.l, arm.ll))
    r = arm.x / np.maximum(l, 1)
    squares = (arm.xx - 2 * r * arm.xl + r**2 * ll) * n / (n - 1)
    scale = (r**2 * ll).sum(0)
    known = scale > 0
    if not known.any():
        return np.zeros_like(scale)
    raw = (squares - arm.x).sum(0)[known] / scale[known]
    phi = max(0.0, (squares - arm.x).sum() / scale.sum())
    mu = arm.x[:, known] / n
    for _ in range(3):
        v = mu + phi * mu**2
        noise = (n * (v + 2 * v**2)).sum(0) / scale[known] ** 2
        phi = max(0.0, np.average(raw, weights=1 / noise))
    w = 1 / noise
    between = max(0.0, (w * (raw - phi) ** 2).sum() - len(raw) + 1) / (
        w.sum() - (w**2).sum() / w.sum() + 1e-300
    )
    shrunk = np.full_like(scale, phi)
    shrunk[known] = np.maximum(0, (raw * between + phi * noise) / (between + noise))
    return shrunk


def likelihood(a: Arm, b: Arm) -> Float[ndarray, "genes points"]:
    r"""Return the quasi-likelihood of each log2 fold change of a against b; its maximum is 1.

    In each batch a gene has a rate of its own, and the arms' rates differ by the same factor 2^t in all. Of
    the sum x over both arms of a batch, a's part is binomial with p = l_a 2^t / (l_a 2^t + l_b) if counts are
    Poisson; so score and information of t ln 2 are::

        U = sum_batch x_a (1 - p) - x_b p
        I = sum_batch x p (1 - p)
        Var U = I + sum_batch x^2 p^2 (1 - p)^2 (phi_a sum l_a^2 / (sum l_a)^2 + the same of b)

    and the log quasi-likelihood of over-dispersed counts is the integral of U I / Var U. It is exact for
    Poisson counts, skewed where they are few, and flat for a gene without counts: a normal approximation by
    the delta method is none of these, and where a small group meets a rare gene its errors all point one way.

    Parameters
    ----------
    a, b
        Sums over the two arms. Batches without cells of both say nothing.

    References
    ----------
    McCullagh and Nelder, Generalized linear models, 1989, chapters 7 (conditional) and 9 (quasi-likelihood).
    """
    # An arm of single cells borrows the other's dispersion.
    phi = [dispersion(arm if (arm.cells > 1).any() else other) for arm, other in ((a, b), (b, a))]
    extra = [f * (arm.ll / np.maximum(arm.l, 1) ** 2)[:, None] for f, arm in zip(phi, (a, b), strict=True)]
    odds = a.l[:, None] * 2.0**LFC
    p = odds / np.maximum(odds + b.l[:, None], 1e-300)
    pq = p * (1 - p)
    x = a.x + b.x
    information = x.T @ pq
    variance = information + (x**2 * (extra[0] + extra[1])).T @ pq**2
    score = a.x.T @ (1 - p) - b.x.T @ p
    slope = np.log(2) * score * information / np.maximum(variance, 1e-300)
    rise = (slope[:, 1:] + slope[:, :-1]) * (_STEP / 2)
    log = np.concatenate([np.zeros((len(slope), 1)), rise.cumsum(1)], 1)
    return np.exp(log - log.max(1, keepdims=True))


@dataclass(frozen=True)
class Posterior:
    """Distribution of each gene's log2 fold change, and the prior that all genes share.

    Attributes
    ----------
    mass : ndarray of shape (genes, points)
        Probability of each point's surroundings, half a step to either side. Rows sum to 1.
    prior : ndarray of shape (points,)
        The same before the gene's own counts.
    """

    mass: Float[ndarray, "genes points"]
    prior: Float[ndarray, "points"]

    @property
    def mean(self) -> Float[ndarray, "genes"]:
        """Posterior mean, log2 fold change."""
        return self.mass @ LFC

    @property
    def sd(self) -> Float[ndarray, "genes"]:
        """Posterior standard deviation, log2 fold change; the grid's own width is part of it."""
        return np.sqrt(np.maximum(0, self.mass @ LFC**2 - self.mean**2) + _STEP**2 / 12)

    def above(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc > t)."""
        return self.mass @ _share_above(t)

    def below(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc < t)."""
        return self.mass @ (1 - _share_above(t))

    def quantile(self, q: float) -> Float[ndarray, "genes"]:
        """Return the log2 fold change with probability q below it."""
        cdf = self.mass.cumsum(1)
        i = np.minimum((cdf < q).sum(1), len(LFC) - 1)
        gene = np.arange(len(cdf))
        short = cdf[gene, i] - q
        return LFC[i] + _STEP * (0.5 - short / np.maximum(self.mass[gene, i], 1e-300))

    def prior_de(self, delta: float) -> float:
        """P(|lfc| > delta) before the gene's own counts."""
        return float(self.prior @ (_share_above(delta) + 1 - _share_above(-delta)))


def shrink(likelihood: Float[ndarray, "genes points"], n_rounds: int = 5) -> Posterior:
    """Learn the prior of the fold changes from all genes, and return each gene's posterior under it.

    The prior is a mixture of normal distributions, its weights and its mode m fitted by maximum likelihood:
    seven with mean m and sd .05, .1, ..., 3.2, and one of sd .35 at every half from m - 4 to m + 4 but m. The
    former are those of Stephens; the latter let the prior have more modes than one, as fold changes of +-1
    among many of 0 need. No component is a point: that a gene changes by nothing at all is no claim that
    counts can support. The mode need not be 0: shares sum to 1, so where some genes rise, all others fall.

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
    mode, weights = 0.0, np.full(len(_SDS), 1 / len(_SDS))
    for _ in range(n_rounds):
        before = mode
        weights = _weights(likelihood @ _components(mode).T, weights)
        fits = np.log(likelihood @ np.stack([weights @ _components(m) for m in _MODES], 1)).sum(0)
        mode = float(_MODES[np.argmax(fits - 0.5 * (_MODES / 0.05) ** 2)])
        if mode == before:
            break
    prior = weights @ _components(mode)
    mass = likelihood * prior
    return Posterior(mass / mass.sum(1, keepdims=True), prior)


def _components(mode: float) -> Float[ndarray, "components points"]:
    """Return the prior's components, each of mass 1 on the grid."""
    density = np.exp(-0.5 * ((LFC - mode - _CENTRES[:, None]) / _SDS[:, None]) ** 2)
    return density / density.sum(1, keepdims=True)


def _weights(
    evidence: Float[ndarray, "genes components"], weights: Float[ndarray, "components"], n_steps: int = 500
) -> Float[ndarray, "components"]:
    """Return the components' weights of highest likelihood, by EM from the given ones."""
    evidence = evidence / evidence.max(1, keepdims=True)
    for _ in range(n_steps):
        before = weights
        weights = weights * (evidence / (evidence @ weights)[:, None]).sum(0) + 1 / len(weights)
        weights = weights / weights.sum()
        if np.abs(weights - before).max() < 1e-6:
            break
    return weights


def _share_above(t: float) -> Float[ndarray, "points"]:
    """Return the share of each point's surroundings that lies above t."""
    return np.clip((LFC - t) / _STEP + 0.5, 0, 1)
