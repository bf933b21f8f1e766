"""One step of Adam: the rate and the KL weight follow their schedules, the programs are run or replayed."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrosc.data.minibatch import Cells, DeviceCounts
from pyrosc.engine.adam import Adam
from pyrosc.engine.bfloat16 import LinearInBfloat16
from pyrosc.engine.compare import agree, restore
from pyrosc.engine.cpu.contention import Threads
from pyrosc.engine.cuda_graph import CudaGraph
from pyrosc.engine.replay import NotRecordableError, recorded
from pyrosc.engine.rng import seeded
from pyrosc.inference.contract import Program
from pyrosc.inference.elbo import loss_and_gradients
from pyrosc.inference.purity import changed, fingerprint

_RECORD_AFTER, _RECORD_FOR = 3, 50
"""Steps that are run before one is recorded, and steps to come for which that is worth its time."""

_NOT_ASKED = "the program does not say that it is pure"
_FEW = "the fit has few steps"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What is trained, on what."""

    model: Program
    guide: Program
    elbo: ELBO
    modules: list[nn.Module]
    train: DeviceCounts
    validation: DeviceCounts | None
    threads: Threads


class Step:
    """Takes steps, and knows whether they are replayed.

    Parameters
    ----------
    problem
        What is trained.
    state
        All tensors that training changes.
    settings
        Of :func:`pyrosc.fit_svi`.
    """

    def __init__(self, problem: Problem, state: list[Tensor], settings: dict[str, Any]) -> None:
        self.parameters = [tensor for tensor in state if tensor.requires_grad]
        if not self.parameters:
            msg = "nothing to train: the model and the guide have no parameters that require a gradient"
            raise ValueError(msg)
        self.problem, self.settings = problem, settings
        n = len(problem.train)
        self.planned = settings["epochs"] * -(-n // settings["minibatch_size"])
        self.taken = 0
        self.rate = self.weight = 0.0
        self.device = problem.train.start.device
        # On the device, so that a recorded step reads what they are then.
        self.weight_there, self.rate_there = (torch.zeros((), device=self.device) for _ in range(2))
        self.optimiser = Adam(self.parameters, settings["weight_decay"] / n)
        self.state, self.trained = state, [*state, *self.optimiser.state]
        self.gradients = self._in_precision(
            loss_and_gradients(problem.elbo, problem.model, problem.guide, self.parameters)
        )
        self.replay: Callable[..., Any] | None = None
        self.graph: CudaGraph | None = None
        enough = self.planned - _RECORD_AFTER > _RECORD_FOR
        self.replayed: bool | str = _FEW if settings["replay"] else _NOT_ASKED
        self._to_be_recorded = bool(settings["replay"]) and enough
        if enough and not settings["replay"]:
            _log.info(
                "steps are run as written: if the programs do the same in each step, which depends on cells, "
                "parameters, buffers and torch's random numbers alone, say so, fit_svi(..., replay=True): "
                "steps of small minibatches are then replayed in about half the time"
            )

    @property
    def may_be_wrong(self) -> bool:
        """Whether steps are replayed, or will be."""
        return self._to_be_recorded or self.replayed is True

    def __call__(self, rows: Tensor) -> Tensor:
        """Take the step; return the loss before it, in nats per cell, on the device."""
        settings = self.settings
        self.rate = settings["learning_rate"] * _one_cycle(self.taken / self.planned)
        self.weight = settings["kl_weight"] * min(1.0, (self.taken + 1) / max(1, settings["kl_warmup"]))
        self.weight_there.fill_(self.weight)
        self.rate_there.fill_(self.rate)
        if self._to_be_recorded and self.taken == _RECORD_AFTER:
            self._record(rows)
        loss = self._step(rows, self.replay or self.gradients) if self.graph is None else self.graph(rows)
        self.taken += 1
        return loss

    def agrees(self, rows: Tensor) -> bool:
        """Take a step of these cells both ways, from the same state and random numbers; say if they agree.

        If not, steps are run from now on, and there is a warning. State and random numbers stay as they were.
        """
        if self.replayed is not True:
            return True
        as_in_training(self.problem.modules)
        before = self._fingerprint()

        def outcome(way: Callable[[Tensor], Tensor]) -> list[Tensor]:
            kept = [tensor.detach().clone() for tensor in self.trained]
            try:
                with seeded(self.device, self.settings["seed"]):
                    return [way(rows).clone(), *(tensor.detach().clone() for tensor in self.trained)]
            finally:
                restore(self.trained, kept)

        run, replayed = outcome(self._run), outcome(self.graph or self._replayed)
        same = agree(run, replayed, partial(outcome, self._run), self.trained)
        if (what := changed(before, self._fingerprint()) or changed(self._at_recording, before)) is not None:
            self.run_from_now_on(f"a program changes {what} from step to step")
        elif not same:
            self.run_from_now_on("a replayed step differed from one that was run")
        return self.replayed is True

    def _run(self, rows: Tensor) -> Tensor:
        return self._step(rows, self.gradients)

    def _replayed(self, rows: Tensor) -> Tensor:
        return self._step(rows, self.replay or self.gradients)

    def run_from_now_on(self, why: str) -> None:
        """Replay no more; `why` is what the fit says."""
        self.replay = self.graph = None
        self.replayed, self._to_be_recorded = why, False

    def _in_precision(self, gradients: Callable[..., Any]) -> Callable[..., Any]:
        def coarse(cells: Cells, weight: Tensor) -> Any:
            with LinearInBfloat16():
                return gradients(cells, weight)

        return coarse if self.settings["precision"] == "bfloat16" else gradients

    def _step(self, rows: Tensor, gradients_of: Callable[..., Any]) -> Tensor:
        loss, gradients = gradients_of(self.problem.train.cells(rows), self.weight_there)
        if self.settings["clip_norm"] is not None:
            gradients = _clipped(gradients, self.settings["clip_norm"])
        # A step with a loss that is not finite is not taken, so that the parameters can still be looked at.
        self.optimiser.step(gradients, self.rate_there, skip=(~torch.isfinite(loss)).float())
        return loss

    def _record(self, rows: Tensor) -> None:
        """Replay this step from now on, if it can be recorded."""
        self._to_be_recorded = False
        n = len(self.problem.train)
        other = (rows + (len(rows) % n or 1)) % n
        gather = self.problem.train.cells
        try:
            self._check_state_of_its_own(rows)
            if rows.device.type == "cuda":
                self.graph = CudaGraph(self._run, self.trained, rows, other)
            elif rows.device.type == "cpu":
                self.replay = recorded(
                    self.gradients,
                    self.state,
                    lambda: (gather(rows), self.weight_there),
                    lambda: (gather(other), self.weight_there / 2),
                )
            else:
                msg = f"steps on {rows.device.type} are not recorded"
                raise NotRecordableError(msg)
        except NotRecordableError as error:
            self.replayed = str(error)
            level = logging.WARNING if error.impure else logging.INFO
            _log.log(level, "steps are run, not replayed: %s", error)
        else:
            self.replayed, self._at_recording = True, self._fingerprint()
            _log.info("steps are replayed from here on")

    def _check_state_of_its_own(self, rows: Tensor) -> None:
        """Raise if a run changes what the programs keep beside parameters, such as a count of their calls."""
        before, kept = self._fingerprint(), [tensor.detach().clone() for tensor in self.state]
        with seeded(self.device, 0):
            self.gradients(self.problem.train.cells(rows), self.weight_there)
        restore(self.state, kept)
        if (what := changed(before, self._fingerprint())) is not None:
            msg = f"a program changes {what} from step to step"
            raise NotRecordableError(msg, impure=True)

    def _fingerprint(self) -> dict[str, Any]:
        problem = self.problem
        programs = [problem.model, problem.guide, problem.elbo, *problem.modules]
        store = pyro.get_param_store().get_state()["params"]
        kept = {"the parameter store": {name: id(tensor) for name, tensor in store.items()}}
        return fingerprint(programs, self.trained) | kept


def as_in_training(modules: list[nn.Module]) -> None:
    """Put modules in training mode, but for parts whose parameters are all frozen: they run as trained."""
    for module in modules:
        module.train()
        for part in module.modules():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()


def _clipped(gradients: list[Tensor | None], norm: float) -> list[Tensor | None]:
    """Shorten gradients, as one vector, to a norm."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None]
    share = (norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return [None if gradient is None else gradient * share for gradient in gradients]


def _one_cycle(done: float) -> float:
    """Return the learning rate as a share of its peak: up in a tenth of the run, then down along a cosine."""
    return 0.04 + 0.96 * done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)
