"""Steps that are replayed: the same bits as steps that are run, and what can't be recorded is run.

The loop that `fuse` puts in rounds otherwise: see `test_passes.py`. Here it is left out.
"""

import logging
import os

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrosc import VAE, distributions, fit_svi
from pyrosc.engine import replay
from pyrosc.engine.passes import fuse, simplify
from pyrosc.engine.replay import NotRecordableError, gradients_of, recorded
from pyrosc.engine.trace import traced
from pyrosc.inference import loop, step
from pyrosc.nn.layers import Dropout

SETTINGS = {"epochs": 4, "minibatch_size": 50, "learning_rate": 1e-2, "progress": False}
STEPS = 4 * 4  # 180 training cells


def plate(cells):
    return pyro.plate("cells", cells.n_total, subsample=cells.index)


class Mixture(nn.Module):
    """Each cell is of one of two types, summed over."""

    elbo = TraceEnum_ELBO

    def __init__(self, n_genes):
        super().__init__()
        self.logits = nn.Parameter(pairs.wave(2, n_genes))
        self.encoder = nn.Linear(n_genes, 2)
        nn.init.zeros_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)

    def model(self, cells):
        with plate(cells):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            rho = torch.softmax(self.logits, -1)[y]
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        with plate(cells):
            logits = self.encoder(torch.log1p(cells.x))
            pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


class Simple(nn.Module):
    """Shares of the genes, and a latent scale of each cell; what a test adds changes the mean."""

    def __init__(self, n_genes):
        super().__init__()
        self.logits = nn.Parameter(pairs.wave(n_genes))
        self.at = nn.Parameter(torch.zeros(2))

    def factor(self, z):
        return 1.0

    def model(self, cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = cells.library * torch.softmax(self.logits, -1) * (0.1 * z).exp().unsqueeze(-1)
            mean = mean * self.factor(z)
            pyro.sample("x", distributions.Poisson(mean).to_event(1), obs=cells.x)

    def guide(self, cells):
        with plate(cells):
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()))


def auto(data):
    model = pairs.global_model(data.n_genes)
    return model, AutoNormal(model)


def small(data, **recipe):
    return VAE.for_data(data, **{"n_latent": 2, "hidden": (8,)} | recipe), None


PROGRAMS = {
    "nb": (small, {}),
    "zinb, latent library, two batches": (
        lambda data: small(
            data, likelihood="zinb", library="latent", dispersion="gene-batch", encode_covariates=True
        ),
        {},
    ),
    "dropout": (lambda data: small(data, dropout=0.3), {}),
    "clipped": (small, {"clip_norm": 0.5}),
    "decayed": (small, {"weight_decay": 1.0}),
    "two particles": (small, {"elbo": Trace_ELBO(num_particles=2)}),
    "plain modules": (lambda data: (pairs.TwoMethods(data.n_genes), None), {}),
    "functions": (lambda data: pairs.two_functions(data.n_genes), {}),
    "autoguide": (auto, {}),
    "gamma": (lambda data: (pairs.Conjugate(data.share, shift=0.3), None), {}),
    "genes in a plate": (lambda data: (pairs.GenesPlate(data.share * 50), None), {}),
}


@pytest.fixture
def fit(data, monkeypatch, caplog):
    """A fit with steps recorded after two, or never; whether they were replayed; and what was said."""

    def fitted(make, *, record, on=data, **settings):
        monkeypatch.setattr(replay, "_REWRITES", tuple(f for f in replay._REWRITES if f is not fuse))
        monkeypatch.setattr(step, "_RECORD_AFTER", 2)
        monkeypatch.setattr(step, "_RECORD_FOR", 0)
        caplog.clear()
        program, guide = make(on)
        with caplog.at_level(logging.INFO, logger="pyrosc"):
            result = fit_svi(program, on, guide=guide, replay=record, **SETTINGS | settings)
        messages = [record.getMessage() for record in caplog.records]
        said = [message for message in messages if "not replayed" in message or "went back" in message]
        return result, result.found.replayed, said

    return fitted


# --- the same bits


@pytest.mark.parametrize(("make", "settings"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_fit_of_replayed_steps_has_the_bits_of_one_of_steps_that_are_run(make, settings, fit):
    run, never, _ = fit(make, record=False, **settings)
    replayed, once, said = fit(make, record=True, **settings)
    assert never == "the program does not say that it is pure"
    assert once is True, said
    assert said == []
    assert pairs.same_bits(run, replayed)
    columns = run.history.columns.drop("seconds")
    np.testing.assert_array_equal(run.history[columns], replayed.history[columns])


class Counting(Simple):
    """Counts its runs in training where no look at its state sees it."""

    def factor(self, z):
        os.environ["CALLS"] = str(int(os.environ.get("CALLS", "0")) + self.training)
        return 1.0


def test_the_programs_do_not_run_again_once_recorded(data, fit):
    _, replayed, _ = fit(lambda data: (Counting(data.n_genes), None), record=True)
    assert replayed is True
    recorded_calls = int(os.environ.pop("CALLS"))
    fit(lambda data: (Counting(data.n_genes), None), record=False)
    # The ELBO's check and the steps; or the check, two steps, a look at what the program keeps, the recording
    # the comparison, and the check at the end.
    assert int(os.environ.pop("CALLS")) == 1 + STEPS
    assert recorded_calls == 1 + 2 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(("steps", "is_recorded"), [(53, False), (54, True)])
def test_a_fit_with_more_than_fifty_steps_to_come_is_recorded(steps, is_recorded, data):
    settings = SETTINGS | {"epochs": steps, "minibatch_size": data.n_cells, "validation": 0.0}
    replayed = fit_svi(Simple(data.n_genes), data, replay=True, **settings).found.replayed
    assert replayed is True if is_recorded else replayed == "the fit has few steps"


class Differentiates(Simple):
    """A gradient within the program."""

    def factor(self, z):
        at = self.at.detach().clone().requires_grad_()
        (at**3).sum().backward()
        return 1.0 + (at.grad * self.at).square().sum()


def test_a_program_may_differentiate(fit):
    make, settings = lambda data: (Differentiates(data.n_genes), None), {"validation": 0.0}
    run, _, _ = fit(make, record=False, **settings)
    tried, _, _ = fit(make, record=True, **settings)
    assert pairs.same_bits(run, tried)


def test_the_kl_weight_still_rises_in_replayed_steps(fit):
    settings = {"kl_warmup": 8}
    run, _, _ = fit(small, record=False, **settings)
    replayed, once, _ = fit(small, record=True, **settings)
    assert once is True
    assert pairs.same_bits(run, replayed)
    at_once, _, _ = fit(small, record=True, kl_warmup=0)
    assert not pairs.same_bits(at_once, replayed)


def test_a_loss_that_is_not_finite_is_noticed_in_replayed_steps(fit):
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        fit(lambda data: (Simple(data.n_genes), None), record=True, learning_rate=1e6)


# --- what can't be recorded


class ReadsANumber(Simple):
    """A value is read off a tensor that depends on parameters and draws."""

    def factor(self, z):
        return 1.0 + 0.1 * abs(z.mean().item())


class Branches(Simple):
    """Python looks at a draw."""

    def factor(self, z):
        return 1.1 if z.mean() > 0 else 0.9


class Counts(Simple):
    """Python state changes what is computed from call to call."""

    calls = 0

    def factor(self, z):
        self.calls += 1
        return 1.0 + 0.1 * (self.calls % 3)


class Numpy(Simple):
    """Random numbers that torch knows nothing of."""

    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.rng = np.random.default_rng(0)

    def factor(self, z):
        return float(1 + 0.1 * self.rng.random())


class ByData(Simple):
    """The number of positive counts decides on a shape."""

    def factor(self, z):
        return 1 + 0.001 * self.logits[torch.nonzero(z > 0).squeeze(-1) % len(self.logits)].sum()


@pytest.mark.parametrize("kind", [ReadsANumber, Branches, ByData])
def test_what_can_not_be_recorded_is_run(kind, fit):
    make = lambda data: (kind(data.n_genes), None)
    run, _, _ = fit(make, record=False)
    tried, once, said = fit(make, record=True)
    assert len(said) == 1
    assert said[0] == f"steps are run, not replayed: {once}"
    assert "\n" not in said[0]
    assert len(said[0]) > len("steps are run, not replayed: ") + 10
    assert pairs.same_bits(run, tried)


def test_an_enumerated_site_is_run(fit):
    """Pyro's TraceEnum_ELBO looks up which probabilities are not zero."""
    make, settings = lambda data: (Mixture(data.n_genes), None), {"elbo": TraceEnum_ELBO(max_plate_nesting=1)}
    run, _, _ = fit(make, record=False, **settings)
    tried, once, said = fit(make, record=True, **settings)
    assert "reads the numbers" in once
    assert len(said) == 1
    assert pairs.same_bits(run, tried)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Counts, "a program changes Counts.calls from step to step"),
        (Numpy, "a program changes Numpy.rng from step to step"),
    ],
)
def test_python_that_acts_differently_from_step_to_step_is_noticed(kind, why, fit):
    """The recording runs the program a few more times than steps are: its own state is what it then is."""
    tried, once, said = fit(lambda data: (kind(data.n_genes), None), record=True)
    assert len(said) == 1
    assert once == why
    run, _, _ = fit(lambda data: (kind(data.n_genes), None), record=False)
    for history in (tried.history, run.history):
        assert np.isfinite(history["train"]).all()
    np.testing.assert_allclose(tried.history["train"], run.history["train"], rtol=0.1)


# --- what recording leaves alone


class Network(nn.Module):
    """Parameters, running moments and dropout, outside of any fit."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(40, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = Dropout(0.5)

    def loss(self, cells, weight):
        return weight * self.dropout(self.norm(self.layer(torch.log1p(cells.x)))).square().mean()


@pytest.fixture
def network(data):
    """A network, its state, and two minibatches."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = Network().train()
    state = [*network.parameters(), *network.buffers()]
    whole = data.on("cpu")
    return network, state, whole.cells(torch.arange(30)), whole.cells(torch.arange(60, 90))


def record(network, state, here, there):
    gradients = gradients_of(network.loss, list(network.parameters()))
    return gradients, recorded_of(gradients, state, here, there)


def recorded_of(gradients, state, here, there):
    weight = torch.tensor(1.0)
    return recorded(gradients, state, lambda: (here, weight), lambda: (there, weight / 2))


def test_recording_leaves_state_and_random_numbers_as_they_were(network, untouched):
    module, state, *_ = network
    before = [t.detach().clone() for t in state]
    with untouched():
        gradients, replay = record(*network)
    assert replay is not gradients
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert all(p.grad is None for p in module.parameters())
    assert int(module.norm.num_batches_tracked) == 0


def test_so_does_recording_what_fails(network, untouched):
    module, state, here, there = network

    def loss(cells, weight):
        value = module.loss(cells, weight)
        return value * value.item()

    gradients = gradients_of(loss, list(module.parameters()))
    before = [t.detach().clone() for t in state]
    with untouched(), pytest.raises(NotRecordableError, match="reads the numbers in a tensor"):
        recorded_of(gradients, state, here, there)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_replays_read_the_parameters_as_they_are_and_update_running_moments(network):
    module, state, here, there = network
    gradients, replay = record(*network)
    with torch.no_grad():
        module.layer.weight.mul_(1.5)
    start = [t.detach().clone() for t in state]
    results = []
    for f in (gradients, replay):
        with torch.no_grad():
            for tensor, value in zip(state, start, strict=True):
                tensor.copy_(value)
        with torch.random.fork_rng([]):
            torch.manual_seed(9)
            (first, slopes), (second, others) = (
                f(cells, torch.tensor(w)) for cells, w in ((there, 0.3), (here, 0.7))
            )
        results.append([first, *slopes, second, *others, *(t.detach().clone() for t in state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert int(module.norm.num_batches_tracked) == 2
    assert not torch.equal(module.norm.running_mean, start[5])


def test_random_numbers_go_on_from_replay_to_replay(network):
    _, _, here, _ = network
    _, replay = record(*network)
    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        first, second = (float(replay(here, torch.tensor(1.0))[0]) for _ in range(2))
        torch.manual_seed(4)
        again = float(replay(here, torch.tensor(1.0))[0])
    assert first != second
    assert first == again


def test_results_of_a_replay_are_not_overwritten_by_the_next(network):
    _, _, here, there = network
    _, replay = record(*network)
    value, slopes = replay(here, torch.tensor(1.0))
    first = [value, *slopes]
    kept = [t.clone() for t in first]
    replay(there, torch.tensor(0.1))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_parameter_that_is_not_used_has_no_gradient(network):
    module, state, here, there = network
    spare = nn.Parameter(torch.ones(2))
    gradients = gradients_of(module.loss, [spare, *module.parameters()])
    replay = recorded_of(gradients, [spare, *state], here, there)
    assert replay is not gradients
    _, (none, *others) = replay(here, torch.tensor(1.0))
    assert none is None
    assert all(isinstance(g, torch.Tensor) for g in others)


def test_what_depends_on_other_cells_than_those_recorded_is_compared_on_others(network):
    """A number that Python took from the recorded cells would be a constant in the replay."""
    module, state, here, there = network
    own = {id(here.x): 1.0}

    def loss(cells, weight):
        factor = 1.0 + len(own) * (2.0 if weight.is_leaf and not own.get(id(cells.x)) else 1.0)
        own[id(cells.x)] = 0.0
        return module.loss(cells, weight) * factor

    gradients = gradients_of(loss, list(module.parameters()))
    with pytest.raises(NotRecordableError, match="differs"):
        recorded_of(gradients, state, here, there)


def test_operations_that_nobody_uses_are_not_replayed():
    def f(x):
        x.exp()  # nobody's
        noise = torch.rand(3)  # nobody's, but it draws random numbers
        del noise
        return [x.expand(3).view(3).detach() + 1]

    graph = traced(f, [torch.ones(3)])
    simplify(graph)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["aten.rand.default", "aten.add.Tensor"]
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 2.0))


# --- rewrites, and checks along the way


def test_a_rewrite_that_computes_other_numbers_is_left_out(network, monkeypatch):
    def wrong(graph):
        """Negate the loss."""
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            other = graph.graph.call_function(torch.neg, (output.args[0][0],))
        output.args = ([other, *output.args[0][1:]],)
        graph.recompile()

    monkeypatch.setattr(replay, "_REWRITES", (wrong,))
    with pytest.warns(RuntimeWarning, match="the rewrite 'wrong' of recorded steps computes other numbers"):
        gradients, replayed = record(*network)
    same_results(gradients, replayed, network)


def test_a_rewrite_that_fails_is_left_out(network, monkeypatch):
    def broken(graph):
        graph.graph.erase_node(next(iter(graph.graph.nodes)))

    monkeypatch.setattr(replay, "_REWRITES", (broken,))
    with pytest.warns(RuntimeWarning, match="the rewrite 'broken' of recorded steps failed"):
        gradients, replayed = record(*network)
    same_results(gradients, replayed, network)


def same_results(gradients, replayed, network):
    _, state, here, _ = network
    start, results = [t.detach().clone() for t in state], []
    for f in (gradients, replayed):
        with torch.no_grad():
            for tensor, value in zip(state, start, strict=True):
                tensor.copy_(value)
        with torch.random.fork_rng([]):
            torch.manual_seed(9)
            value, slopes = f(here, torch.tensor(0.3))
        results.append([value, *slopes, *(t.detach().clone() for t in state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Late(Simple):
    """Acts otherwise from a time on that nothing in it shows."""

    def factor(self, z):
        return 2.0 if "LATE" in os.environ else 1.0


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("late", [1, 2])
def test_a_fit_goes_back_to_the_last_check_where_a_replay_is_wrong(late, finite, data, monkeypatch, caplog):
    """Each epoch is checked; the program acts otherwise from the start of one of them on."""
    original_row = loop._row

    def row(losses, taken, problem):
        if "LATE" in os.environ and taken.replayed is True and not finite:
            raise FloatingPointError
        return original_row(losses, taken, problem)

    monkeypatch.setattr(loop, "_row", row)
    monkeypatch.setattr(loop, "_CHECK_EVERY", 4)
    monkeypatch.setattr(step, "_RECORD_FOR", 0)
    original, settings = loop._epoch, SETTINGS | {"validation": 0.0, "epochs": 6}

    def fit(**how):
        epochs = iter(range(100))

        def epoch(problem, taken):
            if next(epochs) == late:
                monkeypatch.setenv("LATE", "")
            return original(problem, taken)

        monkeypatch.delenv("LATE", raising=False)
        monkeypatch.setattr(loop, "_epoch", epoch)
        return fit_svi(Late(data.n_genes), data, **settings | how)

    replayed, run = fit(replay=True), fit(replay=False)
    why = "a replayed step differed from one that was run" if finite else "the loss was not finite"
    assert replayed.found.replayed == why
    assert f"went back to the start of epoch {late} " in caplog.text
    assert f"steps run: {why}" in repr(replayed)
    assert len(replayed.history) == 6
    assert pairs.same_bits(run, replayed)
    columns = run.history.columns.drop("seconds")
    np.testing.assert_array_equal(run.history[columns], replayed.history[columns])
