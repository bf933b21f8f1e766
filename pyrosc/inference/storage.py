"""Save a Fit and load it: safetensors and JSON, no pickle.

A saved fit is a directory of two files: ``parameters.safetensors`` (all tensors) and ``fit.json`` (names of
genes and categories, how to build the model, settings, history, versions).
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyrosc import models
from pyrosc.data.counts import Counts
from pyrosc.data.schema import Schema
from pyrosc.inference.contract import check_programs, pair
from pyrosc.inference.found import Found, versions
from pyrosc.inference.isolation import copied, device_of, isolated, modules_of, own_parameters

_FORMAT = 4  # 1: the batch came first among the covariates, VSC had another gate; 2: mixtures were unpaced;
# 3: what the run found stood among the settings
_TENSORS, _RECORD = "parameters.safetensors", "fit.json"


def save(fit: Any, directory: str | Path) -> None:
    """Write a fit; see :meth:`pyrosc.Fit.save`."""
    directory = Path(directory).resolve()
    if directory.exists() and not (
        directory.is_dir() and not set(os.listdir(directory)) - {_TENSORS, _RECORD}
    ):
        msg = f"{directory} holds something that is no saved fit: choose another directory"
        raise FileExistsError(msg)
    record = {
        "format": _FORMAT,
        "program": recipe_of(fit),
        "schema": _schema_to_json(fit.schema),
        "settings": {name: _in_words(value) for name, value in fit.settings.items()},
        "found": asdict(fit.found),
        "history": fit.history.astype(object).where(fit.history.notna(), None).to_dict("list"),
        "versions": versions(),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Both files are written beside the target and moved there whole: a crash leaves the old fit or the new.
    fresh = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    fresh.mkdir()
    try:
        (fresh / _RECORD).write_text(json.dumps(record, indent=1, allow_nan=False, default=_plain))
        tensors = _tensors_of(fit.program, fit.separate_guide, fit.params)
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, fresh / _TENSORS)
        shutil.copymode(fresh / _RECORD, fresh / _TENSORS)  # safetensors writes for the owner alone
        for name in (_TENSORS, _RECORD):
            _flush(fresh / name)
        _replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read(directory: str | Path, model: Any, guide: Any, device: str) -> dict[str, Any]:
    """Return the attributes of a saved :class:`pyrosc.Fit`; see :func:`pyrosc.load`."""
    directory = _saved(Path(directory).resolve())
    record = _read(directory / _RECORD, lambda path: json.loads(path.read_text()))
    if record["format"] > _FORMAT:
        msg = f"{directory} was written by pyrosc {record['versions']['pyrosc']}: upgrade pyrosc to read it"
        raise ValueError(msg)
    if record["format"] < _FORMAT:
        msg = f"{directory} was written by an earlier pyrosc, whose models meant other things: fit it again"
        raise ValueError(msg)
    settings = {name: _NOT_FINITE.get(str(value), value) for name, value in record["settings"].items()}
    tensors = _read(directory / _TENSORS, load_file)
    schema = _schema_from_json(record["schema"])
    on = device_of(device)
    program, separate_guide = _build(record["program"], schema) if model is None else copied(model, guide)
    for module in modules_of(program, separate_guide):
        module.to(on).eval()
    _check_fit(_module_tensors(program, separate_guide), tensors, partly=True)
    params: dict[str, Any] = {"params": {}, "constraints": {}}
    with isolated(on, settings["seed"], params):
        # A run on a stand-in for the data makes the parameters that exist only once a program has run.
        cells = _stand_in(schema).on(on).cells(torch.zeros(1, dtype=torch.int64, device=on))
        cells = replace(cells, n_total=record["found"]["n_train"])
        record["found"]["plate_nesting"] = check_programs(*pair(program, separate_guide), cells)
        own_parameters(modules_of(program, separate_guide))
    _fill(_tensors_of(program, separate_guide, params), tensors)
    return {
        "program": program,
        "separate_guide": separate_guide,
        "params": params,
        "schema": schema,
        "history": pd.DataFrame(record["history"], dtype=float).rename_axis("epoch"),
        "settings": settings,
        "found": Found(**record["found"] | {"threads": tuple(record["found"]["threads"])}),
        "device": on,
    }


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    """Return what is in a file; raise if it is damaged."""
    try:
        return how(path)
    except (ValueError, SafetensorError) as error:  # (those of JSON and of encodings are ValueErrors)
        msg = f"{path} is damaged ({error}): save the fit again"
        raise ValueError(msg) from error


def _tensors_of(program: Any, separate_guide: Any, params: dict[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of a fit by a name of its own."""
    store = {f"store.{name}": t for name, t in params["params"].items()}
    return _module_tensors(program, separate_guide) | store


def _module_tensors(*programs: Any) -> dict[str, Tensor]:
    modules = modules_of(*programs)
    return {f"module{i}.{name}": t for i, m in enumerate(modules) for name, t in m.state_dict().items()}


def _fill(into: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors with the saved ones of the same names."""
    _check_fit(into, tensors)
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def _check_fit(into: dict[str, Tensor], tensors: dict[str, Tensor], *, partly: bool = False) -> None:
    """Raise unless names and shapes agree; `partly`: some of the model's may still be to come."""
    odd = [
        f"{name} {tuple(t.shape) if (t := tensors.get(name)) is not None else 'missing'}"
        for name in (into.keys() if partly else into.keys() | tensors.keys())
        if name not in into or name not in tensors or into[name].shape != tensors[name].shape
    ]
    if odd:
        msg = f"the saved parameters do not fit this model ({'; '.join(sorted(odd)[:5])}): build it as it was"
        raise ValueError(msg)


def recipe_of(fit: Any) -> dict[str, Any] | None:
    """Return the model's class and the arguments of its `for_data`, if they make this very model."""
    name, arguments = type(fit.program).__name__, getattr(fit.program, "recipe", None)
    if arguments is None or fit.separate_guide is not None or name not in models.__all__:
        return None
    recipe = {"class": name, "arguments": json.loads(json.dumps(arguments, default=_plain))}
    # Whoever exchanged a part of the model, or changed a number in it, has to bring it again.
    return recipe if _alike(fit.program, _build(recipe, fit.schema)[0]) else None


def _alike(program: nn.Module, again: nn.Module) -> bool:
    """Say whether two models have the same parts and, but for tensors, the same attributes."""
    if repr(program) != repr(again):
        return False
    for part, other in zip(program.modules(), again.modules(), strict=True):
        names = (vars(part).keys() | vars(other).keys()) - _LEFT_OUT
        # (An attribute may be the object's own, or left to its class.)
        if any(not _equal(getattr(part, name, None), getattr(other, name, None)) for name in names):
            return False
    return True


# Tensors are saved, and parts looked at in their turn; fits are asked in evaluation mode.
_LEFT_OUT = {"_parameters", "_buffers", "_modules", "training", "recipe", "schema"}


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):  # arrays and tensors, which are no plain numbers
        return False


def _plain(value: Any) -> Any:
    """Return numbers of numpy or torch as Python's, for JSON."""
    return value.tolist()


_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _in_words(value: Any) -> Any:
    """Return "inf" for infinity, a ``clip_norm`` that clips nothing: JSON has no such number."""
    return str(value) if isinstance(value, (float, np.floating)) and not np.isfinite(value) else value


def _build(program: dict[str, Any] | None, schema: Schema) -> tuple[Any, None]:
    """Make the model anew, with parameters still to be filled in."""
    if program is None:
        msg = "this fit is of a program of your own: pass it, load(directory, model=..., guide=...)"
        raise ValueError(msg)
    if program["class"] not in models.__all__:
        msg = f"this pyrosc has no model {program['class']!r}: upgrade pyrosc to read the fit"
        raise ValueError(msg)
    return getattr(models, program["class"]).for_data(_stand_in(schema), **program["arguments"]), None


def _stand_in(schema: Schema) -> Counts:
    """Return counts of the right names and sizes: a cell for each batch, one of each gene."""
    n = len(schema.batches)
    return Counts(
        x=sp.csr_array(np.ones((n, len(schema.genes)), np.float32)),
        cell_names=np.arange(n).astype(str),
        obs=pd.DataFrame(index=range(n)),
        batch=np.arange(n),
        labels=np.full(n, -1),
        categorical=np.zeros((n, len(schema.categorical)), np.int64),
        continuous=np.zeros((n, len(schema.continuous)), np.float32),
        proteins=np.ones((n, len(schema.proteins)), np.float32),
        schema=schema,
    )


def _schema_to_json(schema: Schema) -> dict[str, Any]:
    return {field.name: getattr(schema, field.name) for field in fields(schema)}


def _schema_from_json(record: dict[str, Any]) -> Schema:
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Schema(**tuples | {"categorical": {key: tuple(v) for key, v in record["categorical"].items()}})


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(fresh: Path, directory: Path) -> None:
    """Put a directory in the place of another. Between the two renames the old one has the name `_old`."""
    old = _old(directory)
    if directory.exists():  # otherwise `old` may be all that an earlier crash left
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _saved(directory: Path) -> Path:
    """Return where the fit is: a crash between two renames leaves it under the old one's name."""
    for place in (directory, _old(directory)):
        if (place / _RECORD).exists() and (place / _TENSORS).exists():
            return place
    msg = f"no saved fit in {directory}: it needs the files {_RECORD} and {_TENSORS}"
    raise FileNotFoundError(msg)
