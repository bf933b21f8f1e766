"""Log2 fold changes between mean counts: their likelihood, a prior learned across genes, the posterior.

It knows sums of counts over cells, not models. Each of the three is a curve over :data:`LFC`, a grid.
Curves of all genes are worked on in torch: numpy's threads and torch's, taking turns, wait for each other.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

LFC: Float[ndarray, "points"] = np.linspace(-10, 10, 801)
"""Log2 fold changes, .025 apart, at which likelihood, prior and posterior are held."""

_STEP = LFC[1] - LFC[0]
_CENTRES = np.r_[np.zeros(7), np.arange(-4, 0, 0.5), np.arange(0.5, 4.5, 0.5)]
_SDS = np.r_[0.05 * 2.0 ** np.arange(7), np.full(16, 0.35)]
_MODES = 40  # the prior's mode is one of so many points to either side of 0
_WIDE = np.arange(-_MODES, len(LFC) + _MODES) * _STEP + LFC[0]
# Not yet of mass 1: the components of the prior with mode 0, on a grid that has room for the others.
_LEAST = -100.0  # logs of densities below are raised to this: subnormal numbers take ten times as long
_DENSITY = torch.from_numpy(-0.5 * ((_WIDE - _CENTRES[:, None]) / _SDS[:, None]) ** 2).clamp(min=_LEAST).exp()
_CELLS = 4096  # summed at a time, so that little is copied
_BLOCK = 256  # genes at a time, so that what is held between two operations stays in the cache


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
    """Sum over the cells of each group and batch, some cells at a time; nothing dense is made of them.

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
    stratum = np.where(codes < 0, -1, codes * n_batches + batch)
    of: dict[str, ndarray] = {}
    for start in range(0, max(1, x.shape[0]), _CELLS):
        some = slice(start, start + _CELLS)
        for name, value in _sums(x[some], stratum[some], n_groups * n_batches).items():
            of[name] = of[name] + value if name in of else value
    by_group = {name: value.reshape(n_groups, n_batches, *value.shape[1:]) for name, value in of.items()}
    return [Arm(**{name: value[i] for name, value in by_group.items()}) for i in range(n_groups)]


def _sums(x: sp.csr_array, stratum: ndarray, n_strata: int) -> dict[str, ndarray]:
    """Return the sums over the cells of each stratum, those of -1 left out."""
    rows = np.flatnonzero(stratum >= 0)
    places = stratum[rows].astype(np.int32), rows.astype(np.int32)  # as x.indices, which is then not copied
    member = sp.csr_array((np.ones(len(rows)), places), shape=(n_strata, x.shape[0]))
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
    of_gene = (v.T for v in (x, x**2 * (extra[0] + extra[1]), a.x.sum(0, keepdims=True)))
    blocks = zip(*(torch.from_numpy(v).split(_BLOCK) for v in of_gene), strict=True)
    p, pq, pq2 = (torch.from_numpy(v) for v in (p, pq, pq**2))
    curves = torch.zeros(x.shape[1], len(LFC), dtype=torch.float64)
    for (x_g, spread, x_a), log in zip(blocks, curves.split(_BLOCK), strict=True):
        information = x_g @ pq
        variance = (spread @ pq2).add_(information).clamp_(min=1e-300)
        slope = (x_a - x_g @ p).mul_(information).div_(variance)
        torch.cumsum(slope[:, 1:].add(slope[:, :-1]), 1, out=log[:, 1:])
        log.sub_(log.amax(1, keepdim=True)).mul_(np.log(2) * _STEP / 2).clamp_(min=_LEAST).exp_()
    return curves.numpy()


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
        return self._expected(LFC)

    @property
    def sd(self) -> Float[ndarray, "genes"]:
        """Posterior standard deviation, log2 fold change; the grid's own width is part of it."""
        return np.sqrt(np.maximum(0, self._expected(LFC**2) - self.mean**2) + _STEP**2 / 12)

    def above(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc > t)."""
        return self._expected(_share_above(t))

    def below(self, t: float) -> Float[ndarray, "genes"]:
        """P(lfc < t)."""
        return self._expected(1 - _share_above(t))

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
    curves = torch.from_numpy(likelihood)
    mode, weights = 0, torch.full((len(_SDS),), 1 / len(_SDS), dtype=torch.float64)
    for _ in range(n_rounds):
        before = mode
        weights = _weights(curves @ _components(mode).T, weights)
        coarse = _best(curves, weights, range(-_MODES, _MODES + 1, 4))
        mode = _best(curves, weights, range(max(coarse - 3, -_MODES), min(coarse + 3, _MODES) + 1))
        if mode == before:
            break
    prior = weights @ _components(mode)
    mass = curves * prior
    mass /= mass.sum(1, keepdim=True)
    return Posterior(mass.numpy(), prior.numpy())


@cache
def _components(mode: int) -> Float[Tensor, "components points"]:
    """Return the components of the prior with its mode `mode` steps above 0, each of mass 1 on the grid."""
    density = _DENSITY[:, _MODES - mode :][:, : len(LFC)]
    return density / density.sum(1, keepdim=True)


def _best(curves: Float[Tensor, "genes points"], weights: Float[Tensor, "components"], modes: range) -> int:
    """Return the mode, in steps above 0, of highest posterior density."""
    priors = torch.stack([weights @ _components(mode) for mode in modes], 1)
    fits = (curves @ priors).log_().sum(0) - 0.5 * (torch.tensor(modes) * _STEP / 0.05) ** 2
    return modes[int(fits.argmax())]


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
