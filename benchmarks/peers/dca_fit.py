"""Fit DCA and predict held-out cells. `founders.py` runs it in an interpreter of its own.

    python dca_fit.py FOLDER

FOLDER holds train.npz, test.npz (counts, cells x genes) and job.json, and gets result.json and answer.npz:
mean, theta and (of a ZINB) pi of each held-out cell and gene. The job names the seed and the arguments of
`dca` (`fit`).

Held-out cells are transformed as `dca.io.normalize` does the training cells, with the training cells'
numbers: divided by the size factor, total / median total, then log(1 + x), then standardised gene by gene.
"""

import json
import platform
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pkg_resources
import scipy.sparse
from dca.api import dca


def load(folder, name):
    return ad.AnnData(scipy.sparse.load_npz(str(folder / (name + ".npz"))).toarray().astype(np.float32))


def predict(network, train, counts):
    """Predict held-out counts; `train` is what `dca` left: standardised, its totals in `obs`."""
    size = counts.sum(1) / np.median(train.obs["n_counts"])
    x = (np.log1p(counts / size[:, None]) - train.var["mean"].values) / train.var["std"].values
    found = {"mean": network.model.predict({"count": x, "size_factors": size})}
    for ours, theirs in {"theta": "dispersion", "pi": "pi"}.items():
        if theirs in network.extra_models:
            found[ours] = network.extra_models[theirs].predict(x)
    return found


def main(folder):
    job = json.loads((folder / "job.json").read_text())
    train, test = load(folder, "train"), load(folder, "test")
    start = time.time()
    network = dca(train, return_model=True, random_state=job["seed"], **job["fit"])
    seconds = time.time() - start
    np.savez(str(folder / "answer.npz"), **predict(network, train, test.X))
    versions = {
        name: pkg_resources.get_distribution(name).version for name in ("dca", "tensorflow", "scanpy")
    }
    versions["python"] = platform.python_version()
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
