"""Seconds of a fit after numba has set torch's threads, and beside programs that use all cores.

A fit is `fit_svi(VAE.for_data(data))` of six epochs, else with its defaults, on the 2638 labelled cells of
pbmc3k and their 2000 most variable genes, or on simulated counts of that size where there is no pbmc3k.h5ad.
Each condition of a round is a process of its own, on two cores, and its first fit is not counted.

    qc      OMP_NUM_THREADS=1. Fits before `sc.pp.calculate_qc_metrics`, which sets torch's number of threads
            to that of the cores, and as many after it. Target: after / before is 1 within 10%.
    beside  OMP_NUM_THREADS=2. A fit alone, one beside two programs that loop for ever on these cores, and
            beside them one with torch.set_num_threads(1). Target: beside / alone is at most 4.

Ratios are of the times of one round; medians over rounds, all rounds kept. Where others use the machine,
`alone` is not alone, and the second ratio is too good.

    python benchmarks/threads.py --rounds 5
    python benchmarks/threads.py --smoke
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import common
import numpy as np
import scanpy as sc
import torch

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORES = 2
CONDITIONS = {"qc": "1", "beside": str(CORES)}  # and OMP_NUM_THREADS
TARGETS = {"qc": 1.1, "beside": 4.0}


def timed_fit(adata: ad.AnnData, options: argparse.Namespace) -> Callable[[], float]:
    """Fit once, which compiles and loads what a first fit does; return what fits again, and its seconds."""
    data = pyrosc.from_anndata(adata)
    model = pyrosc.VAE.for_data(data)

    def seconds() -> float:
        start = time.perf_counter()
        pyrosc.fit_svi(model, data, epochs=options.epochs, seed=options.seed, progress=False)
        return time.perf_counter() - start

    seconds()
    return seconds


def run_qc(adata: ad.AnnData, options: argparse.Namespace) -> dict:
    seconds = timed_fit(adata, options)
    before = [seconds() for _ in range(options.fits)]
    sc.pp.calculate_qc_metrics(adata.copy(), percent_top=[20], inplace=True)
    threads = torch.get_num_threads()
    after = [seconds() for _ in range(options.fits)]
    return {
        "before": before,
        "after": after,
        "ratio": float(np.median(after) / np.median(before)),
        "threads_set_by_qc": threads,
        "threads_after_a_fit": torch.get_num_threads(),
    }


def run_beside(adata: ad.AnnData, options: argparse.Namespace) -> dict:
    seconds = timed_fit(adata, options)
    alone = seconds()
    with busy_cores():
        beside = seconds()
        torch.set_num_threads(1)
        one_beside = seconds()
    return {"alone": alone, "beside": beside, "one_thread_beside": one_beside, "ratio": beside / alone}


@contextmanager
def busy_cores() -> Iterator[None]:
    """Let a program loop for ever on each core."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        time.sleep(1)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(path: Path, options: argparse.Namespace) -> Iterator[dict]:
    """Run the conditions in turn, each in a process of its own, on the cores that this one has."""
    for seed in range(options.rounds):
        for condition, threads in CONDITIONS.items():
            told = {"condition": condition, "seed": seed, "epochs": options.epochs, "fits": options.fits}
            flags = [f"--{name}={value}" for name, value in told.items()]
            done = subprocess.run(
                [sys.executable, __file__, f"--counts={path}", *flags],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )
            row = {"condition": condition, "seed": seed} | json.loads(done.stdout)
            print(
                f"{condition:7} seed {seed}  ratio {row['ratio']:.2f}  at most {TARGETS[condition]}",
                flush=True,
            )
            yield row


def counts(options: argparse.Namespace) -> tuple[str, ad.AnnData]:
    """Name and counts of what is fitted."""
    if options.smoke:
        return "toy", common.toy()
    if (options.data / "pbmc3k.h5ad").exists():
        return "pbmc3k", common.with_variable_genes(common.load(options.data, "pbmc3k"))
    return "simulated", pyrosc.datasets.simulate(2638, 2000, seed=0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fits", type=int, default=3, help="of `qc`, before and after")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, help="default: results/threads.json here; none for --smoke")
    parser.add_argument("--smoke", action="store_true", help="toy counts, one epoch, one round")
    for name, kind in {"counts": Path, "condition": str, "seed": int}.items():  # of a condition's process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.condition:
        run = {"qc": run_qc, "beside": run_beside}[options.condition]
        print(json.dumps(run(ad.read_h5ad(options.counts), options)))
        return
    if options.smoke:
        options.rounds = options.fits = options.epochs = 1
    else:
        options.output = options.output or common.RESULTS / "threads.json"
    record = common.commit() | {
        "versions": common.versions("pyrosc", "torch", "pyro-ppl", "numba", "scanpy", "numpy"),
        "machine": common.machine(),
        "seeds": list(range(options.rounds)),
    }
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        name, adata = counts(options)
        adata.write_h5ad(path := Path(folder) / "counts.h5ad")
        rows = list(measure(path, options))
    ratios = {
        condition: float(np.median([row["ratio"] for row in rows if row["condition"] == condition]))
        for condition in CONDITIONS
    }
    for condition, ratio in ratios.items():
        print(f"{condition:7} median  {ratio:.2f}, target at most {TARGETS[condition]}")
    if options.output:
        settings = {"data": name, "epochs": options.epochs, "fits": options.fits, "cores": CORES}
        found = {"settings": settings, "targets": TARGETS, "median_ratios": ratios, "rows": rows}
        common.write_json(options.output, record | found)


if __name__ == "__main__":
    main()
