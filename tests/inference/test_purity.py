"""What a program promises, and what of its state is seen to change."""

import itertools
import logging
import random
import types
from collections import deque, namedtuple
from functools import partial

import numpy as np
import pairs
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrosc
from pyrosc import VAE
from pyrosc.inference.contract import traces
from pyrosc.inference.purity import changed, fingerprint, is_pure

ANNEALED = {"weight": 1.0}
Schedule = namedtuple("Schedule", "weights")


def test_a_program_of_a_users_is_not_pure_unless_it_says_so(data):
    program = pairs.TwoMethods(data.n_genes)
    assert not is_pure(program, None)
    program.pure = True
    assert is_pure(program, None)
    assert is_pure(program.model, program.guide)
    model, guide = pairs.two_functions(data.n_genes)
    assert not is_pure(model, guide)
    model.pure = True
    assert not is_pure(model, guide)
    guide.pure = True
    assert is_pure(model, guide)


def test_a_class_may_say_so_and_a_model_may_deny_it(data):
    pure = type("Pure", (pairs.TwoMethods,), {"pure": True})(data.n_genes)
    assert is_pure(pure, None)
    vae = VAE.for_data(data)
    vae.pure = False
    assert not is_pure(vae, None)


def test_an_autoguide_is_as_pure_as_its_model(data):
    model = pairs.global_model(data.n_genes)
    assert not is_pure(model, AutoNormal(model))
    model.pure = True
    assert is_pure(model, AutoNormal(model))


def test_an_estimator_or_plates_of_a_users_are_not_pure(data):
    vae, model = VAE.for_data(data), pairs.global_model(data.n_genes)
    assert is_pure(vae, None, Trace_ELBO())
    assert not is_pure(vae, None, type("Annealed", (Trace_ELBO,), {})())
    model.pure = True
    assert not is_pure(model, AutoNormal(model, create_plates=lambda cells: []))


def test_a_function_bound_to_a_model_of_ours_is_not_pure(data):
    vae = VAE.for_data(data)
    assert is_pure(vae.model, vae.guide)
    assert not is_pure(types.MethodType(lambda self, cells: None, vae), None)


def test_a_programs_words_in_the_log_are_no_change(caplog):
    log = logging.getLogger("of a user")
    program = lambda cells: log.warning("a step")
    before = fingerprint([program], [])
    program(None)
    assert changed(before, fingerprint([program], [])) is None


def test_what_is_hung_on_a_model_of_ours_makes_it_impure(data):
    hooked = VAE.for_data(data)
    handle = hooked.decoder.logits.register_forward_hook(lambda *_: None)
    assert not is_pure(hooked, None)
    handle.remove()
    assert is_pure(hooked, None)
    hooked.decoder.forward = lambda z, cells: None
    assert not is_pure(hooked, None)


def test_a_method_put_in_the_place_of_ours_makes_it_impure(data, monkeypatch):
    vae = VAE.for_data(data)
    monkeypatch.setattr(VAE, "guide", lambda self, cells: None)
    assert not is_pure(vae, None)


class Helper:
    """Slots, and a class attribute."""

    __slots__ = ("value",)
    shared = [0]  # noqa: RUF012

    def __init__(self):
        self.value = 0


def of_attribute():
    program = type("Program", (), {})()
    program.value = 0
    return program, lambda: setattr(program, "value", 1)


def holding(thing, act):
    """A function that closes over a thing."""
    return (lambda cells: thing), act


def of_default():
    values = [0]

    def program(cells, values=values):
        return values

    return program, lambda: values.append(1)


def of_partial():
    values = {"a": {"b": 0}}
    return partial(lambda values, cells: values, values), lambda: values["a"].update(b=1)


def of_global():
    return (lambda cells: ANNEALED["weight"]), lambda: ANNEALED.update(weight=ANNEALED["weight"] / 2)


def of_iterator():
    numbers = itertools.count()
    return holding(numbers, lambda: next(numbers))


def of_list_iterator():
    numbers = iter([1, 2, 3])
    return holding(numbers, lambda: next(numbers))


def of_generator():
    numbers = (i for i in range(9))
    return holding(numbers, lambda: next(numbers))


def of_slots():
    helper = Helper()
    return holding(helper, lambda: setattr(helper, "value", 1))


def of_class():
    helper = Helper()
    return holding(helper, lambda: Helper.shared.append(1))


def of_named_tuple():
    schedule = Schedule([1.0])
    return holding(schedule, lambda: schedule.weights.append(2.0))


def of_array():
    array = np.zeros(3)
    return holding(array, lambda: array.__setitem__(1, 1.0))


def of_numpy_number():
    held = {"weight": np.float64(1)}
    return holding(held, lambda: held.update(weight=np.float64(2)))


def of_tensor():
    tensor = torch.zeros(3)
    return holding([tensor], lambda: tensor.data.fill_(1.0))


def of_reassigned_buffer():
    module = nn.BatchNorm1d(3)
    return module, lambda: setattr(module, "running_mean", torch.zeros(3))


def of_deque():
    values = deque([1])
    return holding(values, lambda: values.append(2))


def of_generator_of_torch():
    generator = torch.Generator()
    return holding(generator, lambda: torch.rand(1, generator=generator))


def of_generator_of_numpy():
    generator = np.random.default_rng(0)
    return holding(generator, generator.random)


def of_python_random():
    return (lambda cells: random.random()), lambda: random.seed(random.randrange(2**60))


def of_numpy_random():
    return (lambda cells: np.random.random()), lambda: np.random.seed(np.random.randint(2**30))  # noqa: NPY002


def of_string():
    held = ["first"]
    return holding(held, lambda: held.__setitem__(0, "second"))


def of_requires_grad():
    weight = torch.zeros(2)
    return holding(weight, lambda: weight.requires_grad_())


def of_helper_function():
    values = [0]

    def helper():
        return values

    return (lambda cells: helper()), lambda: values.append(1)


def of_property():
    kind = type("Program", (), {"_values": [], "value": property(lambda self: len(self._values))})
    return kind(), lambda: kind._values.append(1)


WAYS = [of for name, of in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("of", WAYS, ids=lambda of: of.__name__)
def test_a_change_of_state_is_seen(of):
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        program, act = of()
        before = fingerprint([program], [])
        if "random" not in of.__name__:  # (from which beartype draws too)
            assert changed(before, fingerprint([program], [])) is None
        act()
        assert changed(before, fingerprint([program], [])) is not None
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.parametrize("name", pyrosc.models.__all__)
def test_a_run_of_our_models_changes_nothing_beside_parameters(name, rich):
    model = getattr(pyrosc.models, name)
    recipe = {"n_components": 3} if name == "GMVAE" else {}
    program = model.for_data(rich, **recipe)
    cells = rich.on("cpu").cells(torch.arange(20))
    known = [*program.parameters(), *program.buffers()]
    with pyrosc.inference.isolation.isolated(torch.device("cpu"), 0, pairs.empty_params()):
        before = fingerprint([program.model, program.guide], known)
        traces(program.model, program.guide, cells)
        assert changed(before, fingerprint([program.model, program.guide], known)) is None
    assert len(before) > 20
