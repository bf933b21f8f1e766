"""Running model and guide programs from outside: pairing, seeds, param stores, checks.

What a program must not know of is handled here, by handlers around it.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from jaxtyping import Bool
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrosc.cells import Cells
from pyrosc.counts import Schema
from pyrosc.distributions import without
from pyrosc.random import seeded

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


class LeaveOut(Messenger):
    """Leaves genes out of the density of the counts, site ``"x"``.

    Parameters
    ----------
    kept : Tensor of shape (genes,)
        True for the genes that stay.
    """

    def __init__(self, kept: Bool[Tensor, "genes"]) -> None:
        super().__init__()
        self.kept = kept

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "x" and msg["is_observed"]:
            kept = self.kept.to(msg["value"].device)
            msg["fn"] = without(msg["fn"], kept)
            msg["value"] = torch.where(kept, msg["value"], 0.0)


def leaving_out(model: Program, schema: Schema) -> Program:
    """Return the model without a density of the genes that are absent in the schema."""
    if not schema.absent:
        return model
    kept = torch.as_tensor(schema.present)

    @functools.wraps(model)
    def run(cells: Cells) -> Any:
        with LeaveOut(kept):
            return model(cells)

    run.__self__ = getattr(model, "__self__", model)  # type: ignore[attr-defined]  # whose parts it runs
    return run


def copied(program: Any, guide: Any) -> tuple[Any, Any]:
    """Return deep copies. An autoguide forgets its model when copied: its copy gets the copied model."""
    inside = [m for module in modules_of(program, guide) for m in module.modules()]
    autos = list({id(m): m for m in inside if isinstance(m, AutoGuide)}.values())
    held = [(auto._model, auto.master) for auto in autos]
    memo: dict[int, Any] = {}
    try:
        new_program, new_guide = copy.deepcopy((program, guide), memo)
        models = copy.deepcopy([model for model, _ in held], memo)
    finally:
        for auto, (model, master) in zip(autos, held, strict=True):
            auto._model, auto.master = model, master
    for auto, model in zip(autos, models, strict=True):
        memo[id(auto)]._model = model
    return new_program, new_guide


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


def own_parameters(modules: list[nn.Module]) -> None:
    """Make the param store's tensors this fit's own: functions may start from tensors that live outside.

    Raises
    ------
    ValueError
        If a parameter is that of a module which functions close over: it can't be copied with them.
    """
    store = pyro.get_param_store()
    inside = {id(p) for module in modules for p in module.parameters()}
    state = store.get_state()
    for name, tensor in state["params"].items():
        if id(tensor) in inside:
            continue
        if isinstance(tensor, nn.Parameter):
            msg = (
                f"{name!r} is a parameter of a module outside of the programs, which each fit would train in "
                "place: make model and guide two methods of one nn.Module that holds it"
            )
            raise ValueError(msg)
        state["params"][name] = tensor.detach().clone().requires_grad_()
    store.clear()
    store.set_state(state)


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


def device_of(device: str | torch.device) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        msg = f'no device {str(device)!r} here ({why}): "auto" takes CUDA where there is one, else the CPU'
        raise ValueError(msg) from error
    return torch.device(device)


def modules_of(*programs: Any) -> list[nn.Module]:
    """Return the modules behind programs: the program, the object whose method it is, or that one's parts."""
    owners = [getattr(program, "__self__", program) for program in programs]
    parts = [
        part
        for owner in owners
        for part in ([owner] if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values())
    ]
    return list({id(part): part for part in parts if isinstance(part, nn.Module)}.values())


@contextmanager
def isolated(device: torch.device, seed: int, params: dict[str, Any]) -> Iterator[None]:
    """Run with a param store and random numbers of one's own, Pyro's validation off; then all is as before.

    Parameters
    ----------
    device
        Whose random numbers are seeded, beside the CPU's.
    seed
        Of torch's random numbers.
    params
        State of the param store; what programs add to it is kept in it.
    """
    # What a program makes without naming a device, pyro.param("w", lambda: zeros(3)), is made on the fit's.
    on = nullcontext() if device.type == "cpu" else device
    with seeded(device, seed), validating(on=False), pyro.get_param_store().scope(params), on:
        yield


@contextmanager
def validating(*, on: bool) -> Iterator[None]:
    """Run with Pyro's validation on or off; then Pyro's flag and torch's are as before."""
    torch_flag = Distribution._validate_args
    try:
        with pyro.validation_enabled(is_validate=on):
            yield
    finally:
        Distribution.set_default_validate_args(torch_flag)


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
        If nothing is observed, the observed site is in no plate of cells, or a latent site of one program is
        missing in the other.
    """
    with validating(on=True):
        guided, modelled = traces(model, guide, cells)
        modelled.compute_log_prob()
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
