"""What a Gaussian VAE makes of log counts, Pearson residuals and raw counts, in four architectures.

    python examples/gaussian_vae_preprocessing.py [--data FILE.h5ad] [--smoke]

Each is fitted for 30 epochs to four cells in five. Printed: loss, reconstruction and KL, nats per cell, of
these and of the others; of one transform they can be compared. Drawn for the first architecture: PCA and
t-SNE of the codes, coloured by every column of obs with 2 to 20 categories (type, batch, donor, ...).

No code collapses (a KL of 0, the code saying nothing): the scale of each gene is learned, so that a gene
which the code explains weighs more and more, and the weight of the KL starts at zero. With scale=1 a code
that explains a few percent of 5000 standardised genes is hardly worth its KL.
"""

import argparse
import itertools
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

import pyrosc

ARCHITECTURES = [((1024, 512, 256), 32), ((1024, 512, 256), 64), ((256, 128), 128), ((256,), 32)]
TRANSFORMS = ["log", "raw", "pearson"]


def losses(fit, adata):
    """Return loss, reconstruction and KL, nats per cell."""
    parts = pyrosc.elbo(fit, adata, n_draws=5).mean()
    return -parts.elbo, -parts.reconstruction, parts.kl_z


def columns_of(obs):
    """Return the columns of obs that colour a picture well."""
    return [name for name in obs if 2 <= obs[name].nunique() <= 20 and obs[name].dtype.kind not in "fb"]


def picture(codes, obs):
    """PCA and t-SNE of each code, a column of pictures for each column of obs."""
    names = columns_of(obs)
    maps = {
        "PCA": PCA(2, random_state=0),
        "t-SNE": TSNE(2, random_state=0, perplexity=min(30, len(obs) // 4)),
    }
    figure = Figure((3.2 * len(names), 3.0 * len(maps) * len(codes)), layout="constrained")
    axes = figure.subplots(len(maps) * len(codes), len(names), squeeze=False)
    for row, ((code, z), (method, to_plane)) in zip(
        axes, itertools.product(codes.items(), maps.items()), strict=True
    ):
        xy = to_plane.fit_transform(z)
        for axis, name in zip(row, names, strict=True):
            values = obs[name].astype(str).to_numpy()
            for i, value in enumerate(sorted(set(values))):
                colour = mpl.colormaps["tab20"](i % 20)
                axis.plot(*xy[values == value].T, ".", ms=2, color=colour, label=value)
            axis.set(xticks=[], yticks=[], title=f"{code}, {method}: {name}")
    for axis in axes[-1]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), markerscale=4, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description="Fit Gaussian VAEs to counts transformed in three ways.")
    parser.add_argument(
        "--data", type=Path, help="an .h5ad with raw counts in X; by default, simulated cells"
    )
    parser.add_argument("--output", type=Path, default=Path("gaussian_vae.png"), help="the picture")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    options = parser.parse_args()
    size = {"n_cells": 120, "n_genes": 50} if options.smoke else {"n_cells": 3000, "n_genes": 1000}
    simulated = {"n_types": 6, "n_batches": 3, "n_donors": 4, "batch_sd": 0.2, "donor_sd": 0.1}
    adata = (
        ad.read_h5ad(options.data) if options.data else pyrosc.datasets.simulate(**size, **simulated, seed=0)
    )
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train, test = (adata[rows].copy() for rows in np.split(order, [adata.n_obs * 4 // 5]))
    architectures = ARCHITECTURES[-1:] if options.smoke else ARCHITECTURES
    codes = {}
    print(" " * 34 + "train: loss  reconstr.      KL    test: loss  reconstr.      KL")
    for transform, (hidden, n_latent) in itertools.product(TRANSFORMS, architectures):
        model = pyrosc.GaussianVAE.for_data(train, transform=transform, hidden=hidden, n_latent=n_latent)
        epochs = 1 if options.smoke else 30
        fit = pyrosc.fit_svi(model, train, epochs=epochs, patience=epochs, progress=False)
        shown = (f"{a:10.0f} {b:12.0f} {c:8.1f}" for a, b, c in (losses(fit, train), losses(fit, test)))
        print(f"{transform:10} {f'{list(hidden)}-{n_latent}':22}", *shown, flush=True)
        codes.setdefault(transform, pyrosc.latent(fit, adata))
    if not options.smoke:
        picture(codes, adata.obs).savefig(options.output, dpi=90)
        print(f"PCA and t-SNE of the codes: {options.output}")


if __name__ == "__main__":
    main()
