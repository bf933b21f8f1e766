"""Which zeros are dropouts? Four variants of DCA, and a VAE, on counts whose dropouts are known.

    python examples/dropouts_dca.py [--smoke]

1000 genes; some two zeros in five are dropouts. A model is fitted to 70% of the cells, with batch
normalisation and without, with pyrosc's ZINB and with the usual formula in float32; then a VAE. Zeros with
P(dropout given x) > 1/2 count as predicted, and are repaired: filled with the mean before dropout. The two
formulas come to the same, and none of 20 seeds diverges: a fit starts at the counts' means, and is clipped.
"""

import argparse

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import nn

import pyrosc
from pyrosc.distributions.counts import ZeroInflated


class NaiveZeroInflated(ZeroInflated):
    """The ZINB as it is usually written: gamma functions, powers, and 1e-10 against logarithms of 0."""

    def log_prob(self, value):
        """Log density."""
        mu, theta, pi = self.base.mean, self.base.inverse_dispersion, torch.sigmoid(self.gate_logits)
        log_nb = torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        log_nb = log_nb - (theta + value) * torch.log(1 + mu / theta)
        log_nb = log_nb + value * (torch.log(mu + 1e-10) - torch.log(theta + 1e-10))
        at_zero = torch.log(pi + (1 - pi) * (theta / (theta + mu)) ** theta + 1e-10)
        return torch.where(value == 0, at_zero, torch.log(1 - pi + 1e-10) + log_nb)

    to_event = TorchDistribution.to_event  # sums over genes, by the formula above


class Naive(nn.Module):
    """Wraps a likelihood: the same parameters, the other formula."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood

    def forward(self, h, batch, **mean):
        """Return the distribution of the counts."""
        stable = self.likelihood(h, batch, **mean)
        return NaiveZeroInflated(stable.base, stable.gate_logits)


def built(variant, train, seed):
    """Return the model of a variant."""
    if variant == "VAE":
        return pyrosc.VAE.for_data(train, likelihood="zinb", library="latent", seed=seed)
    norm, formula = variant.split(" norm, ")
    model = pyrosc.DCA.for_data(train, norm=None if norm == "no" else norm, seed=seed)
    if formula == "naive":
        model.likelihood = Naive(model.likelihood)
    return model


def scores(fit, test):
    """Count predicted and true dropouts; precision, recall, F1; distance after repair and before."""
    x, truth = test.X.toarray(), test.layers["counts_before_dropout"].toarray()
    dropped = (x == 0) & (truth > 0)
    predicted = pyrosc.dropout_probability(fit, test) > 0.5
    mean = pyrosc.impute(fit, test, what="count").mean
    hits, n, n_true = (predicted & dropped).sum(), predicted.sum(), dropped.sum()
    after, before = (np.linalg.norm(v - truth) for v in (np.where(predicted, mean, x), x))
    return n, n_true, hits / max(1, n), hits / n_true, 2 * hits / (n + n_true), after, before


def main():
    parser = argparse.ArgumentParser(description="Find known dropouts with four variants of DCA.")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    parser.add_argument("--seeds", type=int, default=1, help="fits of each variant")
    options = parser.parse_args()
    size = {"n_cells": 100, "n_genes": 60} if options.smoke else {"n_cells": 2000, "n_genes": 1000}
    adata = pyrosc.datasets.simulate(
        **size, n_types=6, dropout=0.25, library_mean=4 * size["n_genes"], inverse_dispersion=3.0, seed=0
    )
    x, truth = adata.X.toarray(), adata.layers["counts_before_dropout"].toarray()
    print(f"{np.mean(x == 0):.0%} of the entries are 0, {np.mean(truth[x == 0] > 0):.0%} of these dropouts")
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train, test = (adata[rows].copy() for rows in np.split(order, [int(0.7 * adata.n_obs)]))
    print("variant                    seed  predicted    true  precision  recall    F1   distance (before)")
    short = {"epochs": 2} if options.smoke else {}
    for variant in ("batch norm, naive", "batch norm, stable", "no norm, naive", "no norm, stable", "VAE"):
        for seed in range(options.seeds):
            try:
                fit = pyrosc.fit_svi(built(variant, train, seed), train, seed=seed, progress=False, **short)
            except FloatingPointError:
                print(f"{variant:26} {seed:4}  diverged")
                continue
            n, n_true, precision, recall, f1, after, before = scores(fit, test)
            line = f"{variant:26} {seed:4} {n:10} {n_true:7} {precision:10.2f} {recall:7.2f} {f1:5.2f}"
            print(f"{line} {after:10.1f} ({before:.1f})", flush=True)


if __name__ == "__main__":
    main()
