"""Loops over counts on a CPU, compiled by numba: densities of cells, a linear map of them, minibatches.

Each is one pass over the entries where the same in torch operations is thirty, and is written twice: here for
speed, and in `distributions.py` for every device, and as the reference that tests compare with. (Dropout is
here too; what torch draws in its place are other numbers.)
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
from torch.utils.weak import WeakTensorKeyDictionary

_ALONE = 1 << 15  # entries below which waking another thread costs more than it saves
_EXACT = 16  # counts up to this have their rising factorial multiplied out
_LARGEST_FACTOR = 1e9  # of those, and the inverse of their smallest: products stay finite, and above 0
_DENSE = 0.3  # share of entries above which a product of dense matrices is sooner done
_SHARES = 4  # of the rows, for each thread
_BLOCK = 16  # rows whose slopes in parameters of genes are summed one after the other
_PARTS = 8  # of a minibatch, whose entries are listed one after the other
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
_LARGEST, _LARGEST64 = np.float32(3e38), 1e308
_STEEPEST = 1e30
_FAR_OUT = np.float32(1e-30)  # probabilities of a zero below which float32 has too few digits
_SMALLEST_MEAN = float(torch.finfo(torch.float32).tiny)
_LN2 = math.log(2.0)
_NOT_SIGN = np.int32(0x7FFFFFFF)  # all bits of a float32 but the sign: 0 for -0.0 too

_F = np.float32
_NAN = np.float32(math.nan)


@_inlined
@no_type_check
def _split(u: float, less_one: float) -> tuple[float, float]:
    """Return (e, f) with u = 2^e (1 + f), f in [-0.3, 0.42), for a normal float64 u > 0.

    Where e = 0, f is `less_one`: u - 1 without the rounding that u has, so that logs near 0 keep digits.
    """
    bits = np.float64(u).view(np.int64)
    e = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    mantissa = np.int64(bits - (e << np.int64(52))).view(np.float64)
    return np.float64(e), less_one if e == 0 else mantissa - 1.0


@_inlined
@no_type_check
def _log_rest(s: float) -> float:
    """Return q with log(1 + f) = s (2 + q), for s = f / (2 + f)."""
    z = s * s
    z2 = z * z
    low = 2.0 / 3 + z * (2.0 / 5) + z2 * (2.0 / 7 + z * (2.0 / 9))
    high = 2.0 / 11 + z * (2.0 / 13) + z2 * (2.0 / 15 + z * (2.0 / 17))
    return z * (low + z2 * z2 * high)


@_inlined
@no_type_check
def _log(u: float) -> float:
    e, f = _split(u, u - 1.0)
    s = f / (2.0 + f)
    log = e * _LN2 + s * (2.0 + _log_rest(s))
    return log if u < _LARGEST64 else u


@_inlined
@no_type_check
def _nb_at_zero(mu: float, theta: float) -> tuple[float, float, float]:
    """Return log p(0), its slope in mu and its slope in theta, float64.

    With r = mu / theta: -theta log(1 + r), -1 / (1 + r) and r / (1 + r) - log(1 + r); the last cancels where
    r is small, and is there summed as -s r / (1 + r) - s q, whose terms have one sign.
    """
    r = mu / theta
    u = 1.0 + r
    e, f = _split(u, r)
    s = f / (2.0 + f)
    q = _log_rest(s)
    log = e * _LN2 + s * (2.0 + q)
    log = log if u < _LARGEST64 else u
    d = 1.0 / u
    return -theta * log, -d, -(s * (f * d + q)) if e == 0.0 else r * d - log


# In float32, twice as many to a vector: what a zero says, which is evaluated for every entry. Polynomials are
# sums of pairs, whose terms do not wait for each other.


@_inlined
@no_type_check
def _log_parts32(u: float, less_one: float) -> tuple[int, float, float]:
    """Return (e, f, q) with log u = e log 2 + f + f^2 q; the polynomial errs by 6e-9 of log(1 + f)."""
    bits = np.float32(u).view(np.int32)
    e = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = less_one if e == 0 else np.int32(bits - np.int32(e << np.int32(23))).view(np.float32) - _F(1)
    f2 = f * f
    low = _F(0.33333331) + f * _F(-0.25000820) + f2 * (_F(0.20001227) + f * _F(-0.16623357))
    high = _F(0.14201759) + f * _F(-0.13160183) + f2 * (_F(0.12761575) + f * _F(-0.076344930))
    return e, f, f * (low + f2 * f2 * high) - _F(0.5)


@_inlined
@no_type_check
def _exp_parts32(y: float) -> tuple[float, float]:
    """Return 2^n and t with exp y = 2^n (1 + t), t in [-0.3, 0.42), of y that is not positive; or of -87."""
    y = _F(-87) if y < _F(-87) else y
    n = np.floor(y * _F(1 / _LN2) + _F(0.5))
    r = y - n * _F(_LN2)
    r2 = r * r
    q = (
        _F(1 / 2)
        + r * _F(1 / 6)
        + r2 * (_F(1 / 24) + r * _F(1 / 120) + r2 * (_F(1 / 720) + r * _F(1 / 5040)))
    )
    return np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32), r + r2 * q


@_inlined
@no_type_check
def _nb_at_zero32(mu: float, theta: float) -> tuple[float, float, float]:
    """Return what :func:`_nb_at_zero` does; with d = 1 / (1 + r), r d - log(1 + r) is -r^2 (d + q) there."""
    r = mu / theta
    u = _F(1) + r
    e, f, q = _log_parts32(u, r)
    log = _F(e) * _F(_LN2) + (f + f * f * q)
    log = log if u < _LARGEST else u
    d = _F(1) / u
    return -theta * log, -d, -(f * f * (d + q)) if e == 0 else r * d - log


@_inlined
@no_type_check
def _sigmoid32(g: float) -> tuple[float, float, float]:
    """Return sigmoid(g), sigmoid(-g) and exp(-|g|)."""
    scale, t = _exp_parts32(-abs(g))
    small = scale + scale * t
    bound = _F(1) / (_F(1) + small)
    return (bound if g > 0 else small * bound), (small * bound if g > 0 else bound), small


@_inlined
@no_type_check
def _zero_inflated_at_zero32(y: float, pi: float, kept: float) -> tuple[float, float, float, float]:
    """Return log(pi + (1 - pi) p0), its slope in y = log p0 and in g = logit pi, and the sum itself.

    Where that is near 1, its log is taken of what it lacks to 1, (1 - pi) (1 - p0), with all its digits.
    """
    scale, t = _exp_parts32(y)
    p0 = kept * (scale + scale * t)
    less_scale = _F(0) if scale == _F(1) else _F(1) - scale  # (so that 1 - p0 is not computed from p0)
    positive = kept * (less_scale - scale * t)
    p = pi + p0
    e, f, q = _log_parts32(p, -positive)
    inverse = _F(1) / p
    log = _F(e) * _F(_LN2) + (f + f * f * q)
    return (log if p < _LARGEST else p), p0 * inverse, pi * positive * inverse, p


@_inlined
@no_type_check
def _log_kept32(g: float) -> tuple[float, float]:
    """Return log(1 - pi) and its slope in g = logit pi."""
    pi, _, small = _sigmoid32(g)
    e, f, q = _log_parts32(_F(1) + small, small)
    return -(max(g, _F(0)) + (_F(e) * _F(_LN2) + (f + f * f * q))), -pi


@_exact_part
@no_type_check
def _zero_inflated_far_out(y: float, g: float) -> tuple[float, float, float]:
    """Return the log and its slopes by log space: where the sum is too small for float32."""
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


@_part
@no_type_check
def _places(x: Any, place: Any) -> int:
    """List where a row is not zero; return in how many places."""
    bits = x.view(np.int32)  # (compared in one operation, where a number may be none)
    n = 0
    for j in range(bits.size):
        place[n] = j
        n += (bits[j] & _NOT_SIGN) != 0
    return n


# Vectors of numbers per count, one after the other in one array: to the compiler several arrays may overlap,
# and it then works on one number at a time.
_K, _MU, _THETA, _W, _INVERSE, _PRODUCT, _SLOPE, _REST, _OTHER, _BY_MEAN = (i * _WIDE for i in range(10))
_ROOM64 = 10 * _WIDE
_D_MEAN, _D_THETA, _D_GATE, _LOG_P0, _PI, _NOT_PI, _ROOM32 = (i * _WIDE for i in range(7))  # per gene


@_part
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
        e, f = _split(product, product - 1.0)
        e_theta, f_theta = _split(not_w, -w)
        by = 1.0 / (product * (2.0 + f) * (2.0 + f_theta))
        s, s_theta = f * (2.0 + f_theta) * product * by, f_theta * (2.0 + f) * product * by
        q_theta = _log_rest(s_theta)
        log = e * _LN2 + s * (2.0 + _log_rest(s))
        log_theta = e_theta * _LN2 + s_theta * (2.0 + q_theta)
        total += (log if product < _LARGEST64 else product) + b[_REST + i] + theta * log_theta
        # w + log(1 - w): where that cancels, by the series.
        slope = s_theta * (q_theta + w) if e_theta == 0.0 else w + log_theta
        b[_SLOPE + i] = b[_SLOPE + i] * (2.0 + f) * (2.0 + f_theta) * by + slope - b[_K + i] * inverse
    return total


@_part
@no_type_check
def _log_density_of_block(x: Any, mean: Any, theta: Any, gate: Any, s: Any, b: Any, place: Any) -> float:
    """Return log p of up to `_WIDE` genes of a cell, summed; leave in `s` its slopes in mean, theta and gate.

    `s`, `b` and `place` are room to work in. Of arguments that are None numba compiles nothing: `theta` of a
    Poisson, `gate` without zero inflation.
    """
    width, total = x.size, 0.0
    # What a zero says, everywhere. (Short loops: the processor then works on several vectors at once.)
    part, n_far_out = _F(0), _F(0)
    for j in range(width):
        if theta is not None:
            log, s[_D_MEAN + j], s[_D_THETA + j] = _nb_at_zero32(mean[j], theta[j])
        else:
            log, s[_D_MEAN + j] = -mean[j], _F(-1)
        if gate is not None:
            s[_LOG_P0 + j] = log
        else:
            part += log if x[j] == 0 else _F(0)
    if gate is not None:
        for j in range(width):
            s[_PI + j], s[_NOT_PI + j], _ = _sigmoid32(gate[j])
        for j in range(width):
            log, by_log, s[_D_GATE + j], p = _zero_inflated_at_zero32(
                s[_LOG_P0 + j], s[_PI + j], s[_NOT_PI + j]
            )
            n_far_out += _F(1) if p < _FAR_OUT else _F(0)
            s[_D_MEAN + j] *= by_log
            if theta is not None:
                s[_D_THETA + j] *= by_log
            part += log if x[j] == 0 else _F(0)
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
                log64, by_y, s[_D_GATE + j] = _zero_inflated_far_out(y, np.float64(gate[j]))
                total += log64 - log32 if zero else 0.0
                s[_D_MEAN + j] = by_y * y_mean
                if theta is not None:
                    s[_D_THETA + j] = by_y * y_theta
    # The counts, in float64: gathered, so that these loops run in vectors too.
    n = _places(x, place)
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
            total += k * _log(mu) - mu + b[_REST + i]
            b[_BY_MEAN + i] = (k - mu) / mu
    else:
        for i in range(n):
            b[_THETA + i] = theta[place[i]]
        total += _nb_counts(n, b, place[_WIDE + 1 :])
        for i in range(n):
            s[_D_THETA + place[i]] = b[_SLOPE + i]
    for i in range(n):
        s[_D_MEAN + place[i]] = min(b[_BY_MEAN + i], _STEEPEST)
    if gate is not None:
        part = _F(0)
        for i in range(n):
            s[_PI + i] = gate[place[i]]
        for i in range(n):
            log, s[_PI + i] = _log_kept32(s[_PI + i])
            part += log
        total += part
        for i in range(n):
            s[_D_GATE + place[i]] = s[_PI + i]
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
    """Fill rows `first` to `last` of log p(x), summed over genes, and of the partial derivatives wanted.

    Each array has as many rows, or fewer that are taken over and over.
    """
    s, b, place = np.empty(_ROOM32, np.float32), np.empty(_ROOM64), np.empty(2 * (_WIDE + 1), np.int32)
    n_genes = x.shape[1]
    for row in range(first, last):
        total = 0.0
        for start in range(0, n_genes, _WIDE):
            stop = min(n_genes, start + _WIDE)
            total += _log_density_of_block(
                x[row % x.shape[0], start:stop],
                mean[row % mean.shape[0], start:stop],
                None if theta is None else theta[row % theta.shape[0], start:stop],
                None if gate is None else gate[row % gate.shape[0], start:stop],
                s,
                b,
                place,
            )
            if d_mean is not None:
                d_mean[row, start:stop] = s[_D_MEAN : _D_MEAN + stop - start]
            if d_theta is not None:
                d_theta[row, start:stop] = s[_D_THETA : _D_THETA + stop - start]
            if d_gate is not None:
                d_gate[row, start:stop] = s[_D_GATE : _D_GATE + stop - start]
        log_p[row] = total


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
def _add(weight: float, values: Any, total: Any) -> None:
    for j in range(total.size):
        total[j] += weight * values[j]


@_part
@no_type_check
def _softmax(logits: Any, bias: Any) -> float:
    """Add a bias to a row of logits and turn them into powers; return the sum, to divide by for shares."""
    n_genes = logits.size
    top = np.int32(-0x80000000)
    for j in range(n_genes):
        if bias is not None:
            logits[j] += bias[j]
        top = max(top, _ordered(logits[j]))
    largest = np.int32(_ordered(np.int32(top).view(np.float32))).view(np.float32)
    total = 0.0
    for start in range(0, n_genes, _WIDE):
        block, part = logits[start : start + _WIDE], _F(0)
        for j in range(block.size):
            y = block[j] - largest
            scale, t = _exp_parts32(y)
            power = _F(0) if y < _F(-87) else scale + scale * t
            block[j] = power
            part += power
        total += part
    return total


@_compiled
@no_type_check
def _shares_density(
    first: int,
    last: int,
    logits: Any,
    bias: Any,
    gate: Any,
    gate_bias: Any,
    library: Any,
    x: Any,
    theta: Any,
    weight: Any,
    log_p: Any,
    d_bias: Any,
    d_gate_bias: Any,
    d_theta: Any,
    d_library: Any,
) -> None:
    """Do so for blocks `first` to `last` of rows with the mean library * softmax(logits + bias).

    Slopes of the weighted log densities take the place of `logits` and `gate`; those in `bias`, `gate_bias`
    and `theta` are summed.
    """
    n_rows, n_genes = logits.shape
    s, b, place = np.empty(_ROOM32, np.float32), np.empty(_ROOM64), np.empty(2 * (_WIDE + 1), np.int32)
    mean, by_mean = np.empty(_WIDE, np.float32), np.empty(n_genes, np.float32)
    for row in range(first * _BLOCK, min(last * _BLOCK, n_rows)):
        block, w, size, shares = row // _BLOCK, weight[row], library[row, 0], logits[row]
        inverse = _F(1 / _softmax(shares, bias))
        total, average = 0.0, 0.0
        for start in range(0, n_genes, _WIDE):
            stop = min(n_genes, start + _WIDE)
            share, slope, part = shares[start:stop], by_mean[start:stop], _F(0)
            for j in range(share.size):
                share[j] *= inverse
                mean[j] = size * share[j]
            if gate is not None:
                gate_part = gate[row, start:stop]
                if gate_bias is not None:
                    _add(_F(1), gate_bias[start:stop], gate_part)
            total += _log_density_of_block(
                x[row, start:stop],
                mean[: share.size],
                None if theta is None else theta[0, start:stop],
                None if gate is None else gate_part,
                s,
                b,
                place,
            )
            for j in range(share.size):
                slope[j] = s[_D_MEAN + j]
                part += share[j] * slope[j]
            average += part
            if theta is not None:
                _add(w, s[_D_THETA:], d_theta[block, start:stop])
            if gate is not None:
                for j in range(share.size):
                    gate_part[j] = w * s[_D_GATE + j]
                if gate_bias is not None:
                    _add(_F(1), gate_part, d_gate_bias[block, start:stop])
        log_p[row], d_library[row, 0] = total, w * _F(average)
        scale, average = w * size, _F(average)
        d_bias_row = None if bias is None else d_bias[block]
        for j in range(n_genes):
            shares[j] *= scale * (by_mean[j] - average)
            if bias is not None:
                d_bias_row[j] += shares[j]


@_in_parallel
@no_type_check
def _shares_densities(
    n_shares: int,
    n_blocks: int,
    logits: Any,
    bias: Any,
    gate: Any,
    gate_bias: Any,
    library: Any,
    x: Any,
    theta: Any,
    weight: Any,
    log_p: Any,
    d_bias: Any,
    d_gate_bias: Any,
    d_theta: Any,
    d_library: Any,
) -> None:
    """Do so for all blocks, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _shares_density(
            n_blocks * i // n_shares,
            n_blocks * (i + 1) // n_shares,
            logits,
            bias,
            gate,
            gate_bias,
            library,
            x,
            theta,
            weight,
            log_p,
            d_bias,
            d_gate_bias,
            d_theta,
            d_library,
        )


_shares_densities.alone = _shares_density


@_compiled
@no_type_check
def _sum_blocks(slopes: Any, out: Any) -> None:
    """Sum over the second axis, in an order that does not depend on threads, as torch's may."""
    out[:] = 0
    for i in range(slopes.shape[0]):
        for block in range(slopes.shape[1]):
            _add(_F(1), slopes[i, block], out[i, 0])


@_compiled
@no_type_check
def _count(first: int, last: int, x: Any, n_positive: Any) -> None:
    """Fill in how many entries of rows `first` to `last` are not zero."""
    for row in range(first, last):
        n = np.int32(0)
        bits = x[row].view(np.int32)
        for j in range(bits.size):
            n += np.int32((bits[j] & _NOT_SIGN) != 0)
        n_positive[row] = n


@_in_parallel
@no_type_check
def _counts(n_shares: int, n_rows: int, x: Any, n_positive: Any) -> None:
    """Do so for all rows, some at a time on each thread.

    It stands before `_lists` for another reason too: torch's embedding_bag leaves the vector registers of the
    threads in a state in which scalar code is ten times slower, and the loop here, in vectors, clears it. (So
    do the copies in `_list` where entries are known.)
    """
    for i in numba.prange(n_shares):
        _count(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, x, n_positive)


_counts.alone = _count


@_compiled
@no_type_check
def _list(first: int, last: int, x: Any, at: Any, start: Any, gene: Any, value: Any, found: Any) -> None:
    """List genes and log(1 + x) of what is not zero in parts `first` to `last` of the rows.

    Each row from its `start` on; `found` is how often a part has a gene. `at` is where such entries stand
    already, (first, last, genes, counts), or None.
    """
    n_rows, n_parts = x.shape[0], found.shape[0]
    place = np.empty(x.shape[1] + 1, np.int32)
    for part in range(first, last):
        n_found = found[part]
        n_found[:] = 0
        for row in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            genes, values = gene[start[row] : start[row + 1]], value[start[row] : start[row + 1]]
            if at is None:
                _places(x[row], place)
                for i in range(genes.size):
                    genes[i] = place[i]
                for i in range(genes.size):
                    values[i] = x[row, genes[i]]
            else:
                genes[:] = at[2][at[0][row] : at[1][row]]
                values[:] = at[3][at[0][row] : at[1][row]]
            for i in range(genes.size):
                u = _F(1) + values[i]
                e, f, q = _log_parts32(u, values[i])
                log = _F(e) * _F(_LN2) + (f + f * f * q)
                values[i] = log if _F(0) < u < _LARGEST else (_NAN if u <= _F(0) else u)
            for i in range(genes.size):
                n_found[np.uint32(genes[i])] += 1


@_in_parallel
@no_type_check
def _lists(
    n_shares: int, n_parts: int, x: Any, at: Any, start: Any, gene: Any, value: Any, found: Any
) -> None:
    """Do so for all parts, some at a time on each thread."""
    for i in numba.prange(n_shares):
        first, last = n_parts * i // n_shares, n_parts * (i + 1) // n_shares
        _list(first, last, x, at, start, gene, value, found)


_lists.alone = _list


@_compiled
@no_type_check
def _add_up(found: Any, by_gene: Any) -> None:
    """Turn how often parts have genes into where the first of each stands in a list gene by gene."""
    n = 0
    for j in range(found.shape[1]):
        by_gene[j] = n
        for part in range(found.shape[0]):
            n, found[part, j] = n + found[part, j], n
    by_gene[-1] = n


@_compiled
@no_type_check
def _transpose(
    first: int, last: int, start: Any, gene: Any, value: Any, free: Any, row_of: Any, value_of: Any
) -> None:
    """List the same gene by gene, of parts `first` to `last`, each from what is `free` on."""
    n_rows, n_parts = start.size - 1, free.shape[0]
    for part in range(first, last):
        next_ = free[part]
        for row in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            for i in range(start[row], start[row + 1]):
                j = np.uint32(gene[i])
                to = np.uint32(next_[j])
                next_[j] += 1
                row_of[to], value_of[to] = row, value[i]


@_in_parallel
@no_type_check
def _transposes(
    n_shares: int, n_parts: int, start: Any, gene: Any, value: Any, free: Any, row_of: Any, value_of: Any
) -> None:
    """Do so for all parts, some at a time on each thread."""
    for i in numba.prange(n_shares):
        first, last = n_parts * i // n_shares, n_parts * (i + 1) // n_shares
        _transpose(first, last, start, gene, value, free, row_of, value_of)


_transposes.alone = _transpose


@_compiled
@no_type_check
def _keep(first: int, last: int, seed: Any, dropped: int, out: Any) -> None:
    """Fill rows `first` to `last` of numbers: 0, with probability dropped / 2^16, or what makes the mean 1.

    Four share a number of 64 bits, of the generator SplitMix64 (Steele, Lea and Flood 2014).
    """
    scale, least = _F(65536 / (65536 - dropped)), np.uint16(dropped)
    numbers = np.empty(out.shape[1] // 4, np.uint64)
    bits = numbers.view(np.uint16)
    for row in range(first, last):
        for i in range(numbers.size):
            z = seed[0] + np.uint64(row * numbers.size + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            numbers[i] = z ^ (z >> np.uint64(31))
        for j in range(bits.size):
            out[row, j] = scale if bits[j] >= least else _F(0)


@_in_parallel
@no_type_check
def _keeps(n_shares: int, n: int, seed: Any, dropped: int, out: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _keep(n * i // n_shares, n * (i + 1) // n_shares, seed, dropped, out)


_keeps.alone = _keep


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

# Of minibatches that were gathered, while they live: their version then, and where their entries stand. It
# shows all that torch operations do to them, but not what is written through x.numpy() or x.data.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

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
    logits: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    library: Tensor,
    x: Tensor,
    theta: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log density of rows of counts of mean library * softmax(logits + bias), and slopes of its weighted sum.

    The slopes in `logits` and `gate` take the place of these.

    Parameters
    ----------
    logits, gate, x
        Of shares; of zero inflation, None without; counts. Float32, (rows, genes), contiguous.
    bias, gate_bias
        Of each gene, added to these; None for nothing.
    library
        (rows, 1).
    theta
        Inverse dispersion, (1, genes), None for Poisson.
    weight
        Of each row, (rows,).

    Returns
    -------
    tuple of Tensor
        log p summed over genes, (rows,), and slopes in bias, gate_bias and theta, (1, genes), 0 where there
        is none, and in library, (rows, 1).
    """
    n_rows, n_genes = logits.shape
    library, weight = library.contiguous(), weight.contiguous()
    log_p, d_library = x.new_empty(n_rows), torch.empty_like(library)
    n_blocks = -(-n_rows // _BLOCK)
    slopes = x.new_zeros(3, n_blocks, n_genes)
    tensors = (logits, bias, gate, gate_bias, library, x, theta, weight, log_p, *slopes, d_library)
    arrays = (None if t is None else t.detach().numpy() for t in tensors)
    _shared(_shares_densities, n_blocks, logits.numel(), *arrays)
    summed = x.new_empty(3, 1, n_genes)
    _sum_blocks(slopes.numpy(), summed.numpy())
    return log_p, summed[0], summed[1], summed[2], d_library


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
    known = None if x.is_inference() else _entries.get(x)
    at = None
    start = torch.zeros(len(x) + 1, dtype=torch.int32)
    if known and known[0] == x._version:
        at = tuple(t.numpy() for t in known[1:])
        np.cumsum(at[1] - at[0], out=start[1:].numpy())
    else:
        _shared(_counts, len(x), x.numel(), x.numpy(), start[1:].numpy())
        start = start.cumsum(0, dtype=torch.int32)
    n = int(start[-1])
    listed = (x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int32), x.new_empty(0))
    if n > _DENSE * x.numel():
        return torch.log1p(x) @ weight, *listed
    gene, value = torch.empty(n, dtype=torch.int32), torch.empty(n)
    n_parts = min(len(x), _PARTS)
    found = np.empty((n_parts, x.shape[1]), np.int32)
    arrays = tuple(t.numpy() for t in (start, gene, value))
    _shared(_lists, n_parts, x.numel(), x.numpy(), at, *arrays, found)
    if slope:
        listed = (torch.empty(x.shape[1] + 1, dtype=torch.int32), torch.empty_like(gene), torch.empty(n))
        by_gene, row_of, value_of = (t.numpy() for t in listed)
        _add_up(found, by_gene)
        _shared(_transposes, n_parts, x.numel(), *arrays, found, row_of, value_of)
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
    at = (start[rows], stop[rows], gene, count)
    _shared(_gathers, len(rows), out.numel(), *(t.numpy() for t in (*at, out)))
    if not out.is_inference():
        _entries[out] = (out._version, *at)
    return out


def kept(seed: Tensor, n: int, dropped: int) -> Tensor:
    """Draw what `n` units are multiplied with in dropout.

    Parameters
    ----------
    seed
        One number, int64: with the same one the result is the same.
    dropped
        Probability that it is 0, times 2^16. Else it is the inverse of the share that is not.
    """
    out = torch.empty(-(-n // _WIDE), _WIDE)
    _shared(_keeps, len(out), n, seed.numpy().view(np.uint64), dropped, out.numpy())
    return out.view(-1)[:n]


# Operators of torch's own, so that a recorded step holds each as one operation that is not looked into.
# (torch.library.custom_op does the same, and imports torch._dynamo when first called: a second and a half.)
_LIBRARY = torch.library.Library("pyrosc", "FRAGMENT")
_LIBRARY.define(
    "log_density(Tensor x, Tensor mean, Tensor? theta, Tensor? gate, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "shares_log_density(Tensor(a!) logits, Tensor? bias, Tensor(b!)? gate, Tensor? gate_bias, Tensor library,"
    " Tensor x, Tensor? theta, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("log1p_linear(Tensor x, Tensor weight, bool slope) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "log1p_linear_slope(Tensor d_out, Tensor x, Tensor by_gene, Tensor row_of, Tensor value_of) -> Tensor"
)
_LIBRARY.define("kept(Tensor seed, int n, int dropped) -> Tensor")
for operator in (log_density, shares_log_density, log1p_linear, log1p_linear_slope, kept):
    _LIBRARY.impl(operator.__name__, operator, "CPU")
