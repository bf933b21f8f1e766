"""A function of tensors recorded once and replayed: its operations, without the Python that called them.

Pyro's Python costs as much as the mathematics of a small minibatch. On a CPU the operations of a step are
recorded with torch.fx, rewritten, and called one after the other. Each graph is compared with the function on
other inputs before it is trusted, after the last rewrite too: what is replayed is what passed.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyrosc.engine.compare import agree, restore
from pyrosc.engine.lower import shorten
from pyrosc.engine.passes import fuse, simplify
from pyrosc.engine.rng import seeded
from pyrosc.engine.trace import traced

_Gradients = Callable[..., tuple[Tensor, list[Tensor | None]]]
"""From inputs to a loss and its gradients; None for a parameter that it does not use."""

_REWRITES: tuple[Callable[[fx.GraphModule], None], ...] = (fuse, shorten)
"""What makes a graph sooner done, in this order; each works in place."""


class NotRecordableError(RuntimeError):
    """What a function does that no recording can hold.

    Parameters
    ----------
    why
        The reason.
    impure
        Whether it shows that the function depends on more than tensors and torch's random numbers.
    """

    def __init__(self, why: str, *, impure: bool = False) -> None:
        super().__init__(why)
        self.impure = impure


def gradients_of(loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> _Gradients:
    """Return the function that runs a loss and differentiates it."""

    def gradients(*inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
        value = loss(*inputs)
        return value.detach(), list(torch.autograd.grad(value, parameters, allow_unused=True))

    return gradients


def recorded(
    function: Callable[..., Any],
    state: Sequence[Tensor],
    inputs: Callable[[], tuple[Any, ...]],
    other: Callable[[], tuple[Any, ...]],
) -> Callable[..., Any]:
    """Record the operations that a function runs on a CPU; return what replays them.

    Parameters
    ----------
    function
        What to record: of pytrees of tensors, to a pytree of tensors and None. It may read and change nothing
        but its arguments, `state` and torch's random numbers.
    state
        Tensors that it reads or changes in place; afterwards they are as before.
    inputs, other
        Make its arguments: to record it with, and others of the same shapes to compare replays with it on.
        They are made anew each time, so that none is kept longer than needed.

    Returns
    -------
    callable
        The same, sooner.

    Raises
    ------
    NotRecordableError
        If the function could not be recorded, or a replay differs from it: the message says why.

    Warns
    -----
    RuntimeWarning
        If a rewrite fails, or its graph differs from the function: the graph before it is replayed then.
    """
    kept = [tensor.detach().clone() for tensor in state]
    device = state[0].device

    def outcome(run: Callable[..., Any]) -> list[Tensor | None]:
        before = [tensor.detach().clone() for tensor in state]
        with seeded(device, 1):
            result = tree_leaves(run(*other()))
        result += [tensor.detach().clone() for tensor in state]
        restore(state, before)
        return result

    def passes(graph: fx.GraphModule) -> bool:
        return agree(wanted, outcome(replay_of(graph)), partial(outcome, function), state)

    try:
        with seeded(device, 0):
            graph, replay_of = _graph(function, state, inputs())
        restore(state, kept)
        wanted = outcome(function)
        try:
            simplify(graph)
            same = passes(graph)
        except Exception as error:  # what was recorded can't be run again
            raise NotRecordableError(str(error).partition("\n")[0] or type(error).__name__) from error
        if not same:
            msg = "a replay on other inputs differs: a program does what no tensor operation shows"
            raise NotRecordableError(msg, impure=True)
        for rewrite in _REWRITES:
            graph = _rewritten(graph, rewrite, passes)
        replay = replay_of(graph)
        if not passes(graph):
            msg = "a second replay differs from the first: a program keeps what it computes"
            raise NotRecordableError(msg, impure=True)
    finally:
        restore(state, kept)
    return replay


def _graph(
    function: Callable[..., Any], state: Sequence[Tensor], inputs: tuple[Any, ...]
) -> tuple[fx.GraphModule, Callable[[fx.GraphModule], Callable[..., Any]]]:
    """Return the operations as a graph, and what makes a function of the same arguments of such a graph."""
    arguments, shape = tree_flatten(inputs)
    result_shape: Any = None

    def flat(*tensors: Tensor) -> list[Tensor | None]:
        nonlocal result_shape
        leaves, result_shape = tree_flatten(function(*tree_unflatten(tensors[len(state) :], shape)))
        return leaves

    try:
        graph = traced(flat, [*state, *arguments])
    except Exception as error:  # whatever a program does that can't be recorded
        raise NotRecordableError(str(error).partition("\n")[0] or type(error).__name__) from error

    def replay_of(graph: fx.GraphModule) -> Callable[..., Any]:
        def replay(*inputs: Any) -> Any:
            with torch.no_grad():
                return tree_unflatten(graph(*state, *tree_leaves(inputs)), result_shape)

        return replay

    return graph, replay_of


def _rewritten(
    graph: fx.GraphModule,
    rewrite: Callable[[fx.GraphModule], None],
    passes: Callable[[fx.GraphModule], bool],
) -> fx.GraphModule:
    """Return a rewritten copy of a graph if it passes; else warn, and return the graph."""
    name = getattr(rewrite, "__name__", str(rewrite))
    new = fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    copy = fx.GraphModule(graph, new)  # the tensors that it holds are the same, not copies
    try:
        rewrite(copy)
        if passes(copy):
            return copy
        why = "computes other numbers"
    except Exception as error:  # ours: steps are right without it
        why = f"failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    msg = f"the rewrite {name!r} of recorded steps {why} and is left out: please report it with your model"
    warnings.warn(msg, RuntimeWarning, stacklevel=2)
    return graph
