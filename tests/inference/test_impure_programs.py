"""Fits of programs whose Python acts otherwise from step to step: as if all steps were run, or they say so.

Each program of `impure_programs` is made and fitted afresh, on tiny counts, for so many steps that one of
them is worth recording.
"""

import functools
import logging
import random

import anndata
import numpy as np
import pyro
import pytest
import torch
from impure_programs import HARMLESS, IMPURE, PURE
from pairs import tensors_of

from pyrosc import fit_svi, from_anndata

PROGRAMS = IMPURE | HARMLESS | PURE
SETTINGS = {
    "epochs": 24,  # of 3 steps
    "minibatch_size": 20,
    "learning_rate": 2e-2,
    "kl_warmup": 0,
    "validation": 0.0,
    "device": "cpu",
    "progress": False,
}

pytestmark = pytest.mark.filterwarnings("ignore:corpus:UserWarning")


@functools.cache
def counts():
    """60 cells x 12 genes."""
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(2.0, 2.0, (60, 12)) + 0.2)
    return from_anndata(anndata.AnnData(x.astype(np.float32)))


def fitted(name, **more):
    """Make a program and fit it; all random numbers that it may take from elsewhere begin alike."""
    entry = PROGRAMS[name]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([]):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            model, guide = entry.make()
            return fit_svi(model, counts(), guide, **SETTINGS | entry.settings | more)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        pyro.clear_param_store()  # (making an autoguide may fill it)


@functools.cache
def never_replayed(name):
    """Fit with every step run; kept, since both comparisons need it."""
    return fitted(name, replay=False)


def promised_pure(name):
    """Fit with the promise that the programs are pure."""
    return fitted(name, replay=True)


def said_so(fit, caplog):
    """Say whether the fit has warned that its programs are not what was promised."""
    warned = any(
        record.levelno >= logging.WARNING and record.name.partition(".")[0] == "pyrosc"
        for record in caplog.records
    )
    return warned and isinstance(fit.found.replayed, str)


def numbers(fit):
    """Return what is compared, by name: parameters, buffers, and the losses of the epochs."""
    losses = {name: torch.as_tensor(fit.history[name].to_numpy()) for name in ("train", "validation")}
    return {name: tensor.detach().double() for name, tensor in (tensors_of(fit) | losses).items()}


def apart(a, b):
    """Return the largest difference of two fits, by the scale of each tensor; inf if their names differ."""
    a, b = numbers(a), numbers(b)
    if {name: t.shape for name, t in a.items()} != {name: t.shape for name, t in b.items()}:
        return float("inf")
    return max(
        float(
            (a[name] - b[name]).abs().nan_to_num(0.0).max()
            / b[name].abs().nan_to_num(0.0).max().clamp(min=1e-2)
        )
        for name in b
    )


def alike(a, b):
    """Say whether two fits are equal but for rounding."""
    return apart(a, b) < 1e-4


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_fitted_as_if_no_step_was_replayed(name, caplog):
    with caplog.at_level(logging.INFO, logger="pyrosc"):
        fit = fitted(name)
    if PROGRAMS[name].repeats:
        assert alike(fit, never_replayed(name))
    else:  # two runs of it are never alike
        assert fit.found.replayed is not True


# What a look at a program's state does not show, and a step at a check need not: time, names of objects,
# what only a few steps do. Whoever promises that such a program is pure is believed.
UNSEEN = {"Clock", "Uuid", "IdOfATensor", "CholeskyWithJitter"}


@pytest.mark.parametrize("name", [name for name in IMPURE | HARMLESS if name not in UNSEEN])
def test_a_false_promise_is_noticed_or_changes_nothing(name, caplog):
    with caplog.at_level(logging.INFO, logger="pyrosc"):
        fit = promised_pure(name)
    if not said_so(fit, caplog):
        assert PROGRAMS[name].repeats, "replayed, and nothing said"
        assert alike(fit, never_replayed(name))


@pytest.mark.parametrize("name", PURE)
def test_a_true_promise_is_believed(name, caplog):
    with caplog.at_level(logging.INFO, logger="pyrosc"):
        fit = promised_pure(name)
    assert fit.found.replayed is True
    assert not said_so(fit, caplog)
    assert alike(fit, never_replayed(name))
