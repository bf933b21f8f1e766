"""The log density of rows of counts given their means, and its slopes: one pass over the entries.

The formulas are those of `distributions/density.py`, where they are explained; in torch operations they are
thirty passes. Every entry has what a zero says, in float32; the positive counts, a tenth of them, are
gathered and have theirs in float64. Rows are shared among torch's threads; the result does not depend on how
many.
"""

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from pyrosc.engine.cpu.math32 import (
    LARGEST,
    LARGEST64,
    LN2,
    WIDE,
    F,
    compiled,
    exact_piece,
    exp_parts32,
    in_parallel,
    inlined,
    log64,
    log_parts32,
    log_rest,
    piece,
    places,
    sigmoid32,
    split,
)
from pyrosc.engine.cpu.threads import shared

_EXACT = 16  # counts up to this have their rising factorial multiplied out
_LARGEST_FACTOR = 1e9  # of those, and the inverse of their smallest: products stay finite, and above 0

_LOG_FACTORIAL = np.array([math.lgamma(k + 1.0) for k in range(1024)])
_STEEPEST = 1e30
_FAR_OUT = np.float32(1e-30)  # probabilities of a zero below which float32 has too few digits
_SMALLEST_MEAN = float(torch.finfo(torch.float32).tiny)


@inlined
@no_type_check
def _nb_at_zero(mu: float, theta: float) -> tuple[float, float, float]:
    """Return log p(0), its slope in mu and its slope in theta, float64.

    With r = mu / theta: -theta log(1 + r), -1 / (1 + r) and r / (1 + r) - log(1 + r); the last cancels where
    r is small, and is there summed as -s r / (1 + r) - s q, whose terms have one sign.
    """
    r = mu / theta
    u = 1.0 + r
    e, f = split(u, r)
    s = f / (2.0 + f)
    q = log_rest(s)
    log = e * LN2 + s * (2.0 + q)
    log = log if u < LARGEST64 else u
    d = 1.0 / u
    return -theta * log, -d, -(s * (f * d + q)) if e == 0.0 else r * d - log


@inlined
@no_type_check
def _nb_at_zero32(mu: float, theta: float) -> tuple[float, float, float]:
    """Return what :func:`_nb_at_zero` does; with d = 1 / (1 + r), r d - log(1 + r) is -r^2 (d + q) there."""
    r = mu / theta
    u = F(1) + r
    e, f, q = log_parts32(u, r)
    log = F(e) * F(LN2) + (f + f * f * q)
    log = log if u < LARGEST else u
    d = F(1) / u
    return -theta * log, -d, -(f * f * (d + q)) if e == 0 else r * d - log


@inlined
@no_type_check
def _zero_inflated_at_zero32(y: float, pi: float, kept: float) -> tuple[float, float, float, float]:
    """Return log(pi + (1 - pi) p0), its slope in y = log p0 and in g = logit pi, and the sum itself.

    Where that is near 1, its log is taken of what it lacks to 1, (1 - pi) (1 - p0), with all its digits.
    """
    scale, t = exp_parts32(y)
    p0 = kept * (scale + scale * t)
    less_scale = F(0) if scale == F(1) else F(1) - scale  # (so that 1 - p0 is not computed from p0)
    positive = kept * (less_scale - scale * t)
    p = pi + p0
    e, f, q = log_parts32(p, -positive)
    inverse = F(1) / p
    log = F(e) * F(LN2) + (f + f * f * q)
    return (log if p < LARGEST else p), p0 * inverse, pi * positive * inverse, p


@inlined
@no_type_check
def _log_kept32(g: float) -> tuple[float, float]:
    """Return log(1 - pi) and its slope in g = logit pi."""
    pi, _, small = sigmoid32(g)
    e, f, q = log_parts32(F(1) + small, small)
    return -(max(g, F(0)) + (F(e) * F(LN2) + (f + f * f * q))), -pi


@exact_piece
@no_type_check
def _zero_inflated_far_out(y: float, g: float) -> tuple[float, float, float]:
    """Return the log and its slopes by log space: where the sum is too small for float32."""
    larger, smaller = max(g, y), min(g, y)
    log_sum = larger + math.log1p(math.exp(smaller - larger))  # of odds: of e^g + p0
    log_kept = -math.log1p(math.exp(g)) if g < 0 else -g - math.log1p(math.exp(-g))
    by_y = 1.0 / (1.0 + math.exp(g - y)) if g < y else math.exp(y - g) / (1.0 + math.exp(y - g))
    return log_sum + log_kept, by_y, (1.0 - by_y) * math.exp(log_kept) * -math.expm1(y)


@exact_piece
@no_type_check
def _stirling(z: float) -> tuple[float, float]:
    """Return lgamma(z) less (z - 1/2) log z - z, up to a constant, and digamma(z) less log z - 1 / (2 z).

    For z >= 6 (Abramowitz and Stegun 6.1.41, 6.3.18).
    """
    w = 1.0 / (z * z)
    value = (1 / 12 + w * (-1 / 360 + w * (1 / 1260 + w * (-1 / 1680 + w * (1 / 1188))))) / z
    slope = w * (-1 / 12 + w * (1 / 120 + w * (-1 / 252 + w * (1 / 240 + w * (-1 / 132)))))
    return value, slope


@exact_piece
@no_type_check
def _log_rising_factorial(theta: float, x: float) -> tuple[float, float]:
    """Return the log of Gamma(theta + x) / Gamma(theta), and its slope: see `distributions/density.py`."""
    a, b = theta, theta + x
    factors, slope = 1.0, 0.0
    for _ in range(6):
        factors *= a / b
        slope += x / (a * b)
        a += 1.0
        b += 1.0
    log_growth = math.log1p(x / a)
    value_a, slope_a = _stirling(a)
    value_b, slope_b = _stirling(b)
    value = math.log(factors) + (b - 0.5) * log_growth + x * (math.log(a) - 1.0) + value_b - value_a
    return value, slope + log_growth + x / (2 * a * b) + slope_b - slope_a


# Vectors of numbers per count, one after the other in one array: to the compiler several arrays may overlap,
# and it then works on one number at a time.
_K, _MU, _THETA, _W, _INVERSE, _PRODUCT, _SLOPE, _REST, _OTHER, _BY_MEAN = (i * WIDE for i in range(10))
ROOM64 = 10 * WIDE
D_MEAN, D_THETA, D_GATE, _LOG_P0, _PI, _NOT_PI, ROOM32 = (i * WIDE for i in range(7))  # per gene


@piece
@no_type_check
def _nb_counts(n: int, b: Any, others: Any) -> float:
    """Return log p of `n` positive counts, summed; fill in their slopes in the mean and in theta.

    log p is log Gamma(theta + k) / (Gamma(theta) k!) + k log w + theta log(1 - w), w = mu / (mu + theta).
    Small counts have product = theta ... (theta + k - 1) w^k / k! multiplied out, four factors for all and
    the rest for those that have more; its derivative over itself is the slope. Divisions, which cost most,
    are as few as can be. `b` and `others` are room to work in.
    """
    total = 0.0
    for i in range(n):
        k, mu, theta = b[_K + i], b[_MU + i], b[_THETA + i]
        both = 1.0 / (mu * (mu + theta))
        inverse = both * mu
        w = mu * inverse
        b[_W + i], b[_INVERSE + i], b[_BY_MEAN + i] = w, inverse, (k - mu) * (theta * both)
        product, slope, factor, by = theta * w, w, theta + 1.0, w * (1.0 / 2)
        slope = (slope * factor + product) * by if k > 1 else slope
        product = product * factor * by if k > 1 else product
        factor, by = factor + 1.0, w * (1.0 / 3)
        slope = (slope * factor + product) * by if k > 2 else slope
        product = product * factor * by if k > 2 else product
        factor, by = factor + 1.0, w * (1.0 / 4)
        slope = (slope * factor + product) * by if k > 3 else slope
        product = product * factor * by if k > 3 else product
        b[_PRODUCT + i], b[_SLOPE + i], b[_REST + i] = product, slope, 0.0
        small = (k == 1 or k == 2 or k == 3 or k == 4) and theta < _LARGEST_FACTOR and w > 1 / _LARGEST_FACTOR
        b[_OTHER + i] = 0.0 if small else 1.0
    n_others = 0
    for i in range(n):
        others[n_others] = i
        n_others += b[_OTHER + i] != 0
    for l in range(n_others):
        i = others[l]
        k, theta, w = b[_K + i], b[_THETA + i], b[_W + i]
        if 4 < k <= _EXACT and k == math.floor(k) and theta < _LARGEST_FACTOR and w > 1 / _LARGEST_FACTOR:
            for j in range(4, int(k)):
                by = w / (j + 1)
                b[_SLOPE + i] = (b[_SLOPE + i] * (theta + j) + b[_PRODUCT + i]) * by
                b[_PRODUCT + i] *= (theta + j) * by
        else:
            log_rising, b[_SLOPE + i] = _log_rising_factorial(theta, k)
            b[_PRODUCT + i], b[_REST + i] = 1.0, log_rising - math.lgamma(k + 1.0) + k * math.log(w)
    for i in range(n):
        product, theta, w, inverse = b[_PRODUCT + i], b[_THETA + i], b[_W + i], b[_INVERSE + i]
        not_w = theta * inverse
        e, f = split(product, product - 1.0)
        e_theta, f_theta = split(not_w, -w)
        by = 1.0 / (product * (2.0 + f) * (2.0 + f_theta))
        s, s_theta = f * (2.0 + f_theta) * product * by, f_theta * (2.0 + f) * product * by
        q_theta = log_rest(s_theta)
        log = e * LN2 + s * (2.0 + log_rest(s))
        log_theta = e_theta * LN2 + s_theta * (2.0 + q_theta)
        total += (log if product < LARGEST64 else product) + b[_REST + i] + theta * log_theta
        # w + log(1 - w): where that cancels, by the series.
        slope = s_theta * (q_theta + w) if e_theta == 0.0 else w + log_theta
        b[_SLOPE + i] = b[_SLOPE + i] * (2.0 + f) * (2.0 + f_theta) * by + slope - b[_K + i] * inverse
    return total


@piece
@no_type_check
def log_density_of_block(x: Any, mean: Any, theta: Any, gate: Any, s: Any, b: Any, place: Any) -> float:
    """Return log p of up to `WIDE` genes of a cell, summed; leave in `s` its slopes in mean, theta and gate.

    `s`, `b` and `place` are room to work in. Of arguments that are None numba compiles nothing: `theta` of a
    Poisson, `gate` without zero inflation.
    """
    width, total = x.size, 0.0
    # What a zero says, everywhere. (Short loops: the processor then works on several vectors at once.)
    part, n_far_out = F(0), F(0)
    for j in range(width):
        if theta is not None:
            log, s[D_MEAN + j], s[D_THETA + j] = _nb_at_zero32(mean[j], theta[j])
        else:
            log, s[D_MEAN + j] = -mean[j], F(-1)
        if gate is not None:
            s[_LOG_P0 + j] = log
        else:
            part += log if x[j] == 0 else F(0)
    if gate is not None:
        for j in range(width):
            s[_PI + j], s[_NOT_PI + j], _ = sigmoid32(gate[j])
        for j in range(width):
            log, by_log, s[D_GATE + j], p = _zero_inflated_at_zero32(
                s[_LOG_P0 + j], s[_PI + j], s[_NOT_PI + j]
            )
            n_far_out += F(1) if p < _FAR_OUT else F(0)
            s[D_MEAN + j] *= by_log
            if theta is not None:
                s[D_THETA + j] *= by_log
            part += log if x[j] == 0 else F(0)
    total += part
    if gate is not None and n_far_out > 0:
        for j in range(width):
            m, zero = np.float64(mean[j]), x[j] == 0
            if theta is not None:
                y, y_mean, y_theta = _nb_at_zero(m, np.float64(theta[j]))
            else:
                y, y_mean = -m, -1.0
            log32, _, _, p = _zero_inflated_at_zero32(s[_LOG_P0 + j], s[_PI + j], s[_NOT_PI + j])
            if p < _FAR_OUT:
                exact, by_y, s[D_GATE + j] = _zero_inflated_far_out(y, np.float64(gate[j]))
                total += exact - log32 if zero else 0.0
                s[D_MEAN + j] = by_y * y_mean
                if theta is not None:
                    s[D_THETA + j] = by_y * y_theta
    # The counts, in float64: gathered, so that these loops run in vectors too.
    n = places(x, place)
    for i in range(n):
        b[_K + i] = x[place[i]]
        b[_MU + i] = max(np.float64(mean[place[i]]), _SMALLEST_MEAN)
    if theta is None:
        for i in range(n):
            k = b[_K + i]
            whole = 0 < k < _LOG_FACTORIAL.size and k == math.floor(k)
            b[_REST + i] = -(_LOG_FACTORIAL[int(k)] if whole else math.lgamma(k + 1.0))
        for i in range(n):
            k, mu = b[_K + i], b[_MU + i]
            total += k * log64(mu) - mu + b[_REST + i]
            b[_BY_MEAN + i] = (k - mu) / mu
    else:
        for i in range(n):
            b[_THETA + i] = theta[place[i]]
        total += _nb_counts(n, b, place[WIDE + 1 :])
        for i in range(n):
            s[D_THETA + place[i]] = b[_SLOPE + i]
    for i in range(n):
        s[D_MEAN + place[i]] = min(b[_BY_MEAN + i], _STEEPEST)
    if gate is not None:
        part = F(0)
        for i in range(n):
            s[_PI + i] = gate[place[i]]
        for i in range(n):
            log, s[_PI + i] = _log_kept32(s[_PI + i])
            part += log
        total += part
        for i in range(n):
            s[D_GATE + place[i]] = s[_PI + i]
    return total


@compiled
@no_type_check
def _log_density(
    first: int,
    last: int,
    x: Any,
    mean: Any,
    theta: Any,
    gate: Any,
    log_p: Any,
    d_mean: Any,
    d_theta: Any,
    d_gate: Any,
) -> None:
    """Fill rows `first` to `last` of log p(x), summed over genes, and of the partial derivatives wanted.

    Each array has as many rows, or fewer that are taken over and over.
    """
    s, b, place = np.empty(ROOM32, np.float32), np.empty(ROOM64), np.empty(2 * (WIDE + 1), np.int32)
    n_genes = x.shape[1]
    for row in range(first, last):
        total = 0.0
        for start in range(0, n_genes, WIDE):
            stop = min(n_genes, start + WIDE)
            total += log_density_of_block(
                x[row % x.shape[0], start:stop],
                mean[row % mean.shape[0], start:stop],
                None if theta is None else theta[row % theta.shape[0], start:stop],
                None if gate is None else gate[row % gate.shape[0], start:stop],
                s,
                b,
                place,
            )
            if d_mean is not None:
                d_mean[row, start:stop] = s[D_MEAN : D_MEAN + stop - start]
            if d_theta is not None:
                d_theta[row, start:stop] = s[D_THETA : D_THETA + stop - start]
            if d_gate is not None:
                d_gate[row, start:stop] = s[D_GATE : D_GATE + stop - start]
        log_p[row] = total


@in_parallel
@no_type_check
def _log_densities(
    n_shares: int,
    n_rows: int,
    x: Any,
    mean: Any,
    theta: Any,
    gate: Any,
    log_p: Any,
    d_mean: Any,
    d_theta: Any,
    d_gate: Any,
) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _log_density(
            n_rows * i // n_shares,
            n_rows * (i + 1) // n_shares,
            x,
            mean,
            theta,
            gate,
            log_p,
            d_mean,
            d_theta,
            d_gate,
        )


_log_densities.alone = _log_density


def log_density(
    x: Tensor, mean: Tensor, theta: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log density of rows of counts, and its slopes.

    Parameters
    ----------
    x, mean, theta, gate
        Counts; mean; inverse dispersion, None for Poisson; logits of zero inflation, None without. All
        float32 of shape (some rows, genes), contiguous: the one with the most rows is taken once, the others
        over and over.
    wanted
        For mean, theta and gate: whether the slope is.

    Returns
    -------
    tuple of Tensor
        log p summed over genes, (rows,), and slopes in mean, theta and gate, (rows, genes) or empty.
    """
    inputs = [x, mean, theta, gate]
    n_rows = max(len(t) for t in inputs if t is not None)
    n_genes = x.shape[1]
    log_p = x.new_empty(n_rows)
    slopes = [x.new_empty((n_rows, n_genes) if want else (0, n_genes)) for want in wanted]
    arrays = [None if t is None else t.detach().numpy() for t in inputs]
    filled = [slope.numpy() if want else None for slope, want in zip(slopes, wanted, strict=True)]
    shared(_log_densities, n_rows, n_rows * n_genes, *arrays, log_p.numpy(), *filled)
    return log_p, slopes[0], slopes[1], slopes[2]
