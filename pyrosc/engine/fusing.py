"""Shares of the genes and the density of their counts as one loop, in a recorded step on a CPU.

A decoder of counts ends in softmax(logits), a library size times that, and a density: there and back, seven
passes over minibatch x genes. In one loop a row stays in the processor's cache, and the slopes in the logits
take their place. It is put in for the operations of whatever program, where nothing else looks at what lies
between them.
"""

from collections.abc import Iterable
from operator import getitem
from typing import Any

import torch
from torch import fx

from pyrosc.engine.passes import acts

_aten = torch.ops.aten


def fuse(graph: fx.GraphModule) -> None:
    """Replace such operations, in place; leave all others."""
    for node in list(graph.graph.nodes):
        if str(node.target) == "pyrosc.log_density.default":
            try:
                _fuse(graph.graph, node)
            except _OtherOperations:
                continue
    graph.graph.eliminate_dead_code(acts)
    graph.graph.lint()
    graph.recompile()


class _OtherOperations(Exception):  # noqa: N818 (it is no error)
    """What is there is not what the loop does."""


def _fuse(graph: fx.Graph, density: Any) -> None:
    # There: mean = library * softmax(logits).
    x, mean, theta, gate, _ = density.args
    shares = _first(_aten._softmax.default, _nodes(mean.args))
    logits, library = shares.args[0], _other_factor(mean, shares)
    _only(shares.args[1:] == (-1, False) and list(mean.users) == [density])
    _only(len(_shape(x)) == 2 and _shape(x) == _shape(logits) and _shape(library) == (_shape(x)[0], 1))
    _only(theta is None or _shape(theta) == (1, _shape(x)[1]))
    _only(gate is None or _shape(gate) == _shape(x))
    _only(_is_room(logits, shares) and (gate is None or _is_room(gate, density)))

    # And back: the slopes of each row times its weight.
    result = {node.args[1]: node for node in density.users}
    of_logits = _first(_aten._softmax_backward_data.default, shares.users)
    of_shares = of_logits.args[0]
    of_mean = _other_factor(of_shares, library)
    weight = _column(_other_factor(of_mean, result.get(1)))
    _only([*result[1].users, *of_shares.users] == [of_mean, of_logits] and of_logits.args[1] is shares)
    replaced: dict[Any, Any] = {}
    between = {mean, of_logits}
    of_theta = of_library = None
    if theta is not None and 2 in result:  # a sum over rows
        of_theta = _user(result[2])
        _only(of_theta.target == _aten.mm.default and of_theta.args[1] is result[2])
        row = of_theta.args[0]
        _only(row.target == _aten.unsqueeze.default and row.args == (weight, 0))
    if gate is not None:
        _only(3 in result)
        of_gate = _user(result[3])
        _only(_column(_other_factor(of_gate, result[3])) is weight)
    if len(of_mean.users) > 1:  # the library size is latent
        (product, *others) = set(of_mean.users) - {of_shares}
        of_library = _user(product)
        _only(not others and _other_factor(product, of_mean) is shares)
        _only(of_library.target == _aten.sum.dim_IntList and of_library.args[1:] == ([1], True))
        between.add(product)
    _only(set(shares.users) == between)

    of_bias, of_gate_bias = _sum_over_rows(of_logits), None if gate is None else _sum_over_rows(of_gate)
    _put_before(graph, density, weight)
    with graph.inserting_before(density):
        product, bias = _parts(graph, logits)
        gate_product, gate_bias = (None, None) if gate is None else _parts(graph, gate)
        arguments = (product, bias, gate_product, gate_bias, library, x, theta, weight)
        loop = graph.call_function(torch.ops.pyrosc.shares_log_density.default, arguments)
        slopes = (of_bias if bias else None, of_gate_bias if gate_bias else None, of_theta, of_library)
        for i, old in enumerate((result.get(0), *slopes)):
            if old is not None:
                replaced[old] = graph.call_function(getitem, (loop, i))
    replaced[of_logits] = product
    if gate is not None:
        replaced[of_gate] = gate_product
    for old, new in replaced.items():
        old.replace_all_uses_with(new)


def _nodes(arguments: Iterable[Any]) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def _only(met: Any) -> None:
    if not met:
        raise _OtherOperations


def _first(target: Any, nodes: Iterable[Any]) -> Any:
    found = [node for node in nodes if node.target == target]
    _only(len(found) > 0)
    return found[0]


def _user(node: Any) -> Any:
    """Return the only operation that uses the result of another."""
    _only(len(node.users) == 1)
    return next(iter(node.users))


def _other_factor(product: Any, factor: Any) -> Any:
    """Return what a product multiplies one of its factors with."""
    _only(isinstance(product, fx.Node) and product.target == _aten.mul.Tensor and factor in product.args)
    a, b = product.args
    return a if b is factor else b


def _column(node: Any) -> Any:
    """Return what was made a column of numbers, one for each row."""
    _only(isinstance(node, fx.Node) and node.target == _aten.unsqueeze.default and node.args[1] == -1)
    return node.args[0]


def _is_room(node: Any, user: Any) -> bool:
    """Say whether one operation alone uses the result of a linear map, which can be written over then."""
    # (A product of bfloat16 numbers is made float32 by adding the offset, or by a copy: see `precision.py`.)
    made = node.args[0] if node.target in (_aten.add.Tensor, _aten._to_copy.default) else node
    is_map = isinstance(made, fx.Node) and made.target in (_aten.addmm.default, _aten.mm.default)
    return is_map and list(node.users) == [user] and list(made.users) in ([node], [user])


def _parts(graph: fx.Graph, node: Any) -> tuple[Any, Any]:
    """Return a linear map without its offset, and the offset; None if that isn't a number of each column."""
    width = _shape(node)[1:]
    if node.target == _aten.addmm.default and _shape(node.args[0]) == width and not node.kwargs:
        return graph.call_function(_aten.mm.default, node.args[1:]), node.args[0]
    is_sum = node.target == _aten.add.Tensor and _shape(node.args[0]) == _shape(node) and not node.kwargs
    if is_sum and _shape(node.args[1]) == width:
        return node.args
    return node, None


def _sum_over_rows(node: Any) -> Any:
    """Return the operation that sums it over rows, if there is one."""
    sums = (user for user in node.users if user.target == _aten.sum.dim_IntList)
    return next((user for user in sums if user.args[1:] == ([0], True)), None)


def _shape(node: Any) -> tuple[int, ...]:
    """Return the shape of float32 numbers, () of all else."""
    made = node.meta.get("made") if isinstance(node, fx.Node) else None
    return tuple(made.shape) if made is not None and made.dtype == torch.float32 else ()


def _put_before(graph: fx.Graph, target: fx.Node, node: fx.Node) -> None:
    """Move an operation before another, and before it what it is made of."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    moved, open_ = set(), [node]
    while open_:
        node = open_.pop()
        if place[node] >= place[target] and node not in moved:
            _only(node is not target and not acts(node))
            moved.add(node)
            open_ += node.all_input_nodes
    for node in sorted(moved, key=place.__getitem__):
        target.prepend(node)
