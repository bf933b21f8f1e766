"""The log density of rows of counts whose mean is total * softmax(logits), and its slopes, in one pass.

A decoder of counts ends in softmax(logits), a library size times that, and a density: in torch operations,
seven passes over minibatch x genes. In one loop a row stays in the processor's cache. With m = total * share
and d = d log p / d m of each gene::

    d log p / d logit_g = total share_g (d_g - sum_h share_h d_h),    d log p / d total = sum_h share_h d_h

Autograd multiplies the slopes by the gradient of each row, by `softmax_density_backward`. Where that is known
beforehand, `weighted_softmax_density_` does both at once.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from pyrosc.engine.cpu.count_density import (
    D_GATE,
    D_MEAN,
    D_THETA,
    ROOM32,
    ROOM64,
    log_density_of_block,
)
from pyrosc.engine.cpu.math32 import WIDE, F, add, compiled, exp_parts32, in_parallel, inlined, piece
from pyrosc.engine.cpu.threads import shared


@inlined
@no_type_check
def _ordered(value: float) -> int:
    """Return an integer for a float32: the larger of two is that of the larger number."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@piece
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
    for start in range(0, n_genes, WIDE):
        block, partial = logits[start : start + WIDE], F(0)
        for j in range(block.size):
            y = block[j] - largest
            scale, t = exp_parts32(y)
            power = F(0) if y < F(-87) else scale + scale * t
            block[j] = power
            partial += power
        total += partial
    return total


@inlined
@no_type_check
def _slopes_of_gate(weight: float, s: Any, by_gate: Any) -> None:
    """Fill in the slopes in the gate, times `weight`."""
    for j in range(by_gate.size):
        by_gate[j] = weight * s[D_GATE + j]


@inlined
@no_type_check
def density_of_row(
    logits: Any,
    bias: Any,
    gate: Any,
    gate_bias: Any,
    size: float,
    x: Any,
    theta: Any,
    kept: Any,
    weight: float,
    d_bias: Any,
    d_gate: Any,
    d_gate_bias: Any,
    d_theta: Any,
    by_mean: Any,
    mean: Any,
    s: Any,
    b: Any,
    place: Any,
) -> tuple[float, float]:
    """Return log p of a row, summed over genes, and its slope in the total.

    Slopes times `weight` take the place of `logits` and `d_gate`, which may be `gate`, and are added to
    `d_bias`, `d_gate_bias` and `d_theta`. `by_mean`, `mean`, `s`, `b` and `place` are room to work in. Of
    arguments that are None nothing is compiled.
    """
    n_genes = logits.size
    inverse = F(1 / _softmax(logits, bias))
    total, average = 0.0, 0.0
    for start in range(0, n_genes, WIDE):
        stop = min(n_genes, start + WIDE)
        share, slope, partial = logits[start:stop], by_mean[start:stop], F(0)
        for j in range(share.size):
            share[j] *= inverse
            mean[j] = size * share[j]
        if kept is not None:
            for j in range(share.size):
                mean[j] *= kept[start + j]
        if gate is not None and gate_bias is not None:
            add(F(1), gate_bias[start:stop], gate[start:stop])
        total += log_density_of_block(
            x[start:stop],
            mean[: share.size],
            None if theta is None else theta[start:stop],
            None if gate is None else gate[start:stop],
            s,
            b,
            place,
        )
        if kept is not None:
            for j in range(share.size):
                s[D_MEAN + j] *= kept[start + j]
        for j in range(share.size):
            slope[j] = s[D_MEAN + j]
            partial += share[j] * slope[j]
        average += partial
        if d_theta is not None:
            add(weight, s[D_THETA:], d_theta[start:stop])
        if d_gate is not None:
            by_gate = d_gate[start:stop]
            _slopes_of_gate(weight, s, by_gate)
            if d_gate_bias is not None:
                add(F(1), by_gate, d_gate_bias[start:stop])
    scale, less = weight * size, F(average)
    for j in range(n_genes):
        logits[j] *= scale * (by_mean[j] - less)
        if d_bias is not None:
            d_bias[j] += logits[j]
    return total, average


@compiled
@no_type_check
def _density(
    first: int,
    last: int,
    logits: Any,
    total: Any,
    x: Any,
    theta: Any,
    gate: Any,
    kept: Any,
    log_p: Any,
    d_logits: Any,
    d_total: Any,
    d_theta: Any,
    d_gate: Any,
) -> None:
    """Fill rows `first` to `last` of log p(x), summed over genes, and of the slopes wanted.

    Each array has as many rows, or fewer that are taken over and over.
    """
    n_genes = x.shape[1]
    s, b, place = np.empty(ROOM32, np.float32), np.empty(ROOM64), np.empty(2 * (WIDE + 1), np.int32)
    mean, by_mean = np.empty(WIDE, np.float32), np.empty(n_genes, np.float32)
    room = np.empty(n_genes, np.float32)
    for row in range(first, last):
        shares = room if d_logits is None else d_logits[row]
        shares[:] = logits[row % logits.shape[0]]
        if d_theta is not None:
            d_theta[row] = 0
        log_p[row], d_total[row, 0] = density_of_row(
            shares,
            None,
            None if gate is None else gate[row % gate.shape[0]],
            None,
            total[row % total.shape[0], 0],
            x[row % x.shape[0]],
            None if theta is None else theta[row % theta.shape[0]],
            None if kept is None else kept[row % kept.shape[0]],
            F(1),
            None,
            None if d_gate is None else d_gate[row],
            None,
            None if d_theta is None else d_theta[row],
            by_mean,
            mean,
            s,
            b,
            place,
        )


@in_parallel
@no_type_check
def _densities(
    n_shares: int,
    n_rows: int,
    logits: Any,
    total: Any,
    x: Any,
    theta: Any,
    gate: Any,
    kept: Any,
    log_p: Any,
    d_logits: Any,
    d_total: Any,
    d_theta: Any,
    d_gate: Any,
) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _density(
            n_rows * i // n_shares,
            n_rows * (i + 1) // n_shares,
            logits,
            total,
            x,
            theta,
            gate,
            kept,
            log_p,
            d_logits,
            d_total,
            d_theta,
            d_gate,
        )


_densities.alone = _density


def softmax_density(
    logits: Tensor,
    total: Tensor,
    x: Tensor,
    theta: Tensor | None,
    gate: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log density of rows of counts of mean total * softmax(logits), and its slopes.

    Parameters
    ----------
    logits, x, theta, gate
        Of shares; counts; inverse dispersion, None for Poisson; logits of zero inflation, None without. All
        float32 of shape (some rows, genes), contiguous: the one with the most rows is taken once, the others
        over and over.
    total
        (some rows, 1), likewise.
    kept
        1 for a count that has a density, 0 for one that is left out, and is 0 in `x`; None for all.
    wanted
        For logits, theta and gate: whether the slope is.

    Returns
    -------
    tuple of Tensor
        log p summed over genes, (rows,), and slopes in logits, total, theta and gate: (rows, genes) or empty,
        that in the total (rows, 1).
    """
    n_rows = max(len(t) for t in (logits, total, x, theta, gate, kept) if t is not None)
    n_genes = x.shape[1]
    log_p, d_total = x.new_empty(n_rows), x.new_empty(n_rows, 1)
    slopes = [x.new_empty((n_rows, n_genes) if want else (0, n_genes)) for want in wanted]
    arrays = [None if t is None else t.detach().numpy() for t in (logits, total, x, theta, gate, kept)]
    d_logits, d_theta, d_gate = (
        slope.numpy() if want else None for slope, want in zip(slopes, wanted, strict=True)
    )
    filled = (log_p.numpy(), d_logits, d_total.numpy(), d_theta, d_gate)
    shared(_densities, n_rows, n_rows * n_genes, *arrays, *filled)
    return log_p, slopes[0], d_total, slopes[1], slopes[2]


def softmax_density_backward(
    weight: Tensor,
    d_logits: Tensor,
    d_total: Tensor,
    d_theta: Tensor,
    d_gate: Tensor,
    of_genes: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes of :func:`softmax_density` times the gradient of each row.

    Parameters
    ----------
    weight
        The gradient, (rows,).
    d_logits, d_total, d_theta, d_gate
        The slopes; those that nobody wants are empty, and stay so.
    of_genes
        For logits, theta and gate: whether they are the same in all rows, so that theirs are summed.

    Returns
    -------
    tuple of Tensor
        Gradients in logits, total, theta and gate, (rows, genes) or (1, genes); (rows, 1) for the total.
    """

    def chained(slopes: Tensor, summed: bool) -> Tensor:  # noqa: FBT001
        if not len(slopes):
            return torch.empty_like(slopes)
        return (weight @ slopes)[None] if summed else weight[:, None] * slopes

    by_logits, by_theta, by_gate = map(chained, (d_logits, d_theta, d_gate), of_genes)
    return by_logits, weight[:, None] * d_total, by_theta, by_gate
