"""Rewriting a recorded graph: what nobody uses goes, and what returns its input as it is."""

import torch
from torch import fx


def simplify(graph: fx.GraphModule) -> None:
    """Drop operations whose result nobody uses, and those that return their input as it is."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        same = isinstance(source, fx.Node) and node.meta.get("made") == source.meta.get("made")
        if node.target is aten.detach.default or (
            same and node.target in (aten.expand.default, aten.view.default)
        ):
            result = source
        elif node.target is aten.ones_like.default:  # a gradient's first 1 is no function of the loss
            made = node.meta["made"]
            with graph.graph.inserting_before(node):
                kind = {"dtype": made.dtype, "device": made.device, "pin_memory": False}
                result = graph.graph.call_function(aten.ones.default, (list(made.shape),), kind)
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
