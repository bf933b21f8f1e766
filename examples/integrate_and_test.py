"""Several batches into one space, then differential expression that is not fooled by them.

    python examples/integrate_and_test.py [--smoke]

Cells of six types in four batches with strong effects, from a known truth. Batch mixing: the share of a
cell's 30 nearest neighbours that are of another batch, against what chance would give. Label preservation:
how often they name its type. Both for PCA of log counts, for a VAE that does not know the batches, and for
one that does. Then one type against the rest, by sampling, within batches and not.
"""

import argparse

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

import pyrosc


def neighbours(z, n=30):
    """Each cell's nearest others, (cells, n)."""
    return NearestNeighbors(n_neighbors=n + 1).fit(z).kneighbors(z, return_distance=False)[:, 1:]


def report_space(name, z, adata):
    """Print batch mixing and label preservation."""
    near, batch, label = neighbours(z), adata.obs.batch.to_numpy(), adata.obs.cell_type.to_numpy()
    other = np.mean(batch[near] != batch[:, None])
    chance = 1 - np.mean([np.mean(batch == b) for b in batch])
    kept = np.mean(label[near] == label[:, None])
    print(f"{name:24} batch mixing {other / chance:5.2f} of chance   neighbours of the same type {kept:5.2f}")


def report_test(name, table, adata):
    """Print how many calls are true: of genes whose log2 fold change beyond the common one is over .25."""
    mine = adata.obs.cell_type == "type_0"
    true = np.log2(adata.uns["share"][mine].mean(0) / adata.uns["share"][~mine].mean(0))
    beyond = true - table.lfc_common.iloc[0]  # which the table's fold changes are beyond
    differs = dict(zip(adata.var_names, np.abs(beyond) > 0.25, strict=True))
    called = table[table.is_de]
    false = np.mean([not differs[gene] for gene in called.gene]) if len(called) else 0.0
    print(f"{name:24} {len(called):4} genes called of {sum(differs.values())} that differ, {false:.0%} false")


def main():
    parser = argparse.ArgumentParser(description="Integrate batches, and test within them.")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    smoke = parser.parse_args().smoke
    epochs = 2 if smoke else None
    size = {"n_cells": 200, "n_genes": 50} if smoke else {"n_cells": 4000, "n_genes": 500}
    adata = pyrosc.datasets.simulate(
        **size, n_types=6, n_batches=4, batch_sd=0.5, log2_fold_change=1.5, seed=0
    )
    # The shares without the batches' effects: what a test of types should see.
    effects = np.exp(adata.varm["log_batch_effect"].T)[adata.obs.batch.cat.codes]
    share = adata.layers["share"] / effects
    adata.uns["share"] = share / share.sum(1, keepdims=True)

    x = adata.X.toarray()
    log = np.log1p(x / x.sum(1, keepdims=True) * np.median(x.sum(1)))
    report_space("PCA of log counts", PCA(10, random_state=0).fit_transform(log), adata)
    fits = {}
    for name, key in (("VAE without batches", None), ("VAE with batches", "batch")):
        data = pyrosc.from_anndata(adata, batch_key=key)
        fits[name] = pyrosc.fit_svi(pyrosc.VAE.for_data(data, n_latent=10), data, epochs=epochs), data
        report_space(name, pyrosc.latent(*fits[name]), adata)
    asked = {"groupby": "cell_type", "group": "type_0"}
    for estimand in ("mean", "cell"):
        for name, (fit, data) in fits.items():
            table = pyrosc.differential_expression(fit, data, estimand=estimand, **asked)
            report_test(f"{name}, {estimand}", table, adata)


if __name__ == "__main__":
    main()
