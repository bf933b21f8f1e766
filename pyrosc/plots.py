"""Pictures of a fit, a latent space, an imputation, a table: matplotlib, without pyplot.

Every function draws into the Axes it is given, or into a new figure, and returns the Axes; nothing global is
read or changed. To keep a picture: ``plots.history(fit).figure.savefig("history.png")``.
"""

from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox, BboxBase
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from pyrosc.calibration import NullCalibration
from pyrosc.counts import Counts
from pyrosc.imputation import Imputation
from pyrosc.reading import as_counts
from pyrosc.svi import Fit

__all__ = ["calibration", "embedding", "history", "imputed_against_observed", "layout", "volcano"]

BLUE, ORANGE, SKY, GREEN = "#0072B2", "#D55E00", "#56B4E9", "#009E73"
PALETTE = (BLUE, "#E69F00", GREEN, "#CC79A7", SKY, ORANGE, "#332288", "#999933", "black", "#882255")
"""Okabe and Ito's colours, which colour-blind readers tell apart, with indigo, olive and wine for yellow."""
MARKERS = "os^Dv"
GREY = "0.6"

Number = float | int  # beartype does not take 5 for a float


def _axes(ax: Axes | None, width: Number, height: Number) -> Axes:
    """Return `ax`, or the axes of a new figure of a size in inches."""
    if ax is None:
        ax = Figure(figsize=(width, height), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def history(fit: Fit, *, ax: Axes | None = None) -> Axes:
    """Draw the losses of a fit over its epochs: train, validation, the KL of each site, the epoch kept.

    Parameters
    ----------
    fit
        Of :func:`~pyrosc.fit_svi`.
    ax
        Axes to draw into; by default a new figure's. The lower third of them becomes Axes for the KL.

    Returns
    -------
    Axes
        Of the losses, in nats per cell, lower is better.
    """
    ax = _axes(ax, 7, 5)
    losses, epoch = fit.history, fit.history.index + 1
    best = fit.settings["best_epoch"]
    ax.plot(epoch, losses.train, color=BLUE, label="train (as minimised)")
    if losses.validation.notna().any():
        ax.plot(epoch, losses.validation, color=ORANGE, label="validation")
    kept = losses.validation.combine_first(losses.train).iloc[best]
    ax.plot(best + 1, kept, "o", ms=9, mfc="none", mew=1.8, color="black", label=f"epoch kept ({best + 1})")
    _zoom(ax, losses)
    ax.set_ylabel("loss, nats per cell")
    ax.legend(loc="upper right", framealpha=1, edgecolor="none")
    _kl(ax, losses, epoch, best + 1)
    return ax


def _kl(ax: Axes, losses: pd.DataFrame, epoch: pd.Index, kept: int) -> None:
    """Draw the KL of each site below `ax`; a site whose KL is always zero is an observed one."""
    names = [str(name) for name in losses.columns if name != "kl_weight"]
    sites = [name for name in names if name.startswith("kl_") and losses[name].any()]
    if not sites:
        ax.set_xlabel("epoch")
        return
    below = _lower_third(ax)
    ax.tick_params(labelbottom=False)
    below.spines[["top", "right"]].set_visible(False)
    for i, name in enumerate(sites):
        below.plot(epoch, losses[name], color=PALETTE[2 + i % 8], label=name.removeprefix("kl_"))
    for axes in (ax, below):
        axes.axvline(kept, color=GREY, lw=0.8, zorder=0)
    of = f" of {sites[0].removeprefix('kl_')}" if len(sites) == 1 else ""
    below.set(xlabel="epoch", ylabel=f"KL{of}, nats per cell")
    below.set_ylim(bottom=0)
    if len(sites) > 1:
        below.legend(title="site", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _lower_third(ax: Axes) -> Axes:
    """Cut off the lower third of the place that Axes have, for Axes with the same x axis."""
    figure, spec = ax.figure, ax.get_subplotspec()
    if spec is None:
        x, y, width, height = ax.get_position().bounds
        ax.set_position((x, y + 0.4 * height, width, 0.6 * height))
        return figure.add_axes((x, y, width, 0.3 * height), sharex=ax)
    two = spec.subgridspec(2, 1, height_ratios=(2, 1))
    ax.set_subplotspec(two[0])
    return figure.add_subplot(two[1], sharex=ax)


def _zoom(ax: Axes, losses: pd.DataFrame) -> None:
    """Leave the first epochs' steep fall out of the picture where it would flatten all that follows."""
    values = losses[["train", "validation"]].to_numpy()
    late = values[len(values) // 20 :]
    low, high = np.nanmin(values), np.nanmax(late)
    if np.nanmax(values) > high and high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def layout(latent: Float[np.ndarray, "cells latent"], *, seed: int = 0) -> Float[np.ndarray, "cells 2"]:
    """Lay the cells out in two dimensions: t-SNE, or the principal components of fewer than 20 cells.

    Parameters
    ----------
    latent
        State of the cells, of :func:`~pyrosc.latent`. With two columns or fewer it is its own layout.
    seed
        Of t-SNE.

    Returns
    -------
    ndarray of shape (cells, 2)
        float32. Of t-SNE only who is near to whom has a meaning: no distance between groups has.
    """
    n, width = latent.shape
    if width > 2 and n >= 20:
        perplexity = min(30.0, (n - 1) / 4)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(latent)
    flat = np.zeros((n, 2), np.float32)
    if width <= 2 or n == 1:
        flat[:, :width] = latent[:, :2]
    else:
        flat[:] = PCA(2).fit_transform(latent)
    return flat


def embedding(
    xy: Float[np.ndarray, "cells 2"],
    labels: Any,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw cells in two dimensions, each label in a colour and a marker of its own.

    Parameters
    ----------
    xy
        Places of the cells, e.g. of :func:`layout`.
    labels
        A label for each cell: a Series, an array or a list. Categories keep their order, others are sorted;
        missing ones are grey.
    title
        Of the axes.
    ax
        Axes to draw into; by default a new figure's. The legend stands to its right.

    Raises
    ------
    ValueError
        If there are not as many labels as cells.
    """
    known = pd.Categorical(labels).remove_unused_categories()
    if len(known) != len(xy):
        msg = f"{len(xy)} cells but {len(known)} labels"
        raise ValueError(msg)
    ax = _axes(ax, 7.5, 4.8)
    size = float(np.clip(12000 / max(1, len(xy)), 2, 22))
    if (known.codes < 0).any():
        missing = xy[known.codes < 0]
        ax.scatter(missing[:, 0], missing[:, 1], s=size, c=GREY, lw=0, label=f"unlabelled ({len(missing)})")
    for i, name in enumerate(known.categories):
        mine = xy[known.codes == i]
        ax.scatter(
            mine[:, 0],
            mine[:, 1],
            s=size,
            c=PALETTE[i % len(PALETTE)],
            marker=MARKERS[(i // len(PALETTE) + i) % len(MARKERS)],
            lw=0,
            alpha=0.9,
            label=f"{name} ({len(mine)})",
        )
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        handletextpad=0.1,
        markerscale=max(1, 5 / size**0.5),
    )
    return ax


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


def volcano(table: pd.DataFrame, *, n_labels: int = 12, ax: Axes | None = None) -> Axes:
    """Draw a comparison of two groups: fold change against evidence, calls coloured, top genes named.

    Parameters
    ----------
    table
        Of :func:`~pyrosc.differential_expression`, of one group against one reference.
    n_labels
        Genes to name: of those called, the ones with the most certain fold change, |mean| / sd.
    ax
        Axes to draw into; by default a new figure's.

    Raises
    ------
    ValueError
        If the table lacks a column, or holds several comparisons.
    """
    needed = ["gene", "group", "reference", "lfc_mean", "lfc_sd", "is_de"]
    if missing := [name for name in needed if name not in table]:
        msg = f"the table lacks {', '.join(missing)}: give one of differential_expression"
        raise ValueError(msg)
    pairs = table[["group", "reference"]].drop_duplicates()
    if len(pairs) != 1:
        msg = f"the table holds {len(pairs)} comparisons: give one, e.g. table[table.group == ...]"
        raise ValueError(msg)
    ax = _axes(ax, 7, 5)
    group, reference = pairs.iloc[0]
    lfc, called = table.lfc_mean.to_numpy(), table.is_de.to_numpy(dtype=bool)
    evidence = np.abs(lfc) / table.lfc_sd.to_numpy()
    for mask, colour, name in (
        (~called, GREY, "not called"),
        (called & (lfc > 0), ORANGE, f"higher in {group}"),
        (called & (lfc <= 0), BLUE, f"lower in {group}"),
    ):
        ax.scatter(lfc[mask], evidence[mask], s=14, c=colour, lw=0, alpha=0.8, label=f"{name} ({mask.sum()})")
    ax.set(
        xlabel=f"log2 fold change, {group} against {reference}",
        ylabel="evidence: |fold change| / its posterior sd",
    )
    ax.margins(x=0.12)
    ax.set_ylim(0, 1.08 * evidence.max())
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, handletextpad=0.2)
    top = np.flatnonzero(called)[np.argsort(-evidence[called], kind="stable")][:n_labels]
    _label(ax, np.column_stack([lfc, evidence]), top, table.gene.to_numpy(dtype=str))
    return ax


def calibration(result: NullCalibration, *, interval: float = 0.9, ax: Axes | None = None) -> Axes:
    """Draw realised against nominal false discovery rates: a question that keeps its word is below the line.

    Parameters
    ----------
    result
        Of :func:`~pyrosc.null_calibration`.
    interval
        Probability of the intervals drawn.
    ax
        Axes to draw into; by default a new figure's.
    """
    ax = _axes(ax, 5.5, 4.5)
    table = result.table(interval)
    top = 1.15 * max(table.upper.max(), table.nominal.max())
    ax.plot([0, top], [0, top], color=GREY, lw=1, zorder=1, label="realised = nominal")
    low, high = table.realised - table.lower, table.upper - table.realised
    ax.errorbar(
        table.nominal,
        table.realised,
        yerr=[low, high],
        fmt="o",
        color=BLUE,
        capsize=3,
        clip_on=False,
        zorder=3,
        label=f"{len(result.calls)} permutations, {interval:.0%} intervals",
    )
    ax.set(
        xlim=(0, 1.15 * table.nominal.max()),
        ylim=(0, min(1.05, top)),
        xlabel="nominal false discovery rate",
        ylabel="share of permutations with a call",
    )
    ax.legend(loc="upper left", frameon=False)
    return ax


def _label(ax: Axes, points: np.ndarray, which: np.ndarray, names: np.ndarray) -> None:
    """Name points: each name takes the place where it covers no other name and few points."""
    figure = ax.figure.figure
    figure.draw_without_rendering()  # the layout is final, so that pixels mean something
    inside = ax.get_window_extent()
    pixels = ax.transData.transform(points)
    per_point = figure.dpi / 72
    boxes: list[Bbox] = []
    leaders: list[Path] = []
    for i in which:
        text = ax.annotate(names[i], points[i], (0, 0), textcoords="offset points", fontsize=9, zorder=5)
        width, height = np.add(text.get_window_extent().size, 2 * per_point)
        places: list[tuple[Any, ...]] = []
        for dx, dy in _offsets(outward=1 if points[i, 0] >= 0 else -1):
            left = pixels[i, 0] + dx * per_point - width * (dx < 0)
            box = Bbox.from_bounds(left, pixels[i, 1] + dy * per_point - height / 2, width, height)
            leader = Path([pixels[i], np.clip(pixels[i], box.min, box.max)])
            clashes = box.count_overlaps(boxes) + (not _holds(inside, box))
            crossed = sum(leader.intersects_bbox(other) for other in boxes) + sum(
                other.intersects_bbox(box) or other.intersects_path(leader) for other in leaders
            )
            cost = 3 * box.count_contains(pixels) + np.hypot(dx, dy) / 20
            places.append((clashes, crossed, cost, len(places), dx, dy, box, leader))
        *_, dx, dy, box, leader = min(places)
        boxes.append(box)
        leaders.append(leader)
        text.set(position=(dx, dy), ha="left" if dx > 0 else "right", va="center")
        line = ax.transData.inverted().transform(leader.vertices)
        ax.plot(*line.T, color="0.4", lw=0.7, zorder=2, scalex=False, scaley=False)


def _offsets(outward: int) -> list[tuple[float, float]]:
    """Return places of a name's near edge, in points from its dot; near and outward ones first."""
    angles = np.deg2rad([0, 35, -35, 65, -65])
    return [
        (side * radius * np.cos(angle), radius * np.sin(angle))
        for radius in (6.0, 12.0, 20.0, 30.0, 44.0, 60.0, 80.0, 104.0, 132.0)
        for side in (outward, -outward)
        for angle in angles
    ]


def _holds(outer: BboxBase, box: BboxBase) -> bool:
    return bool(np.all(outer.min <= box.min) and np.all(box.max <= outer.max))
