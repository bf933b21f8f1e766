"""Train scVAE's GMVAE, score it on held-out cells. `founders.py` runs it in an interpreter of its own.

    python scvae_gmvae.py FOLDER

FOLDER holds train.npz, test.npz (counts, cells x genes) and job.json, and gets result.json. The job names the
seed, the number of draws, and the arguments of the model (`model`) and of its training (`fit`).

As in our fits, a tenth of the training cells is kept to watch the ELBO after each epoch, and the parameters
of the best epoch are the ones measured: no held-out cell has a part in the choice.
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


def data_set(name, counts):
    values = SparseRowMatrix(counts)
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
    train, test = (scipy.sparse.load_npz(str(folder / (name + ".npz"))) for name in ("train", "test"))
    np.random.seed(job["seed"])  # noqa: NPY002 (scVAE draws from it)
    order = np.random.permutation(train.shape[0])  # noqa: NPY002
    watched, fitted = np.split(order, [round(0.1 * len(order))])
    parts = {"fitted": train[fitted], "watched": train[watched], "test": test}
    parts = {name: data_set(name, counts) for name, counts in parts.items()}
    with tempfile.TemporaryDirectory() as log:
        start = time.time()
        model = GaussianMixtureVariationalAutoencoder(test.shape[1], log_directory=log, **job["model"])
        model.train(parts["fitted"], validation_set=parts["watched"], **job["fit"])
        seconds = time.time() - start
        found = {"elbo": elbo(model, parts["test"], job["draws"]), "seconds": seconds}
    versions = {"python": platform.python_version(), "scvae": scvae.__version__, "tensorflow": tf.__version__}
    (folder / "result.json").write_text(json.dumps(dict(found, versions=versions)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
