"""Smooth with MAGIC. `imputation.py` runs it in an interpreter of its own.

    python magic_impute.py FOLDER

FOLDER holds train.npz (counts, cells x genes) and job.json, and gets result.json and answer.npz: `mean`, what
MAGIC makes of the square roots of the cells' shares, squared and times the totals; or, if the job's `reverse`
says so, of the shares of the square roots, times the totals of these and squared ("reverse normalisation",
as the Open Problems benchmark has it). All settings are MAGIC's defaults.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import magic
import numpy as np
import scipy.sparse


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    x = scipy.sparse.load_npz(folder / "train.npz").toarray().astype(np.float64)
    start = time.perf_counter()
    rooted = np.sqrt(x) if job["reverse"] else x
    size = rooted.sum(1, keepdims=True)
    share = rooted / size if job["reverse"] else np.sqrt(x / size)
    smooth = magic.MAGIC(random_state=job["seed"], n_jobs=1, verbose=0).fit_transform(
        share, genes="all_genes"
    )
    mean = (smooth * size) ** 2 if job["reverse"] else smooth**2 * size
    seconds = time.perf_counter() - start
    np.savez(folder / "answer.npz", mean=mean.astype(np.float32))
    versions = {name: metadata.version(name) for name in ("magic-impute", "scprep", "numpy")}
    versions |= {"python": platform.python_version()}
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
