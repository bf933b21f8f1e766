"""Whether a program does the same in each step: what it promises, and what its functions can reach.

A recorded step holds a program's tensor operations, not its Python. So steps are replayed only of a program
that is pure: of the cells, its parameters and buffers, and torch's random numbers alone. pyrosc's own models
are; another program says so, by an attribute ``pure = True`` or ``fit_svi(..., replay=True)``.
"""

import functools
import hashlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from io import IOBase
from queue import SimpleQueue
from types import BuiltinFunctionType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoCallable, AutoGuide
from torch import Tensor, nn

_MOST = 100_000
"""Objects that are looked at."""

_LIBRARIES = (
    "torch",
    "pyro",
    "numpy",
    "pandas",
    "scipy",
    "anndata",
    "sklearn",
    "jaxtyping",
    "beartype",
    "pyrosc",
)
_OURS = ("pyrosc.", "torch.nn.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_AUTOGUIDES = ("plates", "prototype_trace", "_prototype_frames")  # which each run makes anew
_PLAIN = (int, float, complex, str, bytes, bool, type(None), np.generic, torch.dtype, torch.device)


def is_pure(*programs: Any) -> bool:
    """Say whether all programs are pure: by their own word, or made of pyrosc's and torch's parts."""
    return all(_is_pure(program) for program in programs if program is not None)


def _is_pure(program: Any) -> bool:
    owner = getattr(program, "__self__", program)
    if (promise := _promise(owner)) is not None:
        return promise
    if isinstance(owner, functools.partial):  # such as Pyro's handlers make of programs
        parts = [part for part in (owner.func, *owner.args) if callable(part)]
        return all(_is_pure(part) for part in parts if not part.__module__.startswith("pyro."))
    if isinstance(owner, ELBO):
        return type(owner).__module__.startswith("pyro.")
    if isinstance(owner, AutoGuide):
        if any(
            isinstance(part, AutoCallable) or getattr(part, "create_plates", None) for part in owner.modules()
        ):
            return False  # functions of a user's
        return type(owner).__module__.startswith("pyro.") and _is_pure(owner.model)
    if not (isinstance(owner, nn.Module) and type(owner).__module__.startswith("pyrosc.")):
        return False
    function = getattr(program, "__func__", None)
    if function is not None and not (function.__module__ or "").startswith(_OURS):
        return False
    return all(map(_is_ours, owner.modules()))


def _promise(owner: Any) -> bool | None:
    """Return the attribute `pure` of an object, of its class, or of what another class than ours gives it."""
    for place in (owner, *type(owner).__mro__):
        if "pure" in getattr(place, "__dict__", {}):
            return bool(vars(place)["pure"])
    return None


def _is_ours(part: nn.Module) -> bool:
    """Say whether a module is one of pyrosc's or torch's, and nothing was hung on it."""
    whole = type(part).__module__.startswith(_OURS) and not any(vars(part).get(hook) for hook in _HOOKS)
    own = (getattr(type(part), name, None) for name in ("forward", "model", "guide"))
    return (
        whole
        and not any(callable(value) and not isinstance(value, nn.Module) for value in vars(part).values())
        and all(f is None or f.__module__.startswith(_OURS) for f in own)
    )


def fingerprint(programs: Sequence[Any], known: Sequence[Tensor]) -> dict[str, Any]:
    """Return what programs can reach and change beside parameters, each under a name that says where it is.

    Attributes, containers, closures, defaults, globals that functions name; the random numbers of Python
    and numpy, where they name these modules. Two that are equal say that nothing of these has changed.

    Parameters
    ----------
    programs
        Functions, or objects whose methods they are.
    known
        Tensors that training changes: these are left out.
    """
    seen: dict[int, Any] = {id(tensor): tensor for tensor in known}
    found: dict[str, Any] = {}
    todo = [(_name(program), program) for program in reversed(programs)]
    while todo and len(found) < _MOST:
        name, thing = todo.pop()
        if isinstance(thing, _PLAIN):
            found[name] = repr(thing)
        elif id(thing) not in seen:
            seen[id(thing)] = thing  # (kept, so that no other gets its id meanwhile)
            if (value := _value(thing)) is not None:
                found[name] = value
            todo += [(f"{name}{where}", part) for where, part in _parts(thing)]
        if not isinstance(thing, (*_PLAIN, MethodType)):
            found[f"{name} is"] = id(thing)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the name of something that two fingerprints differ in, None if there is nothing."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return min(names, key=len).removesuffix(" is") if names else None


def _name(program: Any) -> str:
    owner = getattr(program, "__self__", program)
    return getattr(owner, "__name__", type(owner).__name__)


def _value(thing: Any) -> Any:
    """Return what can change in an object that its parts don't show."""
    if isinstance(thing, Tensor):
        flat = thing.detach().reshape(-1)
        if flat.device.type != "cpu" or flat.layout != torch.strided:
            return (thing.shape, thing._version)
        return (thing.shape, thing.requires_grad, _digest(flat.contiguous().view(torch.uint8).numpy()))
    if thing is random:
        return hash(random.getstate())
    if thing is np or thing is np.random:
        return hash(str(np.random.get_state()))  # noqa: NPY002
    if isinstance(thing, torch.Generator):
        return _digest(thing.get_state().numpy())
    if isinstance(thing, np.ndarray):
        return thing.shape, repr(thing) if thing.dtype.hasobject else _digest(np.ascontiguousarray(thing))
    if isinstance(thing, np.random.Generator):
        return str(thing.bit_generator.state)
    if isinstance(thing, random.Random | np.random.RandomState):
        return str(thing.getstate() if isinstance(thing, random.Random) else thing.get_state())
    if isinstance(thing, ContextVar):
        return repr(thing.get(None))
    if isinstance(thing, IOBase):
        if thing in (sys.stdout, sys.stderr):
            return None
        return None if thing.closed or not thing.seekable() else thing.tell()
    if isinstance(thing, SimpleQueue):
        return thing.qsize()
    if isinstance(thing, GeneratorType):
        return None if thing.gi_frame is None else thing.gi_frame.f_lasti
    if hasattr(thing, "__next__") and hasattr(thing, "__reduce__"):
        return _text_of_iterator(thing)
    if hasattr(thing, "__len__") and isinstance(thing, Mapping | Sequence | Set):
        return len(thing)
    return None


def _text_of_iterator(thing: Any) -> Any:
    try:
        return repr(thing.__reduce__()[1:])
    except TypeError:
        return None


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest() if array.size else ""


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, and where."""
    if isinstance(thing, logging.Logger | logging.Handler):  # which change with every word
        return
    if isinstance(thing, MethodType):
        yield "", thing.__self__
        yield f".{thing.__name__}", thing.__func__
    elif isinstance(thing, functools.partial):
        yield "()", thing.func
        yield from ((f"({i})", part) for i, part in enumerate((*thing.args, *thing.keywords.values())))
    elif isinstance(thing, FunctionType):
        yield from _parts_of_function(thing)
    elif isinstance(thing, GeneratorType):
        yield from (
            (f".{name}", part) for name, part in (getattr(thing, "gi_frame", None) or _Empty).f_locals.items()
        )
    elif isinstance(thing, Mapping):
        yield from ((f"[{key!r:.40}]", part) for key, part in [*thing.items()])
    elif isinstance(thing, Sequence | Set) or type(thing).__name__ == "deque":
        if not isinstance(thing, str | bytes | range):
            yield from ((f"[{i}]", part) for i, part in enumerate([*thing]))
    elif isinstance(thing, type):
        if not _is_library(thing.__module__):
            yield from ((f".{name}", part) for name, part in vars(thing).items() if not name.startswith("__"))
        return
    elif isinstance(thing, property):
        yield ".fget", thing.fget
    elif isinstance(thing, staticmethod | classmethod):
        yield "", thing.__func__
    elif isinstance(thing, BuiltinFunctionType):
        yield "", thing.__self__
        return
    elif isinstance(thing, ModuleType | CodeType | Tensor | np.ndarray):
        return
    if isinstance(thing, AutoGuide):
        yield ".model", thing._model
    skipped = _OF_AUTOGUIDES if isinstance(thing, AutoGuide) else ()
    kept = [(name, part) for name, part in getattr(thing, "__dict__", {}).items() if name not in skipped]
    yield from ((f".{name}", part) for name, part in kept)
    for base in type(thing).__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(thing, name) and not name.startswith("__"):
                yield f".{name}", getattr(thing, name)
    if not _is_library(type(thing).__module__):
        yield " (its class)", type(thing)


class _Empty:
    f_locals: dict[str, Any] = {}  # noqa: RUF012


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield defaults, what the function closes over, and the globals it names."""
    yield from ((f"(default {i})", part) for i, part in enumerate(function.__defaults__ or ()))
    yield from ((f"(default {name})", part) for name, part in (function.__kwdefaults__ or {}).items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" closing over {name}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    if _is_library(function.__module__):
        return
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            yield f" global {name}", value
            if not _is_library(value.__name__):
                yield from (
                    (f" {value.__name__}.{inner}", vars(value)[inner])
                    for inner in _names(function.__code__)
                    if inner in vars(value)
                )
        elif value is not None:
            yield f" global {name}", value


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code looks up, that of functions within too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_library(name: str | None) -> bool:
    """Say whether a module is one of Python's or of the libraries that programs are written with."""
    root = (name or "").partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names
