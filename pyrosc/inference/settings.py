"""What a fit is asked for: settings checked, and what None stands for."""

import math
import sys
from numbers import Real
from typing import Any

import numpy as np
from pyro.infer import ELBO

from pyrosc.data.counts import Counts
from pyrosc.data.schema import Schema
from pyrosc.inference.purity import is_pure

SETTINGS = (
    "epochs",
    "minibatch_size",
    "learning_rate",
    "kl_warmup",
    "kl_weight",
    "validation",
    "patience",
    "weight_decay",
    "clip_norm",
    "precision",
    "replay",
    "seed",
)
"""Arguments of :func:`pyrosc.fit_svi` that a fit remembers."""


def resolved(asked: dict[str, Any], model: Any, guide: Any, elbo: ELBO, n_cells: int) -> dict[str, Any]:
    """Return the settings of a fit: as asked, as the model's attributes say, or the defaults.

    Parameters
    ----------
    asked
        Arguments of :func:`pyrosc.fit_svi`.
    model, guide, elbo
        The programs and the estimator.
    n_cells
        In the data.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """
    of_model = {"epochs": None, "validation": 0.1, "weight_decay": 0.0, "clip_norm": None}
    asked = asked | {
        name: getattr(model, name, default) for name, default in of_model.items() if asked[name] is None
    }
    _check_settings(**asked)
    n_train = n_cells - _n_held_out(n_cells, asked["validation"])
    minibatch_size = min(int(asked["minibatch_size"]), n_train)
    steps = -(-n_train // minibatch_size)
    epochs = _planned_epochs(steps) if asked["epochs"] is None else int(asked["epochs"])
    planned, warmup, patience = steps * epochs, asked["kl_warmup"], asked["patience"]
    return asked | {
        "epochs": epochs,
        "minibatch_size": minibatch_size,
        "kl_warmup": min(planned // 10 if warmup is None else warmup, planned // 2),
        "patience": max(5, epochs // 6) if patience is None else patience,
        "replay": is_pure(model, guide, elbo) if asked["replay"] is None else bool(asked["replay"]),
        "seed": int(asked["seed"]),
    }


def _n_held_out(n_cells: int, validation: float) -> int:
    return min(round(n_cells * validation), n_cells - 1)


def _planned_epochs(steps: int) -> int:
    """Epochs that :func:`fit_svi` plans for so many minibatches: about 2000 steps, 5 to 200 epochs."""
    return min(200, max(5, round(2000 / steps)))


def split(n_cells: int, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training and those for validation, each in ascending order."""
    n = _n_held_out(n_cells, validation)
    order = np.random.default_rng(seed).permutation(n_cells) if n else np.arange(n_cells)
    return np.sort(order[n:]), np.sort(order[:n])


def check_made_for(program: Any, data: Counts) -> None:
    """Raise if a model was built for data of other genes, batches, covariates, labels or another layer."""
    made_for = getattr(program, "schema", None)
    if not isinstance(made_for, Schema):
        return
    for name in ("genes", "batches", "categorical", "continuous", "proteins"):
        if getattr(made_for, name) != getattr(data.schema, name):
            msg = (
                f"the model was built for other {name} than this data has: build it with for_data(data) anew"
            )
            raise ValueError(msg)
    if made_for.labels and made_for.labels != data.schema.labels:
        found = ", ".join(data.schema.labels) or "none"
        msg = (
            f"the model was built for the labels {', '.join(made_for.labels)}, this data has {found}: give "
            "what for_data was given, from_anndata(..., labels_key=...), or build it anew"
        )
        raise ValueError(msg)
    if made_for.layer != data.schema.layer:
        was, is_ = (
            "X" if layer is None else f"layer {layer!r}" for layer in (made_for.layer, data.schema.layer)
        )
        msg = (
            f"the model was built from {was}, this data is from {is_}: give what for_data was given, "
            "from_anndata(..., layer=...), or build it anew"
        )
        raise ValueError(msg)


def _check_settings(**settings: Any) -> None:
    """Raise where a setting is out of range."""
    whole = {"epochs": 1, "minibatch_size": 1, "kl_warmup": 0, "patience": 1, "seed": 0}
    for name, least in whole.items():
        value = settings[name]
        if value is None and name not in ("minibatch_size", "seed"):
            continue
        if not hasattr(value, "__index__") or value < least:
            msg = f"{name} must be a whole number of at least {least}, not {settings[name]!r}"
            raise ValueError(msg)
    decay = settings["weight_decay"]
    if decay is not None and not (isinstance(decay, Real) and 0 <= float(decay) < math.inf):
        msg = f"weight_decay must be at least 0, not {settings['weight_decay']!r}"
        raise ValueError(msg)
    for name in ("learning_rate", "kl_weight", "clip_norm"):
        value = settings[name]
        most = math.inf if name == "clip_norm" else sys.float_info.max  # (of infinity: none are shortened)
        if value is not None and not (isinstance(value, Real) and 0 < float(value) <= most):
            msg = f"{name} must be more than 0, not {settings[name]!r}"
            raise ValueError(msg)
    if settings["precision"] not in ("float32", "bfloat16"):
        msg = f'precision must be "float32" or "bfloat16", not {settings["precision"]!r}'
        raise ValueError(msg)
    if settings["replay"] not in (None, True, False):
        msg = f"replay must be True, False or None, not {settings['replay']!r}"
        raise ValueError(msg)
    share = settings["validation"]
    if not (isinstance(share, Real) and 0 <= float(share) < 1):
        msg = f"validation is a share of the cells, at least 0 and below 1, not {settings['validation']!r}"
        raise ValueError(msg)
