"""Loops over counts on a CPU, compiled by numba: densities of cells, a linear map of them, minibatches.

Each is one pass over the entries where the same in torch operations is thirty, and is written twice: here for
speed, and in `distributions.py` for every device, and as the reference that tests compare with.
Rows are shared among torch's threads; the result does not depend on how many there are.
"""

import math
import os
from collections.abc import Sequence
from threading import Lock
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_ALONE = 1 << 15  # entries below which waking another thread costs more than it saves
_EXACT = 16  # counts up to this have their rising factorial multiplied out
_LARGEST_FACTOR = 1e18  # of those: their product stays finite
_DENSE = 0.3  # share of entries above which a product of dense matrices is sooner done
_SHARES = 4  # of the rows, for each thread
_BLOCK = 16  # rows whose slopes in theta are summed one after the other
_WIDE = 512  # entries summed in float32 before the sum goes on in float64

# Sums may be reordered, so that they run in the processor's vectors; NaN and infinity keep their meaning.
_FAST = {"contract", "nsz", "arcp", "reassoc"}
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
# What these loops call becomes part of each: the process that compiles would else call copies of its own,
# with other last digits than all that find the loops in the cache.
_part = numba.njit(forceinline=True, error_model="numpy", fastmath=_FAST)
_exact_part = numba.njit(forceinline=True, error_model="numpy")
_in_parallel = numba.njit(parallel=True, cache=True, error_model="numpy")
_inlined = numba.njit(inline="always")

_LOG_FACTORIAL = np.array([math.lgamma(k + 1.0) for k in range(1024)])
_LOG1P = np.log1p(np.arange(1024)).astype(np.float32)
_LARGEST, _LARGEST64 = np.float32(3e38), 1e308
_STEEPEST = 1e30
_FAR_OUT = np.float32(1e-30)  # probabilities of a zero below which float32 has too few digits
_SMALLEST_MEAN = float(torch.finfo(torch.float32).tiny)
_LN2 = math.log(2.0)

_F = np.float32


@_inlined
@no_type_check
def _log_parts(u: float, less_one: float) -> tuple[float, float, float, float]:
    """Return (e, f, s, q) with log u = e log 2 + s (2 + q), for a normal float64 u > 0.

    f is u / 2^e - 1, in [-0.3, 0.42), and s is f / (2 + f). Where e = 0, f is `less_one`: u - 1 without
    the rounding that u has, so that logs near 0 keep their digits.
    """
    bits = np.float64(u).view(np.int64)
    e = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    mantissa = np.int64(bits - (e << np.int64(52))).view(np.float64)
    f = less_one if e == 0 else mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    q = 2.0 / 17
    q = q * z + 2.0 / 15
    q = q * z + 2.0 / 13
    q = q * z + 2.0 / 11
    q = q * z + 2.0 / 9
    q = q * z + 2.0 / 7
    q = q * z + 2.0 / 5
    q = q * z + 2.0 / 3
    return np.float64(e), f, s, q * z


@_inlined
@no_type_check
def _log(u: float) -> float:
    e, _, s, q = _log_parts(u, u - 1.0)
    log = e * _LN2 + s * (2.0 + q)
    return log if u < _LARGEST64 else u


@_inlined
@no_type_check
def _exp(y: float) -> float:
    """Exponential of a number that is not positive; below -700, of -700."""
    y = -700.0 if y < -700.0 else y
    n = math.floor(y * (1.0 / _LN2) + 0.5)
    r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = 1.0 / 362880
    p = p * r + 1.0 / 40320
    p = p * r + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)


@_inlined
@no_type_check
def _nb_at_zero(mu: float, theta: float) -> tuple[float, float, float]:
    """Return log p(0), its slope in mu and its slope in theta, float64.

    With r = mu / theta: -theta log(1 + r), -1 / (1 + r) and r / (1 + r) - log(1 + r); the last cancels where
    r is small, and is there summed as -s r / (1 + r) - s q, whose terms have one sign.
    """
    r = mu / theta
    u = 1.0 + r
    e, f, s, q = _log_parts(u, r)
    log = e * _LN2 + s * (2.0 + q)
    log = log if u < _LARGEST64 else u
    d = 1.0 / u
    return -theta * log, -d, -(s * (f * d + q)) if e == 0.0 else r * d - log


# In float32, twice as many to a vector: what a zero says, which is evaluated for every entry.


@_inlined
@no_type_check
def _log_parts32(u: float, less_one: float) -> tuple[int, float, float, float]:
    bits = np.float32(u).view(np.int32)
    e = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = less_one if e == 0 else np.int32(bits - np.int32(e << np.int32(23))).view(np.float32) - _F(1)
    s = f / (_F(2) + f)
    z = s * s
    return e, f, s, z * (_F(2 / 3) + z * (_F(2 / 5) + z * (_F(2 / 7) + z * (_F(2 / 9) + z * _F(2 / 11)))))


@_inlined
@no_type_check
def _exp32(y: float) -> float:
    """Exponential of a number that is not positive; below -87, of -87."""
    y = _F(-87) if y < _F(-87) else y
    n = np.floor(y * _F(1 / _LN2) + _F(0.5))
    r = y - n * _F(_LN2)
    p = _F(1 / 24) + r * (_F(1 / 120) + r * (_F(1 / 720) + r * _F(1 / 5040)))
    p = _F(1) + r * (_F(1) + r * (_F(0.5) + r * (_F(1 / 6) + r * p)))
    return p * np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_inlined
@no_type_check
def _nb_at_zero32(mu: float, theta: float) -> tuple[float, float, float]:
    r = mu / theta
    u = _F(1) + r
    e, f, s, q = _log_parts32(u, r)
    log = _F(e) * _F(_LN2) + s * (_F(2) + q)
    log = log if u < _LARGEST else u
    d = _F(1) / u
    return -theta * log, -d, -(s * (f * d + q)) if e == 0 else r * d - log


@_inlined
@no_type_check
def _zero_inflated_at_zero32(y: float, g: float) -> tuple[float, float, float, float]:
    """Return log(pi + (1 - pi) p0), its slope in y = log p0 and in g = logit pi, and the sum itself.

    Where that is near 1, its log is taken of what it lacks to 1, (1 - pi) (1 - p0), with all its digits.
    """
    small = _exp32(-abs(g))
    bound = _F(1) / (_F(1) + small)
    pi = bound if g > 0 else small * bound
    kept = small * bound if g > 0 else bound
    p0 = _exp32(y)
    series = _F(1 / 24) + y * (_F(1 / 120) + y * (_F(1 / 720) + y * (_F(1 / 5040) + y * _F(1 / 40320))))
    series = -y * (_F(1) + y * (_F(0.5) + y * (_F(1 / 6) + y * series)))
    positive = kept * (series if y > _F(-0.5) else _F(1) - p0)
    p = pi + kept * p0
    e, _, s, q = _log_parts32(p, -positive)
    log = _F(e) * _F(_LN2) + s * (_F(2) + q)
    inverse = _F(1) / p
    return (log if p < _LARGEST else p), kept * p0 * inverse, pi * positive * inverse, p


@_exact_part
@no_type_check
def _zero_inflated_far_out(y: float, g: float) -> tuple[float, float, float]:
    """Return the same, but the sum, in log space: where it is too small for float32."""
    larger, smaller = max(g, y), min(g, y)
    log_sum = larger + math.log1p(math.exp(smaller - larger))  # of odds: of e^g + p0
    log_kept = -math.log1p(math.exp(g)) if g < 0 else -g - math.log1p(math.exp(-g))
    by_y = 1.0 / (1.0 + math.exp(g - y)) if g < y else math.exp(y - g) / (1.0 + math.exp(y - g))
    return log_sum + log_kept, by_y, (1.0 - by_y) * math.exp(log_kept) * -math.expm1(y)


@_exact_part
@no_type_check
def _stirling(z: float) -> tuple[float, float]:
    """Return lgamma(z) less (z - 1/2) log z - z, up to a constant, and digamma(z) less log z - 1 / (2 z).

    For z >= 6 (Abramowitz and Stegun 6.1.41, 6.3.18).
    """
    w = 1.0 / (z * z)
    value = (1 / 12 + w * (-1 / 360 + w * (1 / 1260 + w * (-1 / 1680 + w * (1 / 1188))))) / z
    slope = w * (-1 / 12 + w * (1 / 120 + w * (-1 / 252 + w * (1 / 240 + w * (-1 / 132)))))
    return value, slope


@_exact_part
@no_type_check
def _log_rising_factorial(theta: float, x: float) -> tuple[float, float]:
    """Return the log of Gamma(theta + x) / Gamma(theta), and its slope in theta: see `distributions.py`."""
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
_K, _MU, _THETA, _PRODUCT, _SLOPE, _REST, _BY_MEAN = (i * _WIDE for i in range(7))


@_part
@no_type_check
def _rising_factorials(n: int, b: Any) -> None:
    """Fill in Gamma(theta + k) / (Gamma(theta) k!), as log product + rest, and the slope of its log in theta.

    Small counts have their factors multiplied out, four for all and the others for those that have more:
    product and its derivative, whose ratio is the slope.
    """
    for i in range(n):
        k, factor = b[_K + i], b[_THETA + i]
        product, slope = (factor if k > 0 else 1.0), (1.0 if k > 0 else 0.0)
        factor += 1.0
        slope = slope * factor + product if k > 1 else slope
        product = product * factor if k > 1 else product
        factor += 1.0
        slope = slope * factor + product if k > 2 else slope
        product = product * factor if k > 2 else product
        factor += 1.0
        slope = slope * factor + product if k > 3 else slope
        product = product * factor if k > 3 else product
        b[_PRODUCT + i], b[_SLOPE + i] = product, slope / product
    for i in range(n):
        k, theta = b[_K + i], b[_THETA + i]
        if 0 < k <= _EXACT and k == math.floor(k) and theta < _LARGEST_FACTOR:
            b[_REST + i] = -_LOG_FACTORIAL[int(k)]
            if k > 4:
                product, slope = b[_PRODUCT + i], b[_SLOPE + i] * b[_PRODUCT + i]
                for j in range(4, int(k)):
                    slope = slope * (theta + j) + product
                    product *= theta + j
                b[_PRODUCT + i], b[_SLOPE + i] = product, slope / product
        else:
            log_rising, b[_SLOPE + i] = _log_rising_factorial(theta, k)
            b[_PRODUCT + i], b[_REST + i] = 1.0, log_rising - math.lgamma(k + 1.0)


@_part
@no_type_check
def _log_density_of_row(
    row: int,
    x: Any,
    mean: Any,
    theta: Any,
    gate: Any,
    d_mean: Any,
    d_theta: Any,
    d_gate: Any,
) -> float:
    """Return log p(x) of a row, summed over genes; fill its partial derivatives.

    Each array has that row, or fewer that it takes over and over. Of arguments that are None numba compiles
    nothing: `theta` of a Poisson, `gate` without zero inflation, slopes that nobody wants.
    """
    n_genes = x.shape[1]
    slopes = np.empty(3 * _WIDE, np.float32)  # in mean, theta and gate
    place = np.empty(_WIDE + 1, np.int32)
    b = np.empty(7 * _WIDE)
    total = 0.0
    for start in range(0, n_genes, _WIDE):
        stop = min(n_genes, start + _WIDE)
        width = stop - start
        x_part, mean_part = x[row % x.shape[0], start:stop], mean[row % mean.shape[0], start:stop]
        if theta is not None:
            theta_part = theta[row % theta.shape[0], start:stop]
        if gate is not None:
            gate_part = gate[row % gate.shape[0], start:stop]
        # What a zero says, everywhere.
        part, n_far_out = _F(0), _F(0)
        for j in range(width):
            if theta is not None:
                log, by_mean, by_theta = _nb_at_zero32(mean_part[j], theta_part[j])
            else:
                log, by_mean = -mean_part[j], _F(-1)
            if gate is not None:
                log, by_log, by_gate, p = _zero_inflated_at_zero32(log, gate_part[j])
                n_far_out += _F(1) if p < _FAR_OUT else _F(0)
                by_mean *= by_log
                if theta is not None:
                    by_theta *= by_log
                slopes[2 * _WIDE + j] = by_gate
            slopes[j] = by_mean
            if theta is not None:
                slopes[_WIDE + j] = by_theta
            part += log if x_part[j] == 0 else _F(0)
        total += part
        if gate is not None and n_far_out > 0:
            for j in range(width):
                m, zero = np.float64(mean_part[j]), x_part[j] == 0
                if theta is not None:
                    y, y_mean, y_theta = _nb_at_zero(m, np.float64(theta_part[j]))
                    log32, _, _ = _nb_at_zero32(mean_part[j], theta_part[j])
                else:
                    y, y_mean, log32 = -m, -1.0, -mean_part[j]
                log32, _, _, p = _zero_inflated_at_zero32(log32, gate_part[j])
                if p < _FAR_OUT:
                    log64, by_y, by_g = _zero_inflated_far_out(y, np.float64(gate_part[j]))
                    total += log64 - log32 if zero else 0.0
                    slopes[j] = by_y * y_mean
                    slopes[2 * _WIDE + j] = by_g
                    if theta is not None:
                        slopes[_WIDE + j] = by_y * y_theta
        if d_mean is not None:
            d_mean[row % d_mean.shape[0], start:stop] = slopes[:width]
        if theta is not None and d_theta is not None:
            d_theta[row % d_theta.shape[0], start:stop] = slopes[_WIDE : _WIDE + width]
        if d_gate is not None:
            d_gate[row % d_gate.shape[0], start:stop] = slopes[2 * _WIDE : 2 * _WIDE + width]
        # The counts, in float64: gathered, so that these loops run in vectors too.
        n = 0
        for j in range(width):
            place[n] = j
            n += x_part[j] != 0
        for i in range(n):
            b[_K + i] = x_part[place[i]]
            b[_MU + i] = max(np.float64(mean_part[place[i]]), _SMALLEST_MEAN)
        if theta is None:
            for i in range(n):
                k, mu = b[_K + i], b[_MU + i]
                whole = 0 < k < _LOG_FACTORIAL.size and k == math.floor(k)
                b[_REST + i] = -(_LOG_FACTORIAL[int(k)] if whole else math.lgamma(k + 1.0))
            for i in range(n):
                k, mu = b[_K + i], b[_MU + i]
                total += k * _log(mu) - mu + b[_REST + i]
                b[_BY_MEAN + i] = (k - mu) / mu
        else:
            for i in range(n):
                b[_THETA + i] = theta_part[place[i]]
            _rising_factorials(n, b)
            for i in range(n):
                k, mu, t = b[_K + i], b[_MU + i], b[_THETA + i]
                at_zero, _, zero_theta = _nb_at_zero(mu, t)
                inverse = 1.0 / (mu + t)
                total += _log(b[_PRODUCT + i]) + b[_REST + i] + k * _log(mu * inverse) + at_zero
                b[_BY_MEAN + i] = (k - mu) / mu * (t * inverse)
                b[_SLOPE + i] += zero_theta - k * inverse
            if d_theta is not None:
                for i in range(n):
                    d_theta[row % d_theta.shape[0], start + place[i]] = b[_SLOPE + i]
        if d_mean is not None:
            for i in range(n):
                d_mean[row % d_mean.shape[0], start + place[i]] = min(b[_BY_MEAN + i], _STEEPEST)
        if gate is not None:
            for i in range(n):
                g = np.float64(gate_part[place[i]])
                small = _exp(-abs(g))
                total += -_log(1.0 + small) - max(g, 0.0)
                b[_SLOPE + i] = -(1.0 if g > 0 else small) / (1.0 + small)
            if d_gate is not None:
                for i in range(n):
                    d_gate[row % d_gate.shape[0], start + place[i]] = b[_SLOPE + i]
    return total


@_compiled
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
    """Fill rows `first` to `last` of log p(x), summed over genes, and of its partial derivatives."""
    for row in range(first, last):
        log_p[row] = _log_density_of_row(row, x, mean, theta, gate, d_mean, d_theta, d_gate)


@_in_parallel
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


@_inlined
@no_type_check
def _ordered(value: float) -> int:
    """Return an integer for a float32: the larger of two is that of the larger number."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_part
@no_type_check
def _softmax(row: int, logits: Any, scale: float, mean: Any) -> None:
    """Turn a row of logits into shares, and fill `mean`, a row, with scale times these."""
    n_genes = logits.shape[1]
    top = _ordered(logits[row, 0])
    for j in range(n_genes):
        top = max(top, _ordered(logits[row, j]))
    largest = np.int32(_ordered(np.int32(top).view(np.float32))).view(np.float32)
    total = 0.0
    for start in range(0, n_genes, _WIDE):
        stop = min(n_genes, start + _WIDE)
        logits_part, mean_part, part = logits[row, start:stop], mean[0, start:stop], _F(0)
        for j in range(stop - start):
            y = logits_part[j] - largest
            power = _F(0) if y < _F(-87) else _exp32(y)
            mean_part[j] = power
            part += power
        total += part
    inverse = _F(1 / total)
    for j in range(n_genes):
        share = mean[0, j] * inverse
        logits[row, j] = share
        mean[0, j] = scale * share


@_part
@no_type_check
def _softmax_slope(row: int, mean: Any, by_mean: Any, weight: float, shares: Any) -> float:
    """Turn a row of shares into weighted slopes in their logits, from those in the mean.

    Return the slope in the scale, not weighted.
    """
    n_genes = mean.shape[1]
    total = 0.0
    for start in range(0, n_genes, _WIDE):
        stop = min(n_genes, start + _WIDE)
        share_part, slope_part, part = shares[row, start:stop], by_mean[0, start:stop], _F(0)
        for j in range(stop - start):
            part += share_part[j] * slope_part[j]
        total += part
    average = _F(total)
    for j in range(n_genes):
        shares[row, j] = weight * mean[0, j] * (by_mean[0, j] - average)
    return average


@_part
@no_type_check
def _add(row: int, weight: float, values: Any, total: Any) -> None:
    for j in range(values.shape[1]):
        total[row, j] += weight * values[0, j]


@_part
@no_type_check
def _put(row: int, weight: float, values: Any, out: Any) -> None:
    for j in range(values.shape[1]):
        out[row, j] = weight * values[0, j]


@_compiled
@no_type_check
def _shares_density(
    first: int,
    last: int,
    logits: Any,
    gate: Any,
    library: Any,
    x: Any,
    theta: Any,
    weight: Any,
    log_p: Any,
    d_theta: Any,
    d_library: Any,
) -> None:
    """Do so for blocks `first` to `last` of rows with the mean library * softmax(logits), in three passes.

    Slopes of the weighted log densities take the place of `logits` and `gate`; those in theta are summed.
    """
    n_rows, n_genes = logits.shape
    mean, by_mean = np.empty((1, n_genes), np.float32), np.empty((1, n_genes), np.float32)
    by_theta = None if theta is None else np.empty((1, n_genes), np.float32)
    by_gate = None if gate is None else np.empty((1, n_genes), np.float32)
    for row in range(first * _BLOCK, min(last * _BLOCK, n_rows)):
        _softmax(row, logits, library[row, 0], mean)
        log_p[row] = _log_density_of_row(row, x, mean, theta, gate, by_mean, by_theta, by_gate)
        by_library = _softmax_slope(row, mean, by_mean, weight[row], logits)
        d_library[row, 0] = weight[row] * by_library
        if theta is not None:
            _add(row // _BLOCK, weight[row], by_theta, d_theta)
        if gate is not None:
            _put(row, weight[row], by_gate, gate)


@_in_parallel
@no_type_check
def _shares_densities(
    n_shares: int,
    n_blocks: int,
    logits: Any,
    gate: Any,
    library: Any,
    x: Any,
    theta: Any,
    weight: Any,
    log_p: Any,
    d_theta: Any,
    d_library: Any,
) -> None:
    """Do so for all blocks, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _shares_density(
            n_blocks * i // n_shares,
            n_blocks * (i + 1) // n_shares,
            logits,
            gate,
            library,
            x,
            theta,
            weight,
            log_p,
            d_theta,
            d_library,
        )


_shares_densities.alone = _shares_density


@_compiled
@no_type_check
def _count(first: int, last: int, x: Any, n_positive: Any) -> None:
    """Fill in how many entries of rows `first` to `last` are not zero."""
    for row in range(first, last):
        n = np.int32(0)
        for j in range(x.shape[1]):
            n += np.int32(x[row, j] != 0)
        n_positive[row] = n


@_in_parallel
@no_type_check
def _counts(n_shares: int, n_rows: int, x: Any, n_positive: Any) -> None:
    """Do so for all rows, some at a time on each thread.

    It stands before `_lists` for another reason too: torch's embedding_bag leaves the vector registers of the
    threads in a state in which scalar code is ten times slower, and the loop here, in vectors, clears it.
    """
    for i in numba.prange(n_shares):
        _count(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, x, n_positive)


_counts.alone = _count


@_compiled
@no_type_check
def _list(first: int, last: int, x: Any, log1p: Any, start: Any, gene: Any, value: Any) -> None:
    """List genes and log(1 + x) of what is not zero in rows `first` to `last`, each from its `start` on."""
    place = np.empty(x.shape[1], np.int32)
    for row in range(first, last):
        n = 0
        for j in range(x.shape[1]):
            place[n] = j
            n += x[row, j] != 0
        to = start[row]
        for i in range(n):
            k = x[row, place[i]]
            gene[to + i] = place[i]
            whole = k >= 0 and k < log1p.size and k == math.floor(k)
            value[to + i] = log1p[int(k)] if whole else math.log1p(k)


@_in_parallel
@no_type_check
def _lists(n_shares: int, n_rows: int, x: Any, log1p: Any, start: Any, gene: Any, value: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _list(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, x, log1p, start, gene, value)


_lists.alone = _list


@_compiled
@no_type_check
def _transpose(start: Any, gene: Any, value: Any, by_gene: Any, row_of: Any, value_of: Any) -> None:
    """List the same gene by gene."""
    by_gene[:] = 0
    for i in range(gene.size):
        by_gene[gene[i] + 1] += 1
    for j in range(by_gene.size - 1):
        by_gene[j + 1] += by_gene[j]
    free = by_gene.copy()
    for row in range(start.size - 1):
        for i in range(start[row], start[row + 1]):
            to = free[gene[i]]
            free[gene[i]] = to + 1
            row_of[to], value_of[to] = row, value[i]


@_compiled
@no_type_check
def _gather(first: int, last: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Fill rows `first` to `last` of `out` with rows of a CSR matrix, made dense."""
    for i in range(first, last):
        out[i] = 0
        for entry in range(start[i], stop[i]):
            out[i, gene[entry]] = count[entry]


@_in_parallel
@no_type_check
def _gathers(n_shares: int, n_rows: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _gather(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, start, stop, gene, count, out)


_gathers.alone = _gather


# From torch, and back.

_LOCK = Lock()
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# In a forked child GNU's OpenMP ends the process that asks for threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _shared(run: Any, n_rows: int, n_entries: int, *arguments: Any) -> None:
    """Call run(n_shares, n_rows, ...) on as many threads as torch has; numba's number is left as it was."""
    n_threads = 1 if _forked or n_entries < _ALONE else torch.get_num_threads()
    n_threads = min(n_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    # Not every thread layer of numba bears two callers at once: the second works alone.
    if n_threads == 1 or not _LOCK.acquire(blocking=False):
        run.alone(0, n_rows, *arguments)
        return
    before = numba.get_num_threads()
    numba.set_num_threads(n_threads)
    try:
        run(min(n_rows, _SHARES * n_threads), n_rows, *arguments)
    finally:
        numba.set_num_threads(before)
        _LOCK.release()


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
    _shared(_log_densities, n_rows, n_rows * n_genes, *arrays, log_p.numpy(), *filled)
    return log_p, slopes[0], slopes[1], slopes[2]


def shares_log_density(
    logits: Tensor, gate: Tensor | None, library: Tensor, x: Tensor, theta: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log density of rows of counts of mean library * softmax(logits), and slopes of its weighted sum.

    The slopes in `logits` and `gate` take the place of these.

    Parameters
    ----------
    logits, gate, x
        Of shares; of zero inflation, None without; counts. Float32, (rows, genes), contiguous.
    library
        (rows, 1).
    theta
        Inverse dispersion, (1, genes), None for Poisson.
    weight
        Of each row, (rows,).

    Returns
    -------
    tuple of Tensor
        log p summed over genes, (rows,), and slopes in theta, (1, genes) or empty, and library, (rows, 1).
    """
    n_rows, n_genes = logits.shape
    library, weight = library.contiguous(), weight.contiguous()
    log_p, d_library = x.new_empty(n_rows), torch.empty_like(library)
    n_blocks = -(-n_rows // _BLOCK)
    d_theta = x.new_zeros((0 if theta is None else n_blocks), n_genes)
    tensors = (logits, gate, library, x, theta, weight, log_p, d_theta, d_library)
    arrays = (None if t is None else t.detach().numpy() for t in tensors)
    _shared(_shares_densities, n_blocks, logits.numel(), *arrays)
    return log_p, d_theta if theta is None else d_theta.sum(0, keepdim=True), d_library


def log1p_linear(x: Tensor, weight: Tensor, slope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: FBT001
    """log1p(x) @ weight, for x of which most is zero.

    Parameters
    ----------
    x, weight
        (rows, genes) and (genes, features), float32, contiguous.
    slope
        Whether :func:`log1p_linear_slope` will be asked.

    Returns
    -------
    tuple of Tensor
        The product, (rows, features), and what is not zero, listed gene by gene; nothing where too much is.
    """
    start = torch.zeros(len(x) + 1, dtype=torch.int32)
    _shared(_counts, len(x), x.numel(), x.numpy(), start[1:].numpy())
    start = start.cumsum(0, dtype=torch.int32)
    n = int(start[-1])
    listed = (x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int32), x.new_empty(0))
    if n > _DENSE * x.numel():
        return torch.log1p(x) @ weight, *listed
    gene, value = torch.empty(n, dtype=torch.int32), torch.empty(n)
    _shared(_lists, len(x), x.numel(), x.numpy(), _LOG1P, start.numpy(), gene.numpy(), value.numpy())
    if slope:
        listed = (torch.empty(x.shape[1] + 1, dtype=torch.int32), torch.empty_like(gene), torch.empty(n))
        _transpose(*(t.numpy() for t in (start, gene, value, *listed)))
    out = embedding_bag(gene, weight, start[:-1], mode="sum", per_sample_weights=value)
    return out, *listed


def log1p_linear_slope(d_out: Tensor, x: Tensor, by_gene: Tensor, row_of: Tensor, value_of: Tensor) -> Tensor:
    """Gradient in the weight of :func:`log1p_linear`, (genes, features), from that in the product."""
    if not len(by_gene):
        return torch.log1p(x).T @ d_out
    return embedding_bag(row_of, d_out, by_gene[:-1], mode="sum", per_sample_weights=value_of)


def gather(rows: Tensor, start: Tensor, stop: Tensor, gene: Tensor, count: Tensor, n_genes: int) -> Tensor:
    """Rows of a CSR matrix, entries `start` to `stop` of each, as a dense matrix, (rows, genes)."""
    out = count.new_empty(len(rows), n_genes)
    arrays = (t.numpy() for t in (start[rows], stop[rows], gene, count, out))
    _shared(_gathers, len(rows), out.numel(), *arrays)
    return out


# Operators of torch's own, so that a recorded step holds each as one operation that is not looked into.
# (torch.library.custom_op does the same, and imports torch._dynamo when first called: a second and a half.)
_LIBRARY = torch.library.Library("pyrosc", "FRAGMENT")
_LIBRARY.define(
    "log_density(Tensor x, Tensor mean, Tensor? theta, Tensor? gate, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "shares_log_density(Tensor(a!) logits, Tensor(b!)? gate, Tensor library, Tensor x, Tensor? theta,"
    " Tensor weight) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("log1p_linear(Tensor x, Tensor weight, bool slope) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "log1p_linear_slope(Tensor d_out, Tensor x, Tensor by_gene, Tensor row_of, Tensor value_of) -> Tensor"
)
for operator in (log_density, shares_log_density, log1p_linear, log1p_linear_slope):
    _LIBRARY.impl(operator.__name__, operator, "CPU")
