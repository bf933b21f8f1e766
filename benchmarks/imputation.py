r"""Imputation: how near imputed values come to what was hidden, and what intervals around them cover.

mcv          molecular cross-validation: `thin` keeps 90% of the molecules, x, for the methods to see, and y
             is the other 10%; of cells that have some of both, and genes that x has. With p a method's counts
             at the depth of x, m = p / 9, N(a) = log1p(1e4 a / sum of a over the genes) and means over all
             entries:
               poisson          mean of m - y log(m + 1e-6)
               poisson_swapped  mean of y - m log(y + 1e-6), as published: no proper score
               mse              mean of (N(p) - N(y))^2, the official formula
               mse_direct       mean of (a - N(y))^2, a the method's logs: N(p) where it has none
               normalised_mse   (mse of "none" - mse) / mse of "none"; normalised_mse_direct alike
             Answers of any method: `counts`, p itself; `readout`, what m means for the logs if y were
             Poisson: a = E log1p(1e4 y' / d), y' ~ Poisson(m), d = (sum of x) / 9; p = e^a - 1 for the
             official formula. Ours: `count`, the decoder's mean; `rate`, that and the cell's own counts;
             `log1p`, a of new counts of this very cell at the depth d.
masking      a tenth of the positive counts, each times Bernoulli(.1) (scVI's scheme), then fits anew: median
             and mean of |p - count| over these. Ours: `count`, which is the one that is meant: a rate would
             take the zero that we put there for what the cell says. `rate` is shown beside it.
coverage     90% predictive intervals of y in mcv, 1000 cells. Of each tenth of the genes by mean: `pit`, the
             share of entries with u in [.05, .95], u = P(y' < y) + v P(y' = y), v uniform, y' a new count of
             this very cell at the depth of y (rates w / 9 drawn given x, then Poisson); `interval`, the share
             in [lower, upper] of `impute(what="predictive")`, which is of whole counts and covers more.
truth        `datasets.simulate`, 2000 cells of 6 types, 1000 genes, a quarter of the entries dropped out: p
             against the true mean before dropout, r. `rmse` of log1p(p) against log1p(r); `relative`, the
             sum of |p - r| over that of r; `rmse_scaled`, `relative_scaled` once p has the total of r, since
             observed totals are those after dropout. Zeros that are lost counts: `precision`, `recall`,
             `f1` of P(dropout given the zero) > .5; `best_f1`, at the best threshold.
correlation  null genes are independent given the cell's total and type: simulated, 2000 cells, 500 genes, no
             batches, `one` type or `four` types with a tenth of the genes different: mean |Pearson's r|
             over pairs of the null genes, of N(p) (`logs`) and of p (`values`).
memory       20 000 cells of 2000 genes, 100 draws with sd and 90% intervals, in a fresh process: growth of
             peak resident memory over the size of the answer.

Sets: pbmc3k (cells with a label), paul15, pbmc_cite_10k5k, 2000 genes each (seurat_v3 on all counts).
Contestants: `none`, x; `gene mean`, the genes' shares times the cell's total; `knn smoothing` and `alra`,
see peers/smoothers.py; `magic`, and with the order of normalisation reversed; `dca`, its default
(NB); `scvi-tools` with an NB, mean of 25 draws of normalised expression times the total, for `--slow-seeds`.
Ours: VAE as it is by default, 10 draws. In `truth` also DCA's ZINB, and what `INFLATED` says. Peers that an
interpreter is not named for are left out. Each line of the summary names its seeds.

    python benchmarks/imputation.py --data DIR --peer-python A/bin/python --dca-python B/bin/python \
        --magic-python C/bin/python
    python benchmarks/imputation.py --parts mcv coverage --seeds 0
    python benchmarks/imputation.py --smoke

A: scvi-tools; B: Python 3.8, pip install dca 'pyyaml<6'; C: magic-impute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anndata as ad
import common
import numpy as np
import pandas as pd
from peers.peak import peak_memory
from peers.smoothers import alra, knn_smoothing
from scipy import sparse, special

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Iterator

PEERS = Path(__file__).parent / "peers"
SETS = ("pbmc3k", "paul15", "pbmc_cite_10k5k")
KEPT = 0.9
ODDS = (1 - KEPT) / KEPT  # of a molecule to be held out
DRAWS = 10
COVERED = 1000
FLOOR = 1e-6  # the published metric's
OURS = {"pyrosc": (pyrosc.VAE, {})}
INFLATED = {
    "pyrosc, zinb": (pyrosc.VAE, {"likelihood": "zinb"}),
    "pyrosc, zinb, latent library": (pyrosc.VAE, {"likelihood": "zinb", "library": "latent"}),
    "pyrosc DCA": (pyrosc.DCA, {}),
}
MEMORY = ("share", "count", "rate", "log1p", "predictive")


# --- contestants


class Peer(NamedTuple):
    """What a peer made of the counts: counts at the cells' own depth, and of DCA theta and pi."""

    name: str
    counts: np.ndarray
    found: dict
    theta: np.ndarray | None = None
    pi: np.ndarray | None = None


def peers(
    train: ad.AnnData, seed: int, options: argparse.Namespace, *, inflated: bool = False
) -> Iterator[Peer]:
    """Yield each peer's imputation, the fast ones first."""
    x = train.X.toarray().astype(np.float64)
    known = {
        "none": lambda: x,
        "gene mean": lambda: x.sum(1, keepdims=True) * x.sum(0) / x.sum(),
        "knn smoothing": lambda: knn_smoothing(x, seed=seed),
        "alra": lambda: alra(x, seed=seed),
    }
    for name, impute in known.items():
        yield Peer(name, impute(), {})
    jobs: list[tuple[str, Path | None, str, dict]] = [
        ("magic", options.magic_python, "magic_impute.py", {"reverse": False}),
        ("magic, reversed", options.magic_python, "magic_impute.py", {"reverse": True}),
        ("dca", options.dca_python, "dca_fit.py", {"fit": options.fit}),
    ]
    if inflated:
        job = {"fit": {"ae_type": "zinb-conddisp"} | options.fit}
        jobs.append(("dca, zinb", options.dca_python, "dca_fit.py", job))
    if seed in options.slow_seeds:
        short = {"max_epochs": options.fit["epochs"]} if options.fit else {}
        job = {"likelihood": "nb", "n_samples": 25, "fit": short}
        jobs.append(("scvi-tools", options.peer_python, "scvi_impute.py", job))
    for name, python, script, job in jobs:
        if python:
            versions, answer = ask(train, python, script, job | {"seed": seed})
            yield Peer(name, answer.pop("mean").astype(np.float64), {"versions": versions}, **answer)


def ask(train: ad.AnnData, python: Path, script: str, job: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """Run a peer's program on the cells; DCA is asked about them as if they were held out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("train", "test"):
            sparse.save_npz(folder / f"{part}.npz", sparse.csr_matrix(train.X))
        (folder / "job.json").write_text(json.dumps(job))
        subprocess.run([python, PEERS / script, folder], check=True, stdout=subprocess.DEVNULL)
        versions = json.loads((folder / "result.json").read_text())["versions"]
        return versions, dict(np.load(folder / "answer.npz"))


def ours(
    train: ad.AnnData, told: dict, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, pyrosc.Fit]]:
    """Yield each fit of ours; one to the same counts is made once."""
    counts = hash(train.X.data.tobytes())
    for name, (model, settings) in told.items():
        if (counts, name, seed) not in options.fits:
            data = pyrosc.from_anndata(train)
            program = model.for_data(data, seed=seed, **settings)
            fit = pyrosc.fit_svi(program, data, seed=seed, progress=False, **options.fit)
            options.fits[counts, name, seed] = fit
        yield name, options.fits[counts, name, seed]


# --- data


def sets(options: argparse.Namespace) -> Iterator[tuple[str, ad.AnnData]]:
    if options.smoke:
        yield "toy", common.toy()
        return
    for name in options.sets:
        yield name, common.with_variable_genes(common.load(options.data, name))


def thinned(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Return what methods see and what is held out."""
    parts = pyrosc.criticism.thin(adata, KEPT, seed=seed)
    cells = np.logical_and(*(total(part).ravel() > 0 for part in parts))
    genes = np.asarray(parts[0].X.sum(0)).ravel() > 0
    return parts[0][cells][:, genes].copy(), parts[1][cells][:, genes].copy()


def total(adata: ad.AnnData) -> np.ndarray:
    """Return each cell's counts, (cells, 1)."""
    return np.asarray(adata.X.sum(1), dtype=np.float64).reshape(-1, 1)


# --- scores


def normal_logs(counts: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1e-12))


def readout(mean: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """E log1p(1e4 y / depth) of y ~ Poisson(mean), term by term; genes leave when theirs are negligible."""
    top = mean.max(0)
    order = np.argsort(-top)
    last = np.ceil(top + 8 * np.sqrt(top) + 8)[order]
    rate, logs = mean[:, order], np.zeros_like(mean)
    p = np.exp(-rate)
    for k in range(1, int(last[0]) + 1):
        n = np.count_nonzero(last >= k)
        p = p[:, :n] * rate[:, :n] / k
        logs[:, order[:n]] += p * np.log1p(1e4 * k / depth)
    return logs


class CrossValidation:
    """Scores against held-out counts."""

    def __init__(self, train: ad.AnnData, test: ad.AnnData) -> None:
        self.y = test.X.toarray().astype(np.float64)
        self.logs = normal_logs(self.y)
        self.depth = total(train) * ODDS
        self.none = self._mse(normal_logs(train.X.toarray().astype(np.float64)))

    def _mse(self, logs: np.ndarray) -> float:
        return float(np.mean((logs - self.logs) ** 2))

    def counts(self, counts: np.ndarray) -> dict:
        """Score counts at the depth of training."""
        m = counts * ODDS
        found = {
            "poisson": float(np.mean(m - self.y * np.log(m + FLOOR))),
            "poisson_swapped": float(np.mean(self.y - m * np.log(self.y + FLOOR))),
        }
        mse = self._mse(normal_logs(counts))
        return found | self._errors(mse, mse)

    def of_logs(self, logs: np.ndarray) -> dict:
        """Score logs."""
        return self._errors(self._mse(normal_logs(np.expm1(logs))), self._mse(logs))

    def _errors(self, mse: float, direct: float) -> dict:
        found = {"mse": mse, "mse_direct": direct}
        return found | {f"normalised_{name}": 1 - value / self.none for name, value in found.items()}


def dropout_scores(p: np.ndarray, lost: np.ndarray) -> dict:
    """Score P(dropout) of the zeros against which of them are lost counts."""
    called, n = p > 0.5, lost.sum()
    hits = (called & lost).sum()
    ranked = lost[np.argsort(-p, kind="stable")].cumsum()
    return {
        "precision": float(hits / max(1, called.sum())),
        "recall": float(hits / n),
        "f1": float(2 * hits / (called.sum() + n)),
        "best_f1": float((2 * ranked / (np.arange(1, len(p) + 1) + n)).max()),
    }


def mean_correlation(values: np.ndarray) -> float | None:
    """Mean |r| over pairs of columns; None where fewer than two vary."""
    centred = values - values.mean(0)
    norm = np.linalg.norm(centred, axis=0)
    vary = norm > 1e-6 * np.sqrt(len(values)) * np.abs(values).mean(0)
    if vary.sum() < 2:
        return None
    r = centred[:, vary] / norm[vary]
    r = np.abs(r.T @ r)
    return float((r.sum() - np.trace(r)) / (len(r) * (len(r) - 1)))


# --- parts


def part_mcv(options: argparse.Namespace) -> Iterator[dict]:
    for setting, adata in sets(options):
        for seed in options.seeds:
            train, test = thinned(adata, seed)
            score = CrossValidation(train, test)
            row = {"setting": setting, "seed": seed}
            for name, fit in ours(train, OURS, seed, options):
                mine = row | {"contestant": name}
                for what in ("count", "rate"):
                    counts = imputed(fit, train, what)
                    yield mine | {"answer": what} | score.counts(counts)
                logs = imputed(fit, train, "log1p", library=1e4, depth=score.depth.ravel())
                yield mine | {"answer": "log1p"} | score.of_logs(logs)
            for peer in peers(train, seed, options):
                mine = row | {"contestant": peer.name} | peer.found
                yield mine | {"answer": "counts"} | score.counts(peer.counts)
                logs = readout(peer.counts * ODDS, score.depth)
                yield mine | {"answer": "readout"} | score.of_logs(logs)


def imputed(fit: pyrosc.Fit, adata: ad.AnnData, what: str, **asked) -> np.ndarray:
    return pyrosc.impute(fit, adata, what, n_draws=DRAWS, progress=False, **asked).mean.astype(np.float64)


def part_masking(options: argparse.Namespace) -> Iterator[dict]:
    for setting, adata in sets(options):
        for seed in options.seeds:
            train, (i, j), original = masked(adata, seed)
            for name, answer, counts, found in at_own_depth(train, seed, options):
                error = np.abs(counts[i, j] - original)
                row = {"setting": setting, "seed": seed, "contestant": name, "answer": answer}
                yield row | found | {"median": float(np.median(error)), "mean": float(error.mean())}


def masked(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Corrupt a tenth of the positive counts; return the cells, where that was, and what stood there."""
    rng = np.random.default_rng(seed)
    x = adata.X.toarray()
    i, j = np.nonzero(x)
    some = rng.choice(len(i), len(i) // 10, replace=False)
    i, j = i[some], j[some]
    original = x[i, j].copy()
    x[i, j] *= rng.binomial(1, 0.1, len(i))
    genes, cells = x.sum(0) > 0, x.sum(1) > 0
    kept = cells[i] & genes[j]
    place = (cells.cumsum()[i[kept]] - 1, genes.cumsum()[j[kept]] - 1)
    left = ad.AnnData(
        sparse.csr_matrix(x[cells][:, genes]), obs=adata.obs[cells][[]], var=adata.var[genes][[]]
    )
    return left, place, original[kept]


def at_own_depth(
    train: ad.AnnData, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, str, np.ndarray, dict]]:
    """Yield contestant, answer and counts of every method."""
    for name, fit in ours(train, OURS, seed, options):
        for what in ("count", "rate"):
            yield name, what, imputed(fit, train, what), {}
    for peer in peers(train, seed, options):
        yield peer.name, "counts", peer.counts, peer.found


def part_coverage(options: argparse.Namespace) -> Iterator[dict]:
    for setting, adata in sets(options):
        for seed in options.seeds:
            train, test = thinned(adata, seed)
            tenth = np.array_split(np.argsort(np.asarray(train.X.mean(0)).ravel()), 10)
            some = np.random.default_rng(seed).permutation(train.n_obs)[:COVERED]
            y = test.X[some].toarray()
            for name, fit in ours(train, OURS, seed, options):
                cells = train[some].copy()
                u = ranks(fit, cells, y, options.draws, seed)
                new = {"library": total(cells).ravel() * ODDS, "n_draws": options.draws}
                whole = pyrosc.impute(fit, cells, "predictive", **new, progress=False)
                inside = {
                    "pit": (u >= 0.05) & (u <= 0.95),
                    "interval": (whole.lower <= y) & (y <= whole.upper),
                }
                row = {"setting": setting, "seed": seed, "contestant": name, "answer": "predictive"}
                row["mean_of_decile"] = [float(y[:, genes].mean() / ODDS) for genes in tenth]
                yield row | {
                    kind: [float(v[:, genes].mean()) for genes in tenth] for kind, v in inside.items()
                }


def ranks(fit: pyrosc.Fit, train: ad.AnnData, y: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
    """Randomised ranks of held-out counts among new ones of the same cells, uniform if these are right."""
    u = np.random.default_rng(seed).random(y.shape)
    for start in range(0, len(y), 256):
        cells = slice(start, start + 256)
        rates = pyrosc.multiple_imputation(fit, train[cells], n_draws, seed=start)
        zero = np.mean([np.exp(-ODDS * one.X) for one in rates], axis=0)
        u[cells] *= zero  # of a zero, below which there is nothing
        i, j = np.nonzero(y[cells])
        below, up_to = (
            np.mean([special.pdtr(y[cells][i, j] - less, ODDS * one.X[i, j]) for one in rates], axis=0)
            for less in (1, 0)
        )
        v = u[cells][i, j] / zero[i, j]
        u[start + i, j] = below + v * (up_to - below)
    return u


def part_truth(options: argparse.Namespace) -> Iterator[dict]:
    cells, genes = (150, 60) if options.smoke else (2000, 1000)
    for seed in options.seeds:
        adata = pyrosc.datasets.simulate(
            cells, genes, n_types=6, dropout=0.25, library_mean=4 * genes, inverse_dispersion=3.0, seed=seed
        )
        adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
        zero = adata.X.toarray() == 0
        lost = adata.layers["counts_before_dropout"].toarray()[zero] > 0
        row = {"setting": "dropout", "seed": seed}
        for peer in peers(adata, seed, options, inflated=True):
            found = rate_scores(peer.counts, adata.layers["rate"])
            if peer.pi is not None:
                zero_anyway = (peer.theta / (peer.theta + peer.counts)) ** peer.theta
                p = peer.pi / (peer.pi + (1 - peer.pi) * zero_anyway)
                found |= dropout_scores(p[zero], lost)
            yield row | {"contestant": peer.name, "answer": "counts"} | peer.found | found
        for name, fit in ours(adata, OURS | INFLATED, seed, options):
            dropouts = {}
            if name in INFLATED:
                dropouts = dropout_scores(pyrosc.dropout_probability(fit, adata)[zero], lost)
            for what in ("count", "rate"):
                scores = rate_scores(imputed(fit, adata, what), adata.layers["rate"])
                yield row | {"contestant": name, "answer": what} | scores | dropouts


def rate_scores(counts: np.ndarray, rate: np.ndarray) -> dict:
    """Errors against the true mean; and once the totals are the same."""
    found = {}
    for kind, p in {"": counts, "_scaled": counts * (rate.sum() / counts.sum())}.items():
        found[f"rmse{kind}"] = float(np.sqrt(np.mean((np.log1p(p) - np.log1p(rate)) ** 2)))
        found[f"relative{kind}"] = float(np.abs(p - rate).sum() / rate.sum())
    return found


def part_correlation(options: argparse.Namespace) -> Iterator[dict]:
    cells, genes = (150, 40) if options.smoke else (2000, 500)
    for setting, n_types, changed in (("one", 1, 0.0), ("four", 4, 0.025)):
        for seed in options.seeds:
            adata = pyrosc.datasets.simulate(
                cells, genes, n_types=n_types, de_fraction=changed, batch_sd=0.0, donor_sd=0.0, seed=seed
            )
            adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
            null = ~adata.var["is_de"].to_numpy()
            row = {"setting": setting, "seed": seed}
            for peer in peers(adata, seed, options):
                values, logs = peer.counts, normal_logs(peer.counts)
                yield (
                    row
                    | {"contestant": peer.name, "answer": "counts"}
                    | peer.found
                    | {
                        "logs": mean_correlation(logs[:, null]),
                        "values": mean_correlation(values[:, null]),
                    }
                )
            for name, fit in ours(adata, OURS, seed, options):
                answers = {what: imputed(fit, adata, what) for what in ("share", "rate", "log1p")}
                answers["draw"] = pyrosc.multiple_imputation(fit, adata, 1, seed=seed)[0].X.astype(np.float64)
                for what, values in answers.items():
                    logs = values if what == "log1p" else normal_logs(values)
                    yield (
                        row
                        | {"contestant": name, "answer": what}
                        | {
                            "logs": mean_correlation(logs[:, null]),
                            "values": mean_correlation(values[:, null]),
                        }
                    )


def part_memory(options: argparse.Namespace) -> Iterator[dict]:
    cells, genes, n_draws = (200, 50, 20) if options.smoke else (20_000, 2000, 100)
    simulated = pyrosc.datasets.simulate(cells, genes, base_shape=0.2, library_mean=300.0, seed=0)
    adata = ad.AnnData(simulated.X, var=simulated.var[[]])
    del simulated
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adata.write_h5ad(folder / "cells.h5ad")
        fit = pyrosc.fit_svi(pyrosc.VAE.for_data(adata), adata, epochs=2, device="cpu", progress=False)
        fit.save(folder / "fit")
        for what in MEMORY:
            (folder / "job.json").write_text(json.dumps({"what": what, "n_draws": n_draws}))
            if options.smoke:
                run_job(folder)
            else:
                subprocess.run([sys.executable, __file__, "--job", folder], check=True)
            found = json.loads((folder / "result.json").read_text())
            yield {"setting": f"{cells} x {genes}", "seed": 0, "contestant": "pyrosc", "answer": what} | found


def run_job(folder: Path) -> None:
    """Put one question, in the fresh process; an answer for a few cells comes before."""
    job = json.loads((folder / "job.json").read_text())
    data, fit = pyrosc.from_anndata(ad.read_h5ad(folder / "cells.h5ad")), pyrosc.load(folder / "fit")
    pyrosc.impute(fit, data[:20], job["what"], n_draws=20)
    with peak_memory() as peak:
        start = time.perf_counter()
        answer = pyrosc.impute(fit, data, job["what"], n_draws=job["n_draws"], progress=False)
        seconds = time.perf_counter() - start
    output = sum(part.nbytes for part in (answer.mean, answer.sd, answer.lower, answer.upper))
    found = {"seconds": seconds, "peak_bytes": peak["bytes"], "output_bytes": output}
    if peak["bytes"] is not None:
        found["peak_over_output"] = peak["bytes"] / output
    (folder / "result.json").write_text(json.dumps(found))


PARTS = {
    "mcv": part_mcv,
    "masking": part_masking,
    "coverage": part_coverage,
    "truth": part_truth,
    "correlation": part_correlation,
    "memory": part_memory,
}


# --- what it comes to


def summary(rows: list[dict]) -> list[dict]:
    """Means over the seeds, of which each line names its own."""
    lines = []
    table = pd.DataFrame(rows)
    for names, own in table.groupby(["setting", "contestant", "answer"], sort=False):
        line = dict(zip(("setting", "contestant", "answer"), names, strict=True))
        line["seeds"] = own["seed"].to_list()
        for name in own.columns.drop([*line.keys() - {"seeds"}, "seed", "versions"], errors="ignore"):
            values = own[name].dropna().to_list()
            if values:
                line[name] = np.round(np.mean(values, axis=0), 5).tolist()
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    parser.add_argument("--dca-python", type=Path, help="an interpreter that has dca")
    parser.add_argument("--magic-python", type=Path, help="an interpreter that has magic-impute")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--slow-seeds", nargs="+", type=int, default=[0], help="those of scvi-tools")
    parser.add_argument("--draws", type=int, default=50, help="of coverage")
    parser.add_argument("--output", type=Path, help="default benchmarks/results; none for --smoke")
    parser.add_argument("--smoke", action="store_true", help="toy counts, two epochs, one seed")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.job:
        run_job(options.job)
        return
    options.fit, options.fits = {"epochs": 2} if options.smoke else {}, {}
    if options.smoke:
        options.seeds, options.slow_seeds, options.draws = [0], [0], 20
    else:
        for name in options.sets:
            common.leave_without(options.data, name)
        options.output = options.output or common.RESULTS
    for name in ("peer", "dca", "magic"):
        if not vars(options)[f"{name}_python"]:
            print(f"left out, since there is no --{name}-python")
    record = common.commit() | {"machine": common.machine(), "seeds": options.seeds}
    versions = common.versions("pyrosc", "torch", "scanpy", "scikit-learn", "scipy", "numpy")
    for part in options.parts:
        rows: list[dict] = []
        for row in PARTS[part](options):
            versions |= {row["contestant"]: row.pop("versions")} if "versions" in row else {}
            rows.append(row)
            print(row, flush=True)
            if options.output:
                found = {"versions": versions, "summary": summary(rows), "rows": rows}
                common.write_json(options.output / f"imputation_{part}.json", record | found)
        print(pd.DataFrame(summary(rows)).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
