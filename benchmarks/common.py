"""What the benchmarks share: data sets, variable genes, splits, and the record of versions and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from scipy.sparse import csr_matrix

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"


def load(data: Path, name: str) -> ad.AnnData:
    """Raw counts of the data set `name`; of pbmc3k only the 2638 cells with a published label."""
    adata = ad.read_h5ad(data / f"{name}.h5ad")
    if name == "pbmc3k":
        adata = adata[adata.obs["labelled"].to_numpy(dtype=bool)]
    return adata.copy()


def with_variable_genes(adata: ad.AnnData, n_genes: int = 2000, batch_key: str | None = None) -> ad.AnnData:
    """Keep the `n_genes` most variable genes (seurat_v3 on raw counts), and the cells that have any."""
    genes = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=n_genes, batch_key=batch_key, inplace=False
    )
    adata = adata[:, genes["highly_variable"].to_numpy()]
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def split(adata: ad.AnnData, seed: int, held_out: float = 0.25) -> tuple[ad.AnnData, ad.AnnData]:
    """Training and held-out cells, drawn at random."""
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    n_test = round(held_out * adata.n_obs)
    return adata[np.sort(order[n_test:])].copy(), adata[np.sort(order[:n_test])].copy()


def toy(n_cells: int = 200, n_genes: int = 50, seed: int = 0) -> ad.AnnData:
    """Gamma-Poisson counts of two kinds of cell, for `--smoke`: needs no file."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(n_genes, 0.5), size=2)[rng.integers(2, size=n_cells)]
    counts = rng.poisson(300 * share * rng.gamma(2, 0.5, size=share.shape)).astype(np.float32)
    adata = ad.AnnData(csr_matrix(counts[counts.sum(1) > 0]))
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    return adata


def commit() -> dict[str, str | bool | None]:
    """Name the commit that is checked out, and say whether the tree differs from it."""
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions(*packages: str) -> dict[str, str | None]:
    """Python's version and those of the named distributions; None for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """Processor, memory, accelerator, and how busy the machine is: nothing that names it."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_json(path: Path, record: dict) -> None:
    """Write `record` as JSON, making the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def leave_without(data: Path, name: str) -> None:
    """End the run, with success, if the file of data set `name` isn't there."""
    if not (data / f"{name}.h5ad").exists():
        print(f"no {name}.h5ad: name the folder that holds it with --data DIR, or try --smoke")
        sys.exit(0)
