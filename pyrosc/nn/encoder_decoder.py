"""Networks from cells to distributions of their states, and from states to what the counts are made of."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrosc.data.minibatch import Cells
from pyrosc.nn.covariates import Covariates, beside
from pyrosc.nn.layers import MLP, activation, normal
from pyrosc.nn.log1p_linear import Log1pLinear


class CellsLinear(nn.Module):
    """A linear map of log(1 + x) and the covariates: the first layer of what reads cells.

    Parameters
    ----------
    n_genes, n_out
        Widths of the counts and of the result.
    covariates
        What it sees beside the counts.
    """

    def __init__(self, n_genes: int, n_out: int, covariates: Covariates) -> None:
        super().__init__()
        self.covariates = covariates
        self.counts = Log1pLinear(n_genes, n_out)
        self.shift = nn.Linear(covariates.n_out, n_out, bias=False) if covariates.n_out else None
        if self.shift is not None:  # starts as if it were one layer with that of the counts
            nn.init.uniform_(self.shift.weight, -1 / n_genes**0.5, 1 / n_genes**0.5)

    def forward(self, cells: Cells) -> Float[Tensor, "cells out"]:
        """Return the map of each cell."""
        h = self.counts(cells.x, cells.entries)
        return h if self.shift is None else h + self.shift(self.covariates(cells))


def trunk(
    n_genes: int, covariates: Covariates, hidden: Sequence[int], *, norm: str | None, dropout: float
) -> nn.Sequential:
    """Return layers from cells to features, (cells, ``hidden[-1]``); see :class:`MLP`."""
    return nn.Sequential(
        CellsLinear(n_genes, hidden[0], covariates),
        *activation(hidden[0], norm=norm, dropout=dropout),
        MLP(hidden[0], hidden[1:], norm=norm, dropout=dropout),
    )


class Encoder(nn.Module):
    """q(u given x): a normal distribution whose mean and scale a network reads off log(1 + x) and covariates.

    Parameters
    ----------
    n_genes, n_out
        Widths of the counts and of u.
    covariates
        What the network sees beside the counts.
    hidden, norm, dropout
        See :class:`MLP`.
    """

    def __init__(
        self,
        n_genes: int,
        n_out: int,
        covariates: Covariates,
        hidden: Sequence[int],
        *,
        norm: str | None = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.body: nn.Module
        if hidden:
            self.body = trunk(n_genes, covariates, hidden, norm=norm, dropout=dropout)
            self.moments: nn.Module = nn.Linear(hidden[-1], 2 * n_out)
        else:
            self.body, self.moments = CellsLinear(n_genes, 2 * n_out, covariates), nn.Identity()

    def start_at(self, loc: float, scale: float) -> None:
        """Set the last layer so that q starts near Normal(loc, scale), whatever the counts."""
        last: Any = self.moments
        with torch.no_grad():
            if isinstance(self.body, CellsLinear):
                last = self.body.counts
                if self.body.shift is not None:
                    self.body.shift.weight.mul_(0.01)
            last.weight.mul_(0.01)  # at 0 no gradient would reach the layers before
            loc_offset, log_variance_offset = last.bias.chunk(2)
            loc_offset.fill_(loc)
            log_variance_offset.fill_(2 * math.log(scale))

    def forward(self, cells: Cells) -> dist.Normal:
        """Return Normal(loc, scale), each (cells, n_out)."""
        return normal(self.moments(self.body(cells)))


class Decoder(nn.Module):
    """From the state z of cells and their covariates to features h and logits of the genes' shares.

    Parameters
    ----------
    n_latent, n_genes
        Widths of z and of the logits.
    covariates
        What the network sees beside z; also an offset of its own for each gene.
    hidden, norm, dropout
        See :class:`MLP`.
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        covariates: Covariates,
        hidden: Sequence[int],
        *,
        norm: str | None = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.covariates = covariates
        n_beside = covariates.n_out if hidden else 0  # without layers the last one sees them anyway
        self.body = MLP(n_latent + n_beside, hidden, norm=norm, dropout=dropout)
        self.n_out = self.body.n_out + covariates.n_out
        self.logits = nn.Linear(self.n_out, n_genes)

    def start_at(self, share: Float[Tensor, "genes"]) -> None:
        """Set the offsets so that the shares, softmax(logits), start near these."""
        with torch.no_grad():
            self.logits.bias.copy_(share.log())

    def forward(
        self, z: Float[Tensor, "*draws cells latent"], cells: Cells
    ) -> tuple[Float[Tensor, "*draws cells hidden"], Float[Tensor, "*draws cells genes"]]:
        """Return features h, and logits whose softmax are the genes' shares."""
        c = self.covariates(cells)
        h = beside(self.body(beside(z, c) if len(self.body) else z), c)
        return h, self.logits(h)
