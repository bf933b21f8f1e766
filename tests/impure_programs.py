"""Small programs of the kind that people write, whose Python acts otherwise from step to step; and pure ones.

A training step that is recorded and replayed does not run the program's Python again; with these programs one
sees whether that is noticed. `IMPURE` are those that a replay would train wrongly. `HARMLESS` keep or read
something on which no number depends. `PURE` do the same in every step. By name, each is an :class:`Entry`,
whose `make` returns a fresh pair of a model and a guide.

A call of a model is about a step: :func:`pyrosc.fit_svi` runs it twice before the first.
"""

import array
import contextvars
import ctypes
import enum
import functools
import io
import itertools
import math
import queue
import random
import struct
import threading
import time
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from pyrosc import distributions

GENES = 12
FIVE, FORTY, SEVENTY = 5, 40, 70
LONG = 36
"""Epochs of three steps, where something happens at step 70; else a fit may be shorter."""


@dataclass(frozen=True)
class Entry:
    """How to make a program and how to fit it; whether two fits of it are alike if nothing is replayed."""

    make: Callable[[], tuple[Any, Any]]
    repeats: bool
    settings: dict[str, Any]


IMPURE: dict[str, Entry] = {}
HARMLESS: dict[str, Entry] = {}
PURE: dict[str, Entry] = {}


def _adding_to(programs):
    """Return a decorator of classes with methods model and guide, and of functions that make a pair."""

    def decorator(thing=None, *, repeats=True, **settings):
        def add(thing):
            make = (lambda: (thing(), None)) if isinstance(thing, type) else thing
            programs[thing.__name__] = Entry(make, repeats, settings)
            return thing

        return add if thing is None else add(thing)

    return decorator


impure, harmless, pure = _adding_to(IMPURE), _adding_to(HARMLESS), _adding_to(PURE)


def wave(*shape):
    """Numbers by formula, no two alike."""
    return 0.3 * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float32)).view(*shape)


def plate(cells):
    return pyro.plate("cells", cells.n_total, subsample=cells.index)


class Shares(nn.Module):
    """Shares of the genes, and a size of each cell.

    Subclasses change the weight of the prior, the size or the shares; a run of the model asks once for each.
    """

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(wave(GENES))
        self.at = nn.Parameter(torch.zeros(2))

    def beta(self):
        return 1.0

    def size(self, z):
        return (0.5 * z).exp()

    def shift(self):
        return 0.0

    def model(self, cells):
        with plate(cells):
            with poutine.scale(scale=self.beta()):
                z = pyro.sample("z", dist.Normal(1.0, 0.5))
            shares = torch.softmax(self.logits + self.shift(), -1)
            mean = cells.library * shares * self.size(z).unsqueeze(-1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)

    def guide(self, cells):
        with plate(cells):
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()))


class Encoded(nn.Module):
    """A small variational autoencoder; subclasses change how it encodes and decodes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(GENES, 5)
        self.loc, self.log_scale = nn.Linear(5, 2), nn.Linear(5, 2)
        self.decoder = nn.Linear(2, GENES)

    def encode(self, x):
        return torch.tanh(self.encoder(torch.log1p(x)))

    def decode(self, z):
        return torch.softmax(self.decoder(z), -1)

    def model(self, cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(cells.library * self.decode(z) + 1e-4).to_event(1), obs=cells.x)

    def guide(self, cells):
        hidden = self.encode(cells.x)
        with plate(cells):
            pyro.sample("z", dist.Normal(self.loc(hidden), self.log_scale(hidden).exp()).to_event(1))


def functions(beta=lambda: 1.0, shift=lambda: 0.0):
    """Return the programs of `Shares` as two functions with ``pyro.param``."""

    def model(cells):
        logits = pyro.param("logits", lambda: wave(GENES))
        with plate(cells):
            with poutine.scale(scale=beta()):
                z = pyro.sample("z", dist.Normal(1.0, 0.5))
            mean = cells.library * torch.softmax(logits + shift(), -1) * (0.5 * z).exp().unsqueeze(-1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)

    def guide(cells):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        scale = pyro.param("scale", lambda: torch.ones(()), constraint=constraints.positive)
        with plate(cells):
            pyro.sample("z", dist.Normal(loc, scale))

    return model, guide


def global_model(beta=lambda: 1.0):
    """Return a model whose shares are drawn, for an autoguide."""

    def model(cells):
        with poutine.scale(scale=beta()):
            logits = pyro.sample("logits", dist.Normal(torch.zeros(GENES), 0.3).to_event(1))
        with plate(cells):
            pyro.sample("x", dist.Poisson(cells.library * torch.softmax(logits, -1)).to_event(1), obs=cells.x)

    return model


# --- schedules kept in plain Python


@impure
class IntAttribute(Shares):
    """The prior's weight rises with the calls that an int counts: a replay keeps the weight of one step."""

    calls = 0

    def beta(self):
        self.calls += 1
        return min(1.0, self.calls / 60)


@impure
class FloatAttribute(Shares):
    """A temperature falls by a few percent a call from the first on, in a float."""

    temperature = 1.0

    def size(self, z):
        self.temperature = max(0.2, 0.97 * self.temperature)
        return (0.5 * z / self.temperature).exp()


@impure
class FromTheFifthStep(Shares):
    """The count is kept by the guide and read by the model, which changes in step 5, just recorded."""

    calls = 0

    def guide(self, cells):
        self.calls += 1
        super().guide(cells)

    def beta(self):
        return 1.0 if self.calls < FIVE + 2 else 0.1


@impure(epochs=LONG)
class LateInAnInt(Shares):
    """Nothing but the count changes until step 70, when the prior is all but left out."""

    calls = 0

    def beta(self):
        self.calls += 1
        return 0.05 if self.calls > SEVENTY else 1.0


@impure
class SomeEpochs(Shares):
    """Cyclic annealing: in every fifth epoch, by its count of training steps, the prior counts for little."""

    def __init__(self):
        super().__init__()
        self.steps = [0]

    def beta(self):
        self.steps[0] += self.training
        return 0.05 if self.steps[0] // 3 % 5 == 4 else 1.0


@impure
class EverySeventhStep(Shares):
    """The shares are tempered in every seventh step only, by the length of a list."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def shift(self):
        self.seen.append("call")
        return wave(GENES) * (len(self.seen) % 7 == 0)


@impure
class GrowingList(Shares):
    """The weight follows the number of entries of a list, which no count of numbers shows."""

    def __init__(self):
        super().__init__()
        self.history = []

    def beta(self):
        self.history.append(None)
        return min(1.0, len(self.history) / 50)


@impure
class ListOfWeights(Shares):
    """The planned weights are taken from a list one by one until it is empty, at step 40."""

    def __init__(self):
        super().__init__()
        self.planned = [0.02 * (i + 1) for i in range(FORTY)]

    def beta(self):
        return self.planned.pop(0) if self.planned else 1.0


@impure
class Dict(Shares):
    """The settings are a dict, one of them is multiplied in each call."""

    def __init__(self):
        super().__init__()
        self.config = {"beta": 0.01, "growth": 1.05}

    def beta(self):
        self.config["beta"] = min(1.0, self.config["beta"] * self.config["growth"])
        return self.config["beta"]


@impure
class NestedDict(Shares):
    """The count is two dicts deep; the warm-up of the KL begins at step 5."""

    def __init__(self):
        super().__init__()
        self.config = {"loss": {"kl": {"weight": 0.05}, "step": 0}}

    def beta(self):
        loss = self.config["loss"]
        loss["step"] += 1
        if loss["step"] > FIVE:
            loss["kl"]["weight"] = min(1.0, loss["kl"]["weight"] + 0.02)
        return loss["kl"]["weight"]


@impure
class NumpyScalar(Shares):
    """The weight is a numpy scalar, which is neither an int nor a float32's float."""

    def __init__(self):
        super().__init__()
        self.weight = np.float32(0.05)

    def beta(self):
        self.weight = np.minimum(self.weight * np.float32(1.05), np.float32(1.0))
        return float(self.weight)


@impure
class NumpyArray(Shares):
    """A table of weights and a place in it, both numpy arrays; the place is written into."""

    def __init__(self):
        super().__init__()
        self.table, self.place = np.geomspace(0.01, 1.0, 80), np.zeros(1, dtype=int)

    def beta(self):
        self.place += 1
        return float(self.table[min(self.place[0], len(self.table) - 1)])


@impure
class RolledArray(Shares):
    """A schedule is rolled by one in each call: the same numbers in another order, the same sum."""

    def __init__(self):
        super().__init__()
        self.cycle = np.array([1.0] * 9 + [0.02])

    def beta(self):
        self.cycle[:] = np.roll(self.cycle, 1)
        return float(self.cycle[0])


@impure
def closure_nonlocal():
    """Functions count their calls in a variable of the function around them: no object has it."""
    calls = 0

    def beta():
        nonlocal calls
        calls += 1
        return min(1.0, calls / 60)

    return functions(beta)


@impure
def closure_late():
    """The same, but the count is a list's item and the shares move at step 40 and not before."""
    calls = [0]

    def shift():
        calls[0] += 1
        return wave(GENES) if calls[0] > FORTY else 0.0

    return functions(shift=shift)


@impure
def default_argument():
    """The count is a mutable default argument, which lives in the function."""

    def beta(state={"calls": 0}):  # noqa: B006 (made anew with the function)
        state["calls"] += 1
        return min(1.0, 0.1 + state["calls"] / 80)

    return functions(beta)


_STEP = 0


@impure
def module_global():
    """The count is a global of the module."""
    global _STEP
    _STEP = 0

    def beta():
        global _STEP
        _STEP += 1
        return min(1.0, _STEP / 60)

    return functions(beta)


_CONFIG = {"temperature": 1.0}


@impure
def global_dict():
    """A global dict of settings is changed by the guide and read by the model."""
    _CONFIG["temperature"] = 1.0
    model, inner = functions(shift=lambda: wave(GENES) * (1 - _CONFIG["temperature"]))

    def guide(cells):
        _CONFIG["temperature"] *= 0.98
        return inner(cells)

    return model, guide


@impure
def class_attribute():
    """Calls are counted on the class, so no instance changes."""

    class Counted(Shares):
        calls = 0

        def beta(self):
            type(self).calls += 1
            return min(1.0, self.calls / 60)

    return Counted(), None


@impure
def iterator_count():
    """An itertools.count says which step it is; to look at it is to change it."""
    steps = itertools.count()
    return functions(lambda: min(1.0, 0.05 + 0.02 * next(steps)))


@impure
class IteratorOfList(Shares):
    """The weights come from an iterator of a list, whose place is nowhere to be read."""

    def __init__(self):
        super().__init__()
        self.weights = iter([0.01] * 30 + [0.1] * 20)

    def beta(self):
        return next(self.weights, 1.0)


@impure
def generator():
    """The weights come from a generator, whose state is a frame."""

    def rising():
        weight = 0.02
        while True:
            yield weight
            weight = min(1.0, 1.05 * weight)

    weights = rising()
    return functions(lambda: next(weights))


@impure(epochs=LONG)
def generator_late():
    """A generator gives the same weight up to step 70: two calls in a row show no difference."""
    weights = itertools.chain(itertools.repeat(1.0, SEVENTY), itertools.repeat(0.02))
    return functions(lambda: next(weights))


class _Schedule:
    """A linear schedule."""

    def __init__(self, start, end, steps):
        self.start, self.end, self.steps, self.now = start, end, steps, 0

    def step(self):
        self.now += 1

    @property
    def value(self):
        return self.start + (self.end - self.start) * min(1.0, self.now / self.steps)


@impure
class HelperObject(Shares):
    """A schedule is an object of its own, whose count is not the program's."""

    def __init__(self):
        super().__init__()
        self.schedule = _Schedule(0.01, 1.0, 60)

    def beta(self):
        self.schedule.step()
        return self.schedule.value


class _Slotted:
    """A schedule without a __dict__."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return min(1.0, self.calls / 60)


@impure
class Slots(Shares):
    """The count is in a slot, so the helper has no __dict__ to look into."""

    def __init__(self):
        super().__init__()
        self.schedule = _Slotted()

    def beta(self):
        return self.schedule()


class _State(NamedTuple):
    step: int
    weight: float


@impure
class NamedTupleState(Shares):
    """A state is a namedtuple, which is put in place of the last one."""

    def __init__(self):
        super().__init__()
        self.state = _State(0, 0.02)

    def beta(self):
        weight = min(1.0, 1.05 * self.state.weight)
        self.state = self.state._replace(step=self.state.step + 1, weight=weight)
        return self.state.weight


@impure
class Deque(Shares):
    """A deque of weights is rotated."""

    def __init__(self):
        super().__init__()
        self.weights = deque([0.02, 1.0, 1.0, 0.3, 1.0])

    def beta(self):
        self.weights.rotate(-1)
        return self.weights[0]


@impure
class Set(Shares):
    """A set of the steps that were seen grows."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def beta(self):
        self.seen.add(len(self.seen))
        return min(1.0, len(self.seen) / 60)


def _weight(step, start, length):
    return min(1.0, start + step / length)


@impure
class Partial(Shares):
    """The weight is a functools.partial, made anew with the next step as its argument."""

    def __init__(self):
        super().__init__()
        self.weight = functools.partial(_weight, 0, start=0.02, length=60)

    def beta(self):
        (step,) = self.weight.args
        self.weight = functools.partial(_weight, step + 1, **self.weight.keywords)
        return self.weight()


def _partial_model(cells, state, inner):
    state["calls"] += 1
    with poutine.scale(scale=min(1.0, state["calls"] / 60)):
        return inner(cells)


@impure
def partial_program():
    """The model is itself a functools.partial that holds a dict, of which a fit has a copy."""
    inner, guide = functions()
    return functools.partial(_partial_model, state={"calls": 0}, inner=inner), guide


@impure
class Property(Shares):
    """To read a property is to change it."""

    def __init__(self):
        super().__init__()
        self._weight = (0.02,)

    @property
    def weight(self):
        self._weight = (min(1.0, 1.05 * self._weight[0]),)
        return self._weight[0]

    def beta(self):
        return self.weight


@impure
class String(Shares):
    """A string gets longer, and its length says the step."""

    log = ""

    def beta(self):
        self.log += "."
        return min(1.0, len(self.log) / 60)


@impure
class Phase(Shares):
    """A string names the phase, from step 40 on another one."""

    def __init__(self):
        super().__init__()
        self.phase, self.calls = "warm-up", [0]

    def beta(self):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            self.phase = "main"
        return {"warm-up": 0.02, "main": 1.0}[self.phase]


class _Phase(enum.Enum):
    WARM = 0.05
    MAIN = 1.0


@impure
class EnumPhase(Shares):
    """An enum's member is the phase, a bytearray the count: it turns at step 5."""

    def __init__(self):
        super().__init__()
        self.phase, self.count = _Phase.WARM, bytearray(1)

    def beta(self):
        self.count[0] += 1
        if self.count[0] > FIVE + 2:
            self.phase = _Phase.MAIN
        return self.phase.value


@impure
class Flag(Shares):
    """A flag is turned over in each call: every second step is another."""

    flag = False

    def beta(self):
        self.flag = not self.flag
        return 1.0 if self.flag else 0.02


@impure
def function_attribute():
    """The model counts on itself: a function has attributes."""
    inner, guide = functions(lambda: min(1.0, model.calls / 60))

    def model(cells):
        model.calls += 1
        return inner(cells)

    model.calls = 0
    return model, guide


@impure
def context_variable():
    """The count is a contextvars.ContextVar."""
    step = contextvars.ContextVar("step", default=0)

    def beta():
        step.set(step.get() + 1)
        return min(1.0, step.get() / 60)

    return functions(beta)


@impure
def thread_local():
    """The count is in a threading.local, which can't be copied."""
    local = threading.local()

    def beta():
        local.calls = getattr(local, "calls", 0) + 1
        return min(1.0, local.calls / 60)

    return functions(beta)


@impure
def io_buffer():
    """The place in a file of weights says which comes next."""
    lines = io.StringIO("".join(f"{0.02 * (i + 1)}\n" for i in range(48)))
    return functions(lambda: float(lines.readline() or 1.0))


@impure
def queue_of_weights():
    """The weights are taken from a queue, which is no list to be looked at."""
    weights = queue.SimpleQueue()
    for i in range(48):
        weights.put(0.02 * (i + 1))
    return functions(lambda: 1.0 if weights.empty() else weights.get())


@impure
def bound_builtin():
    """The weight is a builtin's bound method: a function of C, whose object has the state."""
    return functions(random.Random(0).random)


@impure
def partial_of_next():
    """The weight is the next of an iterator within a functools.partial."""
    return functions(functools.partial(next, map(_rising, itertools.count())))


def _rising(step):
    return min(1.0, 0.05 + step / 60)


@impure
class ArrayModule(Shares):
    """The count is in an array of the module array."""

    def __init__(self):
        super().__init__()
        self.count = array.array("l", [0])

    def beta(self):
        self.count[0] += 1
        return _rising(self.count[0])


_CALLS: Any = weakref.WeakKeyDictionary()


@impure
class WeakRegistry(Shares):
    """The count is in a global dict, under the program as a weak key."""

    def beta(self):
        _CALLS[self] = _CALLS.get(self, 0) + 1
        return _rising(_CALLS[self])


@impure
class Unplanned(Shares):
    """A method of the instance is replaced by another at step 40."""

    calls = 0

    def beta(self):
        self.calls += 1
        if self.calls > FORTY:
            self.size = self.other_size
        return 1.0

    def other_size(self, z):
        return torch.nn.functional.softplus(z + 0.5)


@impure(epochs=LONG)
class ChangesItsClass(Shares):
    """The object becomes one of a subclass at step 70."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def beta(self):
        self.calls[0] += 1
        if self.calls[0] > SEVENTY:
            self.__class__ = _Later
        return 1.0


class _Later(ChangesItsClass):
    def size(self, z):
        return torch.nn.functional.softplus(z + 0.5)


@impure
class PlainObject:
    """No nn.Module: an object with two methods and pyro.param, which counts the calls of its guide."""

    def __init__(self):
        self.options = {"steps": 0}
        self.inner, self.inner_guide = functions()

    def model(self, cells):
        with poutine.scale(scale=min(1.0, (1 + self.options["steps"]) / 60)):
            return self.inner(cells)

    def guide(self, cells):
        self.options["steps"] += 1
        return self.inner_guide(cells)


@impure(validation=0.2, patience=1000)
class CountsEpochsByTrain(Shares):
    """Its train() is overridden to count epochs, so that a step itself changes nothing."""

    epoch = 0

    def train(self, mode=True):
        self.epoch += bool(mode)
        return super().train(mode)

    def beta(self):
        return 0.02 if self.epoch % 6 in (3, 4) else 1.0


@impure(validation=0.2, patience=1000)
class CountsEpochsByValidation(Shares):
    """Counts the runs in evaluation mode, one an epoch: a step itself changes nothing."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def beta(self):
        if not self.training:
            self.epochs.append("done")
        return min(1.0, (1 + len(self.epochs)) / 25)


@impure(validation=0.2, patience=1000, epochs=LONG)
class TurnsAtAnEpoch(Shares):
    """The same, but all is as it was until epoch 25 of 36."""

    def __init__(self):
        super().__init__()
        self.epochs = set()

    def shift(self):
        if not self.training:
            self.epochs.add(len(self.epochs))
        return wave(GENES) if len(self.epochs) > 25 else 0.0


@impure
class ReadsTheVersion(Shares):
    """A buffer is written in place, which is recorded; how often that was, its _version, is plain Python."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(GENES))

    def beta(self):
        self.mean.lerp_(self.logits.detach(), 0.1)
        return min(1.0, 0.02 + self.mean._version / 60)


# --- tensors that are reassigned


@impure
class MovingAverage(Shares):
    """A moving average of the weights is a new tensor in each call; a replay knows the first one only."""

    def __init__(self):
        super().__init__()
        self.ema = wave(GENES)

    def shift(self):
        self.ema = 0.9 * self.ema + 0.1 * self.logits.detach()
        return self.ema


@impure
class BufferReassigned(Shares):
    """The same as a registered buffer, which is put in place of the one that the fit knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(GENES))

    def shift(self):
        self.ema = 0.8 * self.ema + 0.2 * self.logits.detach()
        return -self.ema


@impure
class PlainTensorInPlace(Shares):
    """The average is written in place, but into a tensor that is no buffer: nobody restores it."""

    def __init__(self):
        super().__init__()
        self.ema = torch.zeros(GENES)

    def shift(self):
        self.ema.lerp_(self.logits.detach(), 0.05)
        return -self.ema


@impure
class TensorsInList(Shares):
    """The last five states of the weights are kept in a list and averaged."""

    def __init__(self):
        super().__init__()
        self.past = []

    def shift(self):
        self.past = [*self.past[-4:], self.logits.detach().clone()]
        return -0.5 * torch.stack(self.past).mean(0)


@impure
class TensorsInDict(Shares):
    """The last shares are kept in a dict and hold back the next."""

    def __init__(self):
        super().__init__()
        self.kept = {"last": torch.zeros(GENES)}

    def shift(self):
        before = self.kept["last"]
        self.kept["last"] = 0.5 * before + 0.5 * self.logits.detach()
        return 0.5 * before


@impure
class DataReplaced(Shares):
    """The tensor stays the same object, its .data is replaced from step 40 on."""

    def __init__(self):
        super().__init__()
        self.anchor, self.calls = torch.zeros(GENES), [0]

    def shift(self):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            self.anchor.data = self.anchor + 0.05 * wave(GENES)
        return self.anchor


@impure
class BufferDataReplaced(Shares):
    """A registered buffer gets other .data in each call: the same object, another memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(GENES))

    def shift(self):
        self.ema.data = 0.8 * self.ema + 0.2 * self.logits.detach()
        return -self.ema


@impure
class CountInATensor(Shares):
    """The count of steps is a tensor that is reassigned."""

    def __init__(self):
        super().__init__()
        self.steps = torch.zeros(())

    def beta(self):
        self.steps = self.steps + 1.0
        return (self.steps / 60).clamp(max=1.0)


@impure
def tensor_in_a_closure():
    """A moving average is a variable of the function around the model."""
    average = torch.zeros(GENES)

    def shift():
        nonlocal average
        average = 0.9 * average + 0.1 * pyro.param("logits").detach()
        return -average

    return functions(shift=shift)


@impure
class MovingAverageOfTheData(Shares):
    """The mean of the counts of the minibatches so far is a tensor that is reassigned."""

    def __init__(self):
        super().__init__()
        self.mean = torch.ones(GENES)

    def model(self, cells):
        self.mean = 0.9 * self.mean + 0.1 * cells.x.mean(0)
        super().model(cells)

    def shift(self):
        return self.mean.log()


@impure
class MemoryBank(Encoded):
    """The codes of the last minibatch are kept, and the next one's are drawn to their mean."""

    def __init__(self):
        super().__init__()
        self.bank = torch.zeros(5)

    def encode(self, x):
        hidden = super().encode(x)
        hidden = hidden - 0.5 * self.bank
        self.bank = hidden.detach().mean(0)
        return hidden


@impure
class RingOfTensors(Shares):
    """A row of a plain tensor is written in each call, at a place that an int counts."""

    def __init__(self):
        super().__init__()
        self.ring, self.place = torch.zeros(4, GENES), [0]

    def shift(self):
        self.ring[self.place[0] % 4] = self.logits.detach()
        self.place[0] += 1
        return -0.5 * self.ring.mean(0)


@impure
class TargetNetwork(Encoded):
    """A copy of the encoder gets its weights in every twentieth step, and pulls it."""

    def __init__(self):
        super().__init__()
        self.target = nn.Linear(GENES, 5).requires_grad_(False)
        self.calls = {"model": 0}

    def encode(self, x):
        self.calls["model"] += 1
        if self.calls["model"] % 20 == 0:
            self.target.load_state_dict(self.encoder.state_dict())
        return torch.tanh(self.encoder(torch.log1p(x)) + self.target(torch.log1p(x)))


@impure
def auxiliary_batches():
    """Each run takes the next minibatch of other data, from an iterator that goes round."""
    batches = itertools.cycle(torch.split(1.0 + wave(30, GENES), 5))
    return functions(shift=lambda: next(batches).mean(0))


@impure
class InnerSteps(Encoded):
    """A critic is trained within the program, in place, at a rate that falls with the calls."""

    def __init__(self):
        super().__init__()
        self.critic, self.calls = nn.Linear(5, GENES).requires_grad_(False), [0]

    def encode(self, x):
        hidden = super().encode(x)
        self.calls[0] += 1
        with torch.enable_grad():
            weight = self.critic.weight.detach().clone().requires_grad_()
            loss = (torch.log1p(x) - hidden.detach() @ weight.T).square().mean()
            (slope,) = torch.autograd.grad(loss, [weight])
        self.critic.weight.data.sub_(slope, alpha=3.0 / self.calls[0])
        return hidden + 0.3 * (torch.log1p(x) - self.critic(hidden)) @ self.critic.weight


# --- numbers that are read where torch does not show it


@impure
class Item(Shares):
    """A number of the parameters is read by item()."""

    def size(self, z):
        return (0.5 * z).exp() * (1.0 + self.at[0].item())


@impure
class ItemLate(Shares):
    """The branch on a parameter turns when it has moved far enough, which is late."""

    def beta(self):
        return 0.05 if self.at[1].item() < -0.4 else 1.0


@impure
class ToList(Shares):
    """Draws are read by tolist() and ranked in Python."""

    def size(self, z):
        order = sorted(range(len(z)), key=z.tolist().__getitem__)
        return (0.5 * z).exp() * (1.0 + 0.2 * z[order[-1]])


@impure
class Numpy(Shares):
    """The quantile of a draw is had from numpy."""

    def size(self, z):
        return (0.5 * z).exp() * float(1.0 + 0.2 * np.quantile(z.detach().numpy(), 0.9))


@impure
class NumpyAsArray(Shares):
    """The same by np.asarray."""

    def size(self, z):
        return (0.5 * z).exp() * float(1.0 + 0.2 * np.asarray(z.detach()).max())


@impure
class NumpyView(Shares):
    """A numpy array over a parameter's memory is kept: to read it is no torch call at all."""

    view = None

    def size(self, z):
        if self.view is None:
            self.view = self.at.detach().numpy()
        return (0.5 * z).exp() * (1.0 + float(self.view[0]))


@impure
class Ctypes(Shares):
    """A number is read from memory by ctypes, at its data_ptr."""

    def size(self, z):
        number = ctypes.c_float.from_address(self.at.data_ptr()).value
        return (0.5 * z).exp() * (1.0 + number)


@impure
class CtypesOfADraw(Shares):
    """The same of a draw: each step has its own, so a single replay differs."""

    def size(self, z):
        first = ctypes.cast(z.contiguous().data_ptr(), ctypes.POINTER(ctypes.c_float))[0]
        return (0.5 * z).exp() * (1.0 + 0.2 * math.tanh(first))


@impure
class Storage(Shares):
    """A number is made of the bytes of a parameter's storage."""

    def size(self, z):
        (number,) = struct.unpack("f", bytes(self.at.untyped_storage().tolist()[:4]))
        return (0.5 * z).exp() * (1.0 + number)


@impure
class Repr(Shares):
    """A number is read off the printed form of a tensor."""

    def size(self, z):
        number = repr(self.at.detach()[0]).removeprefix("tensor(").removesuffix(")")
        return (0.5 * z).exp() * (1.0 + float(number))


@impure
class Str(Shares):
    """The sign of a parameter is looked up in its printed form: a minus appears or goes during the fit."""

    def shift(self):
        return wave(GENES) * str(self.logits.detach()).count("-") * 0.2


@impure
class Format(Shares):
    """A number is formatted to one digit, and changes by jumps."""

    def size(self, z):
        return (0.5 * z).exp() * (1.0 + float(f"{self.at[0]:.1f}"))


@impure
class Apply(Shares):
    """Draws are rounded in place by apply_, which is no operation to be recorded."""

    def size(self, z):
        rounded = z.detach().clone().apply_(lambda number: round(number, 1) / 2)
        return (0.5 * z).exp() * (0.3 * rounded).exp()


@impure
class Map(Shares):
    """Two tensors are put together by map_, in place."""

    def size(self, z):
        larger = z.detach().clone().map_(0.5 * z.detach().flip(0), max)
        return (0.5 * z).exp() * (0.3 * larger).exp()


@impure
class TensorOfTensors(Shares):
    """A tensor is made of a list of tensors, which reads their numbers."""

    def shift(self):
        ends = torch.tensor([self.logits.detach()[0], self.logits.detach()[-1]])
        return wave(GENES) * ends.sum()


@impure
class InAThread(Shares):
    """Another thread reads the number, where no handler of this one sees it."""

    def size(self, z):
        found = []
        reader = threading.Thread(target=lambda: found.append(self.at[0].item()))
        reader.start()
        reader.join()
        return (0.5 * z).exp() * (1.0 + found[0])


@impure
class Equal(Shares):
    """torch.equal says whether the rounded weights have changed; how often is counted."""

    def __init__(self):
        super().__init__()
        self.before, self.changes = wave(GENES), []

    def beta(self):
        rounded = (10 * self.logits.detach()).round()
        if not torch.equal(rounded, self.before):
            self.before = rounded
            self.changes.append("changed")
        return 1.0 / (1 + len(self.changes))


@impure
class AllClose(Shares):
    """A warm-up lasts as long as the parameters are close to where they began."""

    def beta(self):
        return 0.02 if torch.allclose(self.at, torch.zeros(2), atol=0.25) else 1.0


@impure
class IsNonzero(Shares):
    """is_nonzero of a comparison of parameters, which turns late."""

    def beta(self):
        return 0.02 if torch.is_nonzero(self.at[1] > -0.3) else 1.0


@impure
class Nonzero(Shares):
    """The number of large draws is the length of nonzero()."""

    def size(self, z):
        return (0.5 * z).exp() * (1.0 + 0.05 * len(torch.nonzero(z > 0.3)))


@impure
class AnyLargeDraw(Shares):
    """An if on any(): some draw is large."""

    def size(self, z):
        if (z > 1.2).any():
            z = z.clamp(max=1.0)
        return (0.5 * z).exp()


@impure
class ReadsTheCells(Shares):
    """The depth of the minibatch is read as a number."""

    def model(self, cells):
        self.depth = float(cells.library.mean())
        super().model(cells)

    def shift(self):
        return wave(GENES) * (self.depth / 50)


# --- what fails at times


def _correlation(r):
    one = torch.ones(())
    return torch.stack([torch.stack([one, r]), torch.stack([r, one])])


@impure
class CholeskyFallback(Shares):
    """A Cholesky factor that fails for some draws, and then is that of a matrix without correlation."""

    def size(self, z):
        try:
            factor = torch.linalg.cholesky(_correlation(0.85 + 0.5 * z.mean()))
        except torch.linalg.LinAlgError:
            factor = torch.eye(2)
        return (0.5 * z).exp() * (1.0 + 0.3 * factor[1, 1])


@impure
class CholeskyWithJitter(Shares):
    """Jitter is added until the factor is had; more of it is needed as the parameter grows, late."""

    def size(self, z):
        matrix, jitter = _correlation(0.8 + self.at[0]), 0.0
        while True:
            try:
                factor = torch.linalg.cholesky(matrix + jitter * torch.eye(2))
            except RuntimeError:
                jitter = 0.1 + 2 * jitter
            else:
                return (0.5 * z).exp() * (1.0 + 0.3 * factor[1, 1])


@impure
class SingularInverse(Shares):
    """A matrix has no inverse for some draws: inv raises, and the pseudo-inverse steps in."""

    def size(self, z):
        diagonal = torch.stack([torch.ones(()), torch.relu(z.mean() - 0.2)])
        try:
            inverse = torch.linalg.inv(torch.diag(diagonal))
        except torch.linalg.LinAlgError:
            inverse = torch.linalg.pinv(torch.diag(diagonal.detach()))
        return (0.5 * z).exp() * (1.0 + 0.3 * torch.tanh(inverse.diagonal().mean()))


@impure
class NanCheck(Shares):
    """A logarithm is not a number for some draws; then another scale is taken."""

    def size(self, z):
        scale = torch.log(z.mean() + 0.1)
        if torch.isnan(scale).any():
            scale = -torch.ones(())
        return (0.5 * z).exp() * (1.0 + 0.1 * torch.tanh(scale))


@impure
class SkipsOnNan(Shares):
    """The steps in which a ratio was not finite are counted, and the weight follows."""

    def __init__(self):
        super().__init__()
        self.bad = []

    def size(self, z):
        if not torch.isfinite(z.detach().min().add(0.8).log()):
            self.bad.append("not finite")
        return (0.5 * z).exp() / (1.0 + 0.1 * len(self.bad))


# --- layers, hooks and modes


@impure
class CheckpointedDropout(Encoded):
    """A checkpoint runs its dropout again on the way back, with the random numbers of the way there."""

    def encode(self, x):
        return checkpoint(self.block, x, use_reentrant=False)

    def block(self, x):
        return dropout(super().encode(x), 0.5, self.training)


@impure
class ForwardHook(Encoded):
    """A forward hook counts its calls and scales the output."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.decoder.register_forward_hook(self.scaled)

    def scaled(self, module, inputs, output):
        self.calls.append("call")
        return output * min(1.0, len(self.calls) / 60)


@impure
class ForwardPreHook(Encoded):
    """A forward pre-hook adds noise that falls from call to call, as a closure counts them."""

    def __init__(self):
        super().__init__()
        steps = itertools.count(1)

        def noisy(module, inputs):
            return (inputs[0] + torch.randn_like(inputs[0]) / next(steps),)

        self.encoder.register_forward_pre_hook(noisy)


@impure
class HookThatGoes(Encoded):
    """A hook takes itself away at step 40."""

    def __init__(self):
        super().__init__()
        self.calls = [0]
        self.handles = [self.decoder.register_forward_hook(self.scaled)]

    def scaled(self, module, inputs, output):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            self.handles.pop().remove()
        return 0.3 * output


@impure
class BackwardHook(Encoded):
    """A backward hook shrinks the gradients by the number of its calls: the loss shows nothing of it."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.decoder.register_full_backward_hook(self.shrunk)

    def shrunk(self, module, inputs, outputs):
        self.calls.append("call")
        return tuple(g if g is None else g / len(self.calls) for g in inputs)


@impure
class GradientHook(Encoded):
    """A hook on a tensor turns the gradient off from step 40 on."""

    def __init__(self):
        super().__init__()
        self.backwards = {"calls": 0}

    def encode(self, x):
        hidden = super().encode(x)
        if hidden.requires_grad:
            hidden.register_hook(self.turned_off)
        return hidden

    def turned_off(self, gradient):
        self.backwards["calls"] += 1
        return 0.0 * gradient if self.backwards["calls"] > FORTY else gradient


@impure
class ParameterHook(Encoded):
    """A hook on a parameter is made in its first call; its noise on the gradient decays by numpy's count."""

    def __init__(self):
        super().__init__()
        self.count = np.zeros(1)
        self.hooked = False

    def decode(self, z):
        if not self.hooked:
            self.hooked = True
            self.decoder.weight.register_hook(self.noisy)
        return super().decode(z)

    def noisy(self, gradient):
        self.count += 1
        return gradient + gradient.abs().mean() * float(3.0 / self.count[0])


class _Shrinking(nn.Module):
    """A parametrization that shrinks less from call to call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, weight):
        self.calls.append("call")
        return weight * min(1.0, len(self.calls) / 60)


@impure
class Parametrized(Encoded):
    """A parametrization of a weight counts how often the weight was asked for."""

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.decoder, "weight", _Shrinking())


@impure
class SpectralNormEvery(Encoded):
    """Spectral normalisation whose power iterations become more at step 40: an int deep in the layer."""

    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.decoder)
        self.calls = [0]

    def decode(self, z):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            self.decoder.parametrizations.weight[0].n_power_iterations = 0
        return super().decode(z)


@impure
class StaleWeight(Encoded):
    """A normalised weight is computed in every tenth step, and kept as a tensor until the next."""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.decoder)
        self.calls, self.kept = [0], None

    def decode(self, z):
        self.calls[0] += 1
        if self.calls[0] % 10 == 1:
            self.kept = self.decoder.weight.detach()
        return torch.softmax(z @ self.kept.T + self.decoder.bias + 0.1 * self.decoder(z), -1)


@impure
class DropoutSchedule(Encoded):
    """The p of a Dropout layer falls from call to call."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.8)

    def encode(self, x):
        self.drop.p = 0.97 * self.drop.p
        return self.drop(super().encode(x))


@impure(epochs=LONG)
class DropoutLate(Encoded):
    """Dropout is turned on at step 70, by a Dropout layer whose p was zero."""

    def __init__(self):
        super().__init__()
        self.drop, self.calls = nn.Dropout(0.0), ()

    def encode(self, x):
        self.calls = (*self.calls, "call")
        if len(self.calls) > SEVENTY:
            self.drop.p = 0.7
        return self.drop(super().encode(x))


class _Normed(Encoded):
    """An encoder with batch normalisation."""

    momentum: float | None = 0.1

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(GENES, 5, bias=False)
        self.norm = nn.BatchNorm1d(5, momentum=self.momentum)

    def encode(self, x):
        return torch.tanh(self.norm(self.encoder(torch.log1p(x))))


@impure
class BatchNormMomentum(_Normed):
    """The momentum of a batch normalisation falls: no parameter shows it, the running moments do."""

    def encode(self, x):
        self.norm.momentum = 0.97 * self.norm.momentum
        return super().encode(x)


@impure
class BatchNormCumulative(_Normed):
    """Momentum None: torch reads how many batches were tracked, and averages over all."""

    momentum = None


@impure
class BatchNormFrozen(_Normed):
    """The normalisation is put in evaluation mode at step 40, as one does when it has settled."""

    def __init__(self):
        super().__init__()
        self.steps = [0]

    def encode(self, x):
        self.steps[0] += self.training
        if self.steps[0] > FORTY:
            self.norm.eval()
        return super().encode(x)


@impure
class TogglesTraining(Encoded):
    """A part is put in training and in evaluation mode by turns."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.6)

    def encode(self, x):
        hidden = self.drop(super().encode(x))
        self.drop.train(not self.drop.training)
        return hidden


@impure
class Freezes(Encoded):
    """The decoder takes part without gradients up to step 40: requires_grad is turned off while it runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def decode(self, z):
        self.calls.append("call")
        self.decoder.requires_grad_(len(self.calls) > FORTY)
        shares = super().decode(z)
        self.decoder.requires_grad_(True)
        return shares


@impure
class Detaches(Encoded):
    """The encoder is detached in every third step."""

    calls = 0

    def encode(self, x):
        self.calls += 1
        hidden = super().encode(x)
        return hidden.detach() if self.calls % 3 == 0 else hidden


@impure
class LazilyBuilt(Encoded):
    """A layer is built at step 40, from random numbers, and is there from then on."""

    def __init__(self):
        super().__init__()
        self.calls, self.more = [0], None

    def decode(self, z):
        self.calls[0] += 1
        if self.more is None and self.calls[0] > FORTY:
            self.more = nn.Linear(2, GENES)
        return super().decode(z) if self.more is None else torch.softmax(self.decoder(z) + self.more(z), -1)


@impure
class SwapsLayers(Encoded):
    """Two decoders take turns, by epoch."""

    def __init__(self):
        super().__init__()
        self.decoders, self.calls = nn.ModuleList(nn.Linear(2, GENES) for _ in range(2)), [0]

    def decode(self, z):
        self.calls[0] += 1
        self.decoder = self.decoders[self.calls[0] // 3 % 2]
        return super().decode(z)


@impure
class Curriculum(Encoded):
    """More genes are looked at from stage to stage, by a slice whose length is counted."""

    def __init__(self):
        super().__init__()
        self.stage = {"genes": 2.0}

    def encode(self, x):
        self.stage["genes"] = min(GENES, self.stage["genes"] + 0.2)
        mask = torch.zeros(GENES)
        mask[: int(self.stage["genes"])] = 1.0
        return super().encode(x * mask)


@impure
class GumbelTemperature(Encoded):
    """The temperature of a Gumbel softmax falls."""

    def __init__(self):
        super().__init__()
        self.temperature = {"now": 3.0}

    def decode(self, z):
        self.temperature["now"] = max(0.5, 0.97 * self.temperature["now"])
        return nn.functional.gumbel_softmax(self.decoder(z), tau=self.temperature["now"])


# --- random numbers and clocks


@impure
class OwnRandom(Shares):
    """A random.Random of its own decides on the weight."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def beta(self):
        return self.random.uniform(0.1, 1.0)


@impure(repeats=False)
class GlobalRandom(Shares):
    """Python's global random decides, which others draw from too."""

    def beta(self):
        return random.random() + 0.1


@impure
class RandomGenes(Encoded):
    """Genes to be hidden are drawn in Python; most steps hide none."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(1)

    def encode(self, x):
        if self.random.random() < 0.15:
            x = x.clone()
            x[:, self.random.sample(range(GENES), 6)] = 0.0
        return super().encode(x)


@impure
class GlobalNumpyRandom(Shares):
    """numpy's global random numbers make a mask."""

    def shift(self):
        return torch.from_numpy(np.random.binomial(1, 0.3, GENES).astype(np.float32))  # noqa: NPY002


@impure
class NumpyGenerator(Shares):
    """A numpy generator of its own makes noise."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def shift(self):
        return torch.as_tensor(self.rng.normal(0.0, 0.5, GENES), dtype=torch.float32)


@impure
def torch_generator():
    """A torch.Generator of its own makes noise, which is none of torch's common random numbers."""
    own = torch.Generator().manual_seed(0)
    return functions(shift=lambda: 0.5 * torch.randn(GENES, generator=own))


@impure
class SeedsTorch(Shares):
    """torch's random numbers are seeded in every run, so that all have the same noise."""

    def shift(self):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return 0.5 * torch.randn(GENES)


@impure(repeats=False)
class Clock(Shares):
    """The weight depends on a clock."""

    def beta(self):
        return 0.1 + time.perf_counter() * 1e3 % 1.0


@impure
def ticking_clock():
    """The same, with a clock that counts, so that two fits are alike: warm-up lasts for so much time."""
    ticks = itertools.count()
    clock = lambda: 0.01 * next(ticks)
    start = clock()
    return functions(lambda: 1.0 if clock() - start > 0.5 else 0.02)


@impure(repeats=False)
class Uuid(Shares):
    """Something is made of a uuid."""

    def beta(self):
        return 0.1 + uuid.uuid4().int % 1000 / 1000


@impure(repeats=False)
class IdOfATensor(Shares):
    """The hash of a tensor, which is where it lies, stands for chance."""

    def beta(self):
        return 0.1 + hash(torch.zeros(3)) // 16 % 97 / 97


@impure
class HashOfTheStep(Shares):
    """A hash of the count stands for chance."""

    def __init__(self):
        super().__init__()
        self.calls = frozenset()

    def beta(self):
        self.calls |= {len(self.calls)}
        return 0.05 + hash((len(self.calls), 7)) % 101 / 101


# --- Pyro's effects


@impure
class MaskSchedule(Shares):
    """The prior is masked until step 40."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def model(self, cells):
        self.calls[0] += 1
        with plate(cells):
            with poutine.mask(mask=self.calls[0] > FORTY):
                z = pyro.sample("z", dist.Normal(1.0, 0.5))
            mean = cells.library * torch.softmax(self.logits, -1) * self.size(z).unsqueeze(-1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)


@impure
class FactorSchedule(Shares):
    """A penalty by pyro.factor grows with a schedule that begins at step 5."""

    def __init__(self):
        super().__init__()
        self.calls = [0]

    def model(self, cells):
        self.calls[0] += 1
        pyro.factor("sparse", -max(0.0, 5.0 * (self.calls[0] - FIVE)) * self.logits.square().sum())
        super().model(cells)


@impure(epochs=LONG)
def param_created_late():
    """A parameter is made by pyro.param at step 70: it is in no recording, and not in the store either."""
    calls = [0]

    def shift():
        calls[0] += 1
        return pyro.param("late", lambda: wave(GENES)) if calls[0] > SEVENTY else 0.0

    return functions(shift=shift)


@impure
def store_is_read():
    """The number of a parameter is read from Pyro's param store."""

    def beta():
        return 0.02 if pyro.get_param_store()["scale"].item() > 0.8 else 1.0

    return functions(beta)


@impure
def store_is_written():
    """A number that is no tensor of a step is kept in a tensor of the param store, reassigned."""

    def shift():
        store = pyro.get_param_store()
        kept = store["ema"].detach() if "ema" in store else torch.zeros(GENES)
        store["ema"] = (0.8 * kept + 0.2 * pyro.param("logits").detach()).clone()
        return -kept

    return functions(shift=shift)


class _WithOffset(Shares):
    """Another latent site, an offset of a gene; in a step or not."""

    def __init__(self):
        super().__init__()
        self.offset, self.calls = nn.Parameter(torch.zeros(2)), [0]

    def has_offset(self):
        return True

    def shift(self):
        if not self.has_offset():
            return 0.0
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        return offset * wave(GENES)

    def model(self, cells):
        shift = self.shift()
        with plate(cells):
            z = pyro.sample("z", dist.Normal(1.0, 0.5))
            mean = cells.library * torch.softmax(self.logits + shift, -1) * self.size(z).unsqueeze(-1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)

    def guide(self, cells):
        self.calls[0] += 1
        if self.has_offset():
            pyro.sample("offset", dist.Normal(self.offset[0], self.offset[1].exp()))
        super().guide(cells)


@impure
class SiteOnSomeSteps(_WithOffset):
    """A latent site is there in two of three steps."""

    def has_offset(self):
        return self.calls[0] % 3 > 0


@impure
class SiteFromFortyOn(_WithOffset):
    """A latent site appears at step 40."""

    def has_offset(self):
        return self.calls[0] > FORTY


@impure
class ConditionedAtFirst(_WithOffset):
    """The model is conditioned on a value of a site up to step 40; the guide leaves it out that long."""

    def model(self, cells):
        known = {"offset": torch.tensor(1.0)} if self.calls[0] <= FORTY else {}
        pyro.condition(super().model, data=known)(cells)

    def guide(self, cells):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            pyro.sample("offset", dist.Normal(self.offset[0], self.offset[1].exp()))
        Shares.guide(self, cells)


@impure
class GenesOfAPythonSample(Shares):
    """Python draws which genes are looked at; their plate is scaled."""

    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def model(self, cells):
        genes = torch.tensor(self.random.sample(range(GENES), 6))
        with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.ones(1, 1), 0.5))
            mean = cells.library * torch.softmax(self.logits, -1) * self.size(z)
            with pyro.plate("genes", GENES, subsample=genes, dim=-1):
                pyro.sample("x", dist.Poisson(mean[:, genes]), obs=cells.x[:, genes])

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
            pyro.sample("z", dist.Normal(self.at[0].expand(1, 1), self.at[1].exp()))


class _Tempering(Messenger):
    """Scales latent sites by a weight that grows with the sites seen."""

    def __init__(self):
        super().__init__()
        self.sites = []

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            self.sites.append(msg["name"])
            msg["scale"] = msg["scale"] * min(1.0, len(self.sites) / 60)


@impure
class OwnMessenger(Shares):
    """A handler of one's own counts the sites that pass it."""

    def __init__(self):
        super().__init__()
        self.tempering = _Tempering()

    def model(self, cells):
        with self.tempering:
            super().model(cells)


@impure
def own_distribution():
    """A distribution of one's own changes its density by the number of times it was asked."""

    class Jumpy(dist.Normal):
        seen: list[str] = []  # noqa: RUF012 (shared on purpose)

        def log_prob(self, value):
            self.seen.append("density")
            return super().log_prob(value) * min(1.0, len(self.seen) / 80)

    class WithJumpy(Shares):
        def model(self, cells):
            with plate(cells):
                z = pyro.sample("z", Jumpy(1.0, 0.5))
                mean = cells.library * torch.softmax(self.logits, -1) * self.size(z).unsqueeze(-1)
                pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)

    return WithJumpy(), None


@impure
class OnePyroModule(PyroModule):
    """A PyroModule with a PyroParam counts its calls in a dict."""

    def __init__(self):
        super().__init__()
        self.rates = PyroParam(torch.full((GENES,), 1.0), constraint=constraints.positive)
        self.at = nn.Parameter(torch.zeros(2))
        self.state = {"calls": 0}

    @pyro_method
    def model(self, cells):
        self.state["calls"] += 1
        with plate(cells):
            with poutine.scale(scale=min(1.0, self.state["calls"] / 60)):
                z = pyro.sample("z", dist.Normal(1.0, 0.5))
            pyro.sample("x", dist.Poisson(self.rates * z.exp().unsqueeze(-1)).to_event(1), obs=cells.x)

    @pyro_method
    def guide(self, cells):
        with plate(cells):
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()))


# --- autograd, caches


@impure
def reversal_schedule():
    """Gradient reversal whose strength is a class attribute that backward raises: the loss shows nothing."""

    class Reversal(torch.autograd.Function):
        strength = 0.0

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            Reversal.strength = min(0.9, Reversal.strength + 0.02)
            return gradient * (1.0 - Reversal.strength)

    class Reversed(Encoded):
        def encode(self, x):
            return Reversal.apply(super().encode(x))

    return Reversed(), None


@impure
def function_counts_forwards():
    """A Function of one's own rounds, coarser at first, by a count of its forwards."""

    class Rounded(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            Rounded.calls += 1
            grain = 1.0 if Rounded.calls < FORTY else 0.1
            return torch.round(x / grain) * grain

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Quantised(Shares):
        def size(self, z):
            return (0.5 * Rounded.apply(z)).exp()

    return Quantised(), None


class _Clipped(torch.autograd.Function):
    """The identity, its gradient clipped at a number that it is given."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-ctx.most, ctx.most), None


@impure
class ClipSchedule(Shares):
    """A gradient is clipped at a number which falls late, at step 40."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def shift(self):
        self.calls.append("call")
        return _Clipped.apply(self.logits, 100.0 if len(self.calls) < FORTY else 1e-4)


@impure
def cache_by_epoch():
    """A function of the epoch has a cache, and returns what the parameters were when it was asked first."""
    steps = itertools.count()

    @functools.cache
    def anchor(epoch):
        return pyro.param("logits").detach().clone()

    return functions(shift=lambda: -0.5 * anchor(next(steps) // 10))


@impure
class MemoByStep(Shares):
    """A memo by the number of the step, filled once for ten steps."""

    def __init__(self):
        super().__init__()
        self.memo, self.calls = {}, [0]

    def shift(self):
        self.calls[0] += 1
        key = self.calls[0] // 10
        if key not in self.memo:
            self.memo = {key: torch.roll(wave(GENES), key)}
        return self.memo[key]


@impure
class CachedProperty(Shares):
    """A cached_property of the weights that is thrown away in every tenth step, by its age."""

    age = 0

    @functools.cached_property
    def anchor(self):
        return self.logits.detach().clone()

    def shift(self):
        self.age += 1
        if self.age % 10 == 0:
            del self.anchor
        return -0.5 * self.anchor


# --- objectives


class _AnnealedELBO(Trace_ELBO):
    """Trace_ELBO whose loss is scaled by the number of its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.calls.append("call")
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        return loss + sum(p.square().sum() for p in self.penalised) * len(self.calls)


@impure
class SubclassedELBO(Shares):
    """A subclass of Trace_ELBO adds a penalty that grows with its calls."""

    def __init__(self):
        super().__init__()
        self.elbo = _AnnealedELBO()
        self.elbo.penalised = [self.logits]


class _TemperedELBO(ELBO):
    """An estimate of one's own, with a weight on the prior that rises from call to call."""

    def __init__(self):
        super().__init__()
        self.step = {"now": 0}

    def differentiable_loss(self, model, guide, *args, **kwargs):
        self.step["now"] += 1
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
        modelled = poutine.trace(poutine.replay(model, guided)).get_trace(*args, **kwargs)
        modelled.compute_log_prob()
        guided.compute_log_prob()
        kl = guided.nodes["z"]["log_prob_sum"] - modelled.nodes["z"]["log_prob_sum"]
        return kl * min(1.0, self.step["now"] / 60) - modelled.nodes["x"]["log_prob_sum"]

    def loss(self, model, guide, *args, **kwargs):
        return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError


@impure
class OwnELBO(Shares):
    """An ELBO of one's own counts its calls, and reads no number while it is differentiated."""

    def __init__(self):
        super().__init__()
        self.elbo = _TemperedELBO()


@impure
def elbo_on_the_class():
    """The same, but the count is an attribute of the ELBO's class, and late: from step 40 on."""

    class Late(_TemperedELBO):
        calls = 0

        def differentiable_loss(self, model, guide, *args, **kwargs):
            Late.calls += 1
            self.step["now"] = 60 if Late.calls > FORTY else 2
            return super().differentiable_loss(model, guide, *args, **kwargs)

    program = Shares()
    program.elbo = Late
    return program, None


@impure
class MoreParticles(Shares):
    """The program sets the number of its objective's particles, from step 40 on."""

    def __init__(self):
        super().__init__()
        self.elbo, self.calls = Trace_ELBO(), [0]

    def beta(self):
        self.calls[0] += 1
        if self.calls[0] > FORTY:
            self.elbo.num_particles = 2
        return 1.0


# --- autoguides


@impure
def autonormal():
    """AutoNormal of a function that counts its calls."""
    steps = itertools.count(1)
    model = global_model(lambda: min(1.0, next(steps) / 60))
    return model, AutoNormal(model)


@impure(epochs=LONG)
def autodelta_late():
    """AutoDelta of a model whose prior all but goes at step 70."""
    calls = []

    def beta():
        calls.append("call")
        return 0.02 if len(calls) > SEVENTY else 1.0

    model = global_model(beta)
    return model, AutoDelta(model)


class _GlobalShares(nn.Module):
    """The model alone, its shares drawn; it counts in a dict."""

    def __init__(self):
        super().__init__()
        self.scale, self.state = nn.Parameter(torch.zeros(())), {"calls": 0}

    def forward(self, cells):
        self.state["calls"] += 1
        prior = dist.Normal(torch.zeros(GENES), 0.3 * self.scale.exp())
        with poutine.scale(scale=min(1.0, self.state["calls"] / 60)):
            logits = pyro.sample("logits", prior.to_event(1))
        with plate(cells):
            pyro.sample("x", dist.Poisson(cells.library * torch.softmax(logits, -1)).to_event(1), obs=cells.x)


@impure
def autoguide_of_a_module():
    """An autoguide of a module that counts: each is copied, and the guide's model is the copy."""
    model = _GlobalShares()
    return model, AutoLowRankMultivariateNormal(model, rank=2)


class _WideningAutoNormal(AutoNormal):
    """AutoNormal whose scales are tempered."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = []

    def _get_loc_and_scale(self, name):
        self.calls.append(name)
        loc, scale = super()._get_loc_and_scale(name)
        return loc, scale * (1.0 + 3.0 / len(self.calls))


@impure
def subclassed_autoguide():
    """A subclass of AutoNormal draws ever narrower; the model is pure."""
    model = global_model()
    return model, _WideningAutoNormal(model)


# --- harmless: something is kept, read or said, of which no number depends


@harmless
class LogsItsLosses(Shares):
    """The prior's densities are appended to a list, as tensors, to be plotted."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def size(self, z):
        self.sizes.append(z.detach().mean())
        return super().size(z)


@harmless
class LogsNumbers(Shares):
    """The same as floats, which are read."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def size(self, z):
        self.sizes.append(float(z.detach().mean()))
        return super().size(z)


@harmless
class OnlyCounts(Shares):
    """Calls are counted, and the count is not used."""

    calls = 0

    def beta(self):
        self.calls += 1
        return super().beta()


@harmless
def warns_once():
    """A warning is given in the first call."""
    warned = []

    def beta():
        if not warned:
            warned.append(True)
            warnings.warn("corpus: the weight of the prior is not annealed", stacklevel=2)
        return 1.0

    return functions(beta)


@harmless
def lru_cache_of_a_constant():
    """An lru_cache holds a constant, and counts its hits."""

    @functools.lru_cache(maxsize=4)
    def pattern(n):
        return wave(n)

    return functions(shift=lambda: pattern(GENES))


@harmless
class BuiltInTheFirstRun(Shares):
    """A layer is built from the first cells it sees, before training begins."""

    start = None

    def model(self, cells):
        if self.start is None:
            self.start = torch.log1p(cells.x.mean(0))
        super().model(cells)

    def shift(self):
        return self.start


@harmless
class AssertsFinite(Shares):
    """An assertion reads whether all is finite, which it is."""

    def size(self, z):
        assert torch.isfinite(z).all()
        return super().size(z)


@harmless
class KeepsTheLast(Shares):
    """The last draws are kept as an attribute, which nothing looks at but the user."""

    last = None

    def size(self, z):
        self.last = z.detach()
        return super().size(z)


# --- pure: the same in every step


@pure
class Plain(Shares):
    """Two parameters, no state."""


@pure
class Autoencoder(Encoded):
    """Linear layers."""


@pure
class PyroscDensities(Encoded):
    """The softmax times a library size and negative binomial counts around it, which run as one loop."""

    def __init__(self):
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(GENES))

    def model(self, cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            counts = distributions.NegativeBinomial(cells.library * self.decode(z), self.log_theta.exp())
            pyro.sample("x", counts.to_event(1), obs=cells.x)


@pure
def two_functions():
    """Two functions with pyro.param."""
    return functions()


@pure
def autonormal_of_a_function():
    """AutoNormal of a pure function."""
    model = global_model()
    return model, AutoNormal(model)


@pure
def autoguide_list():
    """Two autoguides in a list, for two sites."""

    def model(cells):
        logits = pyro.sample("logits", dist.Normal(torch.zeros(GENES), 0.3).to_event(1))
        depth = pyro.sample("depth", dist.LogNormal(0.0, 0.1))
        with plate(cells):
            mean = depth * cells.library * torch.softmax(logits, -1)
            pyro.sample("x", dist.Poisson(mean).to_event(1), obs=cells.x)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["logits"])))
    guide.append(AutoDelta(poutine.block(model, expose=["depth"])))
    return model, guide


@pure
class BatchNorm(_Normed):
    """Batch normalisation: its running moments are buffers that are written in place."""


@pure
class DropoutLayer(Encoded):
    """nn.Dropout: random numbers of torch's."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def encode(self, x):
        return self.drop(super().encode(x))


@pure
class SpectralNorm(Encoded):
    """Spectral normalisation: its vectors are buffers that are written in place."""

    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.decoder)


@pure
class LayersOfAllKinds(Encoded):
    """Layer normalisation, an embedding of the batch, a bilinear layer, a GELU."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.bilinear = nn.Embedding(1, 3), nn.LayerNorm(5), nn.Bilinear(5, 3, 5)

    def encode(self, x):
        embedded = self.embedding(torch.zeros(len(x), dtype=torch.long))
        return nn.functional.gelu(self.bilinear(self.norm(super().encode(x)), embedded))


@pure
class RegistersItself(Encoded):
    """pyro.module puts the parameters in the store in each run."""

    def model(self, cells):
        pyro.module("encoded", self)
        super().model(cells)


@pure
class WeightNorm(Encoded):
    """Weight normalisation by a parametrization."""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.decoder)


@pure
class HooksThatDoNothing(Encoded):
    """Forward, backward and gradient hooks that return what they got, or None."""

    def __init__(self):
        super().__init__()
        self.encoder.register_forward_pre_hook(lambda module, inputs: None)
        self.encoder.register_forward_hook(lambda module, inputs, output: output)
        self.decoder.register_full_backward_hook(lambda module, inputs, outputs: None)

    def encode(self, x):
        hidden = super().encode(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient)
        return hidden


@pure
class BufferInPlace(Shares):
    """A moving average in a registered buffer, written in place: a replay writes it too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(GENES))

    def shift(self):
        self.ema.mul_(0.8).add_(self.logits.detach(), alpha=0.2)
        return -self.ema


@pure
class CountInABuffer(Shares):
    """The steps are counted in a registered buffer, in place, and the weight is computed from it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def beta(self):
        self.steps += 1
        return (self.steps / 60).clamp(max=1.0)


@pure
class ClampsItsWeights(Shares):
    """Parameters are put back into a box, in place, in each run."""

    def shift(self):
        with torch.no_grad():
            self.logits.clamp_(-0.3, 0.3)
        return 0.0


@pure
class Noise(Shares):
    """Noise of torch's own random numbers."""

    def shift(self):
        return 0.3 * torch.randn(GENES)


@pure
class GenesSubsampled(Shares):
    """A plate of genes with Pyro's own subsampling."""

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.ones(1, 1), 0.5))
            mean = cells.library * torch.softmax(self.logits, -1) * self.size(z)
            with pyro.plate("genes", GENES, subsample_size=6, dim=-1) as genes:
                pyro.sample("x", dist.Poisson(mean[:, genes]), obs=cells.x[:, genes])

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index, dim=-2):
            pyro.sample("z", dist.Normal(self.at[0].expand(1, 1), self.at[1].exp()))


@pure(validation=0.2, patience=1000)
class OtherInEvaluation(Shares):
    """Acts otherwise in evaluation mode, but always the same in training."""

    def shift(self):
        return 0.0 if self.training else 0.1 * wave(GENES)


@pure
class StraightThrough(Shares):
    """A Function of one's own without state: rounding whose gradient is one."""

    def size(self, z):
        return (0.5 * z).exp() + _Clipped.apply(z, 0.5) * 0.01 + 0.1


@pure
class MeanField(Encoded):
    """TraceMeanField_ELBO, with the KL in closed form."""

    elbo = TraceMeanField_ELBO


@pure
class SamplesItsWeights(PyroModule):
    """A PyroModule with a PyroSample, and a guide by hand."""

    def __init__(self):
        super().__init__()
        self.logits = PyroSample(dist.Normal(torch.zeros(GENES), 0.3).to_event(1))
        self.at = nn.Parameter(torch.stack([torch.zeros(GENES), torch.full((GENES,), -1.0)]))

    @pyro_method
    def model(self, cells):
        shares = torch.softmax(self.logits, -1)
        with plate(cells):
            pyro.sample("x", dist.Poisson(cells.library * shares).to_event(1), obs=cells.x)

    @pyro_method
    def guide(self, cells):
        pyro.sample("logits", dist.Normal(self.at[0], self.at[1].exp()).to_event(1))


@pure
def nested_closures():
    """Functions made of functions, with constants of Python and numpy around them."""
    offsets = np.linspace(-0.1, 0.1, GENES, dtype=np.float32)
    table = {"beta": 0.7, "names": ["a", "b"]}
    return functions(lambda: table["beta"], lambda: torch.from_numpy(offsets) + 0.01 * len(table["names"]))
