"""What a question about differential expression found: volcano, calibration."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.transforms import Bbox, BboxBase

from pyrosc.differential.null_calibration import NullCalibration
from pyrosc.plots.style import BLUE, GREY, ORANGE, axes_or_new


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

    Examples
    --------
    >>> import pandas as pd
    >>> from pyrosc import plots
    >>> table = pd.DataFrame(
    ...     {
    ...         "gene": ["CD19", "CD3D"],
    ...         "group": "B",
    ...         "reference": "rest",
    ...         "lfc_mean": [3.0, -0.1],
    ...         "lfc_sd": [0.5, 0.4],
    ...         "is_de": [True, False],
    ...     }
    ... )
    >>> [text.get_text() for text in plots.volcano(table).texts]
    ['CD19']
    """
    needed = ["gene", "group", "reference", "lfc_mean", "lfc_sd", "is_de"]
    if missing := [name for name in needed if name not in table]:
        msg = f"the table lacks {', '.join(missing)}: give one of differential_expression"
        raise ValueError(msg)
    pairs = table[["group", "reference"]].drop_duplicates()
    if len(pairs) != 1:
        msg = f"the table holds {len(pairs)} comparisons: give one, e.g. table[table.group == ...]"
        raise ValueError(msg)
    ax = axes_or_new(ax, 7, 5)
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

    Examples
    --------
    >>> import numpy as np
    >>> import pyrosc
    >>> from pyrosc import plots
    >>> calls = np.array([[0, 0], [0, 1], [0, 0], [0, 0]])  # of four permutations, at two nominal rates
    >>> result = pyrosc.NullCalibration(np.array([0.05, 0.1]), calls, n_rows=40)
    >>> plots.calibration(result).get_xlabel()
    'nominal false discovery rate'
    """
    ax = axes_or_new(ax, 5.5, 4.5)
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
