"""What the pictures share: colours, markers, new axes."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Number = float | int  # beartype does not take 5 for a float
BLUE, ORANGE, SKY = "#0072B2", "#D55E00", "#56B4E9"
PALETTE = (BLUE, "#E69F00", "#009E73", "#CC79A7", SKY, ORANGE, "#332288", "#999933", "black", "#882255")
"""Okabe and Ito's colours, which colour-blind readers tell apart, with indigo, olive and wine for yellow."""
MARKERS = "os^Dv"
GREY = "0.6"


def axes_or_new(ax: Axes | None, width: Number, height: Number) -> Axes:
    """Return `ax`, or the axes of a new figure of a size in inches."""
    if ax is None:
        ax = Figure(figsize=(width, height), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return ax
