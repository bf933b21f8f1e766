"""Programs as users write them, some with a known answer, for the tests."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy.special import gammaln
from torch import nn

from pyrosc import Fit, distributions
from pyrosc.inference.found import Found


def empty_params():
    return {"params": {}, "constraints": {}}


def untrained(program, data, guide=None, params=None, plates=1):
    """A Fit of a program as it is."""
    history = pd.DataFrame({"train": [1.0], "validation": [1.0]}).rename_axis("epoch")
    found = Found(
        data.n_cells, data.n_cells, 0, plates, False, "it is not trained", (1,), data.fingerprint, {}
    )
    params, cpu = params or empty_params(), torch.device("cpu")
    return Fit(program, guide, params, data.schema, history, {"seed": 0}, found, cpu)


def wave(*shape, phase=0.0, size=0.1):
    """Numbers by formula, no two alike."""
    n = int(np.prod(shape))
    return size * torch.sin(0.7 * torch.arange(n, dtype=torch.float32) + phase).view(*shape)


def tensors_of(fit):
    """Every tensor of a fit, by name."""
    from pyrosc.inference.isolation import modules_of

    modules = modules_of(fit.program, fit.separate_guide)
    named = {f"{i}.{name}": t for i, m in enumerate(modules) for name, t in m.state_dict().items()}
    return named | dict(fit.params["params"])


def same_bits(a, b):
    """Whether two fits have the same tensors, to the bit."""
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Conjugate(nn.Module):
    """z ~ Gamma(3, 0.01), x_g ~ Poisson(z share_g). The guide is the posterior where `shift` is zero.

    The total is Poisson(z), so z given x ~ Gamma(3 + total, 1.01), and log p(x) is known.
    """

    shape, rate = 3.0, 0.01

    def __init__(self, share, shift=0.0):
        super().__init__()
        self.register_buffer("share", torch.as_tensor(share, dtype=torch.float32))
        self.shift = nn.Parameter(torch.tensor([shift, 0.0]))

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Gamma(self.shape, self.rate).expand([1]).to_event(1))
            rho = self.share.expand(*z.shape[:-1], -1)
            rho = pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", distributions.Poisson(z * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        a, b = self.shift.exp()
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            q = dist.Gamma((self.shape + cells.library) * a, (self.rate + 1) * b)
            pyro.sample("z", q.to_event(1))

    def evidence(self, x):
        """Return log p(x) of each cell."""
        x, share = np.asarray(x, np.float64), self.share.double().numpy()
        total, a, b = x.sum(1), self.shape, self.rate
        return (
            gammaln(a + total)
            - gammaln(a)
            + a * np.log(b)
            - (a + total) * np.log(b + 1)
            + (x * np.log(share / share.sum())).sum(1)
            - gammaln(x + 1).sum(1)
        )


class GenesPlate(nn.Module):
    """Conjugate in each entry: x_ng ~ Poisson(w_ng), w_ng ~ Gamma(2, 1 / m_g); the genes stand in a plate.

    With `genes_outside` the plates are named without dims, so Pyro puts genes left of cells.
    """

    def __init__(self, mean, *, transposed=False):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(()))
        self.transposed = transposed

    def plates(self, cells):
        dims = (-1, -2) if self.transposed else (-2, -1)
        return (
            pyro.plate("cells", cells.n_total, subsample=cells.index, dim=dims[0]),
            pyro.plate("genes", len(self.mean), dim=dims[1]),
        )

    def model(self, cells):
        over_cells, over_genes = self.plates(cells)
        turn = (lambda t: t.mT) if self.transposed else (lambda t: t)
        rate = 2 / self.mean
        with over_cells, over_genes:
            w = pyro.sample("w", dist.Gamma(2.0, rate[:, None] if self.transposed else rate))
            pyro.sample("x", dist.Poisson(w), obs=turn(cells.x))

    def guide(self, cells):
        over_cells, over_genes = self.plates(cells)
        turn = (lambda t: t.mT) if self.transposed else (lambda t: t)
        rate = 2 / self.mean
        with over_cells, over_genes:
            pyro.sample(
                "w",
                dist.Gamma(
                    (2 + turn(cells.x)) * self.shift.exp(),
                    1 + (rate[:, None] if self.transposed else rate),
                ),
            )

    def posterior_mean(self, x):
        return (2 + x) / (1 + 2 / self.mean.numpy())

    def evidence(self, x):
        """Negative binomial: gamma-Poisson, summed over the genes."""
        from scipy.stats import nbinom

        p = 2 / (2 + self.mean.double().numpy())
        return nbinom.logpmf(np.asarray(x), 2, p).sum(1)


class TwoMethods(nn.Module):
    """A small autoencoder as a user's class, with a plain BatchNorm1d and pyro.module."""

    def __init__(self, n_genes, n_latent=2, *, register=False):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(n_genes, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.loc = nn.Linear(8, n_latent)
            self.scale = nn.Linear(8, n_latent)
            self.decoder = nn.Linear(n_latent, n_genes)
        self.n_latent, self.register = n_latent, register

    def model(self, cells):
        if self.register:
            pyro.module("two", self)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            zero = cells.x.new_zeros(len(cells), self.n_latent)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            rho = torch.softmax(self.decoder(z), -1)
            rho = pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library.clamp_min(1) * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            h = self.encoder(torch.log1p(cells.x))
            scale = nn.functional.softplus(self.scale(h)) + 1e-3
            pyro.sample("z", dist.Normal(self.loc(h), scale).to_event(1))


def two_functions(n_genes, n_latent=2):
    """Poisson factor analysis with pyro.param only."""

    def model(cells):
        weight = pyro.param("weight", lambda: wave(n_latent, n_genes))
        bias = pyro.param("bias", lambda: torch.zeros(n_genes))
        theta = pyro.param("theta", lambda: torch.ones(n_genes), constraint=constraints.positive)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            zero = cells.x.new_zeros(len(cells), n_latent)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            rho = pyro.deterministic("rho", torch.softmax(z @ weight + bias, -1), event_dim=1)
            mean = cells.library.clamp_min(1) * rho
            pyro.sample("x", distributions.NegativeBinomial(mean, theta).to_event(1), obs=cells.x)

    def guide(cells):
        slope = pyro.param("slope", lambda: wave(n_genes, n_latent))
        offset = pyro.param("offset", lambda: torch.zeros(n_latent))
        scale = pyro.param("scale", lambda: torch.ones(n_latent), constraint=constraints.positive)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(torch.log1p(cells.x) @ slope + offset, scale).to_event(1))

    return model, guide


def global_model(n_genes):
    """Shares of the genes are latent and common to all cells: for autoguides."""

    def model(cells):
        zero = torch.zeros(n_genes, device=cells.x.device)
        w = pyro.sample("w", dist.Normal(zero, 3.0).to_event(1))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            rho = torch.softmax(w, -1).expand(*w.shape[:-2], len(cells), n_genes)
            rho = pyro.deterministic("rho", rho, event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library.clamp_min(1) * rho).to_event(1), obs=cells.x)

    return model


class Watching(nn.Module):
    """Records the batches that the guide and the model see; rho depends on the batch only."""

    def __init__(self, n_genes):
        super().__init__()
        self.n_genes, self.seen = n_genes, []

    def watch(self, who, cells):
        if len(cells) > 1:  # not the trial run on one cell
            self.seen.append((who, cells.batch.tolist()))

    def model(self, cells):
        self.watch("model", cells)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            zero = cells.x.new_zeros(len(cells), 1)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            logits = (cells.batch[:, None] + 0.1 * z) * torch.linspace(-1, 1, self.n_genes)
            rho = pyro.deterministic("rho", torch.softmax(logits, -1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        self.watch("guide", cells)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            at = cells.batch[:, None].float()
            pyro.sample("z", dist.Normal(at, 0.1).to_event(1))
