"""Fit scvi-tools' SCVI and ask its differential expression. `differential.py` runs it in its own interpreter.

    python scvi_de.py FOLDER

FOLDER holds cells.h5ad (counts in X; obs["side"], "0" or "1", and perhaps obs["batch"]) and job.json: the
seed, the arguments of `SCVI.train` (`fit`), and delta. It gets answer.csv: for each gene lfc_mean,
proba_not_de, and expected_fdr, the smallest nominal rate at which it is called.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import scvi


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    adata = ad.read_h5ad(folder / "cells.h5ad")
    scvi.settings.seed = job["seed"]
    batches = "batch" in adata.obs
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch" if batches else None)
    model = scvi.model.SCVI(adata)
    model.train(enable_progress_bar=False, logger=False, **job["fit"])
    table = model.differential_expression(
        groupby="side",
        group1="1",
        group2="0",
        mode="change",
        delta=job["delta"],
        batch_correction=batches,
    )
    table = table.sort_values("proba_not_de")
    table["expected_fdr"] = table.proba_not_de.cumsum() / np.arange(1, len(table) + 1)
    table[["lfc_mean", "proba_not_de", "expected_fdr"]].to_csv(folder / "answer.csv")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
