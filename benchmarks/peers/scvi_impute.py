"""Fit scvi-tools' SCVI and impute. `imputation.py` runs it in an interpreter of its own.

    python scvi_impute.py FOLDER

FOLDER holds train.npz (counts, cells x genes) and job.json, and gets result.json and answer.npz: `mean`, the
mean of so many draws (`n_samples`) of `get_normalized_expression`, times the cell's total. The job names the
seed, the likelihood and the arguments of `SCVI.train` (`fit`); all else is SCVI's default.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse
import scvi
import torch


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    adata = ad.AnnData(scipy.sparse.csr_matrix(scipy.sparse.load_npz(folder / "train.npz")))
    scvi.settings.seed = job["seed"]
    start = time.perf_counter()
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood=job["likelihood"])
    model.train(enable_progress_bar=False, logger=False, **job["fit"])
    seconds = time.perf_counter() - start
    share = model.get_normalized_expression(n_samples=job["n_samples"], return_mean=True, return_numpy=True)
    np.savez(folder / "answer.npz", mean=np.asarray(adata.X.sum(1)) * share)
    versions = {name: metadata.version(name) for name in ("scvi-tools", "torch", "numpy")}
    versions |= {"python": platform.python_version(), "torch_threads": torch.get_num_threads()}
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
