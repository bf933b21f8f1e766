"""Log densities and their slopes at once: what a recorded step did before, but for rounding."""

import contextlib

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrosc import LDVAE, VAE, VSC, AutoZI, distributions
from pyrosc.distributions.cell import without
from pyrosc.engine import replay as recording
from pyrosc.engine.bfloat16 import LinearInBfloat16
from pyrosc.engine.compare import restore
from pyrosc.engine.lower import shorten
from pyrosc.engine.passes import fuse, simplify
from pyrosc.engine.replay import gradients_of, recorded
from pyrosc.engine.trace import traced
from pyrosc.inference.contract import pair
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.inference.isolation import validating

LIKELIHOODS = pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])
AT_ONCE = "pyrosc.weighted_softmax_density_.default"


@pytest.fixture
def replayed(data, monkeypatch):
    """Loss and slopes of a step of a program that is run, and recorded; and how many loops that has."""
    whole = data.on("cpu")
    here, there = whole.cells(torch.arange(40)), whole.cells(torch.arange(40, 80))

    def replay(program, how=contextlib.nullcontext):
        graphs = []

        def watched(graph):
            fuse(graph)
            graphs.append([(str(node.target), node.args) for node in graph.graph.nodes])

        monkeypatch.setattr(recording, "_REWRITES", (watched, shorten))
        program.train()
        model, guide = pair(program, None)
        state = [*program.parameters(), *program.buffers()]
        parameters = [p for p in program.parameters() if p.requires_grad]
        estimate = program.elbo()

        def loss(cells, weight):
            with how():
                return _weighted_loss(estimate, model, guide, cells, weight)

        gradients = gradients_of(loss, parameters)
        weight = torch.tensor(1.0)
        replay = recorded(gradients, state, lambda: (here, weight), lambda: (there, weight / 2))
        kept = [t.detach().clone() for t in state]
        results = []
        for run in (gradients, replay):
            restore(state, kept)
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                value, slopes = run(there, torch.tensor(0.7))
            results.append([value, *slopes])
        (nodes,) = graphs
        n_loops = [name for name, _ in nodes].count(AT_ONCE)
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
    assert not [name for name, _ in nodes if "softmax" in name and name != AT_ONCE]
    # The offsets are added in the loop, and their slopes summed there.
    (loop,) = (args for name, args in nodes if name == AT_ONCE)
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


def test_a_gate_that_is_no_linear_map_is_written_over_too(data, replayed):
    run, replay, n_loops, nodes = replayed(AutoZI.for_data(data))
    assert_same_step(run, replay)
    assert n_loops == 1
    (loop,) = (args for name, args in nodes if name == AT_ONCE)
    assert str(loop[2].target) == "aten.logit.default"
    assert loop[3] is None


class Written(nn.Module):
    """As users write it; what a test adds changes the density, or says more of the logits."""

    elbo = VAE.elbo

    def __init__(self, n_genes):
        super().__init__()
        self.decoder = nn.Linear(2, n_genes)
        self.at = nn.Parameter(torch.tensor([0.3, -1.0]))
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

    def total(self, cells):
        return cells.library

    def theta(self, cells):
        return self.log_theta.exp()

    def counts(self, cells, logits):
        return distributions.NegativeBinomial(
            logits=logits, total=self.total(cells), inverse_dispersion=self.theta(cells)
        ).to_event(1)

    def logits(self, z):
        return self.decoder(z)

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            logits = self.logits(z)
            pyro.deterministic("rho", logits.softmax(-1), event_dim=1)
            pyro.sample("x", self.counts(cells, logits), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(self.at[0], self.at[1].exp()).expand([2]).to_event(1))


class Frozen(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.log_theta.requires_grad_(False)


class FrozenDecoder(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.decoder.requires_grad_(False)


class GenesLeftOut(Written):
    def counts(self, cells, logits):
        return without(super().counts(cells, logits), torch.arange(logits.shape[-1]) % 3 > 0)


class SumOfLogits(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.shift = nn.Parameter(pairs.wave(n_genes))

    def logits(self, z):
        return (z @ self.decoder.weight.T) + self.shift


class OfParameters(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.table = nn.Parameter(pairs.wave(40, n_genes))

    def logits(self, z):
        return self.table + 0.0 * z.sum()


class TheParameters(OfParameters):
    def logits(self, z):
        return self.table


class LooksAtShares(Written):
    def counts(self, cells, logits):
        pyro.factor("even", (logits.softmax(-1) ** 2).sum(-1))
        return super().counts(cells, logits)


class LooksAtLogits(Written):
    def logits(self, z):
        logits = super().logits(z)
        pyro.factor("small", -logits.square().mean(-1))
        return logits


class PartOfLogits(Written):
    """A copy is made of it, which nobody else reads."""

    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.decoder = nn.Linear(2, 2 * n_genes)

    def logits(self, z):
        both = super().logits(z)
        pyro.factor("small", -both.square().mean(-1))
        return both.view(*z.shape[:-1], 2, -1)[..., 0, :]


class ViewOfLogits(Written):
    """Who writes over it writes over what another reads."""

    def logits(self, z):
        logits = super().logits(z)
        pyro.factor("small", -logits.square().mean(-1))
        return logits.view(1, *logits.shape)[0]


class ThetaOfEachCell(Written):
    def theta(self, cells):
        return (self.log_theta + cells.library.log()).exp()


class OneTotal(Written):
    def total(self, cells):
        return torch.tensor(1000.0)


class ByTheMean(Written):
    def counts(self, cells, logits):
        mean = self.total(cells) * logits.softmax(-1)
        return distributions.NegativeBinomial(mean, self.theta(cells)).to_event(1)


class TwoSites(Written):
    """Of one tensor of logits: neither may write over it."""

    def counts(self, cells, logits):
        pyro.sample("y", distributions.Poisson(logits=logits, total=cells.library).to_event(1), obs=cells.x)
        return super().counts(cells, logits)


class TwoDecoders(Written):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.other = nn.Linear(2, n_genes)

    def logits(self, z):
        self.others = self.other(z)
        return super().logits(z)

    def counts(self, cells, logits):
        pyro.sample(
            "y", distributions.Poisson(logits=self.others, total=cells.library).to_event(1), obs=cells.x
        )
        return super().counts(cells, logits)


@pytest.mark.parametrize(
    ("program", "n_loops"),
    [
        (Written, 1),
        (Frozen, 1),
        (GenesLeftOut, 1),
        (SumOfLogits, 1),
        (OfParameters, 1),
        (TwoDecoders, 2),
        (PartOfLogits, 1),
        (ViewOfLogits, 0),
        (FrozenDecoder, 1),
        (TheParameters, 0),
        (LooksAtShares, 0),
        (LooksAtLogits, 0),
        (ThetaOfEachCell, 0),
        (OneTotal, 0),
        (ByTheMean, 0),
        (TwoSites, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_put_in_where_nothing_else_reads_the_logits(program, n_loops, data, replayed):
    run, replay, found, _ = replayed(program(data.n_genes))
    assert_same_step(run, replay)
    assert found == n_loops


def test_it_is_left_where_gradients_of_rows_depend_on_their_densities():
    """As those of importance weights do."""

    def slopes(h, weight, total, x):
        logits = (h @ weight).requires_grad_()
        log_p = distributions.Poisson(logits=logits, total=total).to_event(1).log_prob(x)
        return torch.autograd.grad(log_p.logsumexp(0), logits)

    h, weight, total, x = pairs.wave(5, 3), pairs.wave(3, 7), torch.full((5, 1), 20.0), torch.ones(5, 7)
    with validating(on=False):
        graph = traced(slopes, (h, weight, total, x))
        simplify(graph)
        fuse(graph)
        names = [str(node.target) for node in graph.graph.nodes]
        assert "pyrosc.softmax_density_backward.default" in names
        assert AT_ONCE not in names
        graph.recompile()
        torch.testing.assert_close(graph(h, weight, total, x), slopes(h, weight, total, x))
