"""VAE and GMVAE under four likelihoods: on known Poisson rates, then on counts of cells.

    python examples/scvae.py [--data pbmc3k.h5ad] [--grid] [--smoke]

First 1000 cells of 10 genes with the rates 1, ..., 10: each model should give them back. Then the cells of a
file with raw counts in X (or 700 blood cells of pyrosc's demo), 81% of them to train on: ELBO, log likelihood
and KL, in nats per cell, of both parts. --grid tries hidden layers and latents first, by the validation loss
of the VAE with NB, on training cells that it keeps out. Types are read from obs["cell_type"].
"""

import argparse
import itertools
from pathlib import Path

import anndata as ad
import numpy as np
from scipy.sparse import csr_matrix

import pyrosc

LIKELIHOODS = ["poisson", "nb", "zip", "zinb"]
HIDDEN = [(100,), (100, 250), (100, 250, 500), (100, 250, 500, 1000)]
LATENT = [10, 25, 50, 100]


def made(name, data, likelihood, n_components, **sizes):
    """Build a VAE, or a GMVAE of so many components."""
    more = {"n_components": n_components} if name == "GMVAE" else {}
    return getattr(pyrosc, name).for_data(data, likelihood=likelihood, **more, **sizes)


def known_rates(epochs):
    """Fit Poisson counts, and show the rates that each model finds."""
    rates = np.arange(1.0, 11.0)
    x = np.random.default_rng(0).poisson(rates, (1000, 10)).astype(np.float32)
    data = pyrosc.from_anndata(ad.AnnData(csr_matrix(x)))
    print("true rates         ", *(f"{rate:5.1f}" for rate in rates))
    for name, likelihood in itertools.product(["VAE", "GMVAE"], LIKELIHOODS):
        sizes = {"library": "latent", "n_latent": 2, "hidden": (16,)}
        fit = pyrosc.fit_svi(made(name, data, likelihood, 2, **sizes), data, epochs=epochs, progress=False)
        found = pyrosc.posterior_predictive(fit, data, 20)
        print(f"{name:6} {likelihood:12}", *(f"{r:5.1f}" for r in sum(found).toarray().mean(0) / 20))


def best_sizes(train, epochs):
    """Return the hidden widths and the number of latents of the best validation loss."""
    scores = {}
    for hidden, n_latent in itertools.product(HIDDEN, LATENT):
        model = pyrosc.VAE.for_data(train, hidden=hidden, n_latent=n_latent)
        fit = pyrosc.fit_svi(model, train, epochs=epochs, progress=False)
        scores[hidden, n_latent] = fit.history["validation"].min()
        print(f"hidden {hidden!s:24} latents {n_latent:4}: {scores[hidden, n_latent]:9.1f}", flush=True)
    hidden, n_latent = min(scores, key=scores.get)
    return {"hidden": hidden, "n_latent": n_latent}


def table(train, test, sizes, n_components, epochs):
    """Print ELBO, log likelihood and KL of the training cells and of the others."""
    print("model  likelihood   train: ELBO    log p(x)      KL    test: ELBO    log p(x)      KL")
    for name, likelihood in itertools.product(["VAE", "GMVAE"], LIKELIHOODS):
        model = made(name, train, likelihood, n_components, **sizes)
        fit, shown = pyrosc.fit_svi(model, train, epochs=epochs, progress=False), []
        for cells in (train, test):
            parts, log_p = pyrosc.elbo(fit, cells).mean(), pyrosc.log_likelihood(fit, cells).mean
            shown.append(f"{parts.elbo:12.1f} {log_p:11.1f} {parts.filter(like='kl_').sum():7.1f}")
        print(f"{name:6} {likelihood:9}", *shown, flush=True)


def main():
    parser = argparse.ArgumentParser(description="Fit VAE and GMVAE with four likelihoods.")
    parser.add_argument("--data", type=Path, help="an .h5ad file; by default the demo's cells")
    parser.add_argument("--grid", action="store_true", help="choose the sizes of the networks first")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    options = parser.parse_args()
    epochs = 2 if options.smoke else None
    known_rates(epochs)
    if options.smoke:
        adata = pyrosc.datasets.simulate(120, 60, n_types=3, seed=0)
    else:
        adata = ad.read_h5ad(options.data) if options.data else pyrosc.datasets.pbmc68k_reduced()
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train, test = (adata[rows].copy() for rows in np.split(order, [round(0.81 * adata.n_obs)]))
    sizes = best_sizes(train, epochs) if options.grid else {"hidden": (100,), "n_latent": 10}
    table(train, test, sizes, adata.obs["cell_type"].nunique(), epochs)


if __name__ == "__main__":
    main()
