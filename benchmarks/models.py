"""Every model of pyrosc on PBMC 3k: held-out likelihood and seconds, for each likelihood that it takes.

The 2638 labelled cells and their 2000 most variable genes, split 75/25 at random; each model with its
defaults but two: clusters and labels are as many as the published cell types, and the library is observed in
AutoZI too, so that log p(x) is that of the others. `nats_per_cell` is the
importance-weighted -log p(x) of the held-out cells (K = 25), lower is better. Two kinds of model have none:
those without a posterior (their code is a function of the cell that it explains), and those of transformed
counts. Their `reconstruction`, and that of the others, is the mean of -log p(x given z): it grows less with
every freedom of the code, and compares nothing. SCANVI is shown the training cells' labels.

Seconds are of `for_data` and `fit_svi`, after a first fit that loads what a first fit loads. Printed at the
end: the README's table.

    python benchmarks/models.py --data DIR
    python benchmarks/models.py --models GMVAE VSC --seeds 0 1 2
    python benchmarks/models.py --smoke
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Iterator

    import anndata as ad

DATASET, LABELS = "pbmc3k", "cell_type"
COUNTS = ["nb", "zinb", "poisson", "zip"]
LIKELIHOODS = {
    "VAE": COUNTS,
    "LDVAE": COUNTS,
    "GMVAE": COUNTS,
    "VSC": COUNTS,
    "SCANVI": COUNTS,
    "AutoZI": ["nb", "poisson"],
    "DCA": ["zinb", "nb"],
    "GaussianVAE": [None],
    "Autoencoder": [None],
    "SCVIS": [None],
    "VASC": [None],
    "AutoImpute": [None],
}
# (TOTALVI needs proteins, which this data set has not.)
NO_EVIDENCE = {"DCA", "GaussianVAE", "Autoencoder", "SCVIS", "VASC", "AutoImpute"}
LINE = "{model:12} {likelihood!s:8} seed {seed}  {shown:>9} nats/cell  {seconds:6.1f} s  {epochs} epochs"


def run(train: ad.AnnData, test: ad.AnnData, name: str, likelihood: str | None, settings: dict) -> dict:
    start = time.perf_counter()
    data = pyrosc.from_anndata(train, labels_key=LABELS)
    recipe = {"seed": settings["seed"]} | ({"likelihood": likelihood} if likelihood else {})
    if name == "GMVAE":
        recipe["n_components"] = len(data.schema.labels)
    if name == "AutoZI":
        recipe["library"] = "observed"
    model = getattr(pyrosc, name).for_data(data, **recipe)
    fit = pyrosc.fit_svi(model, data, progress=False, **settings)
    seconds = time.perf_counter() - start
    parts = pyrosc.elbo(fit, test)
    score = None if name in NO_EVIDENCE else -float(pyrosc.log_likelihood(fit, test).mean)
    return {
        "nats_per_cell": score,
        "reconstruction": -float(parts["reconstruction"].mean()),
        "kl": float(parts.filter(like="kl_").sum(axis=1).mean()),
        "seconds": seconds,
        "epochs": len(fit.history),
    }


def rows_of(adata: ad.AnnData, options: argparse.Namespace) -> Iterator[dict]:
    short = {"epochs": 1} if options.smoke else {}
    for seed in options.seeds:
        train, test = common.split(adata, seed)
        test.obs[LABELS] = np.nan  # of cells held out nobody knows the label
        run(train, test, "VAE", "nb", {"seed": seed, "epochs": 1})
        for name in options.models:
            for likelihood in LIKELIHOODS[name][:1] if options.smoke else LIKELIHOODS[name]:
                row = {"model": name, "likelihood": likelihood, "seed": seed}
                row |= run(train, test, name, likelihood, {"seed": seed} | short)
                nats = row["nats_per_cell"]
                print(LINE.format(**row, shown="-" if nats is None else f"{nats:.2f}"), flush=True)
                yield row


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds."""
    found = []
    for key in dict.fromkeys((row["model"], row["likelihood"]) for row in rows):
        own = [row for row in rows if (row["model"], row["likelihood"]) == key]
        means = {
            name: None if own[0][name] is None else float(np.mean([row[name] for row in own]))
            for name in ("nats_per_cell", "reconstruction", "kl", "seconds")
        }
        found.append({"model": key[0], "likelihood": key[1]} | means)
    return found


def table(lines: list[dict]) -> str:
    """Return the README's table: nats per cell and seconds of each model that has a likelihood of counts."""
    of = {(line["model"], line["likelihood"]): line for line in lines if line["nats_per_cell"] is not None}
    rows = [["model", *COUNTS], ["---"] * (1 + len(COUNTS))]
    for name in dict.fromkeys(model for model, _ in of):
        cells = [of.get((name, likelihood)) for likelihood in COUNTS]
        rows.append(
            [f"`{name}`"]
            + ["" if c is None else f"{c['nats_per_cell']:.1f} ({c['seconds']:.0f} s)" for c in cells]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help=f"folder of {DATASET}.h5ad")
    parser.add_argument("--models", nargs="+", choices=LIKELIHOODS, default=list(LIKELIHOODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/models.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="toy counts, one epoch, one likelihood each")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.smoke:
        adata = common.toy()
        adata.obs[LABELS] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
    else:
        common.leave_without(options.data, DATASET)
        adata = common.with_variable_genes(common.load(options.data, DATASET))
        options.output = options.output or common.RESULTS / "models.json"
    settings = {"dataset": DATASET, "n_cells": adata.n_obs, "n_genes": adata.n_vars, "draws": 25}
    record = common.commit() | {"machine": common.machine(), "seeds": options.seeds, "settings": settings}
    record["versions"] = common.versions("pyrosc", "torch", "pyro-ppl", "numpy", "anndata", "scanpy")
    rows = list(rows_of(adata, options))
    print(table(summary(rows)))
    if options.output:
        common.write_json(options.output, record | {"summary": summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
