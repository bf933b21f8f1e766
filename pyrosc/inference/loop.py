"""The training loop: epochs, minibatches, validation; what fit_svi runs. It knows no site.

Replayed steps are checked as they go: after the epoch in which a stretch of `CHECK_EVERY` steps ends, and at
the end, a step is taken both ways. If they differ, the fit goes back to where the stretch began and runs the
programs from there, so that no replayed step that was not checked stays in a fit.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrosc.data.minibatch import Cells
from pyrosc.engine.compare import restore
from pyrosc.engine.rng import seeded
from pyrosc.inference.contract import check_all_found, check_programs, is_of_each_cell, traces
from pyrosc.inference.elbo import check_estimator, checked_loss, loss_and_kl, of_held_out
from pyrosc.inference.isolation import own_parameters
from pyrosc.inference.step import Problem, Step, as_in_training

_CHECK_EVERY = 100
"""Replayed steps after which one is taken both ways: about 2% of their time."""

_log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """What there is after some epochs: rows of the history, and the best parameters so far."""

    kept: list[Tensor]
    rows: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    best_loss: float = math.inf

    def add(self, row: dict[str, float], state: Sequence[Tensor], *, warm: bool) -> None:
        """Note an epoch; its parameters are kept if it is the best.

        Without validation the loss is NaN and the last epoch is kept; before the KL weight has risen to its
        end no epoch is final.
        """
        self.rows.append(row)
        if not (warm and row["validation"] >= self.best_loss):
            self.best = len(self.rows) - 1
            self.best_loss = row["validation"] if warm else math.inf
            restore(self.kept, state)


class _Stretch:
    """Where a stretch of steps began, to go back to."""

    def __init__(self, step: Step, progress: _Progress) -> None:
        self.tensors = [tensor.detach().clone() for tensor in step.trained]
        self.taken = step.taken
        self.random = torch.get_rng_state()
        self.random_there = torch.cuda.get_rng_state(step.device) if step.device.type == "cuda" else None
        self.progress = replace(progress, rows=[*progress.rows], kept=[t.clone() for t in progress.kept])

    def go_back(self, step: Step) -> _Progress:
        """Make all as it was then; return the progress of the time."""
        restore(step.trained, self.tensors)
        step.taken = self.taken
        torch.default_generator.set_state(self.random)
        if self.random_there is not None:
            torch.cuda.set_rng_state(self.random_there, step.device)
        return self.progress


def train(problem: Problem, settings: dict[str, Any], progress: bool) -> tuple[pd.DataFrame, dict[str, Any]]:  # noqa: FBT001
    """Train in place; the parameters of the best epoch are kept.

    Returns
    -------
    DataFrame
        The history.
    dict
        What was found: attributes of :class:`~pyrosc.inference.found.Found`.
    """
    start = time.perf_counter()
    state, plate_nesting, each = _checked(problem, settings)
    step = Step(problem, state, settings)
    done = _Progress([tensor.detach().clone() for tensor in state])
    stretch = _Stretch(step, done) if step.may_be_wrong else None
    with tqdm(total=settings["epochs"], desc="fit", unit="epoch", disable=not progress) as bar:
        while len(done.rows) < settings["epochs"]:
            losses, interrupted = _epoch(problem, step)
            wrong = False
            if interrupted and not (losses or done.rows):
                raise KeyboardInterrupt
            try:
                row = _row(losses, step, problem) | {"seconds": time.perf_counter() - start}
                done.add(row, state, warm=step.taken >= settings["kl_warmup"])
            except KeyboardInterrupt:  # while the validation loss was measured
                interrupted = True
                if not done.rows:
                    row = _row(losses, step, replace(problem, validation=None))
                    done.add(row | {"seconds": time.perf_counter() - start}, state, warm=False)
            except FloatingPointError:
                if stretch is None or step.replayed is not True:
                    raise
                wrong = True  # it is raised again, if steps that are run come to it
                step.run_from_now_on("the loss was not finite")
            over = interrupted or _is_over(done, step)
            if stretch is not None and (wrong or over or step.taken - stretch.taken >= _CHECK_EVERY):
                try:
                    wrong = wrong or not step.agrees(_rows_to_check(problem, step))
                except KeyboardInterrupt:
                    wrong = interrupted = True
                    step.run_from_now_on("a check was interrupted")
                if wrong:
                    done, over = _gone_back(stretch, step), interrupted
                    if interrupted and not done.rows:
                        raise KeyboardInterrupt
                stretch = _Stretch(step, done) if step.may_be_wrong and not over else None
            _show(bar, done.rows)
            if over:
                break
    _check_finite(done.kept, state)
    restore(state, done.kept)
    history = pd.DataFrame(done.rows).rename_axis("epoch")
    return history, {
        "best_epoch": done.best,
        "plate_nesting": plate_nesting,
        "parameters_of_each_cell": each,
        "replayed": step.replayed,
        "threads": problem.threads.numbers,
    }


def _is_over(done: _Progress, step: Step) -> bool:
    """Say whether all epochs are done, or the validation loss has been no better for long."""
    warm = step.taken >= step.settings["kl_warmup"]
    waited = len(done.rows) - 1 - done.best
    return len(done.rows) >= step.settings["epochs"] or (warm and waited >= step.settings["patience"])


def _gone_back(stretch: _Stretch, step: Step) -> _Progress:
    """Go back to the start of a stretch, with a word in the log."""
    done = stretch.go_back(step)
    _log.warning(
        "steps were replayed, but %s: the fit went back to the start of epoch %d and runs its programs from "
        "there; fit_svi(..., replay=False) does so at once",
        step.replayed,
        len(done.rows),
    )
    return done


def _rows_to_check(problem: Problem, step: Step) -> Tensor:
    """Return cells to take a step of both ways: others each time, and no random number of the fit's."""
    n, size = len(problem.train), step.settings["minibatch_size"]
    return (torch.arange(size, device=step.device) + step.taken * size) % n


def _show(bar: Any, rows: list[dict[str, float]]) -> None:
    if not rows:
        return
    bar.update(len(rows) - bar.n)
    shown = {name: rows[-1][name] for name in ("train", "validation")}
    bar.set_postfix({name: f"{loss:.1f}" for name, loss in shown.items() if math.isfinite(loss)})


def _check_finite(kept: list[Tensor], state: list[Tensor]) -> None:
    with torch.no_grad():
        if not all(torch.isfinite(v).all() for v, t in zip(kept, state, strict=True) if t.requires_grad):
            msg = "the parameters are no longer finite: try a lower learning_rate or clip_norm=1.0"
            raise FloatingPointError(msg)


def _checked(problem: Problem, settings: dict[str, Any]) -> tuple[list[Tensor], int, bool]:
    """Run the programs and the ELBO on a first minibatch, as Pyro validates them.

    Returns
    -------
    list of Tensor
        All that training changes.
    int
        How many plates stand inside each other.
    bool
        Whether there are parameters of each cell.

    Raises
    ------
    ValueError
        If the programs don't fit each other, the data or the estimator; the message names the remedy.
    """
    n, size = len(problem.train), settings["minibatch_size"]
    estimate = {name: settings[name] for name in ("kl_weight", "kl_warmup")}
    check_estimator(problem.elbo, n_minibatches=-(-n // size), **estimate)
    first = torch.arange(size, device=problem.train.start.device)
    for module in problem.modules:
        module.eval()  # so that a run of the programs leaves their running moments alone
    with seeded(first.device, settings["seed"]):
        cells = problem.train.cells(first)
        plate_nesting = check_programs(problem.model, problem.guide, cells)
    if isinstance(problem.elbo, TraceEnum_ELBO) and math.isinf(problem.elbo.max_plate_nesting):
        problem.elbo.max_plate_nesting = plate_nesting  # or Pyro runs the programs to find out
    own_parameters(problem.modules)
    # From here on the store's tensors are the ones to train, save and restore.
    state = _state(problem.modules)
    kept = [tensor.detach().clone() for tensor in state]
    as_in_training(problem.modules)  # in which some draws are others than in evaluation
    with seeded(first.device, settings["seed"]):
        check_all_found(checked_loss(problem.elbo, problem.model, problem.guide, cells), state)
    restore(state, kept)
    for module in problem.modules:
        module.eval()
    each = is_of_each_cell(problem.model, problem.guide, cells, state)
    if each and problem.validation is not None and len(problem.validation):
        msg = "the programs have parameters of each cell, which cells kept out do not have: use validation=0"
        raise ValueError(msg)
    return state, plate_nesting, each


def _epoch(problem: Problem, step: Step) -> tuple[list[float], bool]:
    """Take the steps of an epoch; return their losses, and whether ctrl-C ended it."""
    as_in_training(problem.modules)
    losses: list[Tensor] = []
    interrupted = False
    try:
        for rows in _permuted(len(problem.train), step.settings["minibatch_size"], step.device):
            losses.append(step(rows))
            problem.threads.notice()
    except KeyboardInterrupt:
        interrupted = True
    return torch.stack(losses).tolist() if losses else [], interrupted


def _permuted(n: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a random order of all rows as minibatches of one size: the last is filled up from the first."""
    # Pyro subsamples parameters of each cell only where the minibatch is not all cells: keep their order.
    if size == n:
        yield torch.arange(n, device=device)
        return
    order = torch.randperm(n, device=device)
    yield from torch.cat([order, order[: -n % size]]).split(size)


def _row(losses: list[float], step: Step, problem: Problem) -> dict[str, float]:
    """Return an epoch's row of the history; raise if a loss is not finite."""
    settings = step.settings
    for module in problem.modules:
        module.eval()
    with torch.no_grad(), seeded(step.device, settings["seed"]):
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            rows = torch.arange(settings["minibatch_size"], device=step.device)
            raise FloatingPointError(
                _blame(problem, step, step.taken - len(losses) + bad[0], problem.train.cells(rows))
            )
        blocks = problem.validation.minibatches(512) if problem.validation is not None else ()
        measured = []
        for cells in blocks:
            measured.append(_measured(problem, cells, settings["kl_weight"]))
            if not math.isfinite(measured[-1]["validation"]):
                raise FloatingPointError(_blame(problem, step, step.taken, cells))
    row = {"train": float(np.mean(losses)) if losses else math.nan, "validation": math.nan}
    for name in measured[0] if measured else ():
        row[name] = sum(m[name] * m["n"] for m in measured) / sum(m["n"] for m in measured)
    row.pop("n", None)
    return row | {"kl_weight": step.weight, "learning_rate": step.rate}


def _measured(problem: Problem, cells: Cells, kl_weight: float) -> dict[str, float]:
    """Return the validation loss of cells and the KL of each site, in nats per cell, and their number."""
    cells = replace(cells, n_total=len(problem.train))
    loss, kl = loss_and_kl(of_held_out(problem.elbo), problem.model, problem.guide, cells, kl_weight)
    return {"validation": float(loss), "n": len(cells)} | {f"kl_{name}": value for name, value in kl.items()}


def _blame(problem: Problem, step: Step, which: int, cells: Cells) -> str:
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
