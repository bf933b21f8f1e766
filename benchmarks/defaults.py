"""Which settings should be the defaults: held-out likelihood of variants of the VAE on four data sets.

Each variant differs from the defaults of `VAE.for_data` and `fit_svi` in what its name says. It is fitted to
the same 75% of the cells (2000 genes, seurat_v3) and scored on the others: importance-weighted -log p(x),
K = 25, in nats per cell, lower is better. `nats_above_default` is the paired difference on the same split.
The seconds are of the fit alone. All variants of a data set take turns in one run.

    python benchmarks/defaults.py --data DIR
    python benchmarks/defaults.py --smoke
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np
import torch

import pyrosc

if TYPE_CHECKING:
    import anndata as ad

DATASETS = {
    "pbmc3k": None,
    "paul15": None,
    "kang_ifnb": None,
    "pbmc_cite_10k5k": "batch",
}  # and their batch_key

VARIANTS: dict[str, dict[str, dict]] = {
    "default": {},
    "10 latents": {"model": {"n_latent": 10}},
    "20 latents": {"model": {"n_latent": 20}},
    "width 256": {"model": {"hidden": (256,)}},
    "two layers": {"model": {"hidden": (128, 128)}},
    "layer norm": {"model": {"norm": "layer"}},
    "no norm": {"model": {"norm": None}},
    "no dropout": {"model": {"dropout": 0.0}},
    "no weight decay": {"fit": {"weight_decay": 0.0}},
    "weight decay 20": {"fit": {"weight_decay": 20.0}},
    "learning rate 0.002": {"fit": {"learning_rate": 2e-3}},
    "learning rate 0.01": {"fit": {"learning_rate": 1e-2}},
    "minibatch 256": {"fit": {"minibatch_size": 256}},
    "no KL warm-up": {"fit": {"kl_warmup": 0}},
    "linear variance": {"model": {"dispersion": "gene-linear"}},
    "bfloat16": {"fit": {"precision": "bfloat16"}},
    "zinb": {"model": {"likelihood": "zinb"}},
    "poisson": {"model": {"likelihood": "poisson"}},
}

LINE = (
    "{dataset:16} seed {seed}  {variant:20} {nats_per_cell:8.2f} ({nats_above_default:+.2f}) {seconds:5.1f} s"
)


def run(
    train: ad.AnnData, test: ad.AnnData, batch_key: str | None, variant: dict, options: argparse.Namespace
) -> dict:
    data = pyrosc.from_anndata(train, batch_key=batch_key)
    model = pyrosc.VAE.for_data(data, **variant.get("model", {}))
    told = variant.get("fit", {}) | ({"epochs": 2} if options.smoke else {})
    start = time.perf_counter()
    fit = pyrosc.fit_svi(model, data, progress=False, **told)
    seconds = time.perf_counter() - start
    score = pyrosc.log_likelihood(fit, test, n_draws=options.draws)
    return {
        "nats_per_cell": -score.mean,
        "ess_median": float(np.median(score.ess)),
        "seconds": seconds,
        "epochs": len(fit.history),
    }


def run_dataset(
    name: str, adata: ad.AnnData, batch_key: str | None, options: argparse.Namespace
) -> list[dict]:
    if options.threads:
        torch.set_num_threads(options.threads)  # here: choosing genes resets it
    rows = []
    for seed in options.seeds:
        train, test = common.split(adata, seed)
        default = None
        for variant in ["default", *(name for name in options.variants if name != "default")]:
            row = {"dataset": name, "seed": seed, "variant": variant}
            row |= run(train, test, batch_key, VARIANTS[variant], options)
            default = row["nats_per_cell"] if default is None else default
            row["nats_above_default"] = row["nats_per_cell"] - default
            print(LINE.format(**row), flush=True)
            rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=25, help="K, the importance samples per cell")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/defaults.json; none for --smoke"
    )
    parser.add_argument("--threads", type=int, help="of torch; on a busy machine 1 is many times faster")
    parser.add_argument("--smoke", action="store_true", help="toy counts, two epochs")
    return parser.parse_args()


def main() -> None:
    options = parse()
    record = common.commit() | {
        "versions": common.versions("pyrosc", "torch", "pyro-ppl", "scanpy", "numpy"),
        "machine": common.machine(),
        "seeds": options.seeds,
        "settings": {
            "draws": options.draws,
            "threads": options.threads,
            "variants": {name: VARIANTS[name] for name in options.variants},
        },
    }
    rows = []
    if options.smoke:
        rows = run_dataset("toy", common.toy(), None, options)
    else:
        options.output = options.output or common.RESULTS / "defaults.json"
        for name in options.datasets:
            common.leave_without(options.data, name)
            adata = common.with_variable_genes(common.load(options.data, name))
            rows += run_dataset(name, adata, DATASETS[name], options)
    if options.output:
        common.write_json(options.output, record | {"rows": rows})


if __name__ == "__main__":
    main()
