"""The training loop: epochs, minibatches, schedules, validation; what fit_svi runs. It knows no site."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrosc.data.minibatch import Cells, DeviceCounts
from pyrosc.engine.adam import Adam
from pyrosc.engine.bfloat16 import LinearInBfloat16
from pyrosc.engine.cuda_graph import CudaGraph
from pyrosc.engine.replay import gradients_of, recorded, restore
from pyrosc.engine.rng import seeded
from pyrosc.inference.contract import Program, check_all_found, check_programs, is_of_each_cell, traces
from pyrosc.inference.elbo import loss_and_kl, weighted_loss
from pyrosc.inference.isolation import own_parameters

RECORD_AFTER, RECORD_FOR = 3, 50
"""Steps that are run before one is recorded, and steps to come for which that is worth its time."""

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


def train(problem: Problem, settings: dict[str, Any], progress: bool) -> tuple[pd.DataFrame, int]:  # noqa: FBT001
    """Train in place; return the history and the epoch whose parameters were kept."""
    start = time.perf_counter()
    state = _checked(problem, settings)
    step = _Stepper(problem, state, settings)
    rows: list[dict[str, float]] = []
    best, best_loss, kept = 0, math.inf, [tensor.detach().clone() for tensor in state]
    with tqdm(total=settings["epochs"], desc="fit", unit="epoch", disable=not progress) as bar:
        for epoch in range(settings["epochs"]):
            losses, interrupted = _epoch(problem, step)
            if interrupted and not (losses or rows):
                raise KeyboardInterrupt
            try:
                row = _row(losses, step, problem, settings)
            except KeyboardInterrupt:  # while the validation loss was measured
                if rows:
                    break
                row, interrupted = _row(losses, step, replace(problem, validation=None), settings), True
            rows.append(row | {"seconds": time.perf_counter() - start})
            bar.update()
            shown = {name: rows[-1][name] for name in ("train", "validation")}
            bar.set_postfix({name: f"{loss:.1f}" for name, loss in shown.items() if math.isfinite(loss)})
            warm = step.taken >= settings["kl_warmup"]
            # Without validation the loss is NaN and the last epoch is kept; before the KL weight has risen
            # to its end no epoch is final.
            if not (warm and rows[-1]["validation"] >= best_loss):
                best, best_loss = epoch, rows[-1]["validation"] if warm else math.inf
                restore(kept, state)
            if interrupted or (warm and epoch - best >= settings["patience"]):
                break
    with torch.no_grad():
        if not all(torch.isfinite(v).all() for v, t in zip(kept, state, strict=True) if t.requires_grad):
            msg = "the parameters are no longer finite: try a lower learning_rate or clip_norm=1.0"
            raise FloatingPointError(msg)
    restore(state, kept)
    return pd.DataFrame(rows).rename_axis("epoch"), best


def _checked(problem: Problem, settings: dict[str, Any]) -> list[Tensor]:
    """Run the programs on a first minibatch; return all tensors that training changes.

    Raises
    ------
    ValueError
        If the programs don't fit each other or the data; the message names the remedy.
    """
    first = torch.arange(settings["minibatch_size"], device=problem.train.start.device)
    for module in problem.modules:
        module.eval()  # so that a run of the programs leaves their running moments alone
    with seeded(first.device, settings["seed"]):
        cells = problem.train.cells(first)
        settings["plate_nesting"] = check_programs(problem.model, problem.guide, cells)
    if isinstance(problem.elbo, TraceEnum_ELBO) and math.isinf(problem.elbo.max_plate_nesting):
        problem.elbo.max_plate_nesting = settings["plate_nesting"]  # or Pyro runs the programs to find out
    own_parameters(problem.modules)
    # From here on the store's tensors are the ones to train, save and restore.
    state = _state(problem.modules)
    with seeded(first.device, settings["seed"]):
        check_all_found(problem.elbo.differentiable_loss(problem.model, problem.guide, cells), state)
    each = is_of_each_cell(problem.model, problem.guide, cells, state)
    settings["parameters_of_each_cell"] = each
    if each and settings["n_train"] < settings["n_cells"]:
        msg = "the programs have parameters of each cell, which cells kept out do not have: use validation=0"
        raise ValueError(msg)
    return state


class _Stepper:
    """One step of Adam: the rate and the KL weight follow their schedules over the planned steps."""

    def __init__(self, problem: Problem, state: list[Tensor], settings: dict[str, Any]) -> None:
        self.parameters = [tensor for tensor in state if tensor.requires_grad]
        if not self.parameters:
            msg = "nothing to train: the model and the guide have no parameters that require a gradient"
            raise ValueError(msg)
        self.problem, self.state, self.settings = problem, state, settings
        self.planned = settings["epochs"] * settings["steps_per_epoch"]
        self.taken = 0
        self.rate = self.weight = 0.0
        device = problem.train.start.device
        # On the device, so that a recorded step reads what they are then.
        self.weight_there, self.rate_there = torch.zeros((), device=device), torch.zeros((), device=device)
        self.gradients = gradients_of(self._loss, self.parameters)
        self.graph: CudaGraph | None = None
        self.optimiser = Adam(self.parameters, settings["weight_decay"] / settings["n_train"])

    def __call__(self, rows: Tensor) -> Tensor:
        """Take the step; return the loss before it, in nats per cell, on the device."""
        settings = self.settings
        self.rate = settings["learning_rate"] * one_cycle(self.taken / self.planned)
        self.weight = settings["kl_weight"] * min(1.0, (self.taken + 1) / max(1, settings["kl_warmup"]))
        self.weight_there.fill_(self.weight)
        self.rate_there.fill_(self.rate)
        if self.taken == RECORD_AFTER and self.planned - self.taken > RECORD_FOR:
            self._record(rows)
        loss = self._step(rows) if self.graph is None else self.graph(rows)
        self.taken += 1
        return loss

    def _loss(self, cells: Cells, weight: Tensor) -> Tensor:
        with LinearInBfloat16() if self.settings["precision"] == "bfloat16" else nullcontext():
            return weighted_loss(self.problem.elbo, self.problem.model, self.problem.guide, cells, weight)

    def _step(self, rows: Tensor) -> Tensor:
        loss, gradients = self.gradients(self.problem.train.cells(rows), self.weight_there)
        if self.settings["clip_norm"] is not None:
            gradients = _clipped(gradients, self.settings["clip_norm"])
        # A step with a loss that is not finite is not taken, so that the parameters can still be looked at.
        self.optimiser.step(gradients, self.rate_there, skip=(~torch.isfinite(loss)).float())
        return loss

    def _record(self, rows: Tensor) -> None:
        """Replay this step from now on, if it can be recorded."""
        if self._counting(rows):
            _log.info("steps are run, not replayed: a program changes numbers of its own from step to step")
            return
        n = len(self.problem.train)
        other = (rows + (len(rows) % n or 1)) % n
        if rows.device.type == "cuda":
            state = [*self.state, *self.optimiser.state]
            try:
                self.graph = CudaGraph(self._step, state, rows, other)
            except RuntimeError as error:
                _log.info("steps are run, not replayed: %s", str(error).partition("\n")[0])
        elif rows.device.type == "cpu":
            gather = self.problem.train.cells
            self.gradients = recorded(
                self.gradients, self.state, lambda: gather(rows), lambda: gather(other), self.weight_there
            )

    def _counting(self, rows: Tensor) -> bool:
        """Say whether a run changes plain numbers that the programs keep, such as a count of their calls."""
        owners = [
            getattr(program, "__self__", program) for program in (self.problem.model, self.problem.guide)
        ]
        parts = [*owners, *(part for module in self.problem.modules for part in module.modules())]

        def numbers() -> list[Any]:
            kept = [item for part in parts for item in getattr(part, "__dict__", {}).items()]
            return [(name, value) for name, value in kept if isinstance(value, int | float)]

        before = numbers()
        with seeded(rows.device, 0):
            state = [tensor.detach().clone() for tensor in self.state]
            traces(self.problem.model, self.problem.guide, self.problem.train.cells(rows))
        restore(self.state, state)
        return numbers() != before


def _clipped(gradients: list[Tensor | None], norm: float) -> list[Tensor | None]:
    """Shorten gradients, as one vector, to a norm."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None]
    share = (norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    return [None if gradient is None else gradient * share for gradient in gradients]


def one_cycle(done: float) -> float:
    """Return the learning rate as a share of its peak: up in a tenth of the run, then down along a cosine."""
    return 0.04 + 0.96 * done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)


def _epoch(problem: Problem, step: _Stepper) -> tuple[list[float], bool]:
    """Take the steps of an epoch; return their losses, and whether ctrl-C ended it."""
    for module in problem.modules:
        _as_in_training(module)
    losses: list[Tensor] = []
    interrupted = False
    try:
        for rows in _permuted(len(problem.train), step.settings, problem.train.start.device):
            losses.append(step(rows))  # noqa: PERF401 (ctrl-C keeps what is done)
    except KeyboardInterrupt:
        interrupted = True
    return torch.stack(losses).tolist() if losses else [], interrupted


def _as_in_training(module: nn.Module) -> None:
    """Put a module in training mode, but for parts whose parameters are all frozen: they run as trained."""
    module.train()
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def _permuted(n: int, settings: dict[str, Any], device: torch.device) -> Iterator[Tensor]:
    """Yield a random order of all rows as minibatches of one size: the last is filled up from the first."""
    size, steps = settings["minibatch_size"], settings["steps_per_epoch"]
    # Pyro subsamples parameters of each cell only where the minibatch is not all cells: keep their order.
    if size == n:
        yield torch.arange(n, device=device)
        return
    order = torch.randperm(n, device=device)
    yield from torch.cat([order, order[: steps * size - n]]).split(size)


def _row(losses: list[float], step: _Stepper, problem: Problem, settings: dict[str, Any]) -> dict[str, float]:
    """Return an epoch's row of the history; raise if a loss is not finite."""
    for module in problem.modules:
        module.eval()
    with torch.no_grad(), seeded(problem.train.start.device, settings["seed"]):
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            rows = torch.arange(settings["minibatch_size"], device=problem.train.start.device)
            raise FloatingPointError(
                _blame(problem, step, step.taken - len(losses) + bad[0], problem.train.cells(rows))
            )
        blocks = problem.validation.minibatches(512) if problem.validation is not None else ()
        measured = []
        for cells in blocks:
            measured.append(_measured(problem, cells, settings))
            if not math.isfinite(measured[-1]["validation"]):
                raise FloatingPointError(_blame(problem, step, step.taken, cells))
    row = {"train": float(np.mean(losses)) if losses else math.nan, "validation": math.nan}
    for name in measured[0] if measured else ():
        row[name] = sum(m[name] * m["n"] for m in measured) / sum(m["n"] for m in measured)
    row.pop("n", None)
    return row | {"kl_weight": step.weight, "learning_rate": step.rate}


def _measured(problem: Problem, cells: Cells, settings: dict[str, Any]) -> dict[str, float]:
    """Return the validation loss of cells and the KL of each site, in nats per cell, and their number."""
    cells = replace(cells, n_total=settings["n_train"])
    loss, kl = loss_and_kl(problem.elbo, problem.model, problem.guide, cells, settings["kl_weight"])
    return {"validation": float(loss), "n": len(cells)} | {f"kl_{name}": value for name, value in kl.items()}


def _blame(problem: Problem, step: _Stepper, which: int, cells: Cells) -> str:
    """Say where a loss stopped being finite."""
    guided, modelled = traces(problem.model, problem.guide, cells)
    sites: dict[str, Tensor] = {}
    for trace in (modelled, guided):
        trace.compute_log_prob()
        sites |= {
            name: site["log_prob"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not torch.isfinite(site["log_prob"]).all()
        }
    return (
        f"the loss is not finite from step {which} on "
        f"(learning rate {step.rate:.2g}); sites without a finite density now: {', '.join(sites) or 'none'}. "
        "Try a lower learning_rate or clip_norm=1.0; if it is the first step, look at that site's parameters"
    )


def _state(modules: list[nn.Module]) -> list[Tensor]:
    """Return all tensors that training changes, each once: parameters, buffers and the param store's."""
    store = pyro.get_param_store().get_state()["params"].values()
    inside = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in (*inside, *store)}.values())
