"""Train scVAE's GMVAE, score it on held-out cells. `founders.py` runs it in an interpreter of its own.

    python scvae_gmvae.py FOLDER

FOLDER holds train.npz, test.npz (counts, cells x genes) and job.json, and gets result.json. The job names the
seed, the number of draws, and the arguments of the model (`model`) and of its training (`fit`).

scVAE watches the held-out cells after each epoch, and the parameters of the best epoch are the ones measured.
Its ELBO is of log p(x), with the whole density of the raw counts, log x! and all. The validation ELBO that it
prints divides the sum over minibatches by n / minibatch, which counts a last short one as a whole one; here
all held-out cells are one minibatch, and the mean is over draws. Its graph takes no seed: the seed is that of
the order of the cells.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse
import scvae
import tensorflow as tf
from scvae.data import DataSet
from scvae.data.sparse import SparseRowMatrix
from scvae.models import GaussianMixtureVariationalAutoencoder


def data_set(folder, name):
    values = SparseRowMatrix(scipy.sparse.load_npz(str(folder / (name + ".npz"))))
    cells, genes = (np.arange(n).astype(str) for n in values.shape)
    return DataSet(
        name,
        title=name,
        specifications={"example type": "counts", "format": "npz"},
        values=values,
        example_names=cells,
        feature_names=genes,
    )


def elbo(model, cells, draws):
    """Return the mean ELBO of the cells under the best epoch's parameters, nats per cell."""
    x = cells.values.toarray()
    feed = {
        model.x: x,
        model.t: x,
        model.is_training: False,
        model.warm_up_weight: 1.0,
        model.n_iw_samples: 1,
        model.n_mc_samples: 1,
    }
    with tf.Session(graph=model.graph) as session:
        model.saver.restore(session, tf.train.latest_checkpoint(model.log_directory(best_model=True)))
        return float(np.mean([session.run(model.lower_bound, feed_dict=feed) for _ in range(draws)]))


def main(folder):
    job = json.loads((folder / "job.json").read_text())
    train, test = data_set(folder, "train"), data_set(folder, "test")
    np.random.seed(job["seed"])  # noqa: NPY002 (scVAE draws from it)
    with tempfile.TemporaryDirectory() as log:
        start = time.time()
        model = GaussianMixtureVariationalAutoencoder(
            train.number_of_features, log_directory=log, **job["model"]
        )
        model.train(train, validation_set=test, **job["fit"])
        seconds = time.time() - start
        found = {"elbo": elbo(model, test, job["draws"]), "seconds": seconds}
    versions = {"python": platform.python_version(), "scvae": scvae.__version__, "tensorflow": tf.__version__}
    (folder / "result.json").write_text(json.dumps(dict(found, versions=versions)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
