"""engine.cpu.math32."""

import math
from typing import Any, no_type_check

import numba
import numpy as np

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
_LARGEST, _LARGEST64 = np.float32(3e38), 1e308
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
def _sigmoid32(g: float) -> tuple[float, float, float]:
    """Return sigmoid(g), sigmoid(-g) and exp(-|g|)."""
    scale, t = _exp_parts32(-abs(g))
    small = scale + scale * t
    bound = _F(1) / (_F(1) + small)
    return (bound if g > 0 else small * bound), (small * bound if g > 0 else bound), small


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


@_part
@no_type_check
def _add(weight: float, values: Any, total: Any) -> None:
    for j in range(total.size):
        total[j] += weight * values[j]
