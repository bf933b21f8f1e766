"""The operations of a recorded step on a CPU, called the short way.

torch.fx calls ``torch.ops.aten.mul.Tensor(a, b)``, which looks up what ``torch.mul(a, b)`` knows, and makes
a tensor of a Python number each time. Of a small minibatch that is a tenth of a step.
"""

from typing import Any

import torch
from torch import Tensor, fx

from pyrosc.compiled import kernels

_aten = torch.ops.aten

_ARITHMETIC = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
}
_FUNCTIONS: dict[Any, Any] = _ARITHMETIC | {
    _aten.add_.Tensor: Tensor.add_,
    _aten.addmm.default: torch.addmm,
    _aten.cat.default: torch.cat,
    _aten.clamp.default: torch.clamp,
    _aten.clamp_min.default: torch.clamp_min,
    _aten.eq.Tensor: torch.eq,
    _aten.exp.default: torch.exp,
    _aten.expand.default: Tensor.expand,
    _aten.ge.Scalar: torch.ge,
    _aten.le.Scalar: torch.le,
    _aten.log.default: torch.log,
    _aten.mm.default: torch.mm,
    _aten.mul.Scalar: torch.mul,
    _aten.native_batch_norm.default: torch.native_batch_norm,
    _aten.neg.default: torch.neg,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.relu.default: torch.relu,
    _aten.sum.default: torch.sum,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
    _aten.where.self: torch.where,
}
"""Functions of the same arguments, in the same places."""


def shorten(graph: fx.GraphModule) -> None:
    """Replace calls by shorter ones of the same operations, in place."""
    for node in list(graph.graph.nodes):
        if node.target in _ARITHMETIC:
            node.args = tuple(_as_tensor(graph, node, argument) for argument in node.args)
        if node.target in _FUNCTIONS and not node.kwargs:
            node.target = _FUNCTIONS[node.target]
        elif str(node.target).startswith(
            "pyrosc."
        ):  # (called by its name it goes through torch's dispatcher)
            node.target = getattr(kernels(), node.target._schema.name.removeprefix("pyrosc::"))
    graph.recompile()


def _as_tensor(graph: fx.GraphModule, node: fx.Node, argument: Any) -> Any:
    """Return a number as what it would become: a tensor of the result's type."""
    result = node.meta.get("val")
    if not isinstance(argument, float | int) or result is None or result.dtype != torch.float32:
        return argument
    name = f"number_{len(list(graph.buffers()))}"
    graph.register_buffer(name, torch.tensor(float(argument)))
    with graph.graph.inserting_before(node):
        return graph.graph.get_attr(name)
