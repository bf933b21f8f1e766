"""A model of your own: a factor model in 20 lines, fitted, scored, and asked what pyrosc's own models are asked.

    python examples/your_own_model.py [--smoke]

All it needs is a pair of Pyro programs of `cells` that keep to three names: the plate "cells", the counts "x", and
the shares of the genes "rho", which is what imputation and differential expression read ("z" is the latent space).
"""

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrosc
from pyrosc.criticism import baseline


class FactorModel(nn.Module):
    """x ~ NB(l softmax(W z + b), theta), l the cell's total: log shares are linear in a few factors z."""

    def __init__(self, n_genes, n_factors=5):
        super().__init__()
        self.n_factors = n_factors
        self.log_share = nn.Linear(n_factors, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.encoder = nn.Sequential(nn.Linear(n_genes, 64), nn.ReLU(), nn.Linear(64, 2 * n_factors))

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_factors), 1).to_event(1))
            rho = pyro.deterministic("rho", self.log_share(z).softmax(-1), event_dim=1)
            theta = self.log_theta.exp()
            pyro.sample("x", dist.GammaPoisson(theta, theta / (cells.library * rho)).to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            loc, log_scale = self.encoder(cells.x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def main():
    parser = argparse.ArgumentParser(description="Fit a model of your own to simulated counts.")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    smoke = parser.parse_args().smoke

    # Counts from a known truth: four cell types, in which a tenth of the genes are up or down fourfold.
    adata = pyrosc.datasets.simulate(
        n_cells=200 if smoke else 2000, n_genes=200, log2_fold_change=2.0, inverse_dispersion=3.0, seed=1
    )
    train, test = adata[::2].copy(), adata[1::2].copy()

    torch.manual_seed(0)  # of the initial weights
    fit = pyrosc.fit_svi(FactorModel(adata.n_vars), train, epochs=3 if smoke else None)
    alike = baseline(train, epochs=3 if smoke else None)
    print(fit)

    score, floor = pyrosc.log_likelihood(fit, test), pyrosc.log_likelihood(alike, test, n_draws=1)
    print(f"held-out log likelihood, nats per cell: {score.mean:.2f}; all cells alike: {floor.mean:.2f}")

    imputed = pyrosc.impute(fit, test, "share")
    truth, counted = np.log(test.layers["share"]), np.log((test.X.toarray() + 0.5) / (test.X.sum(1) + 100))
    print("correlation of log shares with the truth, within genes, over the held-out cells:")
    centre = lambda log_share: log_share - log_share.mean(0)
    print(f"  imputed {correlation(centre(np.log(imputed.mean)), centre(truth)):.3f}", end="")
    print(f", counted {correlation(centre(np.asarray(counted)), centre(truth)):.3f}")

    table = pyrosc.differential_expression(
        fit, test, groupby="cell_type", group="type_0", reference="type_1"
    ).set_index("gene")
    lfc = np.log2(adata.var["share_type_0"] / adata.var["share_type_1"])[table.index]
    called = table.is_de.to_numpy(dtype=bool)
    false = (lfc[called].abs() <= 0.25).sum()
    print(
        f"type_0 against type_1: {called.sum()} genes called, {false} of them with a true |lfc| of at most 0.25;"
    )
    print(
        f"  {((lfc.abs() > 1) & ~called).sum()} of {(lfc.abs() > 1).sum()} with a true |lfc| above 1 were missed;"
    )
    print(f"  correlation of estimated and true log2 fold changes: {correlation(table.lfc_mean, lfc):.3f}")


if __name__ == "__main__":
    main()
