"""Running model and guide programs from outside: pairing, seeds, param stores, checks.

What a program must not know of is handled here, by handlers around it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrosc.data.minibatch import Cells
from pyrosc.engine.rng import seeded
from pyrosc.inference.isolation import validating

Program = Callable[[Cells], Any]


def pair(program: Any, guide: Any) -> tuple[Program, Program]:
    """Return the model and the guide as callables of Cells."""
    for thing in (program, guide):
        if isinstance(thing, type):
            msg = (
                f"{thing.__name__} is a class: pass an object of it, VAE.for_data(data) or AutoNormal(model)"
            )
            raise TypeError(msg)
    model = getattr(program, "model", program)
    guide = getattr(program, "guide", None) if guide is None else guide
    if not callable(model):
        msg = f"the model must be callable with Cells, or have a method `model`; got {type(model).__name__}"
        raise TypeError(msg)
    if not callable(guide):
        msg = "no guide: pass one, guide=..., e.g. pyro.infer.autoguide.AutoNormal(model)"
        raise TypeError(msg)
    return model, guide


def is_of_each_cell(model: Program, guide: Program, cells: Cells, tensors: list[Tensor]) -> bool:
    """Say whether the programs look up parameters by ``cells.index``, so that each cell has its own.

    Parameters that have an axis of `n_total` are filled with noise for the while; then the same cells, with
    the same random numbers, are run again under other indices.
    """
    own = [t for t in tensors if cells.n_total in t.shape and t.is_floating_point()]
    if not own or cells.n_total == 1:
        return False
    kept = [t.detach().clone() for t in own]
    try:
        with torch.no_grad():
            for t in own:
                t.copy_(torch.rand_like(t))
            runs = []
            for index in (cells.index, (cells.index + 1) % cells.n_total):
                with seeded(cells.x.device, 0):
                    runs.append(traces(model, guide, replace(cells, index=index)))
    finally:
        with torch.no_grad():
            for t, value in zip(own, kept, strict=True):
                t.copy_(value)
    return any(
        not torch.equal(site["value"], there.nodes[name]["value"])
        for here, there in zip(*runs, strict=True)
        for name, site in here.nodes.items()
        if site["type"] == "sample" and not is_plate(site)
    )


def check_all_found(loss: Tensor, known: list[Tensor]) -> None:
    """Raise if the loss depends on parameters that are not among the known ones: they would not be trained.

    Raises
    ------
    ValueError
        If there are any: those of a module which a function closes over, for example.
    """
    ids, seen, nodes = {id(tensor) for tensor in known}, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            msg = (
                f"the loss depends on a parameter of shape {tuple(leaf.shape)} that is in no program and no "
                "param store, and would not be trained: make model and guide two methods of one nn.Module "
                "that holds it"
            )
            raise ValueError(msg)


def elbo_of(program: Any, elbo: ELBO | type[ELBO] | None) -> ELBO:
    """Return the estimator: as asked, as the program's attribute says, or Trace_ELBO."""
    chosen = getattr(program, "elbo", Trace_ELBO) if elbo is None else elbo
    if isinstance(chosen, type):
        return chosen()
    # (The fit sets the nesting of a TraceEnum_ELBO, which belongs to the caller.)
    return copy.copy(chosen) if isinstance(chosen, TraceEnum_ELBO) else chosen


def traces(model: Program, guide: Program, cells: Cells) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, and the model on what it drew; return what both did."""
    guided = poutine.trace(guide).get_trace(cells)
    return guided, poutine.trace(poutine.replay(model, guided)).get_trace(cells)


def check_programs(model: Program, guide: Program, cells: Cells) -> int:
    """Run both programs once, with Pyro's validation on, and raise where they don't fit.

    Parameters that programs make with ``pyro.param`` or as autoguides exist from then on.

    Returns
    -------
    int
        How many plates stand inside each other: left of these is room for a plate of draws.

    Raises
    ------
    ValueError
        If nothing is observed, the observed site is in no plate of cells, a latent site of one program is
        missing in the other, or a program writes into the counts.
    """
    x = cells.x.clone()
    with validating(on=True):
        guided, modelled = traces(model, guide, cells)
        modelled.compute_log_prob()
    if not torch.equal(cells.x, x):
        msg = "a program writes into cells.x, which others read: write into a copy, x = cells.x.clone()"
        raise ValueError(msg)
    latent = {name for name in modelled.stochastic_nodes if not is_plate(modelled.nodes[name])}
    summed_out = {name for name in latent if modelled.nodes[name]["infer"].get("enumerate")}
    guessed = {
        name
        for name in guided.stochastic_nodes
        if not is_plate(guided.nodes[name]) and not guided.nodes[name]["infer"].get("is_auxiliary")
    }
    if needed := sorted(latent - guessed - summed_out):
        msg = f"the guide samples no {needed}: each latent site of the model needs one there"
        raise ValueError(msg)
    if guessed - latent:
        msg = f"the model samples no {sorted(guessed - latent)}, which the guide does: use the model's names"
        raise ValueError(msg)
    observed = [
        modelled.nodes[name]
        for name in modelled.observation_nodes
        if not modelled.nodes[name]["infer"].get("_deterministic")
    ]
    if not observed:
        msg = 'the model observes nothing: give a site the counts, pyro.sample("x", ..., obs=cells.x)'
        raise ValueError(msg)
    if not any(frame.name == "cells" for site in observed for frame in site["cond_indep_stack"]):
        msg = (
            f"the observed site {observed[0]['name']!r} is in no plate 'cells': what belongs to a cell "
            'stands inside pyro.plate("cells", cells.n_total, subsample=cells.index)'
        )
        raise ValueError(msg)
    sites = [
        site for trace in (guided, modelled) for site in trace.nodes.values() if site["type"] == "sample"
    ]
    return max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=0)


def is_plate(site: Any) -> bool:
    """Say whether a trace's site is the subsample of a plate."""
    return isinstance(site["fn"], _Subsample)
