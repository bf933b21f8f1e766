"""Loops over counts on a CPU, compiled by numba: densities of cells, a linear map of them, minibatches.

Each is one pass over the entries where the same in torch operations is thirty, and is written twice: here for
speed, and in `distributions.py` for every device, and as the reference that tests compare with.
Rows are shared among torch's threads; the result does not depend on how many there are.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_ALONE = 1 << 15  # entries below which waking another thread costs more than it saves
_EXACT = 16  # counts up to this have their rising factorial multiplied out
_DENSE = 0.3  # share of entries above which a product of dense matrices is sooner done
_SHARES = 4  # of the rows, for each thread
_WIDE = 512  # entries summed in float32 before the sum goes on in float64

# Sums may be reordered, so that they run in the processor's vectors; NaN and infinity keep their meaning.
_compiled = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp", "reassoc"}
)
_in_parallel = numba.njit(parallel=True, cache=True, error_model="numpy")
_inlined = numba.njit(inline="always")

_LOG_FACTORIAL = np.array([math.lgamma(k + 1.0) for k in range(1024)])
_LOG1P = np.log1p(np.arange(1024)).astype(np.float32)
_LARGEST, _LARGEST64 = np.float32(3e38), 1e308
_STEEPEST = 1e30
_SMALLEST_MEAN = float(torch.finfo(torch.float32).tiny)
_LN2 = math.log(2.0)

# 2 atanh(s) = 2 s + s q(s^2), the log of (1 + s) / (1 - s); here |s| < 0.172.
_F0, _F1, _F2, _F3, _F4 = (np.float32(2 / k) for k in (3, 5, 7, 9, 11))
_ONE, _TWO, _LN2_32 = np.float32(1), np.float32(2), np.float32(_LN2)


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


@_inlined
@no_type_check
def _zero_inflated_at_zero(y: float, g: float) -> tuple[float, float, float]:
    """Return log(pi + (1 - pi) p0), its slope in y = log p0 and its slope in g = logit pi, float64."""
    small = _exp(-abs(g))
    bound = 1.0 / (1.0 + small)
    pi = bound if g > 0 else small * bound
    kept = small * bound if g > 0 else bound
    p0 = _exp(y) if y == y else y
    lost = -y * (1.0 + y * (0.5 + y * (1.0 / 6 + y * (1.0 / 24)))) if y > -1e-3 else 1.0 - p0
    positive = kept * lost
    p = pi + kept * p0
    e, _, s, q = _log_parts(p, -positive)
    log = e * _LN2 + s * (2.0 + q)
    log = log if p < _LARGEST64 else p
    return log, kept * p0 / p, pi * positive / p


@numba.njit(cache=True, error_model="numpy")
@no_type_check
def _stirling(z: float) -> tuple[float, float]:
    """Return lgamma(z) less (z - 1/2) log z - z, up to a constant, and digamma(z) less log z - 1 / (2 z).

    For z >= 6 (Abramowitz and Stegun 6.1.41, 6.3.18).
    """
    w = 1.0 / (z * z)
    value = (1 / 12 + w * (-1 / 360 + w * (1 / 1260 + w * (-1 / 1680 + w * (1 / 1188))))) / z
    slope = w * (-1 / 12 + w * (1 / 120 + w * (-1 / 252 + w * (1 / 240 + w * (-1 / 132)))))
    return value, slope


@numba.njit(cache=True, error_model="numpy")
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


@_compiled
@no_type_check
def _rising_factorials(n: int, theta: Any, k: Any, product: Any, slope: Any, rest: Any) -> None:
    """Fill in Gamma(theta + k) / (Gamma(theta) k!), as log product + rest, and the slope of its log in theta.

    Small counts have their factors multiplied out, four for all and the others for those that have more:
    product and its derivative, whose ratio is the slope.
    """
    for i in range(n):
        factor, more = theta[i], k[i] > 0
        p, d = (factor if more else 1.0), (1.0 if more else 0.0)
        factor, more = factor + 1.0, k[i] > 1
        d, p = (d * factor + p if more else d), (p * factor if more else p)
        factor, more = factor + 1.0, k[i] > 2
        d, p = (d * factor + p if more else d), (p * factor if more else p)
        factor, more = factor + 1.0, k[i] > 3
        d, p = (d * factor + p if more else d), (p * factor if more else p)
        product[i], slope[i] = p, d / p
        rest[i] = -_LOG_FACTORIAL[int(min(max(k[i], 0.0), _EXACT))]
    for i in range(n):
        if k[i] > 4 or k[i] != math.floor(k[i]) or k[i] < 0:
            if k[i] <= _EXACT and k[i] == math.floor(k[i]) and k[i] > 0:
                p, d = product[i], slope[i] * product[i]
                for j in range(4, int(k[i])):
                    factor = theta[i] + j
                    d = d * factor + p
                    p *= factor
                product[i], slope[i] = p, d / p
            else:
                log_rising, slope[i] = _log_rising_factorial(theta[i], k[i])
                product[i], rest[i] = 1.0, log_rising - math.lgamma(k[i] + 1.0)


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
    """Fill rows `first` to `last` of log p(x), summed over genes, and of its partial derivatives.

    Of arguments that are None numba compiles nothing: `theta` of a Poisson, `gate` without zero inflation,
    slopes that nobody wants.
    """
    n_genes = x.shape[1]
    place = np.empty(n_genes, np.int32)
    k, mu, t, product, slope, rest, by_mean = np.empty((7, n_genes))
    for row in range(first, last):
        x_row, mean_row = x[row % x.shape[0]], mean[row % mean.shape[0]]
        if theta is not None:
            theta_row = theta[row % theta.shape[0]]
        if gate is not None:
            gate_row = gate[row % gate.shape[0]]
        total = 0.0
        # What a zero says, everywhere.
        for start in range(0, n_genes, _WIDE):
            stop = min(n_genes, start + _WIDE)
            if gate is not None:
                part64 = 0.0
                for j in range(start, stop):
                    m = np.float64(mean_row[j])
                    if theta is not None:
                        y, y_mean, y_theta = _nb_at_zero(m, np.float64(theta_row[j]))
                    else:
                        y, y_mean = -m, -1.0
                    log, by_y, by_gate = _zero_inflated_at_zero(y, np.float64(gate_row[j]))
                    part64 += log if x_row[j] == 0 else 0.0
                    if d_mean is not None:
                        d_mean[row, j] = by_y * y_mean
                    if theta is not None and d_theta is not None:
                        d_theta[row, j] = by_y * y_theta
                    if d_gate is not None:
                        d_gate[row, j] = by_gate
                total += part64
            else:
                part = np.float32(0)
                for j in range(start, stop):
                    mu32 = mean_row[j]
                    if theta is None:
                        part -= mu32 if x_row[j] == 0 else np.float32(0)
                        if d_mean is not None:
                            d_mean[row, j] = -_ONE
                    else:  # _nb_at_zero, in float32: twice as many to a vector
                        r = mu32 / theta_row[j]
                        u = _ONE + r
                        bits = np.float32(u).view(np.int32)
                        e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
                        f = r if e == 0 else np.int32(bits - (e << np.int32(23))).view(np.float32) - _ONE
                        s = f / (_TWO + f)
                        z = s * s
                        q = z * (_F0 + z * (_F1 + z * (_F2 + z * (_F3 + z * _F4))))
                        log = np.float32(e) * _LN2_32 + s * (_TWO + q)
                        log = log if u < _LARGEST else u
                        d = _ONE / u
                        part -= theta_row[j] * log if x_row[j] == 0 else np.float32(0)
                        if d_mean is not None:
                            d_mean[row, j] = -d
                        if d_theta is not None:
                            d_theta[row, j] = -(s * (f * d + q)) if e == 0 else r * d - log
                total += part
        # The counts, in float64: gathered, so that these loops run in vectors too.
        n = 0
        for j in range(n_genes):
            place[n] = j
            n += x_row[j] != 0
        for i in range(n):
            k[i] = x_row[place[i]]
            mu[i] = max(np.float64(mean_row[place[i]]), _SMALLEST_MEAN)
        if theta is None:
            for i in range(n):
                whole = k[i] < _LOG_FACTORIAL.size and k[i] == math.floor(k[i]) and k[i] > 0
                rest[i] = -(_LOG_FACTORIAL[int(k[i])] if whole else math.lgamma(k[i] + 1.0))
            for i in range(n):
                total += k[i] * _log(mu[i]) - mu[i] + rest[i]
                by_mean[i] = (k[i] - mu[i]) / mu[i]
        else:
            for i in range(n):
                t[i] = theta_row[place[i]]
            _rising_factorials(n, t, k, product, slope, rest)
            for i in range(n):
                at_zero, _, zero_theta = _nb_at_zero(mu[i], t[i])
                inverse = 1.0 / (mu[i] + t[i])
                total += _log(product[i]) + rest[i] + k[i] * _log(mu[i] * inverse) + at_zero
                by_mean[i] = (k[i] - mu[i]) / mu[i] * (t[i] * inverse)
                slope[i] += zero_theta - k[i] * inverse
            if d_theta is not None:
                for i in range(n):
                    d_theta[row, place[i]] = slope[i]
        if d_mean is not None:
            for i in range(n):
                d_mean[row, place[i]] = min(by_mean[i], _STEEPEST)
        if gate is not None:
            for i in range(n):
                g = np.float64(gate_row[place[i]])
                small = _exp(-abs(g))
                lost = 1.0 / (1.0 + small) if g > 0 else small / (1.0 + small)
                total += -_log(1.0 + small) - max(g, 0.0)
                by_mean[i] = -lost
            if d_gate is not None:
                for i in range(n):
                    d_gate[row, place[i]] = by_mean[i]
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
    """List the genes and the log(1 + x) of what is not zero in rows `first` to `last`, each from `start` on."""
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
def _gather(first: int, last: int, rows: Any, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Fill rows `first` to `last` of `out` with rows of a CSR matrix, made dense."""
    for i in range(first, last):
        out[i] = 0
        for entry in range(start[rows[i]], stop[rows[i]]):
            out[i, gene[entry]] = count[entry]


@_in_parallel
@no_type_check
def _gathers(
    n_shares: int, n_rows: int, rows: Any, start: Any, stop: Any, gene: Any, count: Any, out: Any
) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _gather(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, rows, start, stop, gene, count, out)


_gathers.alone = _gather


# From torch, and back.

_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=_note_fork
    )  # there GNU's OpenMP ends the process that asks for threads


def _shared(run: Any, n_rows: int, n_entries: int, *arguments: Any) -> None:
    """Call run(n_shares, n_rows, ...) on as many threads as torch has; numba's number is left as it was."""
    n_threads = 1 if _forked or n_entries < _ALONE else torch.get_num_threads()
    n_threads = min(n_threads, numba.config.NUMBA_NUM_THREADS)
    if n_threads == 1:
        run.alone(0, n_rows, *arguments)
        return
    before = numba.get_num_threads()
    numba.set_num_threads(n_threads)
    try:
        run(min(n_rows, _SHARES * n_threads), n_rows, *arguments)
    finally:
        numba.set_num_threads(before)


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
    arrays = [None if t is None else t.numpy() for t in inputs]
    filled = [slope.numpy() if want else None for slope, want in zip(slopes, wanted, strict=True)]
    _shared(_log_densities, n_rows, n_rows * n_genes, *arrays, log_p.numpy(), *filled)
    return log_p, *slopes


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
    arrays = (t.numpy() for t in (rows, start, stop, gene, count, out))
    _shared(_gathers, len(rows), out.numel(), *arrays)
    return out


# Operators of torch's own, so that a recorded step holds each as one operation that is not looked into.
# (torch.library.custom_op does the same and imports torch._dynamo when it is first called: a second and a half.)
_LIBRARY = torch.library.Library("pyrosc", "DEF")
_LIBRARY.define(
    "log_density(Tensor x, Tensor mean, Tensor? theta, Tensor? gate, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("log1p_linear(Tensor x, Tensor weight, bool slope) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "log1p_linear_slope(Tensor d_out, Tensor x, Tensor by_gene, Tensor row_of, Tensor value_of) -> Tensor"
)
for operator in (log_density, log1p_linear, log1p_linear_slope):
    _LIBRARY.impl(operator.__name__, operator, "CPU")
