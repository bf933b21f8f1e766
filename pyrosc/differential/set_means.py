"""Means of fold changes over sets of genes, and their errors, which go together as the genes of a set do."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse

from pyrosc.differential.calls import Number
from pyrosc.differential.design import Contrast
from pyrosc.differential.donor_variance import one_on_each_side
from pyrosc.differential.group_sums import pooling
from pyrosc.differential.quasi_likelihood import LFC

_CELLS = 4096  # looked at together
_KNOWN, _LEAST = 0.25, 0.05**2  # variances of a fold change: of a known one, and of those of a set at least


@dataclass(frozen=True)
class _Errors:
    """What cells, or replicates, contribute to the error of each gene's fold change, up to a gene's factor.

    Attributes
    ----------
    blocks : Callable
        Returns them anew whenever it is called, some at a time, (some, genes): all are as large as the data,
        and not sparse.
    """

    blocks: Callable[[], Iterable[Float[ndarray, "_ genes"]]]

    @cached_property
    def size(self) -> Float[ndarray, "genes"]:
        """Root of the sum of each gene's squares."""
        return np.sqrt(sum((block**2).sum(0) for block in self.blocks()))

    def together(self, weights: Float[ndarray, "genes sets"]) -> Float[ndarray, "sets"]:
        """Return the sum over pairs of different genes g, h of w_g w_h times the correlation of their errors.

        Parameters
        ----------
        weights
            w, of each gene in each set.
        """
        weights = weights * (self.size > 0)[:, None]
        scaled = weights / np.where(self.size > 0, self.size, 1)[:, None]
        return sum(((block @ scaled) ** 2).sum(0) for block in self.blocks()) - (weights**2).sum(0)


def errors_of(
    contrast: Contrast,
    x: sparse.csr_array,
    library: Float[ndarray, "cells"],
    genes: Int[ndarray, "some"],
) -> tuple[_Errors, Number]:
    """Return the errors of some genes' fold changes, and of how many degrees of freedom these are seen in.

    Parameters
    ----------
    contrast
        Of cells, or of replicates: these are then what errors are seen in.
    x, library
        Counts of these genes, (cells, some), and totals of all cells.
    genes
        Places of the genes.
    """
    if contrast.replicates is None:
        return _Errors(partial(_of_cells, x, library, contrast, genes)), np.inf
    block, freedom = _of_replicates(contrast, genes)
    return _Errors(partial(list, [block])), freedom


def set_means(
    curves: Float[ndarray, "genes points"],
    errors: _Errors,
    member: Float[ndarray, "genes sets"],
) -> tuple[Float[ndarray, "sets"], Float[ndarray, "sets"]]:
    """Return each set's mean fold change, and the variance of its error.

    The fold changes t_g of a set are normal about its centre, with the variance s^2. For each centre on the
    grid, every gene has an evidence, and t_g a mean and a variance; the centre's own distribution is the
    product of the evidences. Errors that go together widen it: to first order t_g is predicted by the centre
    plus b_g (e_g - centre), b = s^2 / (s^2 + C_gg), which says how much of each error there is in the mean.
    """
    n = member.sum(0)
    mass = curves / curves.sum(1, keepdims=True)
    e = mass @ LFC
    c = np.maximum(mass @ LFC**2 - e**2, 1e-12)
    s2 = _spread(e, c, errors, member)
    about = np.exp(-0.5 * (LFC - LFC[:, None]) ** 2 / s2)  # symmetric: (centre, t)
    about /= about.sum(0)
    evidence = np.maximum(curves @ about, 1e-300)
    first, second = ((curves * LFC**k) @ about / evidence for k in (1, 2))
    log = np.log(evidence).T @ member
    centre = np.exp(log - log.max(0))
    centre /= centre.sum(0)
    given = first.T @ member / n  # (centres, sets): the mean if that is the centre
    mean = (centre * given).sum(0)
    within = (second - first**2).T @ member / n**2
    own = (centre * (within + (given - mean) ** 2)).sum(0)
    w = member / (c + s2)[:, None]
    b = s2 / (s2 + c)
    part = w / w.sum(0) * (1 - b @ member / n) + member * b[:, None] / n
    return mean, own + np.maximum(0, errors.together(np.sqrt(c)[:, None] * part))


def _spread(
    e: Float[ndarray, "genes"],
    c: Float[ndarray, "genes"],
    errors: _Errors,
    member: Float[ndarray, "genes sets"],
) -> float:
    """Return s^2, the variance of fold changes about the centre of their set, by moments.

    Source: DerSimonian and Laird, 1986, of the genes whose fold change is known to within a half.
    """
    member = member * (c < _KNOWN)[:, None]
    member = member[:, member.sum(0) > 1]
    if not member.size:
        return _LEAST
    w = member / c[:, None]
    total = w.sum(0)
    squares = (w * (e[:, None] - e @ w / total) ** 2).sum()
    # Errors that go together move the centre, and make genes differ from it by less.
    expected = member.sum(0) - 1 - errors.together(member / np.sqrt(c)[:, None]) / total
    scale = total - (w**2).sum(0) / total
    return max(_LEAST, (squares - expected.sum()) / scale.sum())


def _pooled(
    contrast: Contrast, genes: Int[ndarray, "some"]
) -> tuple[tuple[ndarray, ndarray], tuple[ndarray, ndarray], ndarray]:
    """Return counts and totals of each stratum on either side, and what part of the counts is the group's."""
    pool = pooling(contrast.stratum)
    (xa, la), (xb, lb) = (
        (pool @ arm.x[:, genes], (pool @ arm.l)[:, None]) for arm in (contrast.a, contrast.b)
    )
    return (xa, la), (xb, lb), _fitted_share(xa, la, xb, lb)


def _fitted_share(xa: ndarray, la: ndarray, xb: ndarray, lb: ndarray) -> ndarray:
    """Return the part of each stratum's counts that a has if the fold change is the same in all.

    Counts x are (strata, genes), totals l (strata, 1). Source: Mantel and Haenszel, 1959.
    """
    one, other = ((x * l / np.maximum(la + lb, 1)).sum(0) for x, l in ((xa, lb), (xb, la)))
    return la * one / np.maximum(la * one + lb * other, 1e-300)


def _of_cells(
    x: sparse.csr_array, library: Float[ndarray, "cells"], contrast: Contrast, genes: Int[ndarray, "some"]
) -> Iterator[Float[ndarray, "_ some"]]:
    """Yield what cells contribute to the score of a fold change: how far each is from its side's rate."""
    (xa, la), (xb, lb), p = _pooled(contrast, genes)
    rate = np.stack([xa / la, xb / lb], 1)
    weight = np.stack([1 - p, -p], 1)
    rows = np.flatnonzero(contrast.side >= 0)
    for some in np.array_split(rows, -(-len(rows) // _CELLS)):
        place = contrast.stratum_of_cell[some], contrast.side[some]
        yield (x[some].toarray() - library[some, None] * rate[place]) * weight[place]


def _of_replicates(
    contrast: Contrast, genes: Int[ndarray, "some"]
) -> tuple[Float[ndarray, "items some"], int]:
    """Return what each replicate contributes to the score, and the degrees of freedom that shows.

    A pair of single ones on either side contributes how far its fold change is from the common one.
    """
    a, b, stratum = contrast.a, contrast.b, contrast.stratum
    (xa, la), (xb, lb), p = _pooled(contrast, genes)
    paired = one_on_each_side(a, b, stratum)
    blocks, freedom = [(xa - (xa + xb) * p)[paired]], max(0, int(paired.sum()) - 1)
    for arm, x, l, weight in ((a, xa, la, 1 - p), (b, xb, lb, -p)):
        mine = (arm.cells > 0) & ~paired[stratum]
        of = stratum[mine]
        blocks.append((arm.x[mine][:, genes] - arm.l[mine, None] * (x / np.maximum(l, 1))[of]) * weight[of])
        freedom += len(of) - len(np.unique(of))
    return np.concatenate(blocks), max(1, freedom)
