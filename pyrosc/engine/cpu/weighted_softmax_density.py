"""What `softmax_density` and its backward do, at once: for rows whose gradients are known beforehand.

Slopes take the place of the logits, and those in parameters of genes are summed as it goes: nothing of size
rows x genes is made.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from pyrosc.engine.cpu.count_density import ROOM32, ROOM64
from pyrosc.engine.cpu.math32 import WIDE, F, add, compiled, in_parallel
from pyrosc.engine.cpu.softmax_density import density_of_row
from pyrosc.engine.cpu.threads import shared

_BLOCK = 16  # rows whose slopes in parameters of genes are summed one after the other


@compiled
@no_type_check
def _weighted(
    first: int,
    last: int,
    logits: Any,
    bias: Any,
    gate: Any,
    gate_bias: Any,
    total: Any,
    x: Any,
    theta: Any,
    kept: Any,
    weight: Any,
    log_p: Any,
    d_bias: Any,
    d_gate_bias: Any,
    d_theta: Any,
    d_total: Any,
) -> None:
    """Fill blocks `first` to `last` of rows of log p(x), and of the slopes of its weighted sum.

    They take the place of `logits` and `gate`; those in `bias`, `gate_bias` and `theta` are summed by block.
    """
    n_rows, n_genes = logits.shape
    s, b, place = np.empty(ROOM32, np.float32), np.empty(ROOM64), np.empty(2 * (WIDE + 1), np.int32)
    mean, by_mean = np.empty(WIDE, np.float32), np.empty(n_genes, np.float32)
    for row in range(first * _BLOCK, min(last * _BLOCK, n_rows)):
        block = row // _BLOCK
        log_p[row], slope = density_of_row(
            logits[row],
            bias,
            None if gate is None else gate[row],
            gate_bias,
            total[row, 0],
            x[row],
            None if theta is None else theta[0],
            None if kept is None else kept[row % kept.shape[0]],
            weight[row],
            None if bias is None else d_bias[block],
            None if gate is None else gate[row],
            None if gate_bias is None else d_gate_bias[block],
            None if theta is None else d_theta[block],
            by_mean,
            mean,
            s,
            b,
            place,
        )
        d_total[row, 0] = weight[row] * F(slope)


@in_parallel
@no_type_check
def _all_weighted(
    n_shares: int,
    n_blocks: int,
    logits: Any,
    bias: Any,
    gate: Any,
    gate_bias: Any,
    total: Any,
    x: Any,
    theta: Any,
    kept: Any,
    weight: Any,
    log_p: Any,
    d_bias: Any,
    d_gate_bias: Any,
    d_theta: Any,
    d_total: Any,
) -> None:
    """Do so for all blocks, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _weighted(
            n_blocks * i // n_shares,
            n_blocks * (i + 1) // n_shares,
            logits,
            bias,
            gate,
            gate_bias,
            total,
            x,
            theta,
            kept,
            weight,
            log_p,
            d_bias,
            d_gate_bias,
            d_theta,
            d_total,
        )


_all_weighted.alone = _weighted


@compiled
@no_type_check
def _sum_blocks(slopes: Any, out: Any) -> None:
    """Sum over the first axis, in an order that does not depend on threads, as torch's may."""
    out[:] = 0
    for block in range(slopes.shape[0]):
        add(F(1), slopes[block], out[0])


def weighted_softmax_density_(
    logits: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    total: Tensor,
    x: Tensor,
    theta: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log density of rows of counts of mean total * softmax(logits + bias), and slopes of its weighted sum.

    The slopes in `logits` and `gate` take the place of these.

    Parameters
    ----------
    logits, gate, x
        Of shares; of zero inflation, None without; counts. Float32, (rows, genes), contiguous.
    bias, gate_bias
        Of each gene, added to these; None for nothing.
    total
        (rows, 1).
    theta
        Inverse dispersion, (1, genes), None for Poisson.
    kept
        As of :func:`softmax_density`.
    weight
        Of each row, (rows,).

    Returns
    -------
    tuple of Tensor
        log p summed over genes, (rows,), and slopes in bias, gate_bias and theta, (1, genes), 0 where there
        is none, and in the total, (rows, 1).
    """
    n_rows, n_genes = logits.shape
    total, weight = total.contiguous(), weight.contiguous()
    log_p, d_total = x.new_empty(n_rows), torch.empty_like(total)
    n_blocks = -(-n_rows // _BLOCK)
    slopes = x.new_zeros(3, n_blocks, n_genes)
    tensors = (logits, bias, gate, gate_bias, total, x, theta, kept, weight, log_p, *slopes, d_total)
    arrays = (None if t is None else t.detach().numpy() for t in tensors)
    shared(_all_weighted, n_blocks, logits.numel(), *arrays)
    summed = [x.new_empty(1, n_genes) for _ in range(3)]
    for by_block, out in zip(slopes, summed, strict=True):
        _sum_blocks(by_block.numpy(), out.numpy())
    return log_p, *summed, d_total
