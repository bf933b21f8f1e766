"""Training on CUDA: cells a second with and without a CUDA graph, share of memory bandwidth, a million cells.

- steps: `fit_svi(VAE)`, NB and ZINB, 2000 genes, minibatches of 128 and 4096, in steady state: the median
  over epochs after the first, the step as a CUDA graph and the programs run in every step, in turns.
- bandwidth: the bytes that a step cannot but move (the counts once; logits, shares and slopes once each way;
  weights, gradients, Adam's moments) over its time, as a share of what copying a large tensor reaches here.
- million: seconds of a default fit of 1,000,000 cells x 720 genes, from the AnnData in memory.

It runs on whichever GPU is there and says which; without one it says so and ends.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --smoke
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import anndata as ad
import common
import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

import pyrosc
from pyrosc.inference import step as training

TARGETS = {128: 500_000, 4096: 2_000_000}


def counts(n_cells: int, n_genes: int, density: float = 0.1, seed: int = 0) -> ad.AnnData:
    """Gamma-Poisson counts of eight kinds of cell; blocks of 10,000 cells repeat, which no fit can tell."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(n_genes, 0.3), size=8)[rng.integers(8, size=min(n_cells, 10_000))]
    rate = share * rng.gamma(2, 0.5, size=share.shape)
    total = 1.0
    while (1 - np.exp(-total * rate[:500])).mean() < density:
        total *= 1.05
    block = csr_matrix(rng.poisson(total * rate).astype(np.float32))
    block = block[np.diff(block.indptr) > 0]
    x = vstack([block] * -(-n_cells // block.shape[0]), format="csr")[:n_cells]
    return ad.AnnData(x)


def step_seconds(data: pyrosc.Counts, likelihood: str, minibatch: int, n_steps: int, *, graph: bool) -> float:
    """Seconds of a step: the median over the epochs after the first two."""
    kept = training._RECORD_AFTER
    training._RECORD_AFTER = kept if graph else 10**9
    steps = -(-data.n_cells // minibatch)
    epochs = 2 + max(3, -(-n_steps // steps), -(-(training._RECORD_FOR + kept) // steps))
    settings = {"minibatch_size": minibatch, "validation": 0.0, "epochs": epochs, "device": "cuda"}
    try:
        model = pyrosc.VAE.for_data(data, likelihood=likelihood)
        fit = pyrosc.fit_svi(model, data, progress=False, **settings)
    finally:
        training._RECORD_AFTER = kept
    return float(np.median(np.diff(fit.history["seconds"])[1:])) / steps


def copied_bytes_per_second() -> float:
    """Measure what copying 1 GiB reaches, counting what is read and what is written."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * 2**28 / float(np.median(seconds))


def needed_bytes(data: pyrosc.Counts, likelihood: str, minibatch: int) -> int:
    """Bytes that a step cannot but move."""
    heads = 2 if likelihood.startswith("zi") else 1
    n_weights = sum(p.numel() for p in pyrosc.VAE.for_data(data, likelihood=likelihood).parameters())
    return 4 * (minibatch * data.n_genes * (1 + 4 * heads) + 7 * n_weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; none for --smoke")
    parser.add_argument("--smoke", action="store_true", help="few cells and genes, few steps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    n_cells, n_genes, n_steps = (2000, 100, 20) if options.smoke else (100_000, 2000, 300)
    data = pyrosc.from_anndata(counts(n_cells, n_genes))
    bandwidth = copied_bytes_per_second()
    rows = []
    for likelihood, minibatch in itertools.product(("nb", "zinb"), (128,) if options.smoke else TARGETS):
        for pair, graph in itertools.product(range(options.pairs), (True, False)):
            seconds = step_seconds(data, likelihood, minibatch, n_steps, graph=graph)
            row = {"likelihood": likelihood, "minibatch": minibatch, "graph": graph, "pair": pair}
            row |= {"ms_per_step": 1e3 * seconds, "cells_per_s": minibatch / seconds}
            row["bandwidth_share"] = needed_bytes(data, likelihood, minibatch) / seconds / bandwidth
            print(row, flush=True)
            rows.append(row)
    adata = counts(*((5000, 100) if options.smoke else (1_000_000, 720)))
    start = time.perf_counter()
    million = pyrosc.from_anndata(adata)
    fit = pyrosc.fit_svi(pyrosc.VAE.for_data(million), million, device="cuda", progress=False)
    seconds = time.perf_counter() - start
    print(f"{adata.n_obs} cells x {adata.n_vars} genes: {seconds:.1f} s, {len(fit.history)} epochs")
    output = options.output or (None if options.smoke else common.RESULTS / "gpu.json")
    if output:
        record = common.commit() | {"machine": common.machine(), "seeds": [0], "targets": TARGETS}
        record["versions"] = common.versions("pyrosc", "torch", "pyro-ppl", "numpy")
        record |= {"bytes_per_s_of_a_copy": bandwidth, "rows": rows}
        record["million"] = {"seconds": seconds, "cells": adata.n_obs, "genes": adata.n_vars}
        common.write_json(output, record)


if __name__ == "__main__":
    main()
