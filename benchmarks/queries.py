"""Seconds and peak memory of the questions put to a fit: pyrosc against scvi-tools.

10 000 cells of 9 types and 2000 genes (`pyrosc.datasets.simulate`, a tenth of the entries not zero), an NB
VAE with 10 latents, fitted briefly by each library: speed does not depend on how well. Questions, each to all
cells:

    latent           posterior means of the state
    impute           shares of the genes, 50 draws a cell: ours with sd and a 90% interval of each entry,
                     theirs (`get_normalized_expression`) the mean alone
    impute-1-draw    the same with one draw
    de-mean, de-cell          ours: one type against the rest, for each of the 9; estimand "mean" and "cell"
    de-cell, 10x draws        ours: "de-cell" of ten times the pairs, for its memory, which is to be the same
    de-vanilla, de-change     theirs: the same table, in the default mode and in mode "change"

"de-mean" and "de-vanilla" are what either library does by default; "de-cell" and "de-change" ask the same
question, of random pairs of cells. All four ratios are in the record; the target holds for both of these.

Counts are read before (`from_anndata`, `setup_anndata`). Each question is put in a fresh process that has
loaded the fit and asked for the latent means of 64 cells; memory is the peak of what was resident less what
was resident just before the question: the answer itself is in it. Contestants take turns, question by
question and round by round; ratios are of one round, medians over rounds, all rounds kept.

For "de-cell" the cells that went through the decoder are counted, against the draws asked for: `n_draws` of
either side of each comparison. That is the call on all cells alone, without the 64.

    python benchmarks/queries.py --peer-python PEER/bin/python
    python benchmarks/queries.py --questions de-mean de-cell --pairs 5
    python benchmarks/queries.py --smoke
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import common
import numpy as np
from peers.peak import peak_memory

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEER_SCRIPT = Path(__file__).parent / "peers" / "scvi_queries.py"
GROUPBY, N_LATENT = "cell_type", 10
SPARSE = {"base_shape": 0.2, "library_mean": 300.0}  # at 2000 genes: about a tenth of the entries not zero
OURS = ["latent", "impute", "impute-1-draw", "de-mean", "de-cell", "de-cell, 10x draws"]
THEIRS = ["latent", "impute", "impute-1-draw", "de-vanilla", "de-change"]
RATIOS = [*((name, name) for name in OURS[:3])] + [(a, b) for a in OURS[3:5] for b in THEIRS[3:]]
TARGET, FLAT = 10.0, 1.1
TARGETED = [("de-mean", "de-vanilla"), ("de-cell", "de-change")]


def default_draws(verb: Callable) -> int:
    return inspect.signature(verb).parameters["n_draws"].default


def fit(folder: Path, adata: ad.AnnData, job: dict) -> dict:
    data = pyrosc.from_anndata(adata)
    model = pyrosc.VAE.for_data(data, n_latent=job["n_latent"])
    pyrosc.fit_svi(model, data, epochs=job["epochs"], device="cpu", progress=False).save(folder / "pyrosc")
    return {}


def questions(fit: pyrosc.Fit, data: pyrosc.Counts, job: dict) -> dict[str, Callable[[], object]]:
    de = lambda estimand, **asked: pyrosc.differential_expression(
        fit, data, groupby=job["groupby"], estimand=estimand, **asked
    )
    many = 10 * default_draws(pyrosc.differential_expression)
    return {
        "latent": lambda: pyrosc.latent(fit, data),
        "impute": lambda: pyrosc.impute(fit, data, n_draws=job["n_draws"]).mean,
        "impute-1-draw": lambda: pyrosc.impute(fit, data, n_draws=1).mean,
        "de-mean": lambda: de("mean"),
        "de-cell": lambda: de("cell"),
        "de-cell, 10x draws": lambda: de("cell", n_draws=many),
    }


def ask(folder: Path, adata: ad.AnnData, job: dict) -> dict:
    data, fitted = pyrosc.from_anndata(adata), pyrosc.load(folder / "pyrosc")
    question = questions(fitted, data, job)[job["question"]]
    pyrosc.latent(fitted, data[: min(64, data.n_cells)])
    decoded, forward = [], fitted.program.decoder.forward

    def counted(z: object, cells: object) -> object:
        decoded.append(math.prod(z.shape[:-1]))
        return forward(z, cells)

    fitted.program.decoder.forward = counted
    with peak_memory() as peak:
        start = time.perf_counter()
        answer = question()
        seconds = time.perf_counter() - start
    result = {"seconds": seconds, "peak_bytes": peak["bytes"], "shape": list(answer.shape)}
    if job["question"].startswith("de"):
        sides = 2 * answer["group"].nunique() if "cell" in job["question"] else 0
        asked = (
            sides * default_draws(pyrosc.differential_expression) * (10 if "10x" in job["question"] else 1)
        )
        result |= {"cells_decoded": sum(decoded), "draws_asked": asked}
    return result


def run_job(folder: Path) -> None:
    """Do what the fresh process is for."""
    job = json.loads((folder / "job.json").read_text())
    result = (fit if job["question"] == "fit" else ask)(folder, ad.read_h5ad(folder / "data.h5ad"), job)
    result["versions"] = common.versions("pyrosc", "torch", "pyro-ppl", "numpy", "anndata")
    (folder / "result.json").write_text(json.dumps(result))


def run(folder: Path, who: str, job: dict, options: argparse.Namespace) -> dict:
    """One job, in a fresh process; our own in this one for --smoke."""
    (folder / "job.json").write_text(json.dumps(job))
    if who == "scvi":
        subprocess.run([options.peer_python, PEER_SCRIPT, folder], check=True)
    elif options.smoke:
        run_job(folder)
    else:
        subprocess.run([sys.executable, __file__, "--job", folder], check=True)
    return json.loads((folder / "result.json").read_text())


def measure(adata: ad.AnnData, options: argparse.Namespace) -> Iterator[dict]:
    """Fit once with each library, then put the questions, in turns."""
    told = {
        "n_latent": N_LATENT,
        "epochs": options.epochs,
        "n_draws": options.draws,
        "groupby": GROUPBY,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adata.write_h5ad(folder / "data.h5ad")
        contestants = ["pyrosc"] + ["scvi"] * bool(options.peer_python)
        for who in contestants:
            run(folder, who, told | {"question": "fit"}, options)
        turns = [
            (who, question)
            for pair in zip_longest(OURS, THEIRS)
            for who, question in zip(["pyrosc", "scvi"], pair, strict=True)
            if who in contestants and question in options.questions
        ]
        for i in range(options.pairs):
            for who, question in turns:
                row = {"round": i, "contestant": who, "question": question}
                row |= run(folder, who, told | {"question": question}, options)
                mib = math.nan if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
                print(f"round {i}  {who:7} {question:14} {row['seconds']:8.2f} s  {mib:7.0f} MiB", flush=True)
                yield row


def summary(rows: list[dict]) -> dict:
    """Medians, ratios of pairs, and the targets."""
    values = {(row["contestant"], row["question"], row["round"]): row for row in rows}
    rounds = range(1 + max(row["round"] for row in rows))
    medians = [
        {"contestant": who, "question": question}
        | {
            name: None if None in found else float(np.median(found))
            for name in ("seconds", "peak_bytes")
            for found in [[values[who, question, i][name] for i in rounds]]
        }
        for who, question in dict.fromkeys((row["contestant"], row["question"]) for row in rows)
    ]
    ratios = []
    for ours, theirs in RATIOS:
        pairs = [
            (values["scvi", theirs, i], values["pyrosc", ours, i])
            for i in rounds
            if ("scvi", theirs, i) in values and ("pyrosc", ours, i) in values
        ]
        if pairs:
            times = [a["seconds"] / b["seconds"] for a, b in pairs]
            ratios.append({"ours": ours, "theirs": theirs, "median": float(np.median(times)), "pairs": times})
    targets = [
        {"figure": f"{r['theirs']} / {r['ours']}", "target": f">= {TARGET}"}
        | {"median": r["median"], "met": r["median"] >= TARGET}
        for r in ratios
        if (r["ours"], r["theirs"]) in TARGETED
    ]
    counted = {
        row["question"]: {"cells_decoded": row["cells_decoded"], "draws_asked": row["draws_asked"]}
        for row in rows
        if "cells_decoded" in row
    }
    targets += [
        {"figure": f"cells decoded by {question}", "target": f"<= {n['draws_asked']}"}
        | {"median": n["cells_decoded"], "met": n["cells_decoded"] <= n["draws_asked"]}
        for question, n in counted.items()
    ]
    peaks = {m["question"]: m["peak_bytes"] for m in medians if m["contestant"] == "pyrosc"}
    few, many = (peaks.get(name) for name in OURS[4:])
    if few and many:
        figure = {"figure": "memory, 10x draws / de-cell", "target": f"<= {FLAT}"}
        targets.append(figure | {"median": many / few, "met": many / few <= FLAT})
    for t in targets:
        shown = "met" if t["met"] else "missed"
        print(f"{t['figure']:28} {t['median']:10.1f} ({t['target']}: {shown})")
    return {"targets": targets, "medians": medians, "ratios": ratios}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    names = list(dict.fromkeys(OURS + THEIRS))
    parser.add_argument("--questions", nargs="+", choices=names, default=names)
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--types", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=5, help="of the brief fits")
    parser.add_argument("--draws", type=int, default=default_draws(pyrosc.impute), help="a cell, to impute")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/queries.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="200 cells of 50 genes, one round")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.job:
        run_job(options.job)
        return
    if not options.peer_python:
        print("left out, since there is no --peer-python: scvi")
    if options.smoke:
        options.cells, options.genes, options.types, options.epochs, options.pairs = 200, 50, 3, 1, 1
    else:
        options.output = options.output or common.RESULTS / "queries.json"
    simulated = pyrosc.datasets.simulate(
        options.cells, options.genes, n_types=options.types, seed=0, **SPARSE
    )
    adata = ad.AnnData(simulated.X, obs=simulated.obs[[GROUPBY]], var=simulated.var[[]])
    del simulated
    settings = {
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "n_types": options.types,
        "density": adata.X.nnz / (adata.n_obs * adata.n_vars),
        "n_latent": N_LATENT,
        "epochs": options.epochs,
        "draws": options.draws,
        "pairs": options.pairs,
    }
    record = common.commit() | {"machine": common.machine(), "seeds": [0], "settings": settings}
    rows = list(measure(adata, options))
    versions = {"ours" if row["contestant"] == "pyrosc" else "peer": row.pop("versions") for row in rows}
    found = {"versions": versions} | summary(rows) | {"rows": rows}
    if options.output:
        common.write_json(options.output, record | found)


if __name__ == "__main__":
    main()
