"""Time scvi-tools' steps. `speed.py` runs it in an interpreter of its own, which stays for all jobs.

    python scvi_speed.py

Reads a job from each line of stdin, waits there between jobs, and answers each with a line on stdout. A job
names a file of counts, how many of its cells to take, likelihood, minibatch, epochs, seed and threads. The
answer holds the seconds of each epoch but the first and the number of steps in one. `SCVI` has the job's
architecture and its own defaults else (observed library); it is trained on all cells, without validation,
early stopping, progress bar, logger and checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import warnings
from functools import lru_cache
from importlib import metadata

import anndata as ad
import lightning.pytorch as pl
import scvi
import torch
from peak import quiet_stdout


class Clock(pl.Callback):
    """The time at the end of each epoch, and the steps in one."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.steps = 0

    def on_train_batch_end(self, *_: object) -> None:
        """Count the step."""
        self.steps += 1

    def on_train_epoch_end(self, *_: object) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


@lru_cache(maxsize=1)
def counts(path: str) -> ad.AnnData:
    return ad.read_h5ad(path)


@lru_cache(maxsize=1)
def registered(path: str, n_cells: int) -> ad.AnnData:
    adata = counts(path)[:n_cells].copy()
    scvi.model.SCVI.setup_anndata(adata)
    return adata


def run(job: dict) -> dict:
    scvi.settings.seed = job["seed"]
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    adata, clock = registered(job["path"], job["n_cells"]), Clock()
    model = scvi.model.SCVI(adata, gene_likelihood=job["likelihood"], dispersion="gene", **job["model"])
    model.train(
        max_epochs=job["epochs"],
        accelerator="cpu",
        train_size=1.0,
        validation_size=0.0,
        batch_size=job["minibatch"],
        early_stopping=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[clock],
    )
    return {
        "steps_per_epoch": clock.steps // len(clock.ends),
        "seconds": [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)],
        "versions": {name: metadata.version(name) for name in ("scvi-tools", "torch", "lightning", "numpy")}
        | {"python": platform.python_version(), "torch_threads": torch.get_num_threads()},
    }


def main() -> None:
    warnings.simplefilter("ignore")
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with os.fdopen(quiet_stdout(), "w") as out:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
