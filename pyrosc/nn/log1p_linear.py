"""The first layer of an encoder: a linear map of log(1 + x) that touches the positive counts only."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrosc.data.minibatch import Entries
from pyrosc.engine.backends import kernels
from pyrosc.engine.once import only_once

_ONCE = "Log1pLinear is differentiable once; for second derivatives use log1p(x) @ layer.weight + layer.bias"


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

    def forward(
        self, x: Float[Tensor, "cells genes"], entries: Entries | None = None
    ) -> Float[Tensor, "cells out"]:
        """Return the map of each cell's counts.

        Parameters
        ----------
        x
            Counts.
        entries
            Which are not zero, where that is known: of this very tensor, or they are looked for.
        """
        suited = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, self.weight))
        with_gradient = torch.is_grad_enabled()
        if suited and not (x.requires_grad and with_gradient) and kernels():
            weight = self.weight if with_gradient else self.weight.detach()
            known = entries if entries is not None and entries.x is x else None
            return _Log1pLinear.apply(x, weight, known) + self.bias
        return torch.addmm(self.bias, torch.log1p(x), self.weight)


class _Log1pLinear(torch.autograd.Function):
    """The product, and its gradient in the weight; the counts have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, entries: Entries | None) -> Any:
        at = [None] * 4 if entries is None else [entries.start, entries.stop, entries.gene, entries.count]
        slope = ctx.needs_input_grad[1]
        product, *by_gene = torch.ops.pyrosc.log1p_linear(x.contiguous(), weight, *at, slope)
        ctx.save_for_backward(x, weight, *by_gene)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *by_gene = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        with torch.no_grad():
            slope = torch.ops.pyrosc.log1p_linear_slope(grad.contiguous(), x, *by_gene)
        return None, *only_once([slope], [grad, weight], _ONCE), None
