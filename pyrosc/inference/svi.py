"""fit_svi and Fit: stochastic variational inference of any model and guide. It knows no model and no site."""

import math
from numbers import Real
from typing import Any

import anndata
import numpy as np
import torch
from pyro.infer import ELBO

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.data.schema import Schema
from pyrosc.inference.contract import elbo_of, pair
from pyrosc.inference.fit import Fit
from pyrosc.inference.found import Found, versions
from pyrosc.inference.handlers import leaving_out
from pyrosc.inference.isolation import copied, device_of, isolated, modules_of
from pyrosc.inference.loop import train
from pyrosc.inference.purity import is_pure
from pyrosc.inference.step import Problem


def fit_svi(
    model: Any,
    data: Counts | anndata.AnnData,
    guide: Any = None,
    *,
    epochs: int | None = None,
    minibatch_size: int = 128,
    learning_rate: float = 5e-3,
    kl_warmup: int | None = None,
    kl_weight: float = 1.0,
    validation: float | None = None,
    patience: int | None = None,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    elbo: ELBO | type[ELBO] | None = None,
    precision: str = "float32",
    replay: bool | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Fit a model and a guide by stochastic variational inference.

    Parameters
    ----------
    model
        An object with the methods ``model`` and ``guide``, or a model alone: a callable of
        :class:`~pyrosc.Cells`. It is copied, and left untrained.
    data
        Counts, or an AnnData with counts in X.
    guide
        The guide, where `model` has none: a callable of Cells, or one of Pyro's autoguides.
    epochs
        Passes over the training cells at most; by default the attribute ``epochs`` of `model`, else chosen
        from the data, see :func:`planned_epochs`.
    minibatch_size
        Cells in a step.
    learning_rate
        Of Adam, at its peak: it rises over the first tenth of the planned steps and falls along a cosine to
        zero at the end.
    kl_warmup
        Steps over which the KL weight rises from zero to `kl_weight`; a tenth of the planned steps by
        default, and never more than half of them, so that every fit ends at `kl_weight`.
    kl_weight
        Weight of the KL at the end: 1 is the ELBO, more is a beta-VAE.
    validation
        Share of the cells kept out of the training to measure the loss after each epoch; the parameters of
        the best epoch are the fit's. 0 trains on all cells to the end; programs with parameters of each cell
        need that, since a validation cell has none. By default the attribute ``validation`` of `model`, else
        .1.
    patience
        Stop after so many epochs without a better validation loss; a sixth of the planned epochs by default,
        and at least 5.
    weight_decay
        Precision of a normal prior on every (unconstrained) parameter: half of this times the sum of their
        squares, in nats for all cells together, is added to what is minimised, not to the loss reported. By
        default the attribute ``weight_decay`` of `model`, else 0.
    clip_norm
        Gradients longer than this are shortened to it; by default the attribute ``clip_norm`` of `model`, if
        it has one.
    elbo
        A Pyro ELBO; by default the attribute ``elbo`` of `model`, else :class:`pyro.infer.Trace_ELBO`.
    precision
        Of the linear layers' products in training: ``"float32"``, or ``"bfloat16"``, sooner on processors
        that have it. All else, the parameters, and every question to the fit are float32.
    replay
        Whether one step's tensor operations may be recorded and replayed, which is faster: a promise that the
        programs are pure, see Notes. By default the attribute ``pure`` of `model` (and of a separate guide);
        pyrosc's own models are pure.
    device
        ``"auto"`` takes CUDA where there is one.
    seed
        Of the split, the minibatches and the draws. The same seed, device, number of threads and versions
        give the same bits.
    progress
        Show a progress bar.

    Returns
    -------
    Fit
        With ctrl-C, the fit so far.

    Raises
    ------
    TypeError
        If `model` is no model or there is no guide.
    ValueError
        If the data or a setting is out of range, or the programs don't fit each other.
    FloatingPointError
        If the loss is no longer finite; the message names the site.

    Notes
    -----
    A part of a model whose parameters are all frozen (``requires_grad_(False)``) runs in evaluation mode.

    The loss is Pyro's own: with ``kl_weight=1`` and no warm-up a step has the loss and the gradients of
    ``pyro.infer.SVI.step``, divided by the number of cells.

    A program is run as it is written, in every step, unless it is pure: what it computes depends on the
    cells, on parameters and buffers, and on torch's random numbers alone, and Python acts the same in each
    step. A
    schedule kept in an attribute, a count of calls, an average of weights in a plain tensor are not pure.
    Of pure programs, if more than fifty steps are to come, the first three are run; then one step's tensor
    operations are recorded, rewritten, compared with the programs on other cells, and replayed. What is
    replayed is checked again after every hundred steps, at the end of an epoch, and at the end: a step is
    taken both ways from the same state. If they differ, or what the programs can reach has changed, the fit
    goes back to the last check, runs its programs from there, and the logger ``pyrosc`` says so.
    ``fit.found.replayed`` is True, or says why steps were run.

    Pyro's handlers, parameter store and random numbers are the process's, so fits in several threads take
    turns: one fits while others wait. Use processes to fit at the same time.
    """
    if isinstance(model, Fit):
        msg = "this is a Fit: pyrosc.fit_svi(fit.program, ...) trains its model on, fit_query on new batches"
        raise TypeError(msg)
    data = as_counts(data)
    if not data.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    epochs = getattr(model, "epochs", None) if epochs is None else epochs
    validation = getattr(model, "validation", 0.1) if validation is None else validation
    _check_settings(
        epochs=epochs,
        minibatch_size=minibatch_size,
        learning_rate=learning_rate,
        kl_warmup=kl_warmup,
        kl_weight=kl_weight,
        validation=validation,
        patience=patience,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        replay=replay,
    )
    minibatch_size, seed = int(minibatch_size), int(seed)
    _check_made_for(model, data)
    on = device_of(device)
    program, separate_guide = copied(model, guide)
    for module in modules_of(program, separate_guide):
        module.to(on)
    train_rows, validation_rows = split(data.n_cells, validation, seed)
    minibatch_size = min(minibatch_size, len(train_rows))
    steps = -(-len(train_rows) // minibatch_size)
    epochs = planned_epochs(steps) if epochs is None else int(epochs)
    settings = {
        "epochs": epochs,
        "minibatch_size": minibatch_size,
        "learning_rate": learning_rate,
        "kl_warmup": min(steps * epochs // 10 if kl_warmup is None else kl_warmup, steps * epochs // 2),
        "kl_weight": kl_weight,
        "validation": validation,
        "patience": max(5, epochs // 6) if patience is None else patience,
        "weight_decay": getattr(program, "weight_decay", 0.0) if weight_decay is None else weight_decay,
        "clip_norm": getattr(program, "clip_norm", None) if clip_norm is None else clip_norm,
        "precision": precision,
        "replay": is_pure(program, separate_guide) if replay is None else bool(replay),
        "seed": seed,
    }
    params: dict[str, Any] = {"params": {}, "constraints": {}}
    counts = data.on(on)
    with isolated(on, seed, params):
        chosen, variational = pair(program, separate_guide)
        problem = Problem(
            leaving_out(chosen, data.schema),
            variational,
            elbo=elbo_of(program, elbo),
            modules=modules_of(program, separate_guide),
            train=counts.take(torch.as_tensor(train_rows, device=on)),
            validation=counts.take(torch.as_tensor(validation_rows, device=on)),
        )
        trained = train(problem, settings, progress)
    found = Found(
        n_cells=data.n_cells,
        n_train=len(train_rows),
        best_epoch=trained.best_epoch,
        plate_nesting=trained.plate_nesting,
        parameters_of_each_cell=trained.parameters_of_each_cell,
        replayed=trained.replayed,
        threads=torch.get_num_threads(),
        data=data.fingerprint,
        versions=versions(),
    )
    return Fit(program, separate_guide, params, data.schema, trained.history, settings, found, on)


def planned_epochs(steps: int) -> int:
    """Epochs that :func:`fit_svi` plans for so many minibatches: about 2000 steps, 5 to 200 epochs."""
    return min(200, max(5, round(2000 / steps)))


def split(n_cells: int, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training and those for validation, each in ascending order."""
    n = min(round(n_cells * validation), n_cells - 1)
    order = np.random.default_rng(seed).permutation(n_cells) if n else np.arange(n_cells)
    return np.sort(order[n:]), np.sort(order[:n])


def _check_made_for(program: Any, data: Counts) -> None:
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
        if value is not None and not (isinstance(value, Real) and 0 < float(value) < math.inf):
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
