"""The counts of a cell as one event: log densities summed over genes, in one pass where that is compiled.

On a CPU that is one compiled loop (`engine/cpu`), from logits and totals or from means, on CUDA a kernel for
means (`engine/cuda`); elsewhere, and for counts of shapes that no loop takes, the torch operations of
`density.py`, summed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Num
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.distributions.torch import Independent
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor

from pyrosc.distributions.density import ONCE
from pyrosc.distributions.given import Given
from pyrosc.engine.backends import log_density_for, softmax_density_for
from pyrosc.engine.once import only_once


def as_event(counts: Any, n_axes: int | None) -> Any:
    """Make the rightmost axes one event; all of them by default."""
    n_axes = len(counts.batch_shape) if n_axes is None else n_axes
    return _Cell(counts, n_axes) if n_axes > 0 else TorchDistribution.to_event(counts, n_axes)


def without(counts: Any, kept: Bool[Tensor, "genes"]) -> Any:
    """Return the distribution of a cell's counts that leaves genes out of the density: only `kept` have one.

    Parameters
    ----------
    counts
        A distribution whose rightmost axis, that of genes, is an event.
    kept
        Which genes stay. Those left out still have their share of the cell's counts.
    """
    base, n_axes = counts.base_dist, counts.reinterpreted_batch_ndims
    masked = MaskedDistribution(base, kept.expand(base.batch_shape))
    return _Cell(masked, n_axes) if _given(base) is not None else masked.to_event(n_axes)


class _Cell(Independent):
    """Counts whose rightmost axes are one event: as any Independent, but summed over genes as it goes."""

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        base, kept = self.base_dist, None
        if isinstance(base, MaskedDistribution):
            base, kept = base.base_dist, base._mask
            value = torch.where(kept, value, 0)
        given = _given(base)
        # (A value narrower than the event is repeated along it; no loop does that.)
        whole = value.numel() and value.ndim and base.batch_shape[-1] in (1, value.shape[-1])
        log_prob = None
        if given is not None and whole and 0 not in base.batch_shape:
            log_prob = _summed(value, given, kept)
        if log_prob is None:
            single = base.log_prob(value)
            single = single if kept is None else torch.where(kept, single, 0.0)
            return single.sum(tuple(range(-self.reinterpreted_batch_ndims, 0)))
        if self._validate_args:
            base._validate_sample(value)
        log_prob = log_prob.expand(torch.broadcast_shapes(base.batch_shape[:-1], log_prob.shape))
        return sum_rightmost(log_prob, self.reinterpreted_batch_ndims - 1)


def _given(counts: Any) -> Given | None:
    """Return what a distribution of ours was given; None of any other, and of one around any other."""
    given = getattr(counts, "given", None)
    known = isinstance(given, Given) and not (given.mean is None and given.logits is None)
    return given if known else None


def _summed(value: Tensor, given: Given, kept: Tensor | None) -> Float[Tensor, "..."] | None:
    """Return the log density of each row of genes, by a compiled loop; None if there is none that suits."""
    mean, logits, total, *others = given
    if mean is None:
        fits = logits.shape[-1:] == value.shape[-1:] and total.shape[-1:] in ((), (1,))
        compiled = softmax_density_for(value, (logits, total, *others)) if fits else None
        if compiled is not None:
            return _OfLogits.apply(compiled, value, kept, *_wanted(logits, total, *others))
    compiled = log_density_for(value, (mean, logits, total, *others))
    if compiled is None:
        return None
    mean = total * logits.softmax(-1) if mean is None else mean
    mean = mean if kept is None else torch.where(kept, mean, 0.0)  # where a zero is certain
    return _OfMean.apply(compiled, value, *_wanted(mean, *others))


def _wanted(*parameters: Tensor | None) -> list[Tensor | None]:
    """Return parameters, without a gradient where nobody wants one, so that no slope is computed."""
    return [p if p is None or torch.is_grad_enabled() else p.detach() for p in parameters]


class _OfMean(torch.autograd.Function):
    """The log density of rows of counts by their means, and its gradients."""

    @staticmethod
    def forward(ctx: Any, compiled: Callable[..., Any], value: Tensor, *parameters: Tensor | None) -> Any:
        tensors = [value.to(torch.float32), *parameters]
        ctx.shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
        ctx.wanted = ctx.needs_input_grad[2:]
        log_prob, *slopes = compiled(*(_rows_of(t, ctx.shape) for t in tensors), list(ctx.wanted))
        ctx.save_for_backward(*parameters, *slopes)
        return log_prob.view(ctx.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters, slopes = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        with torch.no_grad():
            each = zip(ctx.wanted, slopes, parameters, strict=True)
            gradients = [
                _chained(grad, slope, ctx.shape, p.shape) if want else None for want, slope, p in each
            ]
        return None, None, *only_once(gradients, [grad, *parameters], ONCE)


class _OfLogits(torch.autograd.Function):
    """The log density of rows of counts of mean total * softmax(logits), and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        compiled: Callable[..., Any],
        value: Tensor,
        kept: Tensor | None,
        logits: Tensor,
        total: Tensor,
        theta: Tensor | None,
        gate: Tensor | None,
    ) -> Any:
        x = value.to(torch.float32)
        given = [t for t in (x, logits, total, theta, gate, kept) if t is not None]
        ctx.shape = shape = torch.broadcast_shapes(*(t.shape for t in given))
        while kept is not None and kept.ndim > 1 and not kept.stride(0):  # of genes, expanded
            kept = kept[0]
        kept = None if kept is None else kept.to(torch.float32)
        _, _, _, by_logits, by_total, by_theta, by_gate = ctx.needs_input_grad
        ctx.wanted = by_logits, by_total, by_theta, by_gate
        log_prob, *slopes = compiled(
            _rows_of(logits, shape),
            _rows_of(total, (*shape[:-1], 1)),
            *(_rows_of(t, shape) for t in (x, theta, gate, kept)),
            [by_logits, by_theta, by_gate],
        )
        ctx.save_for_backward(logits, total, theta, gate, *slopes)
        return log_prob.view(shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters, slopes, shape = ctx.saved_tensors[:4], ctx.saved_tensors[4:], ctx.shape
        logits, _, theta, gate = parameters
        of_genes = [p is not None and _is_of_genes(p.shape, shape) for p in (logits, theta, gate)]
        with torch.no_grad():
            rows = grad.reshape(-1)
            chained = torch.ops.pyrosc.softmax_density_backward(rows, *slopes, of_genes)
            each = zip(ctx.wanted, chained, parameters, strict=True)
            gradients = [_summed_to(slope, shape, p.shape) if want else None for want, slope, p in each]
        return None, None, None, *only_once(gradients, [grad, *parameters], ONCE)


def _rows_of(tensor: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return (rows, genes) whose repetition is the broadcast; gene-wise parameters are one row."""
    if tensor is None:
        return None
    sizes = tensor.shape
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    sizes = sizes or Size((1,))
    return tensor.reshape(sizes).expand(shape[len(shape) - len(sizes) :]).reshape(-1, shape[-1]).contiguous()


def _is_of_genes(size: Size, shape: Size) -> bool:
    return size.numel() == shape[-1] and size[-1:] == shape[-1:]


def _chained(grad: Tensor, slope: Tensor, shape: Size, to: Size) -> Tensor:
    """Multiply by the gradient in each row's density; sum over what shares a parameter."""
    rows = grad.reshape(-1)
    if _is_of_genes(to, shape):  # a sum over rows, without their product
        return (rows @ slope).view(to)
    return _summed_to(rows.unsqueeze(-1) * slope, shape, to)


def _summed_to(slope: Tensor, shape: Size, to: Size) -> Tensor:
    """Sum slopes of rows over what shares a parameter; they may be summed already."""
    if slope.numel() == to.numel():
        return slope.view(to)
    return slope.view(*shape[:-1], slope.shape[-1]).sum_to_size(to)
