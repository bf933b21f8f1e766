"""The loops as operators of torch's own: their schemas, and what runs them on a CPU."""

import torch

from pyrosc.engine.cpu.count_density import log_density
from pyrosc.engine.cpu.dropout import kept
from pyrosc.engine.cpu.gather import gather
from pyrosc.engine.cpu.log1p_linear import log1p_linear, log1p_linear_slope
from pyrosc.engine.cpu.softmax_density import shares_log_density

# Operators of torch's own, so that a recorded step holds each as one operation that is not looked into.
# (torch.library.custom_op does the same, and imports torch._dynamo when first called: a second and a half.)
_LIBRARY = torch.library.Library("pyrosc", "FRAGMENT")
_LIBRARY.define(
    "log_density(Tensor x, Tensor mean, Tensor? theta, Tensor? gate, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "shares_log_density(Tensor(a!) logits, Tensor? bias, Tensor(b!)? gate, Tensor? gate_bias, Tensor library,"
    " Tensor x, Tensor? theta, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("log1p_linear(Tensor x, Tensor weight, bool slope) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "log1p_linear_slope(Tensor d_out, Tensor x, Tensor by_gene, Tensor row_of, Tensor value_of) -> Tensor"
)
_LIBRARY.define("kept(Tensor seed, int n, int dropped) -> Tensor")
for operator in (log_density, shares_log_density, log1p_linear, log1p_linear_slope, kept):
    _LIBRARY.impl(operator.__name__, operator, "CPU")

__all__ = ["gather", "kept", "log1p_linear", "log1p_linear_slope", "log_density", "shares_log_density"]
