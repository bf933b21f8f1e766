"""The first layer of an encoder: a linear map of log(1 + x) that touches the positive counts only."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyrosc.engine.backends import kernels


class Log1pLinear(nn.Module):
    """From counts x to log(1 + x) W + b.

    Nine in ten counts of a cell are zero, and add nothing: on a CPU only the others are looked up. Elsewhere,
    and where fewer are zero, it is a product of dense matrices.

    Parameters
    ----------
    n_genes, n_out
        Widths of the counts and of the result. The weight is (genes, out): a gene's row is what is looked up.
    """

    def __init__(self, n_genes: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_genes)
        self.weight = nn.Parameter(torch.empty(n_genes, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        """Show the widths."""
        return "{}, {}".format(*self.weight.shape)

    def forward(self, x: Float[Tensor, "cells genes"]) -> Float[Tensor, "cells out"]:
        """Return the map of each cell's counts."""
        suited = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, self.weight))
        with_gradient = torch.is_grad_enabled()
        if suited and not (x.requires_grad and with_gradient) and kernels():
            return _Log1pLinear.apply(x, self.weight if with_gradient else self.weight.detach()) + self.bias
        return torch.addmm(self.bias, torch.log1p(x), self.weight)


class _Log1pLinear(torch.autograd.Function):
    """The product, and its gradient in the weight; the counts have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        product, *by_gene = torch.ops.pyrosc.log1p_linear(x.contiguous(), weight, ctx.needs_input_grad[1])
        ctx.save_for_backward(x, *by_gene)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        wanted = ctx.needs_input_grad[1]
        return None, torch.ops.pyrosc.log1p_linear_slope(
            grad.contiguous(), *ctx.saved_tensors
        ) if wanted else None
