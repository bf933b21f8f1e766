"""Fit scvi-tools' SCVI and write its latent means. `founders.py` runs it in an interpreter of its own.

    python scvi_latent.py FOLDER

FOLDER holds train.npz (counts, cells x genes) and job.json, and gets result.json and answer.npz. The job
names the seed and the arguments of `SCVI.train` (`fit`); all else is SCVI's default.
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
    model = scvi.model.SCVI(adata)
    model.train(enable_progress_bar=False, logger=False, **job["fit"])
    seconds = time.perf_counter() - start
    np.savez(folder / "answer.npz", z=model.get_latent_representation())
    versions = {name: metadata.version(name) for name in ("scvi-tools", "torch", "numpy")}
    versions |= {"python": platform.python_version(), "torch_threads": torch.get_num_threads()}
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
