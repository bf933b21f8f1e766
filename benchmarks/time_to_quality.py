"""Seconds until held-out nats per cell are as good as what scvi-tools ends at.

Data, variable genes, split, score and peers are those of `heldout.py`: 2000 genes (seurat_v3), 75/25, the
importance-weighted -log p(x) with K = 25 draws, observed library, no batches; seconds from the AnnData in
memory to the fitted model, imports left out. Each fit, theirs and ours, is the first of a fresh process; what
our first fit imports late is in its seconds. `seconds_warm` are those of the same fit done again in that
process, `ratio_warm` goes by them.

Theirs: scvi-tools with its defaults, and with early stopping and a KL warm-up of 20 epochs. The quality to
reach is what that fit has at its end, on the same split.

Ours: a ladder of whole fits, each planned from the start to be so long (about 50, 100, 200, 400, 800 steps,
and the default), with the schedule of its own length, everything else a default. Our time is the seconds of
the shortest fit of the ladder that is at least as good as the peer's: one that a user could have asked for;
nothing is interpolated, and nothing is read off the middle of a longer fit. If none is, there is no time.
`of_default` is the same with the default fit alone, as good or not: `nats_above_peer` says which.

Contestants take turns, seed by seed; the ratio peer / ours is of one seed and split. Medians over seeds, all
rows kept. A seed that reaches no quality makes the median of its peer None.

    python benchmarks/time_to_quality.py --data DIR --peer-python PEER/bin/python
    python benchmarks/time_to_quality.py --data DIR --datasets pbmc3k --seeds 0 1 2 3 4
    python benchmarks/time_to_quality.py --smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import common
import heldout
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

DATASETS = ["pbmc3k", "pbmc_cite_10k5k"]
LADDER = [50, 100, 200, 400, 800]  # planned steps; the default comes last
MINIBATCH, VALIDATION = 128, 0.1  # fit_svi's defaults, from which the steps of an epoch follow
PEERS = {
    "scvi-defaults": heldout.PEERS["scvi-defaults"],
    "scvi-early-stopping": heldout.PEERS["scvi-short-warmup"],
}
TARGETS = {"scvi-defaults": 25.0, "scvi-early-stopping": 10.0}  # on pbmc3k
LINE = (
    "{dataset:16} {likelihood:4} seed {seed}  {contestant:20} {nats_per_cell:8.2f} nats/cell  "
    "{seconds:7.2f} s  {epochs} epochs"
)


def ladder(n_cells: int) -> dict[str, int | None]:
    """Name of each fit, and the epochs it is told; fits that would be as long as another are left out."""
    steps_per_epoch = -(-(n_cells - round(n_cells * VALIDATION)) // MINIBATCH)
    epochs = dict.fromkeys(max(1, round(steps / steps_per_epoch)) for steps in LADDER)
    return {f"pyrosc {n * steps_per_epoch} steps": n for n in epochs} | {"pyrosc default": None}


def run_ours(train: ad.AnnData, test: ad.AnnData, job: dict, in_process: bool) -> dict:
    """Fit and score in a fresh process, as the peers are, or in this one."""
    if in_process:
        result = heldout.run_ours(train, test, job)
        return result | {"seconds_warm": result["seconds"]}
    with tempfile.TemporaryDirectory() as folder:
        train.write_h5ad(f"{folder}/train.h5ad")
        test.write_h5ad(f"{folder}/test.h5ad")
        Path(folder, "job.json").write_text(json.dumps(job))
        subprocess.run([sys.executable, __file__, "--job", folder], check=True)
        return json.loads(Path(folder, "result.json").read_text())


def run_job(folder: Path) -> None:
    """Do what the fresh process is for."""
    train, test = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("train", "test"))
    job = json.loads((folder / "job.json").read_text())
    cold, warm = heldout.run_ours(train, test, job), heldout.run_ours(train, test, job)
    (folder / "result.json").write_text(json.dumps(cold | {"seconds_warm": warm["seconds"]}))


def run_seed(adata: ad.AnnData, name: str, seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """One row for every likelihood and contestant, all on the same split."""
    train, test = common.split(adata, seed)
    for likelihood in options.likelihood:
        jobs = {
            contestant: {"model": {}, "fit": {} if epochs is None else {"epochs": epochs}}
            for contestant, epochs in options.ladder(train.n_obs).items()
        }
        jobs |= PEERS if options.peer_python else {}
        for contestant, told in jobs.items():
            job = told | {"likelihood": likelihood, "seed": seed, "draws": options.draws}
            if contestant not in PEERS:
                result = run_ours(train, test, job, options.smoke)
            else:
                if options.smoke:
                    job["fit"] = job["fit"] | {"max_epochs": 2}
                result = heldout.run_peer(train, test, job, options.peer_python)
            row = {"dataset": name, "likelihood": likelihood, "seed": seed, "contestant": contestant} | result
            print(LINE.format(**row), flush=True)
            yield row


def against(rows: list[dict], peer: dict) -> dict:
    """How soon one peer's final quality was reached on its split, by which fit."""
    own = [row for row in rows if _key(row) == _key(peer) and row["contestant"] not in PEERS]
    own.sort(key=lambda row: row["epochs"])  # those it ran
    first = next((row for row in own if row["nats_per_cell"] <= peer["nats_per_cell"]), None)
    default = next(row for row in own if row["contestant"] == "pyrosc default")
    found = {"seed": peer["seed"], "peer_nats": peer["nats_per_cell"], "peer_seconds": peer["seconds"]}
    return found | {
        "reached_by": first and first["contestant"],
        "seconds": first and first["seconds"],
        "ratio": first and peer["seconds"] / first["seconds"],
        "ratio_warm": first and peer["seconds"] / first["seconds_warm"],
        "of_default": {
            "seconds": default["seconds"],
            "nats_above_peer": default["nats_per_cell"] - peer["nats_per_cell"],
            "ratio": peer["seconds"] / default["seconds"],
        },
    }


def _key(row: dict) -> tuple:
    return row["dataset"], row["likelihood"], row["seed"]


def summary(rows: list[dict]) -> list[dict]:
    """Medians over seeds for each data set, likelihood and peer, and whether the target is met."""
    peers = [row for row in rows if row["contestant"] in PEERS]
    found = []
    for dataset, likelihood, name in dict.fromkeys(
        (row["dataset"], row["likelihood"], row["contestant"]) for row in peers
    ):
        key = {"dataset": dataset, "likelihood": likelihood, "contestant": name}
        pairs = [against(rows, row) for row in peers if key.items() <= row.items()]
        ratios = [pair["ratio"] for pair in pairs]
        median = None if None in ratios else float(np.median(ratios))
        warm = None if median is None else float(np.median([pair["ratio_warm"] for pair in pairs]))
        verdict = {}
        if dataset == "pbmc3k":
            target = TARGETS[name]
            verdict = {"target": f">= {target}", "met": median is not None and median >= target}
        found.append(
            {"dataset": dataset, "likelihood": likelihood, "peer": name, "ratio": median, "ratio_warm": warm}
            | {"ratio_of_default": float(np.median([pair["of_default"]["ratio"] for pair in pairs]))}
            | verdict
            | {"pairs": pairs}
        )
        shown = "not reached" if median is None else f"{median:.1f} times sooner"
        by = ", ".join(str(pair["reached_by"]) for pair in pairs)
        print(f"{dataset:16} {likelihood:4} {name:20} {shown} (by {by}) {verdict}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    parser.add_argument("--likelihood", nargs="+", choices=["nb", "zinb"], default=["nb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--seeds-of-larger", nargs="+", type=int, default=[0], help="of all data sets but pbmc3k"
    )
    parser.add_argument("--draws", type=int, default=25, help="K, the importance samples per cell")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/time_to_quality.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="toy counts, one and two epochs, one seed")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def datasets(options: argparse.Namespace) -> Iterator[tuple[str, ad.AnnData, list[int]]]:
    """Yield the name, the counts and the seeds of each data set."""
    if options.smoke:
        yield "toy", common.toy(), options.seeds[:1]
        return
    for name in options.datasets:
        seeds = options.seeds if name == "pbmc3k" else options.seeds_of_larger
        yield name, common.with_variable_genes(common.load(options.data, name)), seeds


def main() -> None:
    options = parse()
    if options.job:
        run_job(options.job)
        return
    if not options.peer_python:
        print(f"left out, since there is no --peer-python: {', '.join(PEERS)}")
    options.ladder = ladder
    if options.smoke:
        options.ladder = lambda _: {"pyrosc one epoch": 1, "pyrosc default": 2}
    else:
        for name in options.datasets:
            common.leave_without(options.data, name)
        options.output = options.output or common.RESULTS / "time_to_quality.json"
    record = common.commit() | {"machine": common.machine()}
    rows: list[dict] = []
    shapes = {}
    for name, adata, seeds in datasets(options):
        shapes[name] = {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "seeds": seeds}
        for seed in seeds:
            rows += run_seed(adata, name, seed, options)
    versions = {"peer" if row["contestant"] in PEERS else "ours": row.pop("versions") for row in rows}
    settings = {
        "datasets": shapes,
        "library": "observed: the cell's sum over these genes",
        "draws": options.draws,
        "ladder_of_steps": LADDER,
        "peers": PEERS if options.peer_python else {},
    }
    found = {"settings": settings, "versions": versions, "summary": summary(rows), "rows": rows}
    if options.output:
        common.write_json(options.output, record | found)


if __name__ == "__main__":
    main()
