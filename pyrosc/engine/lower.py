"""The operations of a recorded step on a CPU, called the short way.

torch.fx calls ``torch.ops.aten.mul.Tensor(a, b)``, which looks up what ``torch.mul(a, b)`` knows, and makes
a tensor of a Python number each time. Of a small minibatch that is a tenth of a step.
"""

from typing import Any

import torch
from torch import Tensor, fx

from pyrosc.engine.backends import kernels
from pyrosc.engine.passes import acts

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
    """Compute once what is the same in each step, and replace calls by shorter ones, in place."""
    _fold(graph)
    for node in list(graph.graph.nodes):
        if node.target in _ARITHMETIC:
            node.args = tuple(_as_tensor(graph, node, argument) for argument in node.args)
        if node.target in _FUNCTIONS and not node.kwargs:
            node.target = _FUNCTIONS[node.target]
        elif str(node.target).startswith("pyrosc."):  # past torch's dispatcher
            node.target = getattr(kernels(), node.target._schema.name.removeprefix("pyrosc::"))
    graph.recompile()


def _fold(graph: fx.GraphModule) -> None:
    """Put tensors in place of operations on nothing but numbers."""
    values: dict[fx.Node, Any] = {}
    changed = _changed(graph.graph)
    for node in graph.graph.nodes:
        known = all(source in values for source in node.all_input_nodes)
        if node.op == "call_function" and known and node not in changed and not acts(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if isinstance(value, Tensor) and not all(user in values for user in node.users):
            node.replace_all_uses_with(_constant(graph, node, value))
    graph.graph.eliminate_dead_code(acts)


def _changed(graph: fx.Graph) -> set[fx.Node]:
    """Return the operations whose result a later one writes into, or which hand out their result."""
    beside: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}  # those that share its memory
    found: list[fx.Node] = []
    for node in graph.nodes:
        shared: list[fx.Node] = []
        written: list[fx.Node] = []
        if node.op == "output" or node.target == _aten.native_batch_norm.default:
            written = node.all_input_nodes
        elif isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            written = node.all_input_nodes if schema.is_mutable else []
            returned = any(result.alias_info for result in schema.returns)
            # (`_unsafe_view` is a view that says nothing of it.)
            shared = node.all_input_nodes if returned or node.target == _aten._unsafe_view.default else []
        elif node.op == "call_function":
            shared = node.all_input_nodes
        found += written
        for source in shared:
            beside[source].append(node)
            beside[node].append(source)
    reached: set[fx.Node] = set()
    while found:
        node = found.pop()
        if node not in reached:
            reached.add(node)
            found += beside[node]
    return reached


def _as_tensor(graph: fx.GraphModule, node: fx.Node, argument: Any) -> Any:
    """Return a number as what it would become: a tensor of the result's type."""
    made = node.meta.get("made")
    is_number = isinstance(argument, float | int) and not isinstance(argument, bool)
    if not is_number or made is None or made.dtype != torch.float32:
        return argument
    return _constant(graph, node, torch.tensor(float(argument), dtype=made.dtype, device=made.device))


def _constant(graph: fx.GraphModule, before: fx.Node, value: Tensor) -> fx.Node:
    name = f"constant_{len(graph._buffers)}"
    graph.register_buffer(name, value)
    vars(graph)[name] = value  # where it is found sooner than among buffers
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)
