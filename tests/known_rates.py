"""A program whose rates are known, for the tests: its fit, its cells, and what is so by formula."""

import anndata
import numpy as np
import pairs
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import nn

from pyrosc import from_anndata, multiple_imputation
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated


class Known(nn.Module):
    """x ~ Poisson, NB(mu, theta), or that with dropouts: mu = mean_g (1 + batch) exp(sd z), z the prior's."""

    def __init__(self, mean, theta=None, gate=None, sd=0.0, l=None):
        super().__init__()
        self.mean, self.theta, self.gate = (
            None if t is None else torch.as_tensor(t, dtype=torch.float32) for t in (mean, theta, gate)
        )
        self.sd, self.l = sd, l

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
            mu = self.mean * (1 + cells.batch[:, None]) * torch.exp(self.sd * z)
            if self.l is not None:
                pyro.deterministic("l", torch.full((len(cells), 1), self.l), event_dim=1)
            x = Poisson(mu) if self.theta is None else NegativeBinomial(mu, self.theta)
            x = x if self.gate is None else ZeroInflated(x, self.gate)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))


def cells_of(x, batches=None):
    """An AnnData of these counts."""
    n, g = x.shape
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    if batches is not None:
        obs["batch"] = batches
    var = pd.DataFrame({"place": range(g)}, index=[f"g{i}" for i in range(g)])
    return anndata.AnnData(np.asarray(x, np.float32), obs=obs, var=var)


def known(x, *args, batches=None, **kwargs):
    """A fit of Known, and the cells as an AnnData."""
    adata = cells_of(x, batches)
    data = from_anndata(adata, batch_key=None if batches is None else "batch")
    return pairs.untrained(Known(*args, **kwargs), data), adata


X = np.array([[0, 1, 3, 0, 40], [2, 0, 0, 7, 0], [5, 0, 1, 0, 1], [0, 0, 0, 12, 30]])
MEAN = np.array([0.3, 0.8, 2.0, 5.0, 20.0])
THETA = np.array([0.2, 1.0, 3.0, 0.7, 10.0])
GATE = np.array([-2.0, 0.0, 1.0, -1.0, 0.5])
PRIOR = stats.gamma(np.tile(THETA, (4, 1)), scale=MEAN / THETA)
POSTERIOR = stats.gamma(THETA + X, scale=1 / (THETA / MEAN + 1))


def dropouts(x=X, mean=MEAN):
    """P(dropout given x) by Bayes' rule."""
    pi, p0 = 1 / (1 + np.exp(-GATE)), stats.nbinom.pmf(0, THETA, THETA / (THETA + mean))
    return np.where(x == 0, pi / (pi + (1 - pi) * p0), 0)


def drawn_rates(fit, adata, m, **options):
    return np.stack([part.X for part in multiple_imputation(fit, adata, m, **options)])


def distance(values, cdf):
    """Largest distance of the distribution of draws, along the first axis, from another."""
    n = len(values)
    at = cdf(np.sort(values, 0))
    place = np.arange(n).reshape(-1, *[1] * (values.ndim - 1))
    return np.maximum(at - place / n, (place + 1) / n - at).max(0)
