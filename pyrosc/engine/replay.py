"""A training step recorded once and replayed: the operations that the programs ran, without the programs.

Pyro's Python costs as much as the mathematics of a small minibatch. On a CPU the operations are recorded with
torch.fx and called one after the other; on CUDA a graph of the device's own replays them. What a recording
cannot know is Python that acts differently from step to step; hence it is compared with a run of the programs
on other cells before it is trusted.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyrosc.data.minibatch import Cells
from pyrosc.engine.lower import shorten
from pyrosc.engine.passes import fuse, simplify
from pyrosc.engine.rng import seeded
from pyrosc.engine.trace import traced

Gradients = Callable[[Cells, Tensor], tuple[Tensor, list[Tensor | None]]]
"""From cells and the weight of the KL to the loss and its gradients; None for a parameter it does not use."""

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
    kept = [tensor.detach().clone() for tensor in state]
    try:
        leaves, tree = tree_flatten((cells(), weight))

        def flat(*tensors: Tensor) -> list[Tensor | None]:
            value, slopes = gradients(*tree_unflatten(tensors[n_state:], tree))
            return [value, *slopes]

        with seeded(device, 0):
            graph = traced(flat, [*state, *leaves])
        del leaves
        simplify(graph)

        def replay(cells: Cells, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            with torch.no_grad():
                value, *slopes = graph(*state, *tree_leaves((cells, weight)))
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
