"""Gradients in closed form are not differentiable again: says so, where else a term would be left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def only_once(
    gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None], message: str
) -> tuple[Tensor | None, ...]:
    """Return the gradients that a ``backward`` computed; who differentiates them gets a RuntimeError.

    (torch's `once_differentiable` raises only where the gradient that comes in has one of its own: the second
    derivative of log p + f would then be that of f.)

    Parameters
    ----------
    gradients
        What ``backward`` returns, computed without a graph.
    sources
        The tensors that they are functions of.
    message
        What is differentiable once, and what to use instead.
    """
    if not torch.is_grad_enabled():  # no `create_graph`
        return tuple(gradients)
    given = [source for source in sources if source is not None]
    found = iter(_Refused.apply(message, len(given), *given, *(g for g in gradients if g is not None)))
    return tuple(None if gradient is None else next(found) for gradient in gradients)


class _Refused(torch.autograd.Function):
    """Gradients as they are, whose own are refused."""

    @staticmethod
    def forward(ctx: Any, message: str, n_sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tensors[n_sources:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)
