"""Expression imputed and observed, gene by gene and group by group."""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.plots.style import BLUE, GREY, SKY, Number
from pyrosc.posterior.imputation import Imputation


def imputed_against_observed(
    imputation: Imputation,
    data: Counts | anndata.AnnData,
    groupby: str,
    genes: Sequence[str],
    *,
    per: Number = 1000,
    axes: Sequence[Axes] | np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draw what was counted of marker genes, and what a fit makes of it, in each group of cells.

    For each group two rows of dots, one for each cell: above, in grey, the counts observed, divided by the
    cell's total; below, in blue, the imputed expression. Black and blue strokes are the means of each row;
    the blue bar is the posterior interval of a cell, averaged over the group's cells.

    Parameters
    ----------
    imputation
        Of :func:`~pyrosc.impute`, in shares.
    data
        The cells that were imputed: Counts, or an AnnData with counts in X.
    groupby
        Column of ``obs``. Missing values are left out.
    genes
        Names of the genes, one for each panel.
    per
        Expression is drawn as counts in so many of the cell's counts, on a scale that is linear below one and
        logarithmic above.
    axes
        As many Axes as genes; by default those of a new figure.
    seed
        Of the scatter across a row.

    Returns
    -------
    ndarray of Axes
        One for each gene.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a gene is unknown, the imputation is no share or of other cells, or the axes are too few or many.

    Examples
    --------
    >>> import pyrosc
    >>> from pyrosc import plots
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> imputed = pyrosc.impute(fit, adata)
    >>> axes = plots.imputed_against_observed(imputed, adata, "cell_type", ["gene_0", "gene_1"])
    >>> [ax.get_title() for ax in axes]
    ['gene_0', 'gene_1']
    """
    data = as_counts(data)
    _check_markers(imputation, data, groupby, genes)
    groups = pd.Categorical(data.obs[groupby]).remove_unused_categories()
    if axes is None:
        axes = _panels(len(genes), len(groups.categories))
    if len(axes) != len(genes):
        msg = f"{len(genes)} genes need as many axes, not {len(axes)}"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    for ax, gene in zip(axes, genes, strict=True):
        at = list(imputation.gene_names).index(gene)
        counted = data.x[:, [data.schema.genes.index(gene)]].toarray().ravel()
        imputed = (imputation.mean[:, at], imputation.lower[:, at], imputation.upper[:, at])
        for i, _ in enumerate(groups.categories):
            mine = groups.codes == i
            _row(ax, i, per * (counted / data.library)[mine], [per * part[mine] for part in imputed], rng)
        _finish(ax, gene, [str(name) for name in groups.categories], per)
    return np.asarray(axes)


def _check_markers(imputation: Imputation, data: Counts, groupby: str, genes: Sequence[str]) -> None:
    if groupby not in data.obs:
        msg = f"no column {groupby!r} in obs; it has {list(data.obs.columns)}"
        raise KeyError(msg)
    if not imputation.unit.startswith("share"):
        msg = f'the imputation must be of shares, impute(..., what="share"); it is of {imputation.unit}'
        raise ValueError(msg)
    if not np.array_equal(imputation.cell_names, data.cell_names):
        msg = "the imputation is of other cells than the data: impute these"
        raise ValueError(msg)
    known = {*imputation.gene_names} & {*data.schema.genes}
    if unknown := [gene for gene in genes if gene not in known]:
        msg = f"not in the imputation and the data: gene {', '.join(unknown[:5])}"
        raise ValueError(msg)


def _panels(n: int, n_groups: int) -> np.ndarray:
    """Return the axes of a new figure with a legend, up to five in a row, names of groups at the left."""
    rows = max(1, -(-n // 5))
    columns = max(1, -(-n // rows))
    figure = Figure(figsize=(2.6 + 2.2 * columns, 0.6 + rows * (0.9 + 0.34 * n_groups)), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.remove()
    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 4}
    stroke: dict[str, Any] = {"marker": "|", "ls": "", "ms": 11, "mew": 2.2}
    handles = [
        Line2D([], [], color=GREY, label="observed, a cell", **dot),
        Line2D([], [], color="black", label="observed, mean", **stroke),
        Line2D([], [], color=SKY, label="imputed, a cell", **dot),
        Line2D([], [], color=BLUE, label="imputed, mean", **stroke),
        Line2D([], [], color=BLUE, lw=1.4, label="interval of a cell (average)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5 if columns > 2 else 2, frameon=False)
    return axes[:n]


def _row(
    ax: Axes, at: int, observed: np.ndarray, imputed: Sequence[np.ndarray], rng: np.random.Generator
) -> None:
    """Draw a group: observed above the line `at`, imputed below, the y axis pointing down."""
    mean, lower, upper = imputed
    up, down = (at + centre + rng.uniform(-0.13, 0.13, len(mean)) for centre in (-0.2, 0.2))
    dots: dict[str, Any] = {"s": 5, "lw": 0, "rasterized": True}
    ax.scatter(observed, up, c=GREY, alpha=0.6, **dots)
    ax.scatter(mean, down, c=SKY, alpha=0.6, **dots)
    ax.plot([observed.mean()] * 2, [at - 0.38, at - 0.02], color="black", lw=2.2)
    ax.plot([lower.mean(), upper.mean()], [at + 0.2] * 2, color=BLUE, lw=1.4)
    ax.plot([mean.mean()] * 2, [at + 0.02, at + 0.38], color=BLUE, lw=2.2)


def _finish(ax: Axes, gene: str, names: list[str], per: Number) -> None:
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ax.set_xlim(left=-0.15)
    high = ax.get_xlim()[1]
    ticks = [tick for tick in (0, 1, 10, 100, 1000, 10_000, 100_000) if tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    for at in range(0, len(names), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="0.95", lw=0, zorder=0)
    ax.set_title(gene, style="italic")
    ax.set_xlabel(f"counts in {per:,g}")
    ax.spines[["top", "right"]].set_visible(False)
