"""A training step on CUDA as one graph of the device's own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from pyrosc.engine.compare import agree, restore
from pyrosc.engine.replay import NotRecordableError
from pyrosc.engine.rng import seeded


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
    NotRecordableError
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
            restore(state, kept)

            def outcome(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
                before = [tensor.detach().clone() for tensor in state]
                with seeded(device, 1):
                    result = [run(other).clone(), *(tensor.detach().clone() for tensor in state)]
                restore(state, before)
                return result

            if not agree(outcome(step), outcome(self), partial(outcome, step), state):
                msg = "a replay on other cells differs: a program does what no tensor operation shows"
                raise NotRecordableError(msg, impure=True)
        except NotRecordableError:
            raise
        except RuntimeError as error:  # (torch's own, of what a capture can't hold, among them)
            raise NotRecordableError(str(error).partition("\n")[0]) from error
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
