r"""Differential expression: how many true genes are found, how many calls are false, what intervals cover.

simulated  300 genes, 40 of them changed two-fold; base ~ Gamma(.6, scale 1.5) + .3 counts, library factor
           LogNormal(0, .3), counts Poisson(Gamma(3, mean / 3)). Settings:
             plain     750 cells against 750
             small     30 against 30
             batches   three batches, log-sd .5; the first two confounded 80/20 with the condition
             half      half the depth
             donors    three donors against three, log-sd .35 of each donor and gene
             nobody    the same without a changed gene: every call is false
             uneven    as donors, and the genes' log-sd differ: .35 times a log-normal, log-sd .5
             six       the same with six donors against six
             one way   750 against 750, all 40 up four-fold: the shares of all others fall by a quarter
           `found` and `fdp` at the nominal rate of .05; `found_at_5` of the longest ranking whose true false
           discovery proportion is at most .05; `cover` of 90% intervals, over all genes; `curve`, the false
           discovery proportion at nominal 1, 5, 10 and 20%. Fold changes are compared with the true ones, and
           where a contestant's are of shares of the counts (all but pyrosc's and deseq2's) with those.
halves     random halves of cells that are alike, 50 times: pbmc3k's most frequent type, and controls of
           kang_ifnb's (all donors; `donors`: four donors against the other four, also of the second
           type); genes called at .05, and
           at each nominal level the share of splits with a call, which is the false discovery rate here.
kang       kang_ifnb, stimulated against control within a type, cells with a published label, donors as
           replicates: area under the concordance curve of the top 500 genes with the authors' table
           (kang_reference_de.csv.gz, ranked by |stat|; fewer where it lists fewer). That table lists only
           genes with |log2 fold change| >= 1: `pyrosc, 1` and `deseq2, 1` are asked that very question, for
           changes beyond 1 (delta; lfc_null and greaterAbs). `aucc_deseq2` is the agreement with pydeseq2's
           top 500 (plain Wald tests) of the same cells.
splatter   splatter_2batch_drop025, group 2 against group 1 in two batches: power at a true false discovery
           proportion of .05, calls at the nominal one, and the error of the fold changes.

Contestants: `pyrosc`, differential_expression(estimand="mean"), told of batches and donors; `ash`, a normal
mixture with mode 0 and delta-method errors for the raw log ratios of group means; `wilcoxon`, scanpy's on
log1p of counts per median total, Benjamini-Hochberg; `pseudobulk` (donors only), t tests of log counts per
million of each donor's sum, paired where donors have both sides, Benjamini-Hochberg; `scvi`, scvi-tools'
change mode with its defaults (delta .25, fdr .05) and the batch key, `--scvi-seeds` of them; `deseq2`,
pydeseq2 on the donors' sums, donors in the design where they have both sides, and in splatter, which has no
donors, on cells as samples, batches in the design.

    python benchmarks/differential.py --data DIR --peer-python PEER/bin/python
    python benchmarks/differential.py --parts simulated --seeds 0 1 2
    python benchmarks/differential.py --contestants scvi --peer-python PEER/bin/python
    python benchmarks/differential.py --smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import common
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse, stats

import pyrosc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEVELS = np.array([0.01, 0.05, 0.1, 0.2])
SETTINGS = ("plain", "small", "batches", "half", "donors", "nobody", "one way", "uneven", "six")
PEERS = Path(__file__).parent / "peers"
DELTA = 0.25
RELATIVE = ("pyrosc", "deseq2")  # their fold changes are relative to what most genes do


# --- contestants: from counts, sides (0 or 1), batches and donors (or None) to one table


def by_pyrosc(adata: ad.AnnData, delta: float = DELTA) -> pd.DataFrame:
    data = pyrosc.from_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
    donors = "donor" if "donor" in adata.obs else None
    with warnings.catch_warnings(action="ignore"):
        table = pyrosc.differential_expression(
            data, groupby="side", group="1", delta=delta, replicate_key=donors
        )
    table = table.set_index("gene").loc[adata.var_names]
    # (What ranks is the error of a call, and the evidence where that is too small to tell.)
    rank = np.lexsort((-(table.lfc_mean / table.lfc_sd).abs(), table.expected_fdr)).argsort()
    return result(table.lfc_mean, table.expected_fdr, rank, table.lfc_lower, table.lfc_upper)


def by_ash(adata: ad.AnnData) -> pd.DataFrame:
    """Empirical-Bayes shrinkage of log ratios (Stephens 2017), its weights by EM."""
    x, side = adata.X.toarray(), adata.obs.side.to_numpy() == "1"
    rate = x / x.sum(1, keepdims=True) * np.median(x.sum(1))
    means = [rate[mine].mean(0) + 0.5 / mine.sum() for mine in (side, ~side)]
    errors = [
        rate[mine].std(0) / np.sqrt(mine.sum()) / m for mine, m in zip((side, ~side), means, strict=True)
    ]
    lfc = np.log2(means[0] / means[1])
    error = np.maximum(np.hypot(*errors) / np.log(2), 1e-3)
    sds = np.r_[0.01, 0.05 * 2.0 ** np.arange(7)]
    density = stats.norm.pdf(lfc[:, None], 0, np.hypot(error[:, None], sds))
    weights = np.full(len(sds), 1 / len(sds))
    for _ in range(500):
        parts = density * weights
        weights = (parts / parts.sum(1, keepdims=True)).mean(0)
    parts /= parts.sum(1, keepdims=True)
    shrunk = sds**2 / (sds**2 + error[:, None] ** 2)
    mean, sd = shrunk * lfc[:, None], np.sqrt(shrunk) * error[:, None]
    up, down = ((parts * stats.norm.sf(DELTA, s * mean, sd)).sum(1) for s in (1, -1))
    wrong = 1 - np.maximum(up, down)
    order = wrong.argsort(kind="stable")
    expected = np.empty_like(wrong)
    expected[order] = wrong[order].cumsum() / np.arange(1, len(wrong) + 1)
    centre, spread = (
        (parts * mean).sum(1),
        np.sqrt((parts * (sd**2 + mean**2)).sum(1) - (parts * mean).sum(1) ** 2),
    )
    low, high = centre - 1.645 * spread, centre + 1.645 * spread
    rank = np.lexsort((-np.abs(centre / spread), wrong)).argsort()
    return result(centre, expected, rank, low, high)


def by_wilcoxon(adata: ad.AnnData) -> pd.DataFrame:
    logged = adata.copy()
    sc.pp.normalize_total(logged)
    sc.pp.log1p(logged)
    sc.tl.rank_genes_groups(logged, "side", groups=["1"], reference="0", method="wilcoxon")
    table = sc.get.rank_genes_groups_df(logged, "1").set_index("names").loc[adata.var_names]
    rank = np.argsort(-table.scores.abs(), kind="stable").argsort()
    return result(table.logfoldchanges, table.pvals_adj, rank)


def by_pseudobulk(adata: ad.AnnData) -> pd.DataFrame:
    """T tests of each donor's log counts per million."""
    unit = adata.obs.groupby(["donor", "side"], observed=True).ngroup().to_numpy()
    member = sparse.csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))))
    sums = (member @ adata.X).toarray()
    log = np.log2((sums + 0.5) / (sums.sum(1, keepdims=True) + 1) * 1e6)
    rows = adata.obs.groupby(["donor", "side"], observed=True).size().reset_index()
    one, zero = (pd.DataFrame(log[rows.side == s], index=rows.donor[rows.side == s]) for s in ("1", "0"))
    shared = one.index.intersection(zero.index)
    paired = len(shared) > 1
    one, zero = (one.loc[shared], zero.loc[shared]) if paired else (one, zero)
    with np.errstate(all="ignore"):
        p = (stats.ttest_rel if paired else stats.ttest_ind)(one, zero).pvalue
    p = np.where(np.isfinite(p), p, 1.0)
    lfc = one.mean(0).to_numpy() - zero.mean(0).to_numpy()
    return result(lfc, stats.false_discovery_control(p), p.argsort(kind="stable").argsort())


def by_scvi(adata: ad.AnnData, python: Path, seed: int, fit: dict) -> pd.DataFrame:
    """Ask scvi-tools in an interpreter of its own."""
    table = answer(adata, python, "scvi_de.py", {"seed": seed, "fit": fit, "delta": DELTA})
    rank = table.proba_not_de.argsort(kind="stable").argsort()
    return result(table.lfc_mean, table.expected_fdr, rank)


def by_deseq2(adata: ad.AnnData, python: Path, beyond: float = 0.0) -> pd.DataFrame:
    """Ask pydeseq2 in an interpreter of its own; genes that it leaves out are not called."""
    table = answer(adata, python, "deseq2_de.py", {"beyond": beyond}).fillna(
        {"lfc_mean": 0, "stat": 0, "padj": 1}
    )
    return result(table.lfc_mean, table.padj, np.argsort(-table.stat.abs(), kind="stable").argsort())


def answer(adata: ad.AnnData, python: Path, script: str, job: dict) -> pd.DataFrame:
    """Return the table that a peer's program makes of the cells."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adata.write_h5ad(folder / "cells.h5ad")
        (folder / "job.json").write_text(json.dumps(job))
        subprocess.run([python, PEERS / script, folder], check=True, stdout=subprocess.DEVNULL)
        table = pd.read_csv(folder / "answer.csv", index_col=0)
    table.index = table.index.astype(str)
    return table.loc[adata.var_names]


def result(lfc, expected, rank, lower=None, upper=None) -> pd.DataFrame:
    """Fold change, nominal rate at which a gene is called, its place in the ranking, and 90% interval."""
    columns = {"lfc": lfc, "expected": expected, "rank": rank, "lower": lower, "upper": upper}
    return pd.DataFrame({name: None if v is None else np.asarray(v) for name, v in columns.items()})


# --- scores


def scores(table: pd.DataFrame, true: np.ndarray, changed: np.ndarray) -> dict:
    found = {"rmse": float(np.sqrt(np.mean((table.lfc - true) ** 2)))}
    called = table.expected.to_numpy()[:, None] <= LEVELS
    fdp = (called & ~changed[:, None]).sum(0) / np.maximum(1, called.sum(0))
    found |= {"curve": fdp.tolist(), "fdp": float(fdp[1]), "called": int(called[:, 1].sum())}
    found["found"] = int((called[:, 1] & changed).sum())
    best = changed[table["rank"].to_numpy().argsort()]
    proportion = (~best).cumsum() / np.arange(1, len(best) + 1)
    longest = np.flatnonzero(proportion <= 0.05)
    found["found_at_5"] = int(best[: longest[-1] + 1].sum()) if len(longest) else 0
    if table.lower.notna().all():
        inside = (table.lower <= true) & (true <= table.upper)
        found |= {"cover": float(inside.mean())}
        found |= {"cover_changed": float(inside[changed].mean())} if changed.any() else {}
    return found


def concordance(a: pd.Index, b: pd.Index, k: int) -> float:
    """Area under the concordance curve of two rankings' first k, as a share of its largest value."""
    places = pd.DataFrame({"a": pd.Series(range(k), a[:k]), "b": pd.Series(range(k), b[:k])}).max(
        axis=1, skipna=False
    )
    shared = np.searchsorted(np.sort(places.dropna()), np.arange(k), side="right")
    return float(shared.sum() / (k * (k + 1) / 2))


# --- parts


def simulated(setting: str, seed: int, scale: float = 1.0) -> tuple[ad.AnnData, np.ndarray, float]:
    """Draw counts; return them, true log2 fold changes, and what those of shares are less than these."""
    rng = np.random.default_rng([seed, SETTINGS.index(setting)])
    genes, n = 300, 60 if setting == "small" else int(1500 * scale)
    base = rng.gamma(0.6, 1.5, genes) + 0.3
    lfc = np.r_[np.ones(20), -np.ones(20), np.zeros(genes - 40)] * (setting != "nobody")
    lfc = 2 * np.abs(lfc) if setting == "one way" else lfc
    side = np.arange(n) % 2
    log = np.log(base) + np.log(2) * lfc * side[:, None]
    obs = pd.DataFrame({"side": side.astype(str)}, index=[f"c{i}" for i in range(n)])
    if setting == "batches":
        of_side = np.array([[0.2, 0.8, 0.5], [0.8, 0.2, 0.5]])
        batch = np.array([rng.choice(3, p=p / p.sum()) for p in of_side[side]])
        log = log + rng.normal(0, 0.5, (3, genes))[batch]
        obs["batch"] = batch.astype(str)
    if setting in ("donors", "nobody", "uneven", "six"):
        donors = 6 if setting == "six" else 3  # of either side
        donor = 2 * rng.integers(0, donors, n) + side
        sd = 0.35 * (rng.lognormal(0, 0.5, genes) if setting in ("uneven", "six") else 1)
        log = log + rng.normal(0, sd, (2 * donors, genes))[donor]
        obs["donor"] = donor.astype(str)
    mean = np.exp(log) * rng.lognormal(0, 0.3, (n, 1)) * (0.5 if setting == "half" else 1)
    x = rng.poisson(rng.gamma(3, mean / 3)).astype(np.float32)
    return ad.AnnData(sparse.csr_matrix(x), obs=obs), lfc, np.log2((base * 2**lfc).sum() / base.sum())


def part_simulated(options: argparse.Namespace) -> Iterator[dict]:
    for setting in ("batches", "nobody") if options.smoke else SETTINGS:
        for seed in options.seeds:
            adata, true, less = simulated(setting, seed, 0.2 if options.smoke else 1.0)
            for name, ask in contestants(adata, seed, options):
                row = {"setting": setting, "seed": seed, "contestant": name}
                yield row | scores(ask(adata), true - less * (name not in RELATIVE), true != 0)


def contestants(adata: ad.AnnData, seed: int, options: argparse.Namespace) -> list[tuple[str, Callable]]:
    known = [("pyrosc", by_pyrosc), ("ash", by_ash), ("wilcoxon", by_wilcoxon)]
    known += [("pseudobulk", by_pseudobulk)] * ("donor" in adata.obs)
    if options.peer_python and seed in options.scvi_seeds:
        fit = {"max_epochs": 2} if options.smoke else {}
        known.append(("scvi", lambda cells: by_scvi(cells, options.peer_python, seed, fit)))
    if options.deseq2_python and "donor" in adata.obs and seed >= 0:
        known.append(("deseq2", lambda cells: by_deseq2(cells, options.deseq2_python)))
    return [(name, ask) for name, ask in known if name in (options.contestants or [name])]


def part_halves(options: argparse.Namespace) -> Iterator[dict]:
    pbmc, kang = (common.load(options.data, name) for name in ("pbmc3k", "kang_ifnb"))
    kang = kang[kang.obs.condition == "ctrl"]
    first, second = kang.obs.cell_type.value_counts().index[:2]
    for name, adata, kind in (
        ("pbmc3k", pbmc, pbmc.obs.cell_type.value_counts().index[0]),
        ("kang_ifnb", kang, first),
        ("kang_ifnb, donors", kang, first),
        ("kang_ifnb, donors, second type", kang, second),
    ):
        adata = adata[adata.obs.cell_type == kind]
        adata = common.with_variable_genes(adata[:, np.asarray((adata.X > 0).sum(0)).ravel() >= 3])
        donors = adata.obs.get("donor")
        adata.obs = pd.DataFrame(index=adata.obs_names)
        for split in range(2 if options.smoke else 50):
            rng = np.random.default_rng(split)
            if "donors" in name:
                some = rng.permutation(donors.unique())[: donors.nunique() // 2]
                side, adata.obs["donor"] = donors.isin(some).to_numpy(), donors.astype(str)
            else:
                side = rng.permutation(adata.n_obs) % 2 == 0
            adata.obs["side"] = np.where(side, "1", "0")
            for contestant, ask in contestants(adata, -1, options):
                called = ask(adata).expected.to_numpy()[:, None] <= LEVELS
                yield {
                    "setting": name,
                    "seed": split,
                    "contestant": contestant,
                    "calls": called.sum(0).tolist(),
                }


def part_kang(options: argparse.Namespace) -> Iterator[dict]:
    adata = common.load(options.data, "kang_ifnb")
    adata = adata[adata.obs.label_source != "logreg transfer"].copy()
    published = pd.read_csv(options.data / "kang_reference_de.csv.gz")
    for kind in published.cell_type.unique():
        mine = adata[adata.obs.cell_type == kind]
        mine = mine[:, np.asarray((mine.X > 0).sum(0)).ravel() >= 3].copy()
        mine.obs["side"] = np.where(mine.obs.condition == "stim", "1", "0")
        mine.obs = mine.obs[["side", "donor"]].astype(str)
        listed = published[(published.cell_type == kind) & published.gene.isin(mine.var_names)]
        listed = listed.loc[listed.stat.abs().sort_values(ascending=False).index].drop_duplicates("gene")
        k = min(500, len(listed))
        known = dict(contestants(mine, 0, options))
        if "pyrosc" in known:
            known["pyrosc, 1"] = lambda cells: by_pyrosc(cells, 1.0)
        if "deseq2" in known:
            known["deseq2, 1"] = lambda cells: by_deseq2(cells, options.deseq2_python, 1.0)
        tables = {name: ask(mine) for name, ask in known.items()}
        ranked = {name: mine.var_names[table["rank"].to_numpy().argsort()] for name, table in tables.items()}
        for name, table in tables.items():
            row = {"setting": kind, "contestant": name, "cells": mine.n_obs, "k": k}
            row["called"] = int((table.expected <= 0.05).sum())
            row["aucc"] = concordance(ranked[name], pd.Index(listed.gene), k)
            if "deseq2" in tables and name not in ("deseq2", "deseq2, 1"):
                row["aucc_deseq2"] = concordance(ranked[name], ranked["deseq2"], 500)
            yield row


def part_splatter(options: argparse.Namespace) -> Iterator[dict]:
    adata = common.load(options.data, "splatter_2batch_drop025")
    one, two = (adata.var.GeneMean * adata.var[f"DEFacGroup{i}"] for i in (1, 2))
    true, less = adata.var.true_log2fc_group2_vs_group1.to_numpy(), np.log2(two.sum() / one.sum())
    changed = adata.var.is_de.to_numpy(dtype=bool)
    adata.obs["side"] = np.where(adata.obs.cell_type == "Group2", "1", "0")
    known = contestants(adata, 0, options)
    if options.deseq2_python and "deseq2" in (options.contestants or ["deseq2"]):
        known.append(("deseq2", lambda cells: by_deseq2(cells, options.deseq2_python)))
    for name, ask in known:
        yield {"setting": "splatter", "contestant": name, "n_changed": int(changed.sum())} | scores(
            ask(adata), true - less * (name not in RELATIVE), changed
        )


PARTS = {"simulated": part_simulated, "halves": part_halves, "kang": part_kang, "splatter": part_splatter}


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds, and medians of calls."""
    lines = []
    table = pd.DataFrame(rows)
    for (setting, contestant), own in table.groupby(["setting", "contestant"], sort=False):
        line = {"setting": setting, "contestant": contestant, "n": len(own)}
        for name in own.columns.drop(["setting", "contestant", "seed"], errors="ignore"):
            values = own[name].dropna()
            if name in ("curve", "calls") and len(values):
                line[name] = np.mean(values.to_list(), axis=0).round(4).tolist()
            elif len(values):
                line[name] = round(float(values.mean()), 4)
        if "calls" in own:
            line["median_calls"] = float(np.median([calls[1] for calls in own.calls]))
            line["splits_with_calls"] = np.mean(np.array(own.calls.to_list()) > 0, axis=0).round(4).tolist()
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=common.DATA, help="folder of the .h5ad files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools")
    parser.add_argument("--deseq2-python", type=Path, help="an interpreter that has pydeseq2")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(20)))
    parser.add_argument("--scvi-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", help="only these; by default all that are at hand")
    parser.add_argument("--output", type=Path, help="default benchmarks/results; none for --smoke")
    parser.add_argument("--smoke", action="store_true", help="few cells, one seed, no file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.smoke:
        options.parts, options.seeds, options.scvi_seeds = ["simulated"], [0], [0]
    else:
        for name in ("pbmc3k", "kang_ifnb", "splatter_2batch_drop025"):
            common.leave_without(options.data, name)
        options.output = options.output or common.RESULTS
    record = common.commit() | {"machine": common.machine(), "levels": LEVELS.tolist()}
    record["versions"] = common.versions("pyrosc", "torch", "scanpy", "scipy", "numpy")
    for part in options.parts:
        rows = list(PARTS[part](options))
        lines = summary(rows)
        print(pd.DataFrame(lines).to_string(index=False), flush=True)
        if options.output:
            found = {"seeds": options.seeds, "summary": lines, "rows": rows}
            common.write_json(options.output / f"differential_{part}.json", record | found)


if __name__ == "__main__":
    main()
