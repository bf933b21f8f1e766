"""log1p(x) @ weight, and its gradient in the weight, for counts of which most are zero: a look-up.

The entries that are not zero are listed twice, each a CSR matrix of its own for torch's embedding_bag: cell
by cell for the product, and gene by gene for the gradient.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pyrosc.engine.cpu.math32 import (
    LARGEST,
    LN2,
    NAN,
    NOT_SIGN,
    F,
    compiled,
    in_parallel,
    log_parts32,
    places,
)
from pyrosc.engine.cpu.threads import shared

_DENSE = 0.3  # share of entries above which a product of dense matrices is sooner done
_PARTS = 8  # of a minibatch, whose entries are listed one after the other


@compiled
@no_type_check
def _count(first: int, last: int, x: Any, n_positive: Any) -> None:
    """Fill in how many entries of rows `first` to `last` are not zero."""
    for row in range(first, last):
        n = np.int32(0)
        bits = x[row].view(np.int32)
        for j in range(bits.size):
            n += np.int32((bits[j] & NOT_SIGN) != 0)
        n_positive[row] = n


@in_parallel
@no_type_check
def _counts(n_shares: int, n_rows: int, x: Any, n_positive: Any) -> None:
    """Do so for all rows, some at a time on each thread.

    It stands before `_lists` for another reason too: torch's embedding_bag leaves the vector registers of the
    threads in a state in which scalar code is ten times slower, and the loop here, in vectors, clears it. (So
    do the copies in `_list` where entries are known.)
    """
    for i in numba.prange(n_shares):
        _count(n_rows * i // n_shares, n_rows * (i + 1) // n_shares, x, n_positive)


_counts.alone = _count


@compiled
@no_type_check
def _list(first: int, last: int, x: Any, at: Any, start: Any, gene: Any, value: Any, found: Any) -> None:
    """List genes and log(1 + x) of what is not zero in parts `first` to `last` of the rows.

    Each row from its `start` on; `found` is how often a part has a gene. `at` is where such entries stand
    already, (first, last, genes, counts), or None.
    """
    n_rows, n_parts = x.shape[0], found.shape[0]
    place = np.empty(x.shape[1] + 1, np.int32)
    for part in range(first, last):
        n_found = found[part]
        n_found[:] = 0
        for row in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            genes, values = gene[start[row] : start[row + 1]], value[start[row] : start[row + 1]]
            if at is None:
                places(x[row], place)
                for i in range(genes.size):
                    genes[i] = place[i]
                for i in range(genes.size):
                    values[i] = x[row, genes[i]]
            else:
                genes[:] = at[2][at[0][row] : at[1][row]]
                values[:] = at[3][at[0][row] : at[1][row]]
            for i in range(genes.size):
                u = F(1) + values[i]
                e, f, q = log_parts32(u, values[i])
                log = F(e) * F(LN2) + (f + f * f * q)
                values[i] = log if F(0) < u < LARGEST else (NAN if u <= F(0) else u)
            for i in range(genes.size):
                n_found[np.uint32(genes[i])] += 1


@in_parallel
@no_type_check
def _lists(
    n_shares: int, n_parts: int, x: Any, at: Any, start: Any, gene: Any, value: Any, found: Any
) -> None:
    """Do so for all parts, some at a time on each thread."""
    for i in numba.prange(n_shares):
        first, last = n_parts * i // n_shares, n_parts * (i + 1) // n_shares
        _list(first, last, x, at, start, gene, value, found)


_lists.alone = _list


@compiled
@no_type_check
def _add_up(found: Any, by_gene: Any) -> None:
    """Turn how often parts have genes into where the first of each stands in a list gene by gene."""
    n = 0
    for j in range(found.shape[1]):
        by_gene[j] = n
        for part in range(found.shape[0]):
            n, found[part, j] = n + found[part, j], n
    by_gene[-1] = n


@compiled
@no_type_check
def _transpose(
    first: int, last: int, start: Any, gene: Any, value: Any, free: Any, row_of: Any, value_of: Any
) -> None:
    """List the same gene by gene, of parts `first` to `last`, each from what is `free` on."""
    n_rows, n_parts = start.size - 1, free.shape[0]
    for part in range(first, last):
        next_ = free[part]
        for row in range(n_rows * part // n_parts, n_rows * (part + 1) // n_parts):
            for i in range(start[row], start[row + 1]):
                j = np.uint32(gene[i])
                to = np.uint32(next_[j])
                next_[j] += 1
                row_of[to], value_of[to] = row, value[i]


@in_parallel
@no_type_check
def _transposes(
    n_shares: int, n_parts: int, start: Any, gene: Any, value: Any, free: Any, row_of: Any, value_of: Any
) -> None:
    """Do so for all parts, some at a time on each thread."""
    for i in numba.prange(n_shares):
        first, last = n_parts * i // n_shares, n_parts * (i + 1) // n_shares
        _transpose(first, last, start, gene, value, free, row_of, value_of)


_transposes.alone = _transpose


def log1p_linear(
    x: Tensor,
    weight: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    gene: Tensor | None,
    count: Tensor | None,
    slope: bool,  # noqa: FBT001 (as operators are called)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log1p(x) @ weight, for x of which most is zero.

    Parameters
    ----------
    x, weight
        (rows, genes) and (genes, features), float32, contiguous.
    start, stop, gene, count
        Where it is known what is not zero: entries `start` to `stop` of `gene` and `count` for each row. All
        None: it is looked for.
    slope
        Whether :func:`log1p_linear_slope` will be asked.

    Returns
    -------
    tuple of Tensor
        The product, (rows, features), and what is not zero, listed gene by gene: where each gene's begin,
        (genes + 1,), and the row and log1p of each, (entries,). They are empty where too much is not zero.
    """
    first = torch.zeros(len(x) + 1, dtype=torch.int32)
    at = None
    if start is None or stop is None or gene is None or count is None:
        shared(_counts, len(x), x.numel(), x.numpy(), first[1:].numpy())
        first = first.cumsum(0, dtype=torch.int32)
    else:
        at = (start.numpy(), stop.numpy(), gene.numpy(), count.numpy())
        np.cumsum(at[1] - at[0], out=first[1:].numpy())
    n = int(first[-1])
    listed = (torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0))
    if n > _DENSE * x.numel():
        return torch.log1p(x) @ weight, *listed
    genes, values = torch.empty(n, dtype=torch.int32), torch.empty(n)
    n_parts = min(len(x), _PARTS)
    found = np.empty((n_parts, x.shape[1]), np.int32)
    arrays = tuple(t.numpy() for t in (first, genes, values))
    shared(_lists, n_parts, x.numel(), x.numpy(), at, *arrays, found)
    if slope:
        listed = (torch.empty(x.shape[1] + 1, dtype=torch.int32), torch.empty_like(genes), torch.empty(n))
        by_gene, row_of, value_of = (t.numpy() for t in listed)
        _add_up(found, by_gene)
        shared(_transposes, n_parts, x.numel(), *arrays, found, row_of, value_of)
    out = embedding_bag(genes, weight, first[:-1], mode="sum", per_sample_weights=values)
    return out, *listed


def log1p_linear_slope(d_out: Tensor, x: Tensor, by_gene: Tensor, row_of: Tensor, value_of: Tensor) -> Tensor:
    """Gradient in the weight of :func:`log1p_linear`, (genes, features), from that in the product."""
    if not len(by_gene):
        return torch.log1p(x).T @ d_out
    return embedding_bag(row_of, d_out, by_gene[:-1], mode="sum", per_sample_weights=value_of)
