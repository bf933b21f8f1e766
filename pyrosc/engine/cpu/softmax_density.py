"""engine.cpu.softmax_density."""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from pyrosc.engine.cpu.count_density import (
    _D_GATE,
    _D_MEAN,
    _D_THETA,
    _ROOM32,
    _ROOM64,
    _log_density_of_block,
)
from pyrosc.engine.cpu.math32 import _F, _WIDE, _add, _compiled, _exp_parts32, _in_parallel, _inlined, _part
from pyrosc.engine.cpu.threads import shared

_BLOCK = 16  # rows whose slopes in parameters of genes are summed one after the other


@_inlined
@no_type_check
def _ordered(value: float) -> int:
    """Return an integer for a float32: the larger of two is that of the larger number."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


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
    shared(_shares_densities, n_blocks, logits.numel(), *arrays)
    summed = x.new_empty(3, 1, n_genes)
    _sum_blocks(slopes.numpy(), summed.numpy())
    return log_p, summed[0], summed[1], summed[2], d_library
