"""What units are multiplied with in dropout: 0, or what keeps the mean; torch itself draws other numbers."""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from pyrosc.engine.cpu.math32 import WIDE, F, compiled, in_parallel
from pyrosc.engine.cpu.threads import shared


@compiled
@no_type_check
def _keep(first: int, last: int, seed: Any, dropped: int, out: Any) -> None:
    """Fill rows `first` to `last` of numbers: 0, with probability dropped / 2^16, or what makes the mean 1.

    Four share a number of 64 bits, of the generator SplitMix64 (Steele, Lea and Flood 2014).
    """
    scale, least = F(65536 / (65536 - dropped)), np.uint16(dropped)
    numbers = np.empty(out.shape[1] // 4, np.uint64)
    bits = numbers.view(np.uint16)
    for row in range(first, last):
        for i in range(numbers.size):
            z = seed[0] + np.uint64(row * numbers.size + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            numbers[i] = z ^ (z >> np.uint64(31))
        for j in range(bits.size):
            out[row, j] = scale if bits[j] >= least else F(0)


@in_parallel
@no_type_check
def _keeps(n_shares: int, n: int, seed: Any, dropped: int, out: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _keep(n * i // n_shares, n * (i + 1) // n_shares, seed, dropped, out)


_keeps.alone = _keep


def kept(seed: Tensor, n: int, dropped: int) -> Tensor:
    """Draw what `n` units are multiplied with in dropout.

    Parameters
    ----------
    seed
        One number, int64: with the same one the result is the same.
    dropped
        Probability that it is 0, times 2^16. Else it is the inverse of the share that is not.
    """
    out = torch.empty(-(-n // WIDE), WIDE)
    shared(_keeps, len(out), n, seed.numpy().view(np.uint64), dropped, out.numpy())
    return out.view(-1)[:n]
