"""Log densities of one count and their slopes, as pieces of loops: negative binomial and zero inflation.

The formulas are those of `distributions/density.py`, where they are explained.
"""

import math
from typing import no_type_check

from pyrosc.engine.cpu.math32 import (
    LARGEST,
    LARGEST64,
    LN2,
    F,
    exact_piece,
    exp_parts32,
    inlined,
    log_parts32,
    log_rest,
    sigmoid32,
    split,
)


@inlined
@no_type_check
def nb_at_zero(mu: float, theta: float) -> tuple[float, float, float]:
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
def nb_at_zero32(mu: float, theta: float) -> tuple[float, float, float]:
    """Return what :func:`nb_at_zero` does; with d = 1 / (1 + r), r d - log(1 + r) is -r^2 (d + q) there."""
    r = mu / theta
    u = F(1) + r
    e, f, q = log_parts32(u, r)
    log = F(e) * F(LN2) + (f + f * f * q)
    log = log if u < LARGEST else u
    d = F(1) / u
    return -theta * log, -d, -(f * f * (d + q)) if e == 0 else r * d - log


@inlined
@no_type_check
def zero_inflated_at_zero32(y: float, pi: float, kept: float) -> tuple[float, float, float, float]:
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
def log_kept32(g: float) -> tuple[float, float]:
    """Return log(1 - pi) and its slope in g = logit pi."""
    pi, _, small = sigmoid32(g)
    e, f, q = log_parts32(F(1) + small, small)
    return -(max(g, F(0)) + (F(e) * F(LN2) + (f + f * f * q))), -pi


@exact_piece
@no_type_check
def zero_inflated_far_out(y: float, g: float) -> tuple[float, float, float]:
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
def log_rising_factorial(theta: float, x: float) -> tuple[float, float]:
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
