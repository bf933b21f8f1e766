"""Pseudobulk differential expression by pydeseq2. `differential.py` runs it in its own interpreter.

    python deseq2_de.py FOLDER

FOLDER holds cells.h5ad (counts in X; obs["side"], "0" or "1", and obs["donor"] or obs["batch"]). Counts are
summed over the cells of each donor on each side; the design is the side, and the donor too where donors have
both. Without donors each cell is a sample, the design batch and side, and size factors are of positive
counts. job.json says `beyond` which log2 fold change a gene is to be, 0 for any. It gets answer.csv: for
each gene lfc_mean (log2), stat and padj.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from pydeseq2.dds import DeseqDataSet
from pydeseq2.ds import DeseqStats
from scipy import sparse


def of_cells(adata: ad.AnnData) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return counts, what is known of the samples, and the design, where each cell is a sample."""
    counts = pd.DataFrame(adata.X.toarray().astype(int), adata.obs_names, adata.var_names)
    return counts, "s" + adata.obs[["side", "batch"]].astype(str), "~batch + side"


def of_donors(adata: ad.AnnData) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return the same of sums over each donor's cells on each side."""
    units = adata.obs[["donor", "side"]].astype(str)
    code, rows = pd.factorize(pd.MultiIndex.from_frame(units))
    member = sparse.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))
    counts = pd.DataFrame((member @ adata.X).toarray().astype(int), columns=adata.var_names)
    about = pd.DataFrame(list(rows), columns=["donor", "side"])
    about["donor"] = "d" + about.donor
    about["side"] = "s" + about.side
    counts.index = about.index = [f"u{i}" for i in range(len(about))]
    paired = about.groupby("donor").side.nunique().eq(2)
    if paired.sum() > 1:
        both = about.donor.isin(paired.index[paired])
        counts, about = counts[both], about[both]
    return counts, about, "~donor + side" if paired.sum() > 1 else "~side"


def main(folder: Path) -> None:
    adata = ad.read_h5ad(folder / "cells.h5ad")
    donors = "donor" in adata.obs
    counts, about, design = of_donors(adata) if donors else of_cells(adata)
    size = {} if donors else {"size_factors_fit_type": "poscounts"}
    data = DeseqDataSet(counts=counts, metadata=about, design=design, quiet=True, **size)
    data.deseq2()
    beyond = json.loads((folder / "job.json").read_text())["beyond"]
    told = {"lfc_null": beyond, "alt_hypothesis": "greaterAbs"} if beyond else {}
    found = DeseqStats(data, contrast=["side", "s1", "s0"], quiet=True, **told)
    found.summary()
    table = found.results_df
    table.rename(columns={"log2FoldChange": "lfc_mean"})[["lfc_mean", "stat", "padj"]].to_csv(
        folder / "answer.csv"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
