"""The loops as operators of torch's own: schemas, what runs them on a CPU, and the shapes of results.

A recorded step holds each as one operation that is not looked into. Gradients are no part of the operators:
the autograd Functions that call them know which slopes are wanted, and only these are computed; what is
registered for autograd is not told.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrosc.engine.cpu.count_density import log_density
from pyrosc.engine.cpu.dropout import kept
from pyrosc.engine.cpu.gather import gather
from pyrosc.engine.cpu.log1p_linear import log1p_linear, log1p_linear_slope
from pyrosc.engine.cpu.softmax_density import softmax_density, softmax_density_backward
from pyrosc.engine.cpu.weighted_softmax_density import weighted_softmax_density_

__all__ = [
    "gather",
    "kept",
    "log1p_linear",
    "log1p_linear_slope",
    "log_density",
    "softmax_density",
    "softmax_density_backward",
    "weighted_softmax_density_",
]

# (torch.library.custom_op does the same, and imports torch._dynamo when first called: a second and a half.)
_LIBRARY = torch.library.Library("pyrosc", "FRAGMENT")
_LIBRARY.define(
    "log_density(Tensor x, Tensor mean, Tensor? theta, Tensor? gate, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "softmax_density(Tensor logits, Tensor total, Tensor x, Tensor? theta, Tensor? gate, Tensor? kept,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "softmax_density_backward(Tensor weight, Tensor d_logits, Tensor d_total, Tensor d_theta, Tensor d_gate,"
    " bool[] of_genes) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "weighted_softmax_density_(Tensor(a!) logits, Tensor? bias, Tensor(b!)? gate, Tensor? gate_bias,"
    " Tensor total, Tensor x, Tensor? theta, Tensor? kept, Tensor weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "log1p_linear(Tensor x, Tensor weight, Tensor? start, Tensor? stop, Tensor? gene, Tensor? count,"
    " bool slope) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "log1p_linear_slope(Tensor d_out, Tensor x, Tensor by_gene, Tensor row_of, Tensor value_of) -> Tensor"
)
_LIBRARY.define("kept(Tensor seed, int n, int dropped) -> Tensor")


def _log_density(
    x: Tensor, mean: Tensor, theta: Tensor | None, gate: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    n_rows = max(len(t) for t in (x, mean, theta, gate) if t is not None)
    return x.new_empty(n_rows), *_wanted(x, n_rows, wanted)


def _softmax_density(
    logits: Tensor,
    total: Tensor,
    x: Tensor,
    theta: Tensor | None,
    gate: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    n_rows = max(len(t) for t in (logits, total, x, theta, gate, kept) if t is not None)
    d_logits, d_theta, d_gate = _wanted(x, n_rows, wanted)
    return x.new_empty(n_rows), d_logits, x.new_empty(n_rows, 1), d_theta, d_gate


def _softmax_density_backward(
    weight: Tensor,  # noqa: ARG001
    d_logits: Tensor,
    d_total: Tensor,
    d_theta: Tensor,
    d_gate: Tensor,
    of_genes: Sequence[bool],
) -> tuple[Tensor, ...]:
    slopes = zip((d_logits, d_theta, d_gate), of_genes, strict=True)
    d_logits, d_theta, d_gate = (
        d.new_empty(1 if one and len(d) else len(d), d.shape[1]) for d, one in slopes
    )
    return d_logits, torch.empty_like(d_total), d_theta, d_gate


def _weighted_softmax_density_(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    n_rows, n_genes = logits.shape
    return (
        logits.new_empty(n_rows),
        *(logits.new_empty(1, n_genes) for _ in range(3)),
        logits.new_empty(n_rows, 1),
    )


def _log1p_linear(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    size = torch.library.get_ctx().new_dynamic_size  # how many there are is known from their numbers alone
    n_firsts, n_entries = size(), size()
    whole: Any = {"dtype": torch.int32}
    listed = x.new_empty(n_firsts, **whole), x.new_empty(n_entries, **whole), x.new_empty(n_entries)
    return x.new_empty(len(x), weight.shape[1]), *listed


def _log1p_linear_slope(d_out: Tensor, x: Tensor, *listed: Tensor) -> Tensor:  # noqa: ARG001
    return d_out.new_empty(x.shape[1], d_out.shape[1])


def _kept(seed: Tensor, n: int, dropped: int) -> Tensor:  # noqa: ARG001
    return seed.new_empty(n, dtype=torch.float32)


def _wanted(x: Tensor, n_rows: int, wanted: Sequence[bool]) -> list[Tensor]:
    """Return slopes, empty where they are not wanted."""
    return [x.new_empty(n_rows if want else 0, x.shape[1]) for want in wanted]


for _loop, _shapes in (
    (log_density, _log_density),
    (softmax_density, _softmax_density),
    (softmax_density_backward, _softmax_density_backward),
    (weighted_softmax_density_, _weighted_softmax_density_),
    (log1p_linear, _log1p_linear),
    (log1p_linear_slope, _log1p_linear_slope),
    (kept, _kept),
):
    _LIBRARY.impl(_loop.__name__, _loop, "CPU")
    torch.library.register_fake(f"pyrosc::{_loop.__name__}", _shapes, lib=_LIBRARY)
