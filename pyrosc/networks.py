"""Neural networks, and heads that return distributions. They know tensors, not AnnData and not training."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pyrosc.cells import Cells
from pyrosc.compiled import kernels
from pyrosc.counts import Counts
from pyrosc.sparse import Log1pLinear


def check_sizes(**sizes: Any) -> None:
    """Raise unless each is a whole number of at least 1; `hidden` a list of such, or empty."""
    for name, value in sizes.items():
        if name == "hidden":
            fine = isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_size, value))
            wanted = "a tuple of whole numbers of at least 1, such as (128,)"
        else:
            fine, wanted = _is_size(value), "a whole number of at least 1"
        if not fine:
            msg = f"{name} must be {wanted}, not {value!r}"
            raise ValueError(msg)


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, so that draws may stand before cells.

    Parameters
    ----------
    width
        Number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, h: Float[Tensor, "*draws cells width"]) -> Float[Tensor, "*draws cells width"]:
        """Normalise each feature. A single row, of which no variance can be had, uses the running moments."""
        flat = h.reshape(-1, h.shape[-1])
        if len(flat) == 1:
            n = self.norm
            return batch_norm(flat, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps).view(h.shape)
        return self.norm(flat).view(h.shape)


def normalisation(name: str | None, width: int) -> nn.Module:
    """Return the normalisation layer called ``"layer"``, ``"batch"`` or None.

    Raises
    ------
    ValueError
        If the name is another one.
    """
    if name == "layer":
        return nn.LayerNorm(width)
    if name == "batch":
        return BatchNorm(width)
    if name is None:
        return nn.Identity()
    msg = f'norm must be "layer", "batch" or None, not {name!r}'
    raise ValueError(msg)


class Dropout(nn.Module):
    """Set units to zero at random in training, and scale up the others: the mean stays.

    Four units share a random number of 64 bits, which makes this several times faster than ``nn.Dropout``. On
    a CPU a loop draws these, from a seed that torch draws; the numbers are others than without the loop.

    Parameters
    ----------
    probability
        That a unit is dropped; rounded to a multiple of 2^-16.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            msg = f"dropout is a probability, at least 0 and below 1, not {probability!r}"
            raise ValueError(msg)
        self.dropped = min(round(probability * 2**16), 2**16 - 1)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"{self.dropped / 2**16:.5g}"

    def forward(self, h: Float[Tensor, "*draws cells width"]) -> Float[Tensor, "*draws cells width"]:
        """Drop units, in training."""
        if not self.training or not self.dropped:
            return h
        if h.device.type == "cpu" and kernels():
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=h.device)
            return h * torch.ops.pyrosc.kept(seed, h.numel(), self.dropped).view(h.shape).to(h.dtype)
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-h.numel() // 4),), device=h.device)
        kept = bits.view(torch.int16)[: h.numel()].view(h.shape) >= self.dropped - 2**15
        return h * kept.to(h.dtype).mul_(2**16 / (2**16 - self.dropped))


def activation(width: int, *, norm: str | None, dropout: float) -> list[nn.Module]:
    """Return what follows a linear map: normalisation, ReLU and dropout."""
    return [normalisation(norm, width), nn.ReLU(), *([Dropout(dropout)] if dropout else [])]


class MLP(nn.Sequential):
    """Layers of linear map, normalisation, ReLU and dropout.

    Parameters
    ----------
    n_in
        Width of the input.
    hidden
        Widths of the layers, in order.
    norm
        ``"layer"``, ``"batch"`` or None.
    dropout
        Probability that a unit is dropped in training.
    """

    def __init__(
        self, n_in: int, hidden: Sequence[int], *, norm: str | None = "batch", dropout: float = 0.1
    ) -> None:
        layers: list[nn.Module] = []
        for n_before, width in zip((n_in, *hidden), hidden, strict=False):
            layers += [nn.Linear(n_before, width), *activation(width, norm=norm, dropout=dropout)]
        super().__init__(*layers)
        self.n_out = hidden[-1] if hidden else n_in


def network(
    n_in: int,
    hidden: Sequence[int],
    n_out: int,
    *,
    norm: str | None,
    dropout: float,
    start: Float[Tensor, "out"] | None = None,
) -> nn.Sequential:
    """Return an :class:`MLP` and a linear layer to `n_out` numbers; its offsets begin at `start`."""
    body = MLP(n_in, hidden, norm=norm, dropout=dropout)
    last = nn.Linear(body.n_out, n_out)
    if start is not None:
        with torch.no_grad():
            last.bias.copy_(start)
    return nn.Sequential(body, last)


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


def beside(
    h: Float[Tensor, "*draws cells a"], c: Float[Tensor, "cells b"]
) -> Float[Tensor, "*draws cells c"]:
    """Put the covariates beside the features, whatever axes of draws stand before."""
    return torch.cat([h, c.expand(*h.shape[:-1], -1)], -1) if c.shape[-1] else h


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
        h = self.counts(cells.x)
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


def normal(moments: Float[Tensor, "*draws cells twice"]) -> dist.Normal:
    """Return Normal(loc, scale): the first half of the columns are means, the other log variances."""
    loc, log_variance = moments.chunk(2, -1)
    return dist.Normal(loc, torch.exp(0.5 * log_variance.clamp(-15, 15)) + 1e-4)


class Decoder(nn.Module):
    """From the state z of cells and their covariates to features h and shares rho of the genes.

    Parameters
    ----------
    n_latent, n_genes
        Widths of z and of rho.
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
        """Set the offsets so that rho starts near these shares."""
        with torch.no_grad():
            self.logits.bias.copy_(share.log())

    def forward(
        self, z: Float[Tensor, "*draws cells latent"], cells: Cells
    ) -> tuple[Float[Tensor, "*draws cells hidden"], Float[Tensor, "*draws cells genes"]]:
        """Return features h and shares rho; each row of rho sums to one."""
        c = self.covariates(cells)
        h = beside(self.body(beside(z, c) if len(self.body) else z), c)
        return h, torch.softmax(self.logits(h), -1)
