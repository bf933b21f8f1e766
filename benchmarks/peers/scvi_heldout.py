"""Fit scvi-tools' SCVI and score it on held-out cells. `heldout.py` runs it in an interpreter of its own.

    python scvi_heldout.py FOLDER

FOLDER holds train.h5ad, test.h5ad and job.json, and gets result.json. The job names the likelihood, the seed,
the number of draws, and the arguments of `SCVI` (`model`) and of `SCVI.train` (`fit`). The score is the
importance-weighted log p(x) of each cell given its library, computed here from the module's own encoder and
decoder in eval mode, and checked cell by cell, on the same draws, against scvi-tools' `get_marginal_ll`. That
function's own mean weighs every minibatch alike, the short last one too; hence its values per cell are asked
for and the mean is taken here.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import anndata as ad
import numpy as np
import scvi
import torch


def fit(train: ad.AnnData, job: dict) -> tuple[scvi.model.SCVI, float]:
    """Fit the model, and count the seconds from the AnnData to it."""
    scvi.settings.seed = job["seed"]
    start = time.perf_counter()
    scvi.model.SCVI.setup_anndata(train)
    model = scvi.model.SCVI(train, gene_likelihood=job["likelihood"], **job["model"])
    model.train(enable_progress_bar=False, **job["fit"])
    return model, time.perf_counter() - start


@torch.inference_mode()
def log_weights(model: scvi.model.SCVI, test: ad.AnnData, draws: int, minibatch_size: int) -> torch.Tensor:
    """Draws x cells: log p(x | z, l) + log p(z) - log q(z | x) for z ~ q(z | x)."""
    module = model.module.eval()
    minibatches = []
    for tensors in model._make_data_loader(model._validate_anndata(test), batch_size=minibatch_size):
        inferred = module.inference(**module._get_inference_input(tensors), n_samples=draws)
        generated = module.generative(**module._get_generative_input(tensors, inferred))
        z, x = inferred["z"], tensors["X"].to(module.device)
        log_joint = generated["px"].log_prob(x).sum(-1) + generated["pz"].log_prob(z).sum(-1)
        log_weight = log_joint - inferred["qz"].log_prob(z).sum(-1)
        minibatches.append(log_weight.reshape(draws, -1).cpu().double())
    return torch.cat(minibatches, dim=1)


def score(model: scvi.model.SCVI, test: ad.AnnData, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (nats) and effective sample size of each cell."""
    minibatch_size = max(1, 3200 // draws)
    torch.manual_seed(seed)
    weights = log_weights(model, test, draws, minibatch_size)
    nats = weights.logsumexp(0) - math.log(draws)
    ess = (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()

    torch.manual_seed(seed)
    theirs = model.get_marginal_ll(
        test, n_mc_samples=draws, n_mc_samples_per_pass=draws, batch_size=minibatch_size, return_mean=False
    )
    torch.testing.assert_close(theirs.cpu().double(), nats, rtol=1e-4, atol=1e-2)
    return nats.numpy(), ess.numpy()


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    model, seconds = fit(ad.read_h5ad(folder / "train.h5ad"), job)
    nats, ess = score(model, ad.read_h5ad(folder / "test.h5ad"), job["draws"], job["seed"])
    versions = {name: metadata.version(name) for name in ("scvi-tools", "torch", "scanpy", "numpy")}
    result = {
        "nats_per_cell": -float(nats.mean()),
        "seconds": seconds,
        "ess_median": float(np.median(ess)),
        "epochs": len(model.history["elbo_train"]),
        "versions": versions
        | {"python": platform.python_version(), "torch_threads": torch.get_num_threads()},
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
