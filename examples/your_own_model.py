"""A model of your own: a factor model in 20 lines, fitted, scored, and asked what pyrosc's models are asked.

    python examples/your_own_model.py [--smoke]

It needs a pair of Pyro programs of `cells` that keep to a few names: the plate "cells", the counts "x", the
latent space "z", and the shares of the genes "rho", which imputation and differential expression read.
"""

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrosc
from pyrosc.criticism.baseline import baseline


class FactorModel(nn.Module):
    """x ~ NB(l softmax(W z + b), theta), l the cell's total: log shares are linear in a few factors z."""

    def __init__(self, n_genes, n_factors=5):
        super().__init__()
        self.n_factors = n_factors
        self.log_share = nn.Linear(n_factors, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.encoder = nn.Sequential(nn.Linear(n_genes, 64), nn.ReLU(), nn.Linear(64, 2 * n_factors))

    def model(self, cells):
        """Sample the factors and the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(cells.x.new_zeros(self.n_factors), 1).to_event(1))
            rho = pyro.deterministic("rho", self.log_share(z).softmax(-1), event_dim=1)
            theta = self.log_theta.exp()
            pyro.sample("x", dist.GammaPoisson(theta, theta / (cells.library * rho)).to_event(1), obs=cells.x)

    def guide(self, cells):
        """Sample the factors given the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            loc, log_scale = self.encoder(cells.x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def report_score(fit, train, test, epochs):
    alike = baseline(train, epochs=epochs)
    score, floor = pyrosc.log_likelihood(fit, test), pyrosc.log_likelihood(alike, test, n_draws=1)
    print(f"held-out log likelihood, nats per cell: {score.mean:.2f}; all cells alike: {floor.mean:.2f}")


def report_imputation(fit, test):
    centred = lambda share: np.log(share) - np.log(share).mean(0)
    counted = (test.X.toarray() + 0.5) / (test.X.toarray() + 0.5).sum(1, keepdims=True)
    truth, imputed = centred(test.layers["share"]), centred(pyrosc.impute(fit, test).mean)
    print("correlation with the true log shares, over held-out cells and within genes: ", end="")
    print(f"imputed {correlation(imputed, truth):.2f}, counted {correlation(centred(counted), truth):.2f}")


def report_differences(fit, test, estimand):
    table = pyrosc.differential_expression(
        fit, test, groupby="cell_type", group="type_0", reference="type_1", estimand=estimand
    ).set_index("gene")
    truth = np.log2(test.var["share_type_0"] / test.var["share_type_1"])[table.index]
    called, large, small = table.is_de.to_numpy(dtype=bool), truth.abs() > 1, truth.abs() <= 0.25
    print(f"type_0 against type_1, estimand {estimand!r}: {called.sum()} genes called; ", end="")
    print(f"{(large & called).sum()} of {large.sum()} that differ more than twofold, ", end="")
    print(f"{(small & called).sum()} of {small.sum()} that hardly differ; ", end="")
    print(f"correlation with the true fold changes {correlation(table.lfc_mean, truth):.2f}")


def main():
    parser = argparse.ArgumentParser(description="Fit a model of your own to simulated counts.")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    smoke = parser.parse_args().smoke
    epochs = 3 if smoke else None
    # Counts from a known truth: four cell types, each with a tenth of the genes up or down fourfold.
    size = {"n_cells": 200 if smoke else 2000, "n_genes": 200}
    adata = pyrosc.datasets.simulate(**size, log2_fold_change=2.0, inverse_dispersion=3.0, seed=1)
    train, test = adata[::2].copy(), adata[1::2].copy()

    torch.manual_seed(0)  # of the initial weights
    fit = pyrosc.fit_svi(FactorModel(adata.n_vars), train, epochs=epochs)
    print(fit)
    report_score(fit, train, test, epochs)
    report_imputation(fit, test)
    for estimand in ("mean", "cell"):
        report_differences(fit, test, estimand)


if __name__ == "__main__":
    main()
