"""A training step recorded once and replayed: the operations that the programs ran, without the programs.

Pyro's Python costs as much as the mathematics of a small minibatch. On a CPU the operations are recorded with
torch.fx and called one after the other; on CUDA a graph of the device's own replays them. What a recording
cannot know is Python that acts differently from step to step; hence it is compared with a run of the programs
on other cells before it is trusted.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from pyrosc.data.minibatch import Cells
from pyrosc.engine.fusing import fuse
from pyrosc.engine.lower import shorten
from pyrosc.engine.passes import _simplify
from pyrosc.engine.rng import seeded
from pyrosc.engine.trace import traced

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
