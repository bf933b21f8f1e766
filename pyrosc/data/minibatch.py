"""Cells, a minibatch: all that a model may see; DeviceCounts, on a device, of which minibatches come."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pyrosc.engine.backends import kernels

_OF_CELLS = ("batch", "labels", "categorical", "continuous", "proteins")


@dataclass(frozen=True, eq=False)
class Entries:
    """Which counts of a minibatch are not zero: rows of a CSR matrix.

    Attributes
    ----------
    x : Tensor of shape (cells, genes)
        The dense counts that are described: this very tensor, and no other.
    start, stop : Tensor of shape (cells,)
        The entries of each cell are ``start`` to ``stop`` of `gene` and `count`.
    gene, count : Tensor of shape (entries,)
        Gene and count of each entry, of more cells than these.
    total : Tensor of shape (cells, 1)
        Sum of each cell's counts.
    """

    x: Float[Tensor, "cells genes"]
    start: Int[Tensor, "cells"]
    stop: Int[Tensor, "cells"]
    gene: Int[Tensor, "entries"]
    count: Float[Tensor, "entries"]
    total: Float[Tensor, "cells 1"]


@dataclass(frozen=True, eq=False)
class Cells:
    """A minibatch: all that a model may see. What is in it is read, not written.

    Attributes
    ----------
    x : Tensor of shape (cells, genes)
        Observed counts. For others, put a tensor in its place: ``dataclasses.replace(cells, x=...)``.
    index : Tensor of shape (cells,)
        The cells' places among `n_total`: what ``pyro.plate(..., subsample=cells.index)`` takes.
    n_total : int
        Cells in the whole data set that this minibatch stands for.
    batch, labels : Tensor of shape (cells,)
        Codes of the experimental batch and of the label; -1 is an unlabelled cell.
    categorical : Tensor of shape (cells, covariates)
        Codes of the categorical covariates.
    continuous : Tensor of shape (cells, covariates)
        Continuous covariates, in their own units.
    proteins : Tensor of shape (cells, proteins)
        Counts of surface proteins; -1 is one that was not measured.
    entries : Entries, optional
        Which counts are not zero, where that is known; it counts only while it is of this very `x`.

    Examples
    --------
    >>> import pyrosc
    >>> import torch
    >>> data = pyrosc.from_anndata(pyrosc.datasets.simulate(100, 20, n_batches=2), batch_key="batch")
    >>> cells = data.on("cpu").cells(torch.tensor([3, 0, 8]))
    >>> cells.x.shape, cells.library.shape, cells.n_total
    (torch.Size([3, 20]), torch.Size([3, 1]), 100)

    As if they were measured in the second batch:

    >>> cells.in_batch(1).batch
    tensor([1, 1, 1])
    """

    x: Float[Tensor, "cells genes"]
    index: Int[Tensor, "cells"]
    n_total: int
    batch: Int[Tensor, "cells"]
    labels: Int[Tensor, "cells"]
    categorical: Int[Tensor, "cells categorical"]
    continuous: Float[Tensor, "cells continuous"]
    proteins: Float[Tensor, "cells proteins"]
    entries: Entries | None = None

    @property
    def library(self) -> Float[Tensor, "cells 1"]:
        """Observed total of each cell, in counts, over the genes of the fit."""
        if self.entries is not None and self.entries.x is self.x:
            return self.entries.total
        return self.x.sum(-1, keepdim=True)

    def __len__(self) -> int:
        return len(self.index)

    def in_batch(self, code: int) -> "Cells":
        """Return the same cells as if measured in another experimental batch (a counterfactual)."""
        return replace(self, batch=torch.full_like(self.batch, code))


# To torch both are trees of tensors. The counts that entries are of are in it once, and are the same tensor
# again when it is put together.

_TENSORS = [field.name for field in fields(Cells) if field.name not in ("n_total", "entries")]
_OF_ENTRIES = [field.name for field in fields(Entries)]


def _tree_of_cells(cells: Cells) -> tuple[list[Any], tuple[int, bool]]:
    parts, entries = [getattr(cells, name) for name in _TENSORS], cells.entries
    if entries is None:
        return parts, (cells.n_total, False)
    if entries.x is cells.x:
        return parts + [getattr(entries, name) for name in _OF_ENTRIES if name != "x"], (cells.n_total, True)
    return [*parts, entries], (cells.n_total, False)


def _cells_of_tree(parts: Any, kind: tuple[int, bool]) -> Cells:
    (n_total, same), n = kind, len(_TENSORS)
    cells, others = dict(zip(_TENSORS, parts[:n], strict=True)), list(parts[n:])
    entries = [Entries(cells["x"], *others)] if same else others
    return Cells(n_total=n_total, entries=entries[0] if entries else None, **cells)


def _tree_of_entries(entries: Entries) -> tuple[list[Any], None]:
    return [getattr(entries, name) for name in _OF_ENTRIES], None


register_pytree_node(Cells, _tree_of_cells, _cells_of_tree)
register_pytree_node(Entries, _tree_of_entries, lambda parts, _: Entries(*parts))


@dataclass(frozen=True, eq=False)
class DeviceCounts:
    """Counts on a device, in CSR; minibatches are gathered and made dense there.

    Made by :meth:`Counts.on`; on a CPU the arrays are those of the Counts where types allow. The entries of
    cell i are ``start[i]`` to ``stop[i]`` of `gene` and `count`, and ``total[i]`` is their sum.
    """

    start: Int[Tensor, "n"]
    stop: Int[Tensor, "n"]
    gene: Int[Tensor, "..."]
    count: Float[Tensor, "..."]
    total: Float[Tensor, "n"]
    n_genes: int
    batch: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]
    categorical: Int[Tensor, "n categorical"]
    continuous: Float[Tensor, "n continuous"]
    proteins: Float[Tensor, "n proteins"]

    def __len__(self) -> int:
        return len(self.batch)

    def cells(self, rows: Int[Tensor, "cells"], n_total: int | None = None) -> Cells:
        """Gather the minibatch of these rows.

        Parameters
        ----------
        rows : Tensor of shape (cells,)
            Rows to gather; they may repeat and stand in any order.
        n_total : int, optional
            Size of the data set that the minibatch stands for; all rows by default.
        """
        start, stop, total = (t.index_select(0, rows) for t in (self.start, self.stop, self.total))
        x = self._dense(start, stop)
        return Cells(
            x=x,
            index=rows,
            n_total=len(self) if n_total is None else n_total,
            **{name: getattr(self, name).index_select(0, rows) for name in _OF_CELLS},
            entries=Entries(x, start, stop, self.gene, self.count, total[:, None]),
        )

    def take(self, rows: Int[Tensor, "m"]) -> "DeviceCounts":
        """Return some of the cells; their entries are shared, not copied."""
        return replace(
            self, **{name: getattr(self, name)[rows] for name in ("start", "stop", "total", *_OF_CELLS)}
        )

    @cached_property
    def _longest(self) -> int:
        """Return the largest number of entries that a cell has."""
        return int((self.stop - self.start).max()) if len(self) else 0

    def _dense(self, start: Int[Tensor, "cells"], stop: Int[Tensor, "cells"]) -> Float[Tensor, "cells genes"]:
        if start.device.type == "cpu" and (loops := kernels()):
            return loops.gather(start, stop, self.gene, self.count, self.n_genes)
        # As many places for each cell as the longest needs: shapes that do not depend on the data, which a
        # device can fill without being waited for. What a cell has too many go to a column of their own.
        entry = start[:, None] + torch.arange(self._longest, device=start.device)
        own = entry < stop[:, None]
        entry = entry.where(own, 0)
        gene = self.gene[entry].long().where(own, self.n_genes)
        x = self.count.new_zeros(len(start), self.n_genes + 1)
        return x.scatter_(1, gene, self.count[entry])[:, :-1].contiguous()

    def minibatches(self, size: int) -> Iterator[Cells]:
        """Yield all rows in their order, `size` at a time."""
        for start in range(0, len(self), size):  # none at all where there are no rows
            yield self.cells(torch.arange(start, min(start + size, len(self)), device=self.start.device))
