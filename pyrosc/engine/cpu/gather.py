"""Rows of a CSR matrix as a dense one: the counts of a minibatch."""

from typing import Any, no_type_check

import numba
from torch import Tensor

from pyrosc.engine.cpu.math32 import compiled, in_parallel
from pyrosc.engine.cpu.threads import shared


@compiled
@no_type_check
def _gather(first: int, last: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Fill rows `first` to `last` of `out` with rows of a CSR matrix, made dense."""
    for i in range(first, last):
        out[i] = 0
        for entry in range(start[i], stop[i]):
            out[i, gene[entry]] = count[entry]


@in_parallel
@no_type_check
def _gathers(n_shares: int, n_rows: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _gather(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, start, stop, gene, count, out)


_gathers.alone = _gather


def gather(start: Tensor, stop: Tensor, gene: Tensor, count: Tensor, n_genes: int) -> Tensor:
    """Rows of a CSR matrix, entries `start` to `stop` of each, as a dense matrix, (rows, genes)."""
    out = count.new_empty(len(start), n_genes)
    shared(_gathers, len(start), out.numel(), *(t.numpy() for t in (start, stop, gene, count, out)))
    return out
