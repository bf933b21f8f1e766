"""Rewrites of a recorded step: what nobody reads goes; log densities are computed with their slopes.

A log density is two operators, `softmax_density` and, on the way back, `softmax_density_backward`, which
multiplies its slopes by the gradients of the rows. Those of an ELBO are known from the start: they are the
scales of the site. Then one operator does both in one loop, and writes the slopes over the logits if nobody
else reads these.
"""

from operator import getitem
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def simplify(graph: fx.GraphModule) -> None:
    """Drop operations whose result nobody uses, and those that return their input as it is."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        same = isinstance(source, fx.Node) and node.meta.get("made") == source.meta.get("made")
        if node.target is _aten.detach.default or (
            same and node.target in (_aten.expand.default, _aten.view.default)
        ):
            result = source
        elif node.target is _aten.ones_like.default:  # a gradient's first 1 is no function of the loss
            made = node.meta["made"]
            with graph.graph.inserting_before(node):
                kind = {"dtype": made.dtype, "device": made.device, "pin_memory": False}
                result = graph.graph.call_function(_aten.ones.default, (list(made.shape),), kind)
            result.meta = node.meta
        else:
            continue
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(acts)
    graph.graph.lint()
    graph.recompile()


def acts(node: fx.Node) -> bool:
    """Say whether an operation does more than return its result: changes a tensor, draws random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op in ("placeholder", "output")
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def fuse(graph: fx.GraphModule) -> None:
    """Compute log densities with their slopes where the gradients of the rows are known before, in place."""
    for node in list(graph.graph.nodes):
        if str(node.target) == "pyrosc.softmax_density.default":
            _fuse(graph.graph, node)
    graph.graph.eliminate_dead_code(acts)
    graph.graph.lint()
    graph.recompile()


def _fuse(graph: fx.Graph, density: fx.Node) -> None:
    """Replace a log density and its backward by what does both, if that can be; else leave them."""
    given: Any = density.args
    logits, total, x, theta, gate, kept, wanted = given
    result = {node.args[1]: node for node in density.users}
    back = {user for i, node in result.items() if i for user in node.users}
    if len(back) != 1 or not wanted[0] or (gate is not None and not wanted[2]):
        return
    (backward,) = back
    if str(backward.target) != "pyrosc.softmax_density_backward.default":
        return
    arguments: Any = backward.args
    weight, of_genes = arguments[0], arguments[-1]
    row_by_row = not of_genes[0] and not of_genes[2] and _shape(logits) == _shape(x)
    fits = row_by_row and _shape(total) == (*_shape(x)[:1], 1)
    fits = fits and (theta is None or (len(_shape(theta)) == 2 and _shape(theta)[0] == 1))
    room = _is_own(logits, density) and (
        gate is None or (_shape(gate) == _shape(x) and _is_own(gate, density))
    )
    before = _known_before(graph, weight, density) if fits and room else None
    if before is None:
        return
    for node in before:
        density.prepend(node)

    slopes = {node.args[1]: node for node in backward.users}
    of_bias, of_gate_bias = _sum_over_rows(slopes.get(0)), _sum_over_rows(slopes.get(3))
    with graph.inserting_before(density):
        logits, bias = _parts(graph, logits)
        gate, gate_bias = (None, None) if gate is None else _parts(graph, gate)
        arguments = (logits, bias, gate, gate_bias, total, x, theta, kept, weight)
        both = graph.call_function(torch.ops.pyrosc.weighted_softmax_density_.default, arguments)
        found = [graph.call_function(getitem, (both, i)) for i in range(5)]
    log_p, d_bias, d_gate_bias, d_theta, d_total = found
    # (A sum first: it is no use of the slopes any more.)
    replaced = [(of_bias, d_bias if bias else None), (of_gate_bias, d_gate_bias if gate_bias else None)]
    replaced += [(result.get(0), log_p), (slopes.get(0), logits), (slopes.get(1), d_total)]
    replaced += [(slopes.get(2), d_theta), (slopes.get(3), gate)]
    for old, new in replaced:
        if old is not None and new is not None:
            old.replace_all_uses_with(new)


def _shape(node: Any) -> tuple[int, ...]:
    """Return the shape of float32 numbers, () of all else."""
    made = node.meta.get("made") if isinstance(node, fx.Node) else None
    return tuple(made.shape) if made is not None and made.dtype == torch.float32 else ()


def _is_own(node: Any, user: fx.Node) -> bool:
    """Say whether an operation alone reads a tensor that another has made, which may be written over then."""
    makes = isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    if not makes or list(node.users) != [user] or node.target == _aten._unsafe_view.default:
        return False  # (`_unsafe_view` is a view that says nothing of it)
    made = node.meta["made"]
    whole = made.stride == torch.empty(made.shape, device="meta").stride()
    return whole and not any(result.alias_info for result in node.target._schema.returns)


def _known_before(graph: fx.Graph, node: fx.Node, target: fx.Node) -> list[fx.Node] | None:
    """Return, in order, what is to move before another for a result to be known there; None if it can't."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    moved, open_ = set(), [node]
    while open_:
        node = open_.pop()
        if place[node] >= place[target] and node not in moved:
            if node is target or acts(node):
                return None
            moved.add(node)
            open_ += node.all_input_nodes
    return sorted(moved, key=place.__getitem__)


def _parts(graph: fx.Graph, node: Any) -> tuple[fx.Node, fx.Node | None]:
    """Return a linear map without its offset, and the offset; None if that isn't a number of each column."""
    width = _shape(node)[1:]
    if node.target == _aten.addmm.default and _shape(node.args[0]) == width and not node.kwargs:
        return graph.call_function(_aten.mm.default, node.args[1:]), node.args[0]
    is_sum = node.target == _aten.add.Tensor and not node.kwargs and _shape(node.args[0]) == _shape(node)
    if is_sum and _shape(node.args[1]) == width and _is_own(node.args[0], node):
        return node.args
    return node, None


def _sum_over_rows(node: fx.Node | None) -> fx.Node | None:
    """Return the operation that sums it over rows, if there is one."""
    sums = [] if node is None else [user for user in node.users if user.target == _aten.sum.dim_IntList]
    return next((user for user in sums if user.args[1:] == ([0], True)), None)
