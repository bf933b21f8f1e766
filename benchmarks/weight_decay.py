"""Which weight decay each model should have: held-out loss at 0, 5 and 20, all else the model's defaults.

Cells are split 75/25 at random, at most 1500 of them, over the 1000 most variable genes (seurat_v3): those
of pbmc3k and paul15, and, for TOTALVI, those of pbmc_cite_10k5k that have proteins. `loss` is -ELBO of the
held-out cells, nats per cell (of AutoImpute, SCVIS, SCANVI and DCA what they have in its place, without
further terms); lower is better. It compares the decays of one model, never two models. GMVAE has as many
components as there are published labels and SCANVI is shown the training cells' labels. Seed s draws the
split and seeds `for_data` and the fit.

Printed at the end: the table of docs/models.md, means over seeds, each less that of no decay.

    python benchmarks/weight_decay.py --data DIR
    python benchmarks/weight_decay.py --smoke
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np
import torch

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad

DECAYS = [0.0, 5.0, 20.0]
WITHOUT_PROTEINS = [name for name in pyrosc.models.__all__ if name != "TOTALVI"]
DATASETS = {"pbmc3k": WITHOUT_PROTEINS, "paul15": WITHOUT_PROTEINS, "pbmc_cite_10k5k": ["TOTALVI"]}
LABELS, PROTEINS = "cell_type", "protein_expression"
LINE = "{dataset:16} {model:12} seed {seed}  decay {decay:4.0f}  {loss:10.2f} nats/cell  {epochs} epochs"


def few(adata: ad.AnnData, n_cells: int, n_genes: int) -> ad.AnnData:
    """Keep a part of the cells that have all that is measured, and their most variable genes."""
    if PROTEINS in adata.obsm:
        adata = adata[(np.asarray(adata.obsm[PROTEINS]) >= 0).all(1)]
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:n_cells]
    return common.with_variable_genes(adata[np.sort(rows)].copy(), n_genes)


def loss_of(train: ad.AnnData, test: ad.AnnData, name: str, fit_settings: dict) -> tuple[float, int]:
    """Return the held-out loss of one fit, nats per cell, and the epochs that it took."""
    proteins = PROTEINS if name == "TOTALVI" else None
    data = pyrosc.from_anndata(train, labels_key=LABELS, protein_key=proteins)
    components = {"n_components": len(data.schema.labels)} if name == "GMVAE" else {}
    model = getattr(pyrosc, name).for_data(data, seed=fit_settings["seed"], **components)
    fit = pyrosc.fit_svi(model, data, progress=False, **fit_settings)
    return -float(pyrosc.elbo(fit, test)["elbo"].mean()), len(fit.history)


def rows_of(dataset: str, adata: ad.AnnData, options: argparse.Namespace) -> Iterator[dict]:
    for seed in options.seeds:
        train, test = common.split(adata, seed)
        test.obs[LABELS] = np.nan  # of cells held out nobody knows the label
        for name in options.models or DATASETS.get(dataset, WITHOUT_PROTEINS):
            for decay in DECAYS:
                told = {"seed": seed, "weight_decay": decay} | ({"epochs": 1} if options.smoke else {})
                loss, epochs = loss_of(train, test, name, told)
                row = {"dataset": dataset, "model": name, "seed": seed, "decay": decay}
                row |= {"loss": loss, "epochs": epochs}
                print(LINE.format(**row), flush=True)
                yield row


def table(rows: list[dict]) -> str:
    """Return the table of docs/models.md: what a decay adds to the loss, beside the model's own decay."""
    lines = [["data", "model", "its own", *(f"{decay:g}" for decay in DECAYS)], ["---"] * (3 + len(DECAYS))]
    for dataset, name in dict.fromkeys((row["dataset"], row["model"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["model"]) == (dataset, name)]
        means = [np.mean([row["loss"] for row in own if row["decay"] == decay]) for decay in DECAYS]
        differences = [f"{mean - means[0]:+.1f}" for mean in means[1:]]
        attribute = getattr(getattr(pyrosc, name), "weight_decay", 0.0)
        lines.append([dataset, f"`{name}`", f"{attribute:g}", f"{means[0]:.1f}", *differences])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--models", nargs="+", choices=pyrosc.models.__all__, help="default: all that can be")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cells", type=int, default=1500)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/weight_decay.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="toy counts, one epoch, two models")
    return parser.parse_args()


def main() -> None:
    options = parse()
    settings = {"cells": options.cells, "genes": options.genes, "decays": DECAYS}
    record = common.commit() | {"machine": common.machine(), "seeds": options.seeds, "settings": settings}
    record["versions"] = common.versions("pyrosc", "torch", "pyro-ppl", "numpy", "anndata", "scanpy")
    rows: list[dict] = []
    if options.smoke:
        options.models, options.seeds = options.models or ["VAE", "SCANVI"], options.seeds[:1]
        adata = common.toy()
        adata.obs[LABELS] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
        rows += rows_of("toy", adata, options)
    else:
        options.output = options.output or common.RESULTS / "weight_decay.json"
        for dataset in options.datasets:
            common.leave_without(options.data, dataset)
            adata = few(common.load(options.data, dataset), options.cells, options.genes)
            torch.set_num_threads(1)  # choosing genes resets it; on a busy machine one is many times faster
            rows += rows_of(dataset, adata, options)
    print(table(rows))
    if options.output:
        common.write_json(options.output, record | {"rows": rows})


if __name__ == "__main__":
    main()
