"""Asking a fit: its programs run on minibatches of cells, many draws at a time. What all questions stand on.

One primitive, :func:`draws`. Nothing of the size draws x cells x genes is held for more than a minibatch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

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

ELEMENTS = 2**23
"""Draws x cells x genes that are decoded at a time."""

Answer = TypeVar("Answer")


def stream(
    fit: Fit,
    data: Counts,
    sites: Sequence[str],
    n_draws: int,
    codes: Sequence[int | None],
    *,
    parallel: bool,
    seed: int,
    library: bool = False,
) -> Iterator[tuple[Cells, dict[str, Tensor]]]:
    """Yield each minibatch and its draws, (batches, draws, cells, ...): latent ones alike in each batch.

    With `library`, site ``"l"`` too where there is one.
    """

    def read(
        cells: Cells, guided: list[poutine.Trace], modelled: list[list[poutine.Trace]]
    ) -> tuple[Cells, dict[str, Tensor]]:
        names = (*sites, "l") if library and "l" in modelled[0][0].nodes else sites
        drawn = {}
        for name in names:
            runs = [[value_of(m, q, name) for m in p] for p, q in zip(modelled, guided, strict=True)]
            by_batch = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*runs, strict=True)]
            drawn[name] = by_batch[0][None] if len(codes) == 1 else torch.stack(by_batch)
        return cells, drawn

    return answers(fit, data, n_draws, codes, read, parallel=parallel, seed=seed)


def answers(
    fit: Fit,
    data: Counts,
    n_draws: int,
    codes: Sequence[int | None],
    read: Callable[[Cells, list[poutine.Trace], list[list[poutine.Trace]]], Answer],
    *,
    parallel: bool,
    seed: int,
) -> Iterator[Answer]:
    """Yield what `read` makes of each minibatch and of the runs of guide and model on it (see :func:`run`).

    It reads with the fit's random numbers.
    """
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, n_draws * len(codes)))):
        with fit.asking(seed_of(seed, i)):
            guided, modelled = run(fit, cells, n_draws, codes, parallel=parallel)
            _check_guided(guided[0], modelled[0][0])
            answer = read(cells, guided, modelled)
            del guided, modelled  # or they would be there while the next are made
        # The consumer runs outside of the fit's context: two fits may be asked in turns.
        yield answer


def _check_guided(guided: poutine.Trace, modelled: poutine.Trace) -> None:
    """Raise if the model has latent sites that the guide leaves out: they were drawn from their prior."""
    alone = [
        name
        for name in modelled.stochastic_nodes
        if name not in guided.nodes and modelled.nodes[name]["infer"].get("enumerate")
    ]
    if alone:
        msg = f"the guide samples no {alone}, so there are no posterior draws: sample it in the guide too"
        raise ValueError(msg)


def run(
    fit: Fit, cells: Cells, n_draws: int, codes: Sequence[int | None], *, parallel: bool
) -> tuple[list[poutine.Trace], list[list[poutine.Trace]]]:
    """Run the guide, and the model on what it drew in each batch: once for all draws, or once for each."""
    size, runs = (n_draws, 1) if parallel else (1, n_draws)
    dim = -1 - fit.found.plate_nesting
    guided, modelled = [], []
    for _ in range(runs):
        guided.append(poutine.trace(_repeated(fit.guide, size, dim)).get_trace(cells))
        model = poutine.replay(_repeated(fit.model, size, dim), guided[-1])
        seen = [cells if code is None else cells.in_batch(code) for code in codes]
        modelled.append([poutine.trace(model).get_trace(there) for there in seen])
    return guided, modelled


def _repeated(program: Any, n_draws: int, dim: int) -> Any:
    """Return the program in a plate of draws."""

    def repeated(cells: Cells) -> None:
        with pyro.plate("_draws", n_draws, dim=dim):
            program(cells)

    return repeated


def site_of(modelled: poutine.Trace, guided: poutine.Trace, name: str) -> Any:
    """Return a site of the model, or else of the guide; raise if neither has it."""
    trace = modelled if name in modelled.nodes else guided
    if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
        known = {*sites_of(modelled), *sites_of(guided)}
        msg = f"no site {name!r}; the programs have {sorted(known)}"
        raise KeyError(msg)
    return trace.nodes[name]


def sites_of(trace: poutine.Trace) -> list[str]:
    """Return the names of a program's sites, without plates."""
    nodes = trace.nodes.items()
    return [name for name, site in nodes if site["type"] == "sample" and not is_plate(site)]


def value_of(modelled: poutine.Trace, guided: poutine.Trace, name: str) -> Tensor:
    """Return a site's value with all its axes; of an observed site, a draw."""
    site = site_of(modelled, guided, name)
    drawn = site["is_observed"] and not site["infer"].get("_deterministic")
    value = site["fn"].sample() if drawn else site["value"]
    return cells_second(value.expand(site["fn"].batch_shape + site["fn"].event_shape), site)


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


def rows_of(fit: Fit, n_draws: int) -> int:
    """Return how many cells are decoded at a time."""
    return min(1024, max(1, ELEMENTS // (n_draws * len(fit.schema.genes))))


def seed_of(seed: int, i: int) -> int:
    """Return the seed of the i-th minibatch."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
