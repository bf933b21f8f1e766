"""A training step recorded once and replayed: the operations that the programs ran, without the programs.

Pyro's Python costs as much as the mathematics of a small minibatch. On a CPU the operations are recorded with
torch.fx and called one after the other; on CUDA a graph of the device's own replays them. What a recording
cannot know is Python that acts differently from step to step; hence it is compared with a run of the programs
on other cells before it is trusted.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from pyrosc.cells import Cells
from pyrosc.random import seeded

Gradients = Callable[[Cells, Tensor], tuple[Tensor, list[Tensor | None]]]
"""From cells and the weight of the KL to the loss and its gradients; None for a parameter it does not use."""

_ARRAYS = [field.name for field in fields(Cells) if field.name != "n_total"]
_log = logging.getLogger(__name__)


def gradients_of(loss: Callable[[Cells, Tensor], Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """Return the function that runs a loss and differentiates it."""

    def gradients(cells: Cells, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        value = loss(cells, weight)
        return value.detach(), list(torch.autograd.grad(value, parameters, allow_unused=True))

    return gradients


def recorded(
    gradients: Gradients, state: Sequence[Tensor], cells: Cells, other: Cells, weight: Tensor
) -> Gradients:
    """Record the operations of a run on a CPU; return what replays them, or `gradients` if that fails.

    Parameters
    ----------
    gradients
        What to record. It may read and change nothing but its arguments, `state` and random numbers.
    state
        Tensors that it reads or changes in place; afterwards they are as before.
    cells, other
        A minibatch to record, and one of the same size to compare the recording with the programs on.
    weight
        Of the KL.

    Returns
    -------
    Gradients
        The same bits, sooner. If the programs could not be recorded, or a replay differs from them, the log
        says why.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a while to import

    device, n_state = cells.x.device, len(state)

    def flat(*tensors: Tensor) -> list[Tensor | None]:
        *arrays, weight = tensors[n_state:]
        value, slopes = gradients(
            Cells(n_total=cells.n_total, **dict(zip(_ARRAYS, arrays, strict=True))), weight
        )
        return [value, *slopes]

    def flattened(cells: Cells, weight: Tensor) -> list[Tensor]:
        return [*state, *(getattr(cells, name) for name in _ARRAYS), weight]

    kept = [tensor.detach().clone() for tensor in state]
    try:
        with seeded(device, 0):
            graph = make_fx(flat)(*flattened(cells, weight))
        _simplify(graph)

        def replay(cells: Cells, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            with torch.no_grad():
                value, *slopes = graph(*flattened(cells, weight))
            return value, slopes

        runs = []
        for run in (gradients, replay):
            _restore(state, kept)
            with seeded(device, 1):
                value, slopes = run(other, weight / 2)
            changed = [tensor.detach().clone() for tensor in state]
            runs.append([value, *slopes, *changed])
        if not all(_alike(a, b) for a, b in zip(*runs, strict=True)):
            msg = "a replay on other cells differs: a program does what no tensor operation shows"
            raise RuntimeError(msg)
    except Exception as error:  # (whatever a program does that can't be recorded)
        _log.info("steps are run, not replayed: %s", str(error).partition("\n")[0] or type(error).__name__)
        return gradients
    finally:
        _restore(state, kept)
    return replay


def _restore(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-7, equal_nan=True)


def _simplify(graph: fx.GraphModule) -> None:
    """Drop operations whose result nobody uses, and those that return their input as it is."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        same = isinstance(source, fx.Node) and _layout(node) == _layout(source)
        if node.target is aten.detach.default or (
            same and node.target in (aten.expand.default, aten.view.default)
        ):
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(_acts)
    graph.graph.lint()
    graph.recompile()


def _acts(node: fx.Node) -> bool:
    """Say whether an operation does more than return its result: changes a tensor, draws random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op in ("placeholder", "output")
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _layout(node: fx.Node) -> Any:
    value: Any = node.meta.get("tensor_meta")
    return (value.shape, value.stride) if value is not None else node


class CudaGraph:
    """A step on CUDA as one graph: the host sends the rows of the minibatch and starts it.

    Parameters
    ----------
    step
        From rows to the loss; it gathers the cells, runs the programs and updates the parameters, all on the
        device and without waiting for it. It has run before, so that its libraries are warm.
    rows
        Rows of a minibatch: all will have their number.

    Raises
    ------
    RuntimeError
        If the step waits for the device, or does anything else that a graph can't hold.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self.rows = rows.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step(self.rows)

    def __call__(self, rows: Tensor) -> Tensor:
        """Take the step; return the loss before it."""
        self.rows.copy_(rows)
        self.graph.replay()
        return self.loss.clone()
