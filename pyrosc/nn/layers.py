"""Layers of networks: normalisation, dropout, perceptrons, and moments read off them."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from pyrosc.engine.backends import kernels


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


def _normalisation(name: str | None, width: int) -> nn.Module:
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
    return [_normalisation(norm, width), nn.ReLU(), *([Dropout(dropout)] if dropout else [])]


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


def normal(moments: Float[Tensor, "*draws cells twice"]) -> dist.Normal:
    """Return Normal(loc, scale): the first half of the columns are means, the other log variances."""
    loc, log_variance = moments.chunk(2, -1)
    return dist.Normal(loc, torch.exp(0.5 * log_variance.clamp(-15, 15)) + 1e-4)


def uniform_noise(t: Float[Tensor, "*draws cells genes"]) -> dist.MaskedDistribution:
    """Return a uniform number beside each of t: noise of model and guide alike, of no weight in the loss."""
    return dist.Uniform(torch.zeros_like(t), torch.ones_like(t)).to_event(1).mask(mask=False)
