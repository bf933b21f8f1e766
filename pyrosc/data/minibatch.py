"""Cells, a minibatch: all that a model may see; Resident, counts on a device, of which minibatches come."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pyrosc.engine.backends import kernels

_OF_CELLS = ("batch", "labels", "categorical", "continuous", "proteins")


@dataclass(frozen=True, eq=False)
class Cells:
    """A minibatch: all that a model may see.

    Attributes
    ----------
    x : Tensor of shape (cells, genes)
        Observed counts.
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

    @property
    def library(self) -> Float[Tensor, "cells 1"]:
        """Observed total of each cell, in counts, over the genes of the fit."""
        total, version = vars(self).get("known", (None, None))
        if version is None or version != _version(self.x) or self.x.requires_grad:
            return self.x.sum(-1, keepdim=True)
        return total

    def knowing(self, library: Float[Tensor, "cells 1"]) -> "Cells":
        """Return these cells, whose library need not be summed while x stays as it is."""
        vars(self)["known"] = (library, _version(self.x))
        return self

    def __len__(self) -> int:
        return len(self.index)

    def in_batch(self, code: int) -> "Cells":
        """Return the same cells as if measured in another experimental batch (a counterfactual)."""
        return replace(self, batch=torch.full_like(self.batch, code))


_TENSORS = ("x", "index", *_OF_CELLS)
# The library is a tensor of its own, so that whoever replays what was done to cells need not sum it.
register_pytree_node(
    Cells,
    lambda cells: ([*(getattr(cells, name) for name in _TENSORS), cells.library], cells.n_total),
    lambda tensors, n_total: Cells(
        n_total=n_total, **dict(zip(_TENSORS, [*tensors][:-1], strict=True))
    ).knowing([*tensors][-1]),
)


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was written into; None where torch does not count."""
    return None if x.is_inference() else x._version


@dataclass(frozen=True, eq=False)
class Resident:
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
        cells = Cells(
            x=self._dense(rows),
            index=rows,
            n_total=len(self) if n_total is None else n_total,
            **{name: getattr(self, name).index_select(0, rows) for name in _OF_CELLS},
        )
        return cells.knowing(self.total.index_select(0, rows)[:, None])

    def take(self, rows: Int[Tensor, "m"]) -> "Resident":
        """Return some of the cells; their entries are shared, not copied."""
        return replace(
            self, **{name: getattr(self, name)[rows] for name in ("start", "stop", "total", *_OF_CELLS)}
        )

    @cached_property
    def _longest(self) -> int:
        """Return the largest number of entries that a cell has."""
        return int((self.stop - self.start).max()) if len(self) else 0

    def _dense(self, rows: Int[Tensor, "cells"]) -> Float[Tensor, "cells genes"]:
        if rows.device.type == "cpu" and (loops := kernels()):
            return loops.gather(rows, self.start, self.stop, self.gene, self.count, self.n_genes)
        # As many places for each cell as the longest needs: shapes that do not depend on the data, which a
        # device can fill without being waited for.
        # What a cell has too many go to a column of their own.
        entry = self.start[rows, None] + torch.arange(self._longest, device=rows.device)
        own = entry < self.stop[rows, None]
        entry = entry.where(own, 0)
        gene = self.gene[entry].long().where(own, self.n_genes)
        x = self.count.new_zeros(len(rows), self.n_genes + 1)
        return x.scatter_(1, gene, self.count[entry])[:, :-1].contiguous()

    def minibatches(self, size: int) -> Iterator[Cells]:
        """Yield all rows in their order, `size` at a time."""
        for start in range(0, len(self), size):  # none at all where there are no rows
            yield self.cells(torch.arange(start, min(start + size, len(self)), device=self.start.device))
