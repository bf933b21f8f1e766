"""Put questions to scvi-tools' SCVI. `queries.py` runs it in an interpreter of its own, afresh for each job.

    python scvi_queries.py FOLDER

FOLDER holds data.h5ad and job.json, and gets result.json. The job `fit` makes FOLDER/scvi; each other one
loads it, asks for the latent means of 64 cells (which loads what a first question loads), and then puts the
job's question to all cells. The answer holds seconds and the growth of peak memory.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scvi
import torch
from peak import peak_memory, quiet_stdout

if TYPE_CHECKING:
    from collections.abc import Callable


def fit(folder: Path, adata: ad.AnnData, job: dict) -> dict:
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_latent=job["n_latent"], gene_likelihood="nb")
    model.train(max_epochs=job["epochs"], accelerator="cpu", enable_progress_bar=False, logger=False)
    model.save(folder / "scvi", overwrite=True)
    return {}


def questions(model: scvi.model.SCVI, job: dict) -> dict[str, Callable[[], object]]:
    return {
        "latent": model.get_latent_representation,
        "impute": lambda: model.get_normalized_expression(n_samples=job["n_draws"], return_numpy=True),
        "impute-1-draw": lambda: model.get_normalized_expression(n_samples=1, return_numpy=True),
        "de-vanilla": lambda: model.differential_expression(groupby=job["groupby"], silent=True),
        "de-change": lambda: model.differential_expression(
            groupby=job["groupby"], mode="change", silent=True
        ),
    }


def ask(folder: Path, adata: ad.AnnData, job: dict) -> dict:
    model = scvi.model.SCVI.load(folder / "scvi", adata, accelerator="cpu")
    question = questions(model, job)[job["question"]]
    model.get_latent_representation(indices=np.arange(min(64, adata.n_obs)))
    with peak_memory() as peak:
        start = time.perf_counter()
        answer = question()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak["bytes"], "shape": list(answer.shape)}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    quiet_stdout()
    job = json.loads((folder / "job.json").read_text())
    adata = ad.read_h5ad(folder / "data.h5ad")
    result = (fit if job["question"] == "fit" else ask)(folder, adata, job)
    result["versions"] = {name: metadata.version(name) for name in ("scvi-tools", "torch", "numpy")} | {
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
