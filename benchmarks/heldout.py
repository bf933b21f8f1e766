"""Held-out likelihood of PBMC 3k: pyrosc's VAE against scvi-tools' SCVI.

The 2638 labelled cells and their 2000 most variable genes (seurat_v3, chosen on all of these cells) are split
75/25 at random. A model is fitted to the training cells and scored on the others by the importance-weighted

    -log p(x) = -log mean_k [ p(x | z_k, l) p(z_k) / q(z_k | x) ],    z_k ~ q(z | x),  k = 1 ... K,

in nats per cell, a mean over the held-out cells: lower is better. The library size l is observed, not
modelled: it is the sum of the cell's counts over the 2000 genes, for every contestant. The seconds run from
the AnnData in memory to the fitted model, imports left out. Seed s draws the split and seeds the fit.

All contestants take turns in one run, seed by seed, with nothing running beside them. scvi-tools runs in an
interpreter of its own, which has it installed:

    python benchmarks/heldout.py --data DIR --peer-python PEER/bin/python
    python benchmarks/heldout.py --smoke
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad

DATASET = "pbmc3k"
PEER_SCRIPT = Path(__file__).parent / "peers" / "scvi_heldout.py"

# What each contestant is told beyond the likelihood and the seed; all else is its default.
OURS = {"pyrosc": {"model": {}, "fit": {}}}
SHORT = {"early_stopping": True, "plan_kwargs": {"n_epochs_kl_warmup": 20}}
PEERS = {
    "scvi-defaults": {"model": {}, "fit": {}},
    "scvi-early-stopping": {"model": {}, "fit": {"early_stopping": True}},
    "scvi-short-warmup": {"model": {}, "fit": SHORT},
    "scvi-2layers-30latents-short-warmup": {"model": {"n_layers": 2, "n_latent": 30}, "fit": SHORT},
}
CONTESTANTS = OURS | PEERS

LINE = (
    "{contestant:36} seed {seed}  {likelihood:4} {nats_per_cell:8.2f} nats/cell  {seconds:6.1f} s  "
    "{epochs} epochs  ESS {ess_median:.1f}"
)


def run_ours(train: ad.AnnData, test: ad.AnnData, job: dict) -> dict:
    start = time.perf_counter()
    data = pyrosc.from_anndata(train)
    model = pyrosc.VAE.for_data(data, likelihood=job["likelihood"], **job["model"])
    fit = pyrosc.fit_svi(model, data, seed=job["seed"], progress=False, **job["fit"])
    seconds = time.perf_counter() - start
    score = pyrosc.log_likelihood(fit, test, n_draws=job["draws"])
    return {
        "nats_per_cell": -float(np.mean(score.nats)),
        "seconds": seconds,
        "ess_median": float(np.median(score.ess)),
        "epochs": len(fit.history),
        "versions": common.versions("pyrosc", "torch", "pyro-ppl", "scanpy", "numpy"),
    }


def run_peer(train: ad.AnnData, test: ad.AnnData, job: dict, python: Path) -> dict:
    """Fit and score scvi-tools in its own interpreter: cells and job go in as files, a result comes back."""
    with tempfile.TemporaryDirectory() as folder:
        train.write_h5ad(f"{folder}/train.h5ad")
        test.write_h5ad(f"{folder}/test.h5ad")
        Path(folder, "job.json").write_text(json.dumps(job))
        subprocess.run([python, PEER_SCRIPT, folder], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "result.json").read_text())


def run_seed(adata: ad.AnnData, seed: int, contestants: dict, options: argparse.Namespace) -> Iterator[dict]:
    """One row for every likelihood and contestant, all on the same split."""
    train, test = common.split(adata, seed)
    for likelihood, (name, told) in itertools.product(options.likelihood, contestants.items()):
        job = told | {"likelihood": likelihood, "seed": seed, "draws": options.draws}
        result = (
            run_ours(train, test, job) if name in OURS else run_peer(train, test, job, options.peer_python)
        )
        row = {"contestant": name, "seed": seed, "likelihood": likelihood} | result
        print(LINE.format(**row), flush=True)
        yield row


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds, and the difference to pyrosc on the same split (above 0: worse than pyrosc)."""
    groups = list(dict.fromkeys((row["likelihood"], row["contestant"]) for row in rows))
    return [{"likelihood": key[0], "contestant": key[1]} | _means(rows, *key) for key in groups]


def _means(rows: list[dict], likelihood: str, contestant: str) -> dict:
    nats = {(r["contestant"], r["seed"]): r["nats_per_cell"] for r in rows if r["likelihood"] == likelihood}
    own = [r for r in rows if (r["likelihood"], r["contestant"]) == (likelihood, contestant)]
    pairs = [(r["nats_per_cell"], nats["pyrosc", r["seed"]]) for r in own if ("pyrosc", r["seed"]) in nats]
    above = [theirs - ours for theirs, ours in pairs]
    return {
        "nats_per_cell": float(np.mean([r["nats_per_cell"] for r in own])),
        "seconds": float(np.mean([r["seconds"] for r in own])),
        "nats_above_pyrosc": float(np.mean(above)) if above else None,
        "nats_above_pyrosc_sd": float(np.std(above, ddof=1)) if len(above) > 1 else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help=f"folder of {DATASET}.h5ad")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--likelihood", nargs="+", choices=["nb", "zinb"], default=["nb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=25, help="K, the importance samples per cell")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/heldout.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="toy counts, two epochs, one seed")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> dict:
    """Pick the contestants that can run here, and what each is told."""
    names = [name for name in options.contestants if name in OURS or options.peer_python]
    if left_out := [name for name in options.contestants if name not in names]:
        print(f"left out, since there is no --peer-python: {', '.join(left_out)}")
    contestants = {name: CONTESTANTS[name] for name in names}
    if options.smoke:
        for name, told in contestants.items():
            short = {"epochs" if name in OURS else "max_epochs": 2}
            contestants[name] = told | {"fit": told["fit"] | short}
    return contestants


def main() -> None:
    options = parse()
    contestants = chosen(options)
    if options.smoke:
        adata, options.seeds = common.toy(), options.seeds[:1]
    else:
        common.leave_without(options.data, DATASET)
        adata = common.with_variable_genes(common.load(options.data, DATASET))
        options.output = options.output or common.RESULTS / "heldout.json"
    settings = {
        "dataset": "toy" if options.smoke else DATASET,
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "library": "observed: the cell's sum over these genes",
        "draws": options.draws,
        "contestants": contestants,
    }
    record = common.commit() | {"machine": common.machine(), "seeds": options.seeds, "settings": settings}
    rows = [row for seed in options.seeds for row in run_seed(adata, seed, contestants, options)]
    versions = {"ours" if row["contestant"] in OURS else "peer": row.pop("versions") for row in rows}
    if options.output:
        common.write_json(
            options.output, record | {"versions": versions, "rows": rows, "summary": summary(rows)}
        )


if __name__ == "__main__":
    main()
