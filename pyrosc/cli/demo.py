"""``pyrosc demo``: fits real cells and writes down what it found."""

import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from pyrosc import datasets, plots
from pyrosc.criticism.baseline import baseline
from pyrosc.data.counts import Counts
from pyrosc.data.read import from_anndata
from pyrosc.differential.expression import differential_expression
from pyrosc.inference.fit import Fit
from pyrosc.inference.svi import fit_svi
from pyrosc.models import VAE
from pyrosc.posterior.imputation import Imputation
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import LogLikelihood, log_likelihood

_LABELS = "cell_type"
_MARKERS = ("CD79A", "MS4A1", "CD3D", "CD8A", "NKG7", "GNLY", "LYZ", "CST3", "S100A8", "FCER1A", "PPBP")
"""Genes known to mark B cells, T cells, NK cells, monocytes, dendritic cells, platelets."""
_SHOWN = "CD19+ B"
"""The cell type of the volcano."""

_SUMMARY, _CELLS, _TABLE = "summary.txt", "cells.h5ad", "differential_expression.csv"
_LOSSES, _SPACE, _IMPUTED, _VOLCANO = "losses.png", "latent_space.png", "markers.png", "volcano.png"
_FILES = {
    _SUMMARY: "this text",
    "fit/": 'the fitted model: pyrosc.load("fit")',
    _CELLS: 'the cells, with obsm["X_vae"], layers["imputed"] (shares of the counts), obs["cluster"]',
    _TABLE: "each gene in each cell type against the rest",
    _LOSSES: "the losses while fitting",
    _SPACE: "the latent space in two dimensions (t-SNE), by known label and by cluster",
    _IMPUTED: "known marker genes, observed and imputed",
    _VOLCANO: f"{_SHOWN} cells against the rest",
}
_OWN = {*_FILES, "fit/fit.json", "fit/parameters.safetensors"}
_TITLE = "pyrosc demo"

_NEXT = """\
With cells of your own, where adata is an AnnData with whole counts in X:
  import pyrosc
  fit = pyrosc.fit_svi(pyrosc.VAE.for_data(adata), adata)
  adata.obsm["X_vae"] = pyrosc.latent(fit, adata)
With counts in a layer, or batches: data = pyrosc.from_anndata(adata, layer="counts", batch_key="donor"),
and data in the place of adata."""


@dataclass(frozen=True)
class _Findings:
    """What the demo found."""

    adata: AnnData
    fit: Fit
    held_out: LogLikelihood
    held_out_baseline: LogLikelihood
    imputation: Imputation
    table: pd.DataFrame


def demo(output: Path, *, epochs: int | None = None, smoke: bool = False, seed: int = 0) -> str:
    """Fit a VAE to real blood cells; write a folder and print what was found.

    Parameters
    ----------
    output
        Folder to write: new, empty, or of an earlier demo, which is then replaced.
    epochs
        Of the VAE; by default chosen from the data.
    smoke
        Take fewer draws, and fewer steps for the baseline: figures are rough.
    seed
        Of the split into training and test cells, of the fit and of the clusters.

    Returns
    -------
    str
        The summary, which is also printed and written.

    Raises
    ------
    SystemExit
        If scanpy, which has the cells, is missing, or the folder holds something else.
    """
    start = time.perf_counter()
    adata = _real_cells()
    _claim(output)
    data = from_anndata(adata, labels_key=_LABELS)
    order = np.random.default_rng(seed).permutation(data.n_cells)
    test, train = np.sort(order[: data.n_cells // 5]), np.sort(order[data.n_cells // 5 :])
    _say(f"1/4 fitting a VAE to {len(train)} cells")
    fit = fit_svi(VAE.for_data(data[train], seed=seed), data[train], epochs=epochs, seed=seed)
    _say("2/4 fitting the baseline, in which all cells are alike")
    alike = baseline(data[train], seed=seed, **({"epochs": 2} if smoke else {}))
    _say("3/4 asking: held-out cells, latent space, imputation, differential expression")
    n_draws = 5 if smoke else 100
    imputation = impute(fit, data, n_draws=n_draws // 2)
    found = _Findings(
        _annotated(adata, fit, data, imputation, test, seed),
        fit,
        log_likelihood(fit, data[test], n_draws),
        log_likelihood(alike, data[test], 1),
        imputation,
        differential_expression(fit, data, groupby=_LABELS),
    )
    _say(f"4/4 writing {output}")
    _write(output, found, data)
    text = _summary(found, output, time.perf_counter() - start)
    (output / _SUMMARY).write_text(text + "\n", encoding="utf-8")
    print(text)
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stop(why: str) -> NoReturn:
    """End the program with a message and status 1."""
    msg = f"pyrosc demo: {why}"
    raise SystemExit(msg)


def _real_cells() -> AnnData:
    try:
        return datasets.pbmc68k_reduced()
    except (ImportError, RuntimeError) as error:
        _stop(str(error))


def _claim(output: Path) -> None:
    """Make the folder, or take that of an earlier demo; end the program if it is something else's."""
    remedy = "Nothing was written. Choose another: pyrosc demo --output DIR"
    if output.exists() and not output.is_dir():
        _stop(f"{output} is no folder. {remedy}")
    names = (path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    if others := list(islice((name for name in names if name not in _OWN), 3)):
        _stop(f"{output} holds files that are no pyrosc demo's ({', '.join(others)}). {remedy}")
    summary = output / _SUMMARY
    if any(output.rglob("*")) and not (summary.exists() and summary.read_bytes().startswith(_TITLE.encode())):
        _stop(f"{output} is not empty and has no {_SUMMARY} of an earlier demo. {remedy}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        summary.write_text(f"{_TITLE}: not finished\n", encoding="utf-8")
    except OSError as error:
        _stop(f"can't write to {output}: {error.strerror}. {remedy}")


def _annotated(
    adata: AnnData, fit: Fit, data: Counts, imputation: Imputation, test: np.ndarray, seed: int
) -> AnnData:
    """Return a copy with the latent space, its layout and clusters, imputed shares, and who was held out."""
    adata = adata.copy()
    z = latent(fit, data)
    adata.obsm["X_vae"] = z
    adata.obsm["X_vae_tsne"] = plots.layout(z, seed=seed)
    imputation.to_layer(adata, "imputed")
    adata.obs["cluster"] = _named(_clusters(z, len(data.schema.labels), seed), adata.obs[_LABELS])
    adata.obs["held_out"] = np.isin(np.arange(len(adata)), test)
    return adata


def _clusters(z: np.ndarray, n: int, seed: int) -> np.ndarray:
    return KMeans(n, n_init=10, random_state=seed).fit_predict(z)


def _named(clusters: np.ndarray, labels: pd.Series) -> pd.Series:
    """Name each cluster after the label that most of its cells have, in the order of the labels."""
    kinds = labels.cat.categories
    counts = np.zeros((clusters.max() + 1, len(kinds)), int)
    np.add.at(counts, (clusters, labels.cat.codes), 1)
    most = counts.argmax(1)
    order = most.argsort(kind="stable")
    names = [f"{i}: mostly {kinds[most[cluster]]}" for i, cluster in enumerate(order, start=1)]
    named = pd.Categorical.from_codes(order.argsort()[clusters], dtype=pd.CategoricalDtype(names))
    return pd.Series(named, index=labels.index)


def _write(output: Path, found: _Findings, data: Counts) -> None:
    """Write all but the summary."""
    found.fit.save(output / "fit")
    found.adata.write_h5ad(output / _CELLS)
    found.table.to_csv(output / _TABLE, index=False, float_format="%.5g")
    markers = [gene for gene in _MARKERS if gene in data.schema.genes]
    both = Figure(figsize=(13, 4.8), layout="constrained")
    both.suptitle("t-SNE of the latent space", fontsize="x-large")
    left, right = both.subplots(1, 2)
    xy, obs = found.adata.obsm["X_vae_tsne"], found.adata.obs
    plots.embedding(xy, obs[_LABELS], title="known labels (cells)", ax=left)
    plots.embedding(xy, obs["cluster"], title="k-means clusters (cells)", ax=right)
    pictures = {
        _LOSSES: plots.history(found.fit).figure,
        _SPACE: both,
        _IMPUTED: plots.imputed_against_observed(found.imputation, data, _LABELS, markers)[0].figure,
        _VOLCANO: plots.volcano(found.table[found.table.group == _SHOWN]).figure,
    }
    for name, picture in pictures.items():
        picture.savefig(output / name, dpi=120)


def _summary(found: _Findings, output: Path, seconds: float) -> str:
    """Say what was found."""
    adata, fit = found.adata, found.fit
    n_fitted = adata.n_obs - len(found.held_out.nats)
    parts = [
        f"{_TITLE}: {adata.n_obs} blood cells x {adata.n_vars} genes of one donor (Zheng et al. 2017), "
        f"{len(adata.obs[_LABELS].cat.categories)} known cell types",
        f"A VAE was fitted to {n_fitted} of the cells, without their types, in {len(fit.history)} epochs "
        f"(kept: {fit.found.best_epoch + 1}). All took {seconds:.0f} s.",
        _held_out_text(found),
        _clusters_text(found),
        _genes_text(found),
        "\n".join([f"Written to {output}/", *(f"  {name:<27} {what}" for name, what in _FILES.items())]),
        _NEXT,
    ]
    return "\n\n".join(parts)


def _held_out_text(found: _Findings) -> str:
    model, alike = found.held_out, found.held_out_baseline
    gain = model.nats - alike.nats
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    better = f"+- {error:.1f} (standard error); above 0 in {(gain > 0).mean():.0%} of the cells"
    return f"""\
Does it describe cells that it has not seen? Mean log likelihood of {len(gain)} held-out cells, nats per cell:
  VAE                            {model.mean:9.1f}   (from {model.n_draws} draws a cell; a lower bound)
  no structure: all cells alike  {alike.mean:9.1f}
  gain                           {gain.mean():+9.1f}   {better}"""


def _clusters_text(found: _Findings) -> str:
    obs, obsm = found.adata.obs, found.adata.obsm
    labels = obs[_LABELS].astype(str)
    merged = labels.where(~labels.str.startswith(("CD4+/", "CD8+")), "T")
    n, n_merged, seed = labels.nunique(), merged.nunique(), found.fit.settings["seed"]
    ari = adjusted_rand_score
    vae, pca = ari(labels, obs["cluster"]), ari(labels, _clusters(obsm["X_pca"], n, seed))
    few_vae, few_pca = (ari(merged, _clusters(obsm[key], n_merged, seed)) for key in ("X_vae", "X_pca"))
    return f"""\
Do clusters agree with the known types? Adjusted Rand index (1: the same groups, 0: chance) of k-means on
  {"":<42} the VAE's latent space   scanpy's 50 PCs
  {f"{n} clusters, {n} labels":<42} {vae:>12.2f} {pca:>23.2f}
  {f"{n_merged} clusters, the T-cell labels taken as one":<42} {few_vae:>12.2f} {few_pca:>23.2f}
The labels are those of the sorted population whose average is most like the cell: noisy among T cells.
The PCs were made from the expression of all 700 cells; the VAE saw the counts of four in five."""


def _genes_text(found: _Findings) -> str:
    sizes = found.adata.obs[_LABELS].value_counts()
    lines = []
    for group, table in found.table[found.table.is_de].groupby("group", observed=True):
        up = table[table.lfc_mean > 0].sort_values("lfc_lower", ascending=False)
        counts = f"{len(up)} genes higher, {len(table) - len(up)} lower"
        lines.append(f"  {group} ({sizes[group]} cells; {counts}):\n    {', '.join(up.gene[:8]) or 'none'}")
    return "\n".join(
        [
            "Which genes differ in a cell type against the rest? Calls at an expected false discovery rate",
            "of 5 % over all types together. Named are genes that are higher by the widest margin: the lower",
            "end of the fold change's 90 % interval decides. The labels came from expression, so this shows",
            "what defines a label; and one donor says nothing about others.",
            *lines,
        ]
    )
