"""Covariates of cells as numbers: batch, categorical and continuous ones, and types beside vectors."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells


class Covariates(nn.Module):
    """Batch, categorical and continuous covariates of cells as one row of numbers each.

    Continuous covariates come first, standardised by the moments of the data that the model was made for;
    then the categorical ones, as one-hot rows (one with a single category has none); the batch comes last, so
    that further batches can be appended.

    Parameters
    ----------
    n_batches
        Number of experimental batches.
    n_categories
        Number of categories of each categorical covariate.
    mean, sd
        Of each continuous covariate, in its own unit.
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self,
        n_batches: int = 1,
        n_categories: Sequence[int] = (),
        mean: Sequence[float] = (),
        sd: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.sizes = (*n_categories, n_batches)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("sd", torch.tensor(sd, dtype=torch.float32))
        self.n_out = sum(n for n in self.sizes if n > 1) + len(mean)

    @classmethod
    def for_data(cls, data: Counts) -> "Covariates":
        """Read sizes and moments off the data."""
        sd = data.continuous.std(0)
        return cls(
            len(data.schema.batches),
            [len(names) for names in data.schema.categorical.values()],
            data.continuous.mean(0).tolist(),
            [s if s > 0 else 1.0 for s in sd.tolist()],
        )

    def forward(self, cells: Cells) -> Float[Tensor, "cells covariates"]:
        """Return the rows, (cells, n_out)."""
        codes = torch.cat([cells.categorical, cells.batch[:, None]], 1).unbind(1)
        rows = [(cells.continuous - self.mean) / self.sd] * (len(self.mean) > 0)
        rows += [
            (c[:, None] == torch.arange(n, device=c.device)).to(cells.x)
            for c, n in zip(codes, self.sizes, strict=True)
            if n > 1
        ]
        return torch.cat(rows, 1) if rows else cells.x.new_empty(len(cells), 0)


def with_type(
    v: Float[Tensor, "*draws latent"], y: Int[Tensor, "*types"], n_types: int
) -> Float[Tensor, "*all both"]:
    """Put the type, one-hot, beside a vector, whatever axes either has."""
    y = one_hot(y, n_types).to(v)
    shape = torch.broadcast_shapes(v.shape[:-1], y.shape[:-1])
    return torch.cat([v.expand(*shape, -1), y.expand(*shape, -1)], -1)


def beside(
    h: Float[Tensor, "*draws cells a"], c: Float[Tensor, "cells b"]
) -> Float[Tensor, "*draws cells c"]:
    """Put the covariates beside the features, whatever axes of draws stand before."""
    return torch.cat([h, c.expand(*h.shape[:-1], -1)], -1) if c.shape[-1] else h
