"""The log density of rows of counts given their means, and its slopes, on CUDA: compiled by Triton.

What `cpu/count_density.py` is on a CPU. Everything is in float64, of which devices made for training have
plenty and others little; the formulas are those of `distributions/density.py`, where they are explained.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128  # genes that one program looks at: one to a thread
_TABLE = 256  # counts below have the logs of their factorials looked up
_SMALLEST_MEAN = tl.constexpr(float(torch.finfo(torch.float32).tiny))
_STEEPEST = tl.constexpr(1e30)


@triton.jit
@no_type_check
def _log1p(r):
    """Log of 1 + r for r > -1, from a logarithm that rounds 1 + r (Kahan)."""
    u = 1.0 + r
    less_one = u - 1.0
    inside = (less_one != 0.0) & (r < 1e300)
    return tl.where(inside, tl.log(u) * (r / tl.where(inside, less_one, 1.0)), r)


@triton.jit
@no_type_check
def _expm1(y):
    """Exp of y <= 0, less 1, from one that rounds (Kahan)."""
    u = tl.exp(y)
    inside = (u < 1.0) & (u > 1e-300)
    log_u = tl.log(tl.where(inside, u, 0.5))
    return tl.where(inside, (u - 1.0) * (y / log_u), tl.where(u < 1.0, -1.0, y))


@triton.jit
@no_type_check
def _less_log1p(s, log1p_ratio):
    """Return s - log(1 + r), s = r / (1 + r); where that cancels, by its series."""
    series = -1.0 / 11
    series = series * s - 1.0 / 10
    series = series * s - 1.0 / 9
    series = series * s - 1.0 / 8
    series = series * s - 1.0 / 7
    series = series * s - 1.0 / 6
    series = series * s - 1.0 / 5
    series = series * s - 1.0 / 4
    series = series * s - 1.0 / 3
    series = series * s - 1.0 / 2
    return tl.where(s < 0.05, series * s * s, s - log1p_ratio)


@triton.jit
@no_type_check
def _stirling(z):
    w = 1.0 / (z * z)
    return (1.0 / 12 + w * (-1.0 / 360 + w * (1.0 / 1260 + w * (-1.0 / 1680 + w * (1.0 / 1188))))) / z


@triton.jit
@no_type_check
def _stirling_slope(z):
    w = 1.0 / (z * z)
    return w * (-1.0 / 12 + w * (1.0 / 120 + w * (-1.0 / 252 + w * (1.0 / 240 - w * (1.0 / 132)))))


@triton.jit
@no_type_check
def _log_factorial(x, table_at, inside, N_TABLE: tl.constexpr):
    """Log of x!: looked up, or by Stirling's formula where the table ends; NaN for what is no count."""
    known = (x >= 0.0) & (x < N_TABLE) & (x == tl.floor(x))
    looked_up = tl.load(table_at + tl.where(known, x, 0.0).to(tl.int32), inside & known, 0.0)
    z = tl.where(x < N_TABLE, float("nan"), x + 1.0)
    return tl.where(known, looked_up, (z - 0.5) * tl.log(z) - z + 0.9189385332046728 + _stirling(z))


@triton.jit
@no_type_check
def _log_rising_factorial(theta, x):
    """Log of Gamma(theta + x) / Gamma(theta), and its slope in theta."""
    a, b = theta, theta + x
    factors = a / b
    slope = x / (a * b)
    for _ in range(5):
        a += 1.0
        b += 1.0
        factors *= a / b
        slope += x / (a * b)
    a += 1.0
    b += 1.0
    log_growth = _log1p(x / a)
    value = tl.log(factors) + (b - 0.5) * log_growth + x * (tl.log(a) - 1.0) + _stirling(b) - _stirling(a)
    return value, slope + log_growth + x / (2.0 * a * b) + _stirling_slope(b) - _stirling_slope(a)


@triton.jit
@no_type_check
def _log_density(
    x_at,
    mean_at,
    theta_at,
    gate_at,
    log_p_at,
    d_mean_at,
    d_theta_at,
    d_gate_at,
    table_at,
    n_genes,
    x_rows,
    mean_rows,
    theta_rows,
    gate_rows,
    BLOCK: tl.constexpr,
    N_TABLE: tl.constexpr,
):
    """Fill in a row's log p(x) of a block of genes, and the slopes of each; None is what there is none of."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    gene = block * BLOCK + tl.arange(0, BLOCK)
    inside = gene < n_genes
    x = tl.load(x_at + (row % x_rows) * n_genes + gene, inside, 0.0).to(tl.float64)
    mu = tl.load(mean_at + (row % mean_rows) * n_genes + gene, inside, 1.0).to(tl.float64)
    zero = x == 0.0
    mu = tl.where(zero, mu, tl.maximum(mu, _SMALLEST_MEAN))
    log_factorial = _log_factorial(x, table_at, inside, N_TABLE)
    safe = tl.where(zero, 1.0, mu)
    # The log density of a zero, y, and that of a count, z, with their slopes.
    if theta_at is None:
        y, y_mean = -mu, tl.full([BLOCK], -1.0, tl.float64)
        z, z_mean = x * tl.log(safe) - mu - log_factorial, (x - mu) / safe
    else:
        theta = tl.load(theta_at + (row % theta_rows) * n_genes + gene, inside, 1.0).to(tl.float64)
        total = mu + theta
        share, log1p_ratio = mu / total, _log1p(mu / theta)
        y, y_mean, y_theta = -theta * log1p_ratio, -theta / total, _less_log1p(share, log1p_ratio)
        log_rising, slope = _log_rising_factorial(theta, x)
        z = log_rising - log_factorial + x * tl.log(tl.where(zero, 1.0, share)) + y
        z_mean, z_theta = (x - mu) / safe * (theta / total), slope - x / total + y_theta
    z_mean = tl.minimum(z_mean, _STEEPEST)
    if gate_at is not None:
        g = tl.load(gate_at + (row % gate_rows) * n_genes + gene, inside, 0.0).to(tl.float64)
        small = tl.exp(-tl.abs(g))
        pi = tl.where(g > 0.0, 1.0, small) / (1.0 + small)
        log_kept = -_log1p(small) - tl.maximum(g, 0.0)
        positive = tl.where(g > 0.0, small, 1.0) / (1.0 + small) * -_expm1(y)
        log_odds = tl.maximum(g, y) + _log1p(tl.exp(-tl.abs(g - y)))
        inflated = tl.where(positive < 0.5, _log1p(-tl.minimum(positive, 0.5)), log_odds + log_kept)
        far = tl.exp(-tl.abs(g - y))
        by_y = tl.where(g > y, far, 1.0) / (1.0 + far)
        by_g = tl.where(g > y, 1.0, far) / (1.0 + far) * positive
        y, y_mean, z = inflated, by_y * y_mean, z + log_kept
        if theta_at is not None:
            y_theta = by_y * y_theta
        if d_gate_at is not None:
            tl.store(d_gate_at + row * n_genes + gene, tl.where(zero, by_g, -pi).to(tl.float32), inside)
    log_p = tl.sum(tl.where(inside, tl.where(zero, y, z), 0.0), 0)
    tl.store(log_p_at + row * tl.num_programs(1) + block, log_p)
    if d_mean_at is not None:
        tl.store(d_mean_at + row * n_genes + gene, tl.where(zero, y_mean, z_mean).to(tl.float32), inside)
    if theta_at is not None and d_theta_at is not None:
        tl.store(d_theta_at + row * n_genes + gene, tl.where(zero, y_theta, z_theta).to(tl.float32), inside)


def log_density(
    x: Tensor, mean: Tensor, theta: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log density of rows of counts, and its slopes: `cpu.count_density.log_density`, on CUDA."""
    inputs = [x, mean, theta, gate]
    n_rows, n_genes = max(len(t) for t in inputs if t is not None), x.shape[1]
    n_blocks = triton.cdiv(n_genes, _BLOCK)
    log_p = x.new_empty((n_rows, n_blocks), dtype=torch.float64)
    slopes = [x.new_empty((n_rows, n_genes) if want else (0, n_genes)) for want in wanted]
    filled = [slope if want else None for slope, want in zip(slopes, wanted, strict=True)]
    rows = [0 if t is None else len(t) for t in inputs]
    arguments: list[Any] = [*inputs, log_p, *filled, _log_factorials(x.device, _TABLE), n_genes, *rows]
    with torch.cuda.device_of(x):
        _log_density[n_rows, n_blocks](*arguments, BLOCK=_BLOCK, N_TABLE=_TABLE)
    return log_p.sum(1).to(x.dtype), slopes[0], slopes[1], slopes[2]


@cache
def _log_factorials(device: torch.device, n: int) -> Tensor:
    return torch.lgamma(torch.arange(1, n + 1, dtype=torch.float64)).to(device)
