"""Shares and densities as one loop: what a recorded step did before, but for rounding, and only there."""

import contextlib

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrosc import LDVAE, VAE, VSC, distributions
from pyrosc.engine import replay as recording
from pyrosc.engine.bfloat16 import LinearInBfloat16
from pyrosc.engine.cpu.softmax_density import shares_log_density
from pyrosc.engine.replay import gradients_of, recorded
from pyrosc.inference.contract import pair
from pyrosc.inference.elbo import weighted_loss
from pyrosc.inference.isolation import validating

LIKELIHOODS = pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])


def example(rows, n_genes, likelihood, spread=2.0, seed=0):
    """Logits, gate, each with a bias, library, x, theta and weight of rows."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, spread, (rows, n_genes))
    x = draw.poisson(draw.gamma(0.3, 3, (rows, n_genes)))
    library = (x.sum(1, keepdims=True) + 1) * draw.lognormal(0, 0.3, (rows, 1))
    theta = draw.lognormal(0, 2, (1, n_genes)) if "nb" in likelihood else None
    gate = draw.normal(0, 3, (rows, n_genes)) if "z" in likelihood else None
    weight = draw.normal(0, 1, rows)
    bias = draw.normal(0, 1, n_genes)
    gate_bias = None if gate is None else draw.normal(0, 1, n_genes)
    numbers = (logits, bias, gate, gate_bias, library, x, theta, weight)
    return [None if n is None else torch.tensor(n, dtype=torch.float32) for n in numbers]


def by_torch(logits, bias, gate, gate_bias, library, x, theta, weight):
    """Log p and slopes of its weighted sum by autograd, float64, in the order of arguments."""
    given = (logits, bias, gate, gate_bias, theta, library)
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    logits, bias, gate, gate_bias, theta, library = leaves
    mean = library * (logits if bias is None else logits + bias).softmax(-1)
    d = distributions.Poisson(mean) if theta is None else distributions.NegativeBinomial(mean, theta)
    if gate is not None:
        d = distributions.ZeroInflated(d, gate if gate_bias is None else gate + gate_bias)
    log_p = d.log_prob(x.double()).sum(-1)
    wanted = [leaf for leaf in leaves if leaf is not None]
    slopes = iter(torch.autograd.grad((log_p * weight.double()).sum(), wanted))
    return [log_p.detach(), *(None if leaf is None else next(slopes) for leaf in leaves)]


def by_loop(logits, bias, gate, gate_bias, *others):
    logits, gate = logits.clone(), None if gate is None else gate.clone()
    theta = others[2]
    log_p, d_bias, d_gate_bias, d_theta, d_library = shares_log_density(
        logits, bias, gate, gate_bias, *others
    )
    found = {"bias": (bias, d_bias), "gate_bias": (gate_bias, d_gate_bias), "theta": (theta, d_theta)}
    d_bias, d_gate_bias, d_theta = (None if t is None else slope.view(t.shape) for t, slope in found.values())
    return [log_p, logits, d_bias, gate, d_gate_bias, d_theta, d_library]


def assert_close(found, true, x, rtol=3e-6):
    """To `rtol` of the largest, or of the counts: slopes in logits are differences of such numbers."""
    assert [t is None for t in found] == [t is None for t in true]
    for a, b in zip(found, true, strict=True):
        if a is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=0, atol=rtol * float(max(b.abs().max(), x.max())))


# --- the loop


@LIKELIHOODS
@pytest.mark.parametrize("n_genes", [1, 7, 512, 1300])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_loop_has_the_values_and_slopes_of_autograd_in_float64(rows, n_genes, likelihood):
    arguments = example(rows, n_genes, likelihood)
    assert_close(by_loop(*arguments), by_torch(*arguments), x=arguments[5])


@LIKELIHOODS
def test_without_a_bias(likelihood):
    arguments = example(20, 600, likelihood)
    arguments[1] = arguments[3] = None
    assert_close(by_loop(*arguments), by_torch(*arguments), x=arguments[5])


@LIKELIHOODS
def test_logits_far_apart_are_no_trouble(likelihood):
    """Shares down to e^-60. (Below e^-87 they are that.)"""
    arguments = example(20, 600, likelihood, spread=8.0)
    arguments[0] += 1000.0 * torch.arange(20)[:, None]
    arguments[1] = None  # or the sum is rounded as the logits are not
    assert_close(by_loop(*arguments), by_torch(*arguments), x=arguments[5])


@LIKELIHOODS
def test_a_library_of_nothing_has_its_slopes(likelihood):
    """A mean of 0 in a cell without counts: log p is 0, or that of a dropout, and every slope a number."""
    arguments = example(5, 40, likelihood)
    arguments[4][1], arguments[5][1] = 0, 0
    assert_close(by_loop(*arguments), by_torch(*arguments), x=arguments[5])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_not_hidden(value):
    arguments = example(4, 40, "nb")
    arguments[0][1, 3] = value
    log_p, *_ = by_loop(*arguments)
    assert torch.isfinite(log_p).tolist() == [True, False, True, True]


def test_the_number_of_threads_changes_no_bit():
    arguments = example(100, 700, "zinb")
    found = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(by_loop(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- where it is put in


@pytest.fixture
def replayed(data, monkeypatch):
    """Loss and slopes of a step of a program that is run, and recorded; and how many loops that has."""
    whole = data.on("cpu")
    here, there = whole.cells(torch.arange(40)), whole.cells(torch.arange(40, 80))

    def replay(program, how=contextlib.nullcontext):
        graphs, original = [], recording.fuse
        named = lambda graph: [(str(node.target), node.args) for node in graph.nodes]
        monkeypatch.setattr(recording, "fuse", lambda graph: original(graph) or graphs.append(named(graph)))
        program.train()
        model, guide = pair(program, None)
        state = [*program.parameters(), *program.buffers()]
        parameters = [p for p in program.parameters() if p.requires_grad]
        estimate = program.elbo()

        def loss(cells, weight):
            with how():
                return weighted_loss(estimate, model, guide, cells, weight)

        gradients = gradients_of(loss, parameters)
        replay = recorded(gradients, state, lambda: here, lambda: there, torch.tensor(1.0))
        assert replay is not gradients
        kept = [t.detach().clone() for t in state]
        results = []
        for run in (gradients, replay):
            recording.restore(state, kept)
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                value, slopes = run(there, torch.tensor(0.7))
            results.append([value, *slopes])
        (nodes,) = graphs
        n_loops = [name for name, _ in nodes].count("pyrosc.shares_log_density.default")
        return *results, n_loops, nodes

    with validating(on=False):
        yield replay


def assert_same_step(run, replay, tipped=0.0):
    """To 1e-5 of the largest slope of all; a share `tipped` may be the next number of 8 bits."""
    torch.testing.assert_close(run[0], replay[0], rtol=1e-6, atol=0)
    largest = max(float(slope.abs().max()) for slope in run[1:] if slope is not None)
    beyond = []
    for a, b in zip(run[1:], replay[1:], strict=True):
        if a is None or b is None:
            assert a is b
            continue
        torch.testing.assert_close(a, b, rtol=2**-7 if tipped else 0, atol=1e-5 * largest)
        beyond.append(((a - b).abs() > 1e-5 * largest).flatten())
    assert torch.cat(beyond).double().mean() <= tipped


@pytest.mark.parametrize("library", ["observed", "latent"])
@LIKELIHOODS
@pytest.mark.parametrize("model", [VAE, LDVAE, VSC], ids=lambda model: model.__name__)
def test_a_step_of_a_model_is_the_same_with_the_loop(model, likelihood, library, data, replayed):
    run, replay, n_loops, nodes = replayed(model.for_data(data, likelihood=likelihood, library=library))
    assert_same_step(run, replay)
    assert n_loops == 1
    assert not [name for name, _ in nodes if "softmax" in name or name == "pyrosc.log_density.default"]
    # The offsets are added in the loop, and their slopes summed there.
    (loop,) = (args for name, args in nodes if name == "pyrosc.shares_log_density.default")
    logits, bias, gate, gate_bias, *_ = loop
    assert bias is not None
    assert (gate is None) == (gate_bias is None)
    summed = [args[0] for name, args in nodes if name == "aten.sum.dim_IntList"]
    assert not {logits, gate} & set(summed)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_logits_of_bfloat16_products_are_written_over_too(likelihood, data, replayed):
    model = VAE.for_data(data, likelihood=likelihood)
    run, replay, n_loops, _ = replayed(model, LinearInBfloat16)
    # Slopes are rounded to 8 bits: other last digits before that are, now and then, the next number after.
    assert_same_step(run, replay, tipped=0.01)
    assert n_loops == 1


class Written(nn.Module):
    """As users write it; what a test adds changes the mean, or says more of the shares."""

    elbo = VAE.elbo

    def __init__(self, n_genes):
        super().__init__()
        self.decoder = nn.Linear(2, n_genes)
        self.at = nn.Parameter(torch.tensor([0.3, -1.0]))
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    def counts(self, cells, rho):
        return distributions.NegativeBinomial(rho * cells.library, self.log_theta.exp())

    def logits(self, z):
        return self.decoder(z)

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            rho = torch.softmax(self.logits(z), -1)
            pyro.sample("x", self.counts(cells, rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()).expand([2]).to_event(1))


class Frozen(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.log_theta.requires_grad_(False)


class LooksAtShares(Written):
    def counts(self, cells, rho):
        pyro.factor("even", (rho**2).sum(-1))
        return super().counts(cells, rho)


class LooksAtTheMean(Written):
    def counts(self, cells, rho):
        mean = rho * cells.library
        return distributions.NegativeBinomial(mean, mean * self.log_theta.exp())


class LooksAtLogits(Written):
    def logits(self, z):
        logits = super().logits(z)
        pyro.factor("small", -logits.square().mean(-1))
        return logits


class ThetaOfEachCell(Written):
    def counts(self, cells, rho):
        theta = (self.log_theta + cells.library.log()).exp()
        return distributions.NegativeBinomial(rho * cells.library, theta)


class Shifted(Written):
    def counts(self, cells, rho):
        return distributions.NegativeBinomial(rho * cells.library + 0.1, self.log_theta.exp())


class OfParameters(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.table = nn.Parameter(pairs.wave(40, n_genes))

    def logits(self, z):
        return self.table + 0.0 * z.sum()


class OneLibrary(Written):
    def counts(self, cells, rho):
        return distributions.NegativeBinomial(1000.0 * rho, self.log_theta.exp())


@pytest.mark.parametrize(
    ("program", "n_loops"),
    [
        (Written, 1),
        (Frozen, 1),
        (LooksAtShares, 0),
        (LooksAtTheMean, 0),
        (LooksAtLogits, 0),
        (ThetaOfEachCell, 0),
        (Shifted, 0),
        (OfParameters, 0),
        (OneLibrary, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_put_in_where_nothing_else_looks_at_what_lies_between(program, n_loops, data, replayed):
    run, replay, found, _ = replayed(program(data.n_genes))
    assert_same_step(run, replay)
    assert found == n_loops
