"""inference.isolation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn
from torch.distributions import Distribution

from pyrosc.engine.rng import seeded


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


def modules_of(*programs: Any) -> list[nn.Module]:
    """Return the modules behind programs: the program, the object whose method it is, or that one's parts."""
    owners = [getattr(program, "__self__", program) for program in programs]
    parts = [
        part
        for owner in owners
        for part in ([owner] if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values())
    ]
    return list({id(part): part for part in parts if isinstance(part, nn.Module)}.values())
