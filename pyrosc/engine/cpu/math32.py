"""Logarithm, exponential and sigmoid as the loops need them, and how loops are compiled.

In float32, twice as many numbers to a processor's vector: what a zero says, which is evaluated for every
entry. In float64: positive counts, of which there are few. Polynomials are sums of pairs, whose terms do not
wait for each other.
"""

import math
from typing import Any, no_type_check

import numba
import numpy as np

WIDE = 512  # entries summed in float32 before the sum goes on in float64

# Sums may be reordered, so that they run in the processor's vectors; NaN and infinity keep their meaning.
_FAST = {"contract", "nsz", "arcp", "reassoc"}
compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
# What these loops call becomes part of each: the process that compiles would else call copies of its own,
# with other last digits than all that find the loops in the cache.
piece = numba.njit(forceinline=True, error_model="numpy", fastmath=_FAST)
exact_piece = numba.njit(forceinline=True, error_model="numpy")
in_parallel = numba.njit(parallel=True, cache=True, error_model="numpy")
inlined = numba.njit(inline="always")

LARGEST, LARGEST64 = np.float32(3e38), 1e308
LN2 = math.log(2.0)
NOT_SIGN = np.int32(0x7FFFFFFF)  # all bits of a float32 but the sign: 0 for -0.0 too
F = np.float32
NAN = np.float32(math.nan)


@inlined
@no_type_check
def split(u: float, less_one: float) -> tuple[float, float]:
    """Return (e, f) with u = 2^e (1 + f), f in [-0.3, 0.42), for a normal float64 u > 0.

    Where e = 0, f is `less_one`: u - 1 without the rounding that u has, so that logs near 0 keep digits.
    """
    bits = np.float64(u).view(np.int64)
    e = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    mantissa = np.int64(bits - (e << np.int64(52))).view(np.float64)
    return np.float64(e), less_one if e == 0 else mantissa - 1.0


@inlined
@no_type_check
def log_rest(s: float) -> float:
    """Return q with log(1 + f) = s (2 + q), for s = f / (2 + f)."""
    z = s * s
    z2 = z * z
    low = 2.0 / 3 + z * (2.0 / 5) + z2 * (2.0 / 7 + z * (2.0 / 9))
    high = 2.0 / 11 + z * (2.0 / 13) + z2 * (2.0 / 15 + z * (2.0 / 17))
    return z * (low + z2 * z2 * high)


@inlined
@no_type_check
def log64(u: float) -> float:
    """Return log u, of a normal float64 u > 0; NaN and infinity as they are."""
    e, f = split(u, u - 1.0)
    s = f / (2.0 + f)
    log = e * LN2 + s * (2.0 + log_rest(s))
    return log if u < LARGEST64 else u


@inlined
@no_type_check
def log_parts32(u: float, less_one: float) -> tuple[int, float, float]:
    """Return (e, f, q) with log u = e log 2 + f + f^2 q; the polynomial errs by 6e-9 of log(1 + f)."""
    bits = np.float32(u).view(np.int32)
    e = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = less_one if e == 0 else np.int32(bits - np.int32(e << np.int32(23))).view(np.float32) - F(1)
    f2 = f * f
    low = F(0.33333331) + f * F(-0.25000820) + f2 * (F(0.20001227) + f * F(-0.16623357))
    high = F(0.14201759) + f * F(-0.13160183) + f2 * (F(0.12761575) + f * F(-0.076344930))
    return e, f, f * (low + f2 * f2 * high) - F(0.5)


@inlined
@no_type_check
def exp_parts32(y: float) -> tuple[float, float]:
    """Return 2^n and t with exp y = 2^n (1 + t), t in [-0.3, 0.42), of y that is not positive; or of -87."""
    y = F(-87) if y < F(-87) else y
    n = np.floor(y * F(1 / LN2) + F(0.5))
    r = y - n * F(LN2)
    r2 = r * r
    q = F(1 / 2) + r * F(1 / 6) + r2 * (F(1 / 24) + r * F(1 / 120) + r2 * (F(1 / 720) + r * F(1 / 5040)))
    return np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32), r + r2 * q


@inlined
@no_type_check
def sigmoid32(g: float) -> tuple[float, float, float]:
    """Return sigmoid(g), sigmoid(-g) and exp(-|g|)."""
    scale, t = exp_parts32(-abs(g))
    small = scale + scale * t
    bound = F(1) / (F(1) + small)
    return (bound if g > 0 else small * bound), (small * bound if g > 0 else bound), small


@piece
@no_type_check
def places(x: Any, place: Any) -> int:
    """List where a row is not zero; return in how many places."""
    bits = x.view(np.int32)  # (compared in one operation, where a number may be none)
    n = 0
    for j in range(bits.size):
        place[n] = j
        n += (bits[j] & NOT_SIGN) != 0
    return n


@piece
@no_type_check
def add(weight: float, values: Any, total: Any) -> None:
    """Add a weighted row to another, in place."""
    for j in range(total.size):
        total[j] += weight * values[j]
