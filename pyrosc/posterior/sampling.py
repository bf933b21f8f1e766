"""The loop behind all questions: a fit's programs are run on minibatches of cells, many draws at a time.

A question says what to make of one minibatch; the loop puts it to all of them in turn. Nothing of the size
draws x cells x genes is held for more than a minibatch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.contract import is_plate
from pyrosc.inference.fit import Fit

_ELEMENTS = 2**23
"""Draws x cells x genes that are decoded at a time."""

_OWN_BATCH = (None,)
"""Each cell is decoded in the batch that it is of."""

_Answer = TypeVar("_Answer")


class Run(NamedTuple):
    """What the programs did when they were run once, in a plate of draws.

    Attributes
    ----------
    guide
        Trace of the guide.
    models
        Traces of the model on what the guide drew, one for each batch asked for.
    """

    guide: poutine.Trace
    models: list[poutine.Trace]


# The loop.


def map_minibatches(
    fit: Fit, data: Counts, ask: Callable[[Cells], _Answer], n_decoded: int, *, seed: int
) -> Iterator[_Answer]:
    """Yield the answer to a question about each minibatch of cells, in the order of the data.

    Parameters
    ----------
    fit, data
        A fit, and counts in its genes and codes.
    ask
        The question about a minibatch. It runs as the fit does: in evaluation mode, with the fit's parameters
        and with random numbers of the minibatch's own.
    n_decoded
        Draws of each cell's genes that the question holds at a time; more make smaller minibatches.
    seed
        Of the random numbers.
    """
    for i, cells in enumerate(data.on(fit.device).minibatches(_minibatch_size(fit, n_decoded))):
        with fit.asking(_seed_of_minibatch(seed, i)):
            answer = ask(cells)
        # The consumer runs outside of the fit's context: two fits may be asked in turns.
        yield answer


def map_runs(
    fit: Fit,
    data: Counts,
    read: Callable[[Cells, list[Run]], _Answer],
    n_draws: int,
    codes: Sequence[int | None] = _OWN_BATCH,
    *,
    parallel: bool,
    seed: int,
) -> Iterator[_Answer]:
    """Yield what `read` makes of each minibatch and of the runs of guide and model on it: see :func:`run`."""

    def ask(cells: Cells) -> _Answer:
        return read(cells, run(fit, cells, n_draws, codes, parallel=parallel))

    return map_minibatches(fit, data, ask, n_draws * len(codes), seed=seed)


def posterior_draws(
    fit: Fit,
    data: Counts,
    sites: Sequence[str],
    n_draws: int,
    codes: Sequence[int | None] = _OWN_BATCH,
    *,
    parallel: bool,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the draws of each minibatch, (batches, draws, cells, ...): latent ones alike in each batch."""

    def read(_: Cells, runs: list[Run]) -> dict[str, Tensor]:
        check_guided(runs)
        return {name: values_of(runs, name) for name in sites}

    return map_runs(fit, data, read, n_draws, codes, parallel=parallel, seed=seed)


def _minibatch_size(fit: Fit, n_decoded: int) -> int:
    """Return how many cells are asked about at a time."""
    return min(1024, max(1, _ELEMENTS // (max(1, n_decoded) * len(fit.schema.genes))))


def _seed_of_minibatch(seed: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


# Running the programs.


def run(
    fit: Fit, cells: Cells, n_draws: int, codes: Sequence[int | None] = _OWN_BATCH, *, parallel: bool
) -> list[Run]:
    """Run the guide, and the model on what it drew in each batch: once for all draws, or once for each.

    Parameters
    ----------
    fit, cells, n_draws
        Whose programs are run on which cells, and the draws of each.
    codes
        Batches in which the model sees the cells; None is each cell's own. Without any it is not run.
    parallel
        All draws at once.
    """
    size, n_runs = (n_draws, 1) if parallel else (1, n_draws)
    dim = -1 - fit.found.plate_nesting
    guide, model = _in_plate_of_draws(fit.guide, size, dim), _in_plate_of_draws(fit.model, size, dim)
    seen = [cells if code is None else cells.in_batch(code) for code in codes]
    runs = []
    for _ in range(n_runs):
        guided = poutine.trace(guide).get_trace(cells)
        replayed = poutine.trace(poutine.replay(model, guided))
        runs.append(Run(guided, [replayed.get_trace(there) for there in seen]))
    return runs


def _in_plate_of_draws(program: Any, n_draws: int, dim: int) -> Any:
    def in_plate(cells: Cells) -> None:
        with pyro.plate("_draws", n_draws, dim=dim):
            program(cells)

    return in_plate


def check_guided(runs: list[Run]) -> None:
    """Raise if the model has latent sites that the guide leaves out: they were drawn from their prior."""
    guide, (model, *_) = runs[0]
    alone = [
        name
        for name in model.stochastic_nodes
        if name not in guide.nodes and model.nodes[name]["infer"].get("enumerate")
    ]
    if alone:
        msg = f"the guide samples no {alone}, so there are no posterior draws: sample it in the guide too"
        raise ValueError(msg)


# Reading what they did.


def values_of(runs: list[Run], name: str) -> Tensor:
    """Return a site's draws, (batches, draws, cells, ...); of an observed site, new ones."""
    values = [[_value(site_of(model, guide, name)) for model in models] for guide, models in runs]
    by_batch = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*values, strict=True)]
    return by_batch[0][None] if len(by_batch) == 1 else torch.stack(by_batch)


def library_of(runs: list[Run], cells: Cells) -> Tensor:
    """Return the library size, (batches, draws, cells, 1): site ``"l"``, else the observed total."""
    models = runs[0].models
    if "l" not in models[0].nodes:
        return cells.library.expand(len(models), 1, -1, -1)
    l = values_of(runs, "l")
    return l if l.ndim == 4 else l[..., None]  # of each cell a number, or an axis of one


def site_of(model: poutine.Trace, guide: poutine.Trace, name: str) -> Any:
    """Return a site of the model, or else of the guide; raise if neither has it."""
    trace = model if name in model.nodes else guide
    if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
        known = {*sites_of(model), *sites_of(guide)}
        msg = f"no site {name!r}; the programs have {sorted(known)}"
        raise KeyError(msg)
    return trace.nodes[name]


def sites_of(trace: poutine.Trace) -> list[str]:
    """Return the names of a program's sites, without plates."""
    nodes = trace.nodes.items()
    return [name for name, site in nodes if site["type"] == "sample" and not is_plate(site)]


def innermost(distribution: Any) -> Any:
    """Return the distribution whose rightmost axes were made one event, or some of whose entries left out."""
    while isinstance(distribution, Independent | MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def cells_second(value: Tensor, site: Any) -> Tensor:
    """Move the axis of cells behind that of draws, wherever the program's plates put it."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "cells":
            return value.movedim(frame.dim - len(site["fn"].event_shape), 1)
    return value


def _value(site: Any) -> Tensor:
    """Return a site's value with all its axes; of an observed site, a draw."""
    drawn = site["is_observed"] and not site["infer"].get("_deterministic")
    value = site["fn"].sample() if drawn else site["value"]
    return cells_second(value.expand(site["fn"].batch_shape + site["fn"].event_shape), site)
