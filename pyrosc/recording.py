"""A training step recorded once and replayed: the operations that the programs ran, without the programs.

Pyro's Python costs as much as the mathematics of a small minibatch. On a CPU the operations are recorded with
torch.fx and called one after the other; on CUDA a graph of the device's own replays them. What a recording
cannot know is Python that acts differently from step to step; hence it is compared with a run of the programs
on other cells before it is trusted.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, fx

from pyrosc.calling import shorten
from pyrosc.cells import Cells
from pyrosc.fusing import acts, fuse
from pyrosc.random import seeded
from pyrosc.tracing import traced

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
    gradients: Gradients,
    state: Sequence[Tensor],
    cells: Callable[[], Cells],
    other: Callable[[], Cells],
    weight: Tensor,
) -> Gradients:
    """Record the operations of a run on a CPU; return what replays them, or `gradients` if that fails.

    Parameters
    ----------
    gradients
        What to record. It may read and change nothing but its arguments, `state` and random numbers.
    state
        Tensors that it reads or changes in place; afterwards they are as before.
    cells, other
        Gather a minibatch to record, and one of the same size to compare the recording with the programs on;
        neither is kept longer than it is needed.
    weight
        Of the KL.

    Returns
    -------
    Gradients
        The same, sooner; what :func:`fuse` puts in rounds otherwise. If the programs could not be recorded,
        or a replay differs from them, the log says why.
    """
    device, n_state = weight.device, len(state)

    def flat(*tensors: Tensor) -> list[Tensor | None]:
        *arrays, library, weight = tensors[n_state:]
        seen = Cells(n_total=n_total, **dict(zip(_ARRAYS, arrays, strict=True)))
        value, slopes = gradients(seen.knowing(library), weight)
        return [value, *slopes]

    def flattened(cells: Cells, weight: Tensor) -> list[Tensor]:
        return [*state, *(getattr(cells, name) for name in _ARRAYS), cells.library, weight]

    kept = [tensor.detach().clone() for tensor in state]
    try:
        some = cells()
        n_total, arguments = some.n_total, flattened(some, weight)
        with seeded(device, 0):
            graph = traced(flat, arguments)
        del some, arguments
        _simplify(graph)

        def replay(cells: Cells, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            with torch.no_grad():
                value, *slopes = graph(*flattened(cells, weight))
            return value, slopes

        def outcome(run: Gradients) -> list[Tensor | None]:
            restore(state, kept)
            with seeded(device, 1):
                value, slopes = run(other(), weight / 2)
            return [value, *slopes, *(tensor.detach().clone() for tensor in state)]

        if not all(map(_alike, outcome(gradients), outcome(replay))):
            msg = "a replay on other cells differs: a program does what no tensor operation shows"
            raise RuntimeError(msg)
        fuse(graph.graph)
        shorten(graph)
        if not all(map(_alike, outcome(replay), outcome(replay))):
            msg = "a second replay differs from the first: a program keeps what it computes"
            raise RuntimeError(msg)
    except Exception as error:  # (whatever a program does that can't be recorded)
        why = str(error).partition("\n")[0] or type(error).__name__
        _log.info("steps are run, not replayed: %s", why)
        return gradients
    finally:
        restore(state, kept)
    _log.info("steps are replayed from here on")
    return replay


def restore(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Give tensors, in place, the values that were kept of them."""
    with torch.no_grad():
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two are equal but for rounding, by the scale of their largest numbers."""
    if a is None or b is None or torch.equal(a, b):
        return a is b or (a is not None and b is not None)
    a, b = a.double(), b.double()
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)


def _simplify(graph: fx.GraphModule) -> None:
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


class CudaGraph:
    """A step on CUDA as one graph: the host sends the rows of the minibatch and starts it.

    Parameters
    ----------
    step
        From rows to the loss; it gathers the cells, runs the programs and updates the parameters, all on the
        device and without waiting for it. It has run before, so that its libraries are warm.
    state
        Tensors that it reads or changes in place, the optimiser's too; afterwards they are as before.
    rows, other
        Rows of two minibatches of one size: one to capture, one to compare the graph with the programs on.

    Raises
    ------
    RuntimeError
        If the step waits for the device, does anything else that a graph can't hold, or a replay differs.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], state: Sequence[Tensor], rows: Tensor, other: Tensor
    ) -> None:
        self.rows, device = rows.clone(), rows.device
        kept = [tensor.detach().clone() for tensor in state]
        try:
            with seeded(device, 0), _not_waiting():  # a capture that fails half-way would not end well
                step(self.rows)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(self.graph, stream=stream):
                self.loss = step(self.rows)
            runs = []
            for run in (step, self):
                restore(state, kept)
                with seeded(device, 1):
                    loss = run(other).clone()
                runs.append([loss, *(tensor.detach().clone() for tensor in state)])
            if not all(_alike(a, b) for a, b in zip(*runs, strict=True)):
                msg = "a replay on other cells differs: a program does what no tensor operation shows"
                raise RuntimeError(msg)
        finally:
            restore(state, kept)

    def __call__(self, rows: Tensor) -> Tensor:
        """Take the step; return the loss before it."""
        self.rows.copy_(rows)
        self.graph.replay()
        return self.loss.clone()


@contextmanager
def _not_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
