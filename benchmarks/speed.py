"""Milliseconds per training step in steady state: pyrosc, scvi-tools, hand-written PyTorch, and the matmuls.

One VAE for all: one hidden layer of 128, 10 latents, observed library, dispersion of the gene, dropout .1,
batch normalisation, float32, CPU. The contestants:

    pyrosc  `fit_svi(VAE.for_data(...))`, validation=0, else the defaults
    scvi    scvi-tools' SCVI, trained on all cells: no validation, early stopping, bar, logger, checkpoints
    plain   the modules of pyrosc's VAE (encoder, decoder, likelihood) called by hand: no sample, plate,
            trace, ELBO; fused Adam with the same weight decay, minibatches of the same `DeviceCounts`.
            pyrosc / plain is the price of Pyro, the "tax".
    floor   the matmuls of the last layer alone: a (minibatch x 128) matrix through a (128 x genes) head,
            forward and both backward, outputs allocated before; 1 head for NB, 2 for ZINB

The time per step is, for each of the three that train, the median over epochs of an epoch's seconds, divided
by its steps. A turn takes as many epochs as make 360 steps or 3e5 cells, whichever is fewer; those that make
the first 100 steps (a third of them at most) have compilation and capture, and are left out. A fit takes as
many of the cells as fill whole minibatches, so every step is a full one for everyone; those cells / seconds
are the cells/s. The floor is the median of 50 repeats (fewer where they would take more than 3 seconds).

All take the same low-rank gamma-Poisson counts, drawn so that the wanted share of the entries is not zero.
scvi-tools runs in one process of its own, which waits while others run. In each round of a condition all
contestants take their turn, and ratios are of the times of one round: medians over rounds, all rounds kept.

`targets` are the conditions of the project's targets (2000 genes, 1e4 cells, density .1, minibatch 128 and
512, NB and ZINB), in `--pairs` rounds; `sweep` moves one number at a time away from NB with minibatch 128, in
`--sweep-pairs` rounds; `full` is all combinations (a day). Any of --genes --cells --density --minibatch
--likelihood makes the product of these lists the grid, each one not given staying at that centre.

At the start of each round two threads swap halves of 4 MiB, `swap_ms`: the cores of a virtual machine may
share a cache in one minute and not in the next, and a small step is half as long again where they don't.

Memory: in a fresh process, after Counts and model are built and a fit of 256 cells, whose steps are replayed
too, has loaded what a first fit loads, the peak of resident memory during a fit of 60 to 120 steps: the first
are run, one is recorded, the rest replayed; with the default validation, less what was resident before. A fit
shares the counts, so nothing is taken off for them. One copy of the weights (the ones it trains) is taken
off; gradients, Adam's moments and the weights kept of the best epoch are not. The rest in minibatches' worth:
minibatch x genes x 4 bytes.

`models` is every model with its defaults (`for_data(data)`; GMVAE with 4 components) in the centre's
condition, in `--model-pairs` rounds.

    python benchmarks/speed.py --peer-python PEER/bin/python
    python benchmarks/speed.py --grid models --no-memory --output benchmarks/results/speed_models.json
    python benchmarks/speed.py --grid targets --pairs 3
    python benchmarks/speed.py --genes 1000 2000 --minibatch 128 512 --pairs 3 --no-memory
    python benchmarks/speed.py --smoke
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import common
import numpy as np
import pyro
import torch
from peers.peak import peak_memory
from scipy.sparse import csr_matrix, vstack

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEER_SCRIPT = Path(__file__).parent / "peers" / "scvi_speed.py"
HIDDEN, N_LATENT, DROPOUT = 128, 10, 0.1
STEPS, CELLS = 360, 300_000  # of a turn: whichever takes fewer epochs
WARM = 100  # steps of these that are not counted
SMOKE_STEPS = 60
GRID = {
    "genes": [1000, 2000, 5000, 10000],
    "cells": [10_000, 100_000],
    "density": [0.05, 0.1],
    "minibatch": [128, 512, 4096],
    "likelihood": ["nb", "zinb"],
}
MEMORY = {"likelihood": ["nb", "zinb"], "minibatch": [512, 4096, 8192]}


@dataclass(frozen=True)
class Condition:
    """One point of the grid."""

    genes: int = 2000
    cells: int = 10_000
    density: float = 0.1
    minibatch: int = 128
    likelihood: str = "nb"

    @property
    def steps_per_epoch(self) -> int:
        """Full minibatches among the cells."""
        return max(1, self.cells // self.minibatch)

    @property
    def n_cells(self) -> int:
        """Cells that fill them: those that are taken."""
        return min(self.cells, self.steps_per_epoch * self.minibatch)

    @property
    def epochs(self) -> int:
        """All epochs of a turn."""
        steps = SMOKE_STEPS if self.cells == SMOKE.cells else STEPS
        return max(2, min(math.ceil(steps / self.steps_per_epoch), round(CELLS / self.n_cells)))

    @property
    def warm(self) -> int:
        """The first epochs, which aren't counted."""
        return max(1, min(math.ceil(WARM / self.steps_per_epoch), self.epochs // 3))


CENTRE = Condition()
SMOKE = Condition(genes=60, cells=200, density=0.3, minibatch=32)
TARGETS = [
    replace(CENTRE, minibatch=minibatch, likelihood=likelihood)
    for minibatch, likelihood in itertools.product([128, 512], GRID["likelihood"])
]
SWEEP = [replace(CENTRE, **{name: value}) for name, values in GRID.items() for value in values]


# --- the counts


def simulate(n_cells: int, n_genes: int, density: float, seed: int = 0) -> ad.AnnData:
    """Low-rank gamma-Poisson counts of the wanted density (within 5% of it, relatively).

    log share = base + z W with 10 latents, log-normal libraries, theta = 2. The libraries' scale is bisected
    until P(x > 0), which is known in closed form, has the wanted mean over 500 of the cells.
    """
    rng = np.random.default_rng(seed)
    base, w = rng.normal(0, 1.5, n_genes), rng.normal(0, 0.3, (N_LATENT, n_genes))
    z, theta = rng.normal(size=(n_cells, N_LATENT)), 2.0
    l = rng.lognormal(0, 0.4, (n_cells, 1))

    def rate(rows: slice) -> np.ndarray:
        logits = base + z[rows] @ w
        share = np.exp(logits - logits.max(1, keepdims=True))
        return l[rows] * share / share.sum(1, keepdims=True)

    some, low, high = rate(slice(500)), 0.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        expected = 1 - np.mean((1 + np.exp(middle) * some / theta) ** -theta)
        low, high = (middle, high) if expected < density else (low, middle)
    blocks = []
    for start in range(0, n_cells, 1000):
        mean = np.exp(low) * rate(slice(start, start + 1000))
        x = rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.float32)
        x[x.sum(1) == 0, base.argmax()] = 1  # no cell is empty
        blocks.append(csr_matrix(x))
    adata = ad.AnnData(vstack(blocks, format="csr"))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    found = adata.X.nnz / (n_cells * n_genes)
    if n_cells >= 1000 and abs(found / density - 1) > 0.05:
        raise RuntimeError(f"density {found:.4f} where {density} was wanted")
    return adata


def network(data: pyrosc.Counts, likelihood: str) -> pyrosc.VAE:
    return pyrosc.VAE.for_data(
        data, likelihood=likelihood, n_latent=N_LATENT, hidden=(HIDDEN,), dropout=DROPOUT
    )


# --- the contestants: each gives the seconds of its epochs but the first


def run_pyrosc(model: object, data: pyrosc.Counts, condition: Condition, seed: int) -> list[float]:
    fit = pyrosc.fit_svi(
        model,
        data,
        epochs=condition.epochs,
        minibatch_size=condition.minibatch,
        validation=0,
        device="cpu",
        seed=seed,
        progress=False,
    )
    return np.diff(fit.history["seconds"]).tolist()


def run_plain(data: pyrosc.Counts, condition: Condition, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model, resident = network(data, condition.likelihood).train(), data.on("cpu")
    adam = torch.optim.Adam(
        model.parameters(), lr=5e-3, weight_decay=model.weight_decay / data.n_cells, fused=True
    )

    def step(rows: torch.Tensor) -> torch.Tensor:
        cells = resident.cells(rows)
        q = model.encoder(cells)
        z = q.rsample()
        h, logits = model.decoder(z, cells)
        px = model.likelihood(h, cells.batch, logits=logits, total=cells.library.clamp_min(1.0))
        kl = torch.distributions.kl_divergence(q, model.prior(cells).base_dist).sum()
        loss = (kl - px.to_event(1).log_prob(cells.x).sum()) / len(rows)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    ends = []
    with pyro.validation_enabled(False):
        for _ in range(condition.epochs):
            order = torch.randperm(data.n_cells)
            losses = torch.stack([step(rows) for rows in order.split(condition.minibatch)]).tolist()
            if not np.isfinite(losses).all():
                raise FloatingPointError("the plain loss is not finite")
            ends.append(time.perf_counter())
    return np.diff(ends).tolist()


def run_floor(condition: Condition) -> list[float]:
    """Seconds of a step's matmuls, each repeat."""
    B, H, G = condition.minibatch, HIDDEN, condition.genes
    h, W, b, g = torch.randn(B, H), torch.randn(G, H), torch.randn(G), torch.randn(B, G)
    out, grad_h, grad_W = torch.empty(B, G), torch.empty(B, H), torch.empty(G, H)
    heads = {"nb": 1, "zinb": 2}[condition.likelihood]
    times: list[float] = []
    until = time.perf_counter() + 3
    while len(times) < 55 and (len(times) < 10 or time.perf_counter() < until):
        start = time.perf_counter()
        for _ in range(heads):
            torch.addmm(b, h, W.T, out=out)
            torch.mm(g, W, out=grad_h)
            torch.mm(g.T, h, out=grad_W)
        times.append(time.perf_counter() - start)
    return times[5:]


def swap() -> float:
    """Seconds in which each of two threads reads half of 4 MiB that the other has written."""
    halves, times = torch.randn(2, 2**19), []
    for _ in range(200):
        start = time.perf_counter()
        halves = halves.flip(0)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


class Peer:
    """scvi-tools in a process that lives as long as this, and takes one job at a time."""

    def __init__(self, python: Path) -> None:
        self.process = subprocess.Popen(
            [python, PEER_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, path: Path, condition: Condition, seed: int, threads: int | None) -> dict:
        """Answer one job."""
        job = asdict(condition) | {
            "path": str(path),
            "n_cells": condition.n_cells,
            "epochs": condition.epochs,
            "seed": seed,
            "threads": threads,
            "model": {
                "n_layers": 1,
                "n_hidden": HIDDEN,
                "n_latent": N_LATENT,
                "dropout_rate": DROPOUT,
            },
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


# --- rounds


def measure(
    conditions: list[tuple[Condition, int]], options: argparse.Namespace, versions: dict
) -> Iterator[dict]:
    """Rows of all conditions and rounds; counts are drawn once for all conditions that share them."""
    peer = Peer(options.peer_python) if options.peer_python else None
    key = lambda job: (job[0].genes, job[0].cells, job[0].density)
    groups = [list(jobs) for _, jobs in itertools.groupby(sorted(conditions, key=key), key)]
    try:
        for jobs in sorted(groups, key=lambda jobs: key(jobs[0]) != key((CENTRE,))):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "counts.h5ad")
                shared = jobs[0][0]
                adata = simulate(shared.cells, shared.genes, shared.density)
                adata.write_h5ad(path)
                data = pyrosc.from_anndata(adata)
                facts = {
                    "density_measured": adata.X.nnz / (adata.n_obs * adata.n_vars),
                    "counts_per_cell": float(adata.X.sum() / adata.n_obs),
                }
                del adata
                for condition, pairs in jobs:
                    whole = data[: condition.n_cells]
                    turns = {
                        "pyrosc": lambda seed, d=whole, c=condition: run_pyrosc(
                            network(d, c.likelihood), d, c, seed
                        ),
                        "scvi": lambda seed, p=path, c=condition: ask(peer, p, c, seed, options, versions),
                        "plain": lambda seed, d=whole, c=condition: run_plain(d, c, seed),
                        "floor": lambda _seed, c=condition: run_floor(c),
                    }
                    turns = {name: turns[name] for name in options.contestants}
                    for i in range(pairs):
                        yield from one_round(i, condition, turns, facts)
    finally:
        if peer:
            peer.close()


def ask(
    peer: Peer, path: Path, condition: Condition, seed: int, options: argparse.Namespace, versions: dict
) -> list[float]:
    answer = peer.run(path, condition, seed, options.threads)
    versions["peer"] = answer["versions"]
    if answer["steps_per_epoch"] != condition.steps_per_epoch:
        raise RuntimeError(f"{answer['steps_per_epoch']} steps an epoch for {condition}")
    return answer["seconds"]


def one_round(
    i: int, condition: Condition, turns: dict[str, Callable[[int], list[float]]], facts: dict
) -> Iterator[dict]:
    shown = " ".join(str(value) for value in asdict(condition).values())
    swapped = {"swap_ms": 1e3 * swap()}
    for name, turn in turns.items():
        seconds = turn(i)
        if name == "floor":
            step = np.median(seconds)
        else:
            seconds, step = steady(seconds, condition)
        row = asdict(condition) | facts | swapped
        row |= {"round": i, "contestant": name, "ms_per_step": 1e3 * float(step)}
        if name != "floor":
            row |= {
                "cells_per_s": condition.minibatch / float(step),
                "steps": len(seconds) * condition.steps_per_epoch,
                "seconds_of_epochs": seconds,
            }
        print(f"{shown:32} round {i}  {name:7} {row['ms_per_step']:9.2f} ms/step", flush=True)
        yield row


def steady(seconds: list[float], condition: Condition) -> tuple[list[float], float]:
    """Seconds of the epochs that count (the first has been left out already), and of a step."""
    counted = seconds[condition.warm - 1 :]
    return counted, float(np.median(counted)) / condition.steps_per_epoch


# --- every model


def measure_models(options: argparse.Namespace) -> Iterator[dict]:
    """Time a step of each model with its defaults, in the centre's condition; all take turns in a round."""
    shape = SMOKE if options.smoke else CENTRE
    adata = simulate(shape.cells, shape.genes, shape.density)
    rng = np.random.default_rng(0)
    adata.obs["label"] = rng.choice(["a", "b", "c", "d"], shape.cells)
    adata.obsm["proteins"] = rng.negative_binomial(2, 0.05, (shape.cells, 14))
    data = pyrosc.from_anndata(adata, labels_key="label", protein_key="proteins")[: shape.n_cells]
    names = ["SCANVI", "TOTALVI"] if options.smoke else pyrosc.models.__all__
    for i, name in itertools.product(range(options.model_pairs), names):
        recipe = {"n_components": 4} if name == "GMVAE" else {}
        model = getattr(pyrosc, name).for_data(data, **recipe)
        seconds, step = steady(run_pyrosc(model, data, shape, i), shape)
        print(f"{name:12} round {i} {1e3 * step:9.2f} ms/step", flush=True)
        yield {"model": name, "round": i, "ms_per_step": 1e3 * step, "seconds_of_epochs": seconds}


def summary_of_models(rows: list[dict]) -> dict[str, float]:
    """Median over the rounds, in milliseconds a step."""
    names = dict.fromkeys(row["model"] for row in rows)
    return {
        name: float(np.median([row["ms_per_step"] for row in rows if row["model"] == name])) for name in names
    }


# --- memory


def memory_of_a_fit(job: dict) -> dict:
    """Bytes that a fit needs; meant for a process of its own."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    data = pyrosc.from_anndata(ad.read_h5ad(job["path"]))
    model = network(data, job["likelihood"])
    few = data[: min(256, data.n_cells)]
    pyrosc.fit_svi(model, few, epochs=20, minibatch_size=64, device="cpu", progress=False)
    weights = sum(p.nbytes for p in model.parameters())
    epochs = math.ceil(70 * job["minibatch"] / data.n_cells)
    with peak_memory() as peak:
        pyrosc.fit_svi(
            model, data, epochs=epochs, minibatch_size=job["minibatch"], device="cpu", progress=False
        )
    minibatch = 4 * job["minibatch"] * data.n_genes
    beyond = None if peak["bytes"] is None else peak["bytes"] - weights
    return {
        "likelihood": job["likelihood"],
        "minibatch": job["minibatch"],
        "peak_bytes": peak["bytes"],
        "weights_bytes": weights,
        "minibatch_bytes": minibatch,
        "minibatches": None if beyond is None else beyond / minibatch,
        "minibatches_before_taking_off": None if beyond is None else peak["bytes"] / minibatch,
    }


def measure_memory(options: argparse.Namespace) -> Iterator[dict]:
    grid = MEMORY | {name: getattr(options, name) for name in MEMORY if getattr(options, name)}
    shape = SMOKE if options.smoke else CENTRE
    if options.smoke:
        grid = {"likelihood": ["nb"], "minibatch": [32]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counts.h5ad")
        simulate(shape.cells, shape.genes, shape.density).write_h5ad(path)
        for i, likelihood, minibatch in itertools.product(range(options.memory_pairs), *grid.values()):
            job = {"path": str(path), "likelihood": likelihood, "minibatch": minibatch}
            row = {"round": i} | fresh(job | {"threads": options.threads}, options)
            shown = (
                "not known here" if row["minibatches"] is None else f"{row['minibatches']:.1f} minibatches"
            )
            print(f"memory {likelihood} {minibatch} round {i}: {shown}", flush=True)
            yield row


def fresh(job: dict, options: argparse.Namespace) -> dict:
    """Run a memory job in a process of its own (in this one for --smoke, where the number is of no use)."""
    if options.smoke:
        return memory_of_a_fit(job)
    command = [sys.executable, __file__, "--memory-job", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- the record


def summary(rows: list[dict]) -> list[dict]:
    """Medians of each condition, and of the ratios of pairs: each pair is of one round."""
    names = [field.name for field in fields(Condition)]
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        ms = {(row["contestant"], row["round"]): row["ms_per_step"] for row in own}
        medians = {
            contestant: float(
                np.median([row["ms_per_step"] for row in own if row["contestant"] == contestant])
            )
            for contestant in dict.fromkeys(row["contestant"] for row in own)
        }
        pairs = {
            name: [ms[a, i] / ms[b, i] for c, i in ms if c == a and (b, i) in ms]
            for name, (a, b) in RATIOS.items()
        }
        found.append(
            dict(zip(names, key, strict=True))
            | {
                "ms_per_step": medians,
                "cells_per_s": {c: 1e3 * key[3] / v for c, v in medians.items() if c != "floor"},
                "swap_ms": list({row["round"]: row["swap_ms"] for row in own}.values()),
            }
            | {
                name: {"median": float(np.median(values)), "pairs": values}
                for name, values in pairs.items()
                if values
            }
        )
    return found


RATIOS = {
    "scvi_over_pyrosc": ("scvi", "pyrosc"),
    "pyrosc_over_plain": ("pyrosc", "plain"),
    "pyrosc_over_floor": ("pyrosc", "floor"),
}


def targets(summaries: list[dict], memory: list[dict]) -> list[dict]:
    """Each target of the project, what was measured, and whether it is met."""
    wanted = {
        ("scvi_over_pyrosc", 128): (">=", 4.0),
        ("pyrosc_over_plain", 512): ("<=", 1.05),
        ("pyrosc_over_floor", 512): ("<=", 2.5),
    }
    found = [
        _verdict(ratio, s["likelihood"], minibatch, sign, bound, s[ratio]["median"])
        for (ratio, minibatch), (sign, bound) in wanted.items()
        for s in summaries
        if replace(CENTRE, minibatch=minibatch, likelihood=s["likelihood"]) == _condition(s) and ratio in s
    ]
    for likelihood, minibatch in dict.fromkeys((row["likelihood"], row["minibatch"]) for row in memory):
        values = [
            r["minibatches"] for r in memory if (r["likelihood"], r["minibatch"]) == (likelihood, minibatch)
        ]
        if None not in values:
            median = float(np.median(values))
            found.append(_verdict("memory_in_minibatches", likelihood, minibatch, "<=", 10.0, median))
    return found


def _condition(row: dict) -> Condition:
    return Condition(**{field.name: row[field.name] for field in fields(Condition)})


def _verdict(what: str, likelihood: str, minibatch: int, sign: str, bound: float, value: float) -> dict:
    met = value >= bound if sign == ">=" else value <= bound
    print(
        f"{what:22} {likelihood:4} {minibatch:4}  {value:7.2f} ({sign} {bound}: {'met' if met else 'missed'})"
    )
    where = {"figure": what, "likelihood": likelihood, "minibatch": minibatch}
    return where | {"target": f"{sign} {bound}", "median": value, "met": met}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    names = ["pyrosc", "scvi", "plain", "floor"]
    parser.add_argument("--contestants", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--grid",
        nargs="+",
        choices=["targets", "sweep", "full", "models"],
        default=["targets", "sweep", "models"],
    )
    for name, values in GRID.items():
        parser.add_argument(f"--{name}", nargs="+", type=type(values[0]))
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each condition")
    parser.add_argument("--sweep-pairs", type=int, default=1, help="rounds of a condition of the sweep alone")
    parser.add_argument("--model-pairs", type=int, default=3, help="rounds of every model")
    parser.add_argument("--memory-pairs", type=int, default=3, help="fits in fresh processes")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch, for everyone; its own choice by default")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/speed.json; none for --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="200 cells of 60 genes, one round")
    parser.add_argument("--memory-job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[tuple[Condition, int]]:
    """Choose the conditions, and the number of rounds of each."""
    if options.smoke:
        return [(SMOKE, 1), (replace(SMOKE, likelihood="zinb"), 1)]
    given = {name: getattr(options, name) for name in GRID if getattr(options, name)}
    if given:
        grid = {name: given.get(name, [getattr(CENTRE, name)]) for name in GRID}
        return [(Condition(*values), options.pairs) for values in itertools.product(*grid.values())]
    jobs: dict[Condition, int] = {}
    full = [Condition(*values) for values in itertools.product(*GRID.values())]
    for name, conditions, pairs in (
        ("targets", TARGETS, options.pairs),
        ("full", full, options.pairs),
        ("sweep", SWEEP, options.sweep_pairs),
    ):
        if name in options.grid:
            jobs = dict.fromkeys(conditions, pairs) | jobs
    return list(jobs.items())


def main() -> None:
    options = parse()
    if options.memory_job:
        print(json.dumps(memory_of_a_fit(options.memory_job)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.peer_python and "scvi" in options.contestants:
        print("left out, since there is no --peer-python: scvi")
        options.contestants = [name for name in options.contestants if name != "scvi"]
    if options.smoke:
        options.memory_pairs = options.model_pairs = 1
    else:
        options.output = options.output or common.RESULTS / "speed.json"
    conditions = chosen(options)
    settings = {
        "contestants": options.contestants,
        "hidden": HIDDEN,
        "n_latent": N_LATENT,
        "dropout": DROPOUT,
        "steady_steps": STEPS,
        "steady_cells": CELLS,
        "pairs": options.pairs,
        "sweep_pairs": options.sweep_pairs,
        "model_pairs": options.model_pairs,
        "memory_pairs": 0 if options.no_memory else options.memory_pairs,
    }
    record = common.commit() | {
        "machine": common.machine(),
        "seeds": list(range(max([pairs for _, pairs in conditions] + [options.model_pairs]))),
        "settings": settings,
    }
    versions = {"ours": common.versions("pyrosc", "torch", "pyro-ppl", "numpy")}
    rows = list(measure(conditions, options, versions))
    models = list(measure_models(options)) if "models" in options.grid else []
    memory = [] if options.no_memory else list(measure_memory(options))
    summaries = summary(rows)
    verdicts = [] if options.smoke else targets(summaries, memory)
    if options.output:
        found = {"targets": verdicts, "summary": summaries, "models": summary_of_models(models)}
        found |= {"memory": memory, "rows": rows, "rows_of_models": models}
        common.write_json(options.output, record | {"versions": versions} | found)


if __name__ == "__main__":
    main()
