"""engine.cpu.gather."""

from typing import Any, no_type_check

import numba
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyrosc.engine.cpu.math32 import _compiled, _in_parallel
from pyrosc.engine.cpu.threads import shared


@_compiled
@no_type_check
def _gather(first: int, last: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Fill rows `first` to `last` of `out` with rows of a CSR matrix, made dense."""
    for i in range(first, last):
        out[i] = 0
        for entry in range(start[i], stop[i]):
            out[i, gene[entry]] = count[entry]


@_in_parallel
@no_type_check
def _gathers(n_shares: int, n_rows: int, start: Any, stop: Any, gene: Any, count: Any, out: Any) -> None:
    """Do so for all rows, some at a time on each thread."""
    for i in numba.prange(n_shares):
        _gather(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, start, stop, gene, count, out)


_gathers.alone = _gather

# Of minibatches that were gathered, while they live: their version then, and where their entries stand. It
# shows all that torch operations do to them, but not what is written through x.numpy() or x.data.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gather(rows: Tensor, start: Tensor, stop: Tensor, gene: Tensor, count: Tensor, n_genes: int) -> Tensor:
    """Rows of a CSR matrix, entries `start` to `stop` of each, as a dense matrix, (rows, genes)."""
    out = count.new_empty(len(rows), n_genes)
    at = (start[rows], stop[rows], gene, count)
    shared(_gathers, len(rows), out.numel(), *(t.numpy() for t in (*at, out)))
    if not out.is_inference():
        _entries[out] = (out._version, *at)
    return out
