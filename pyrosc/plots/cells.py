"""Cells in two dimensions: their layout, drawn by label."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from pyrosc.plots.style import GREY, MARKERS, PALETTE, axes_or_new


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

    Examples
    --------
    >>> import numpy as np
    >>> from pyrosc import plots
    >>> latent = np.random.default_rng(0).normal(size=(30, 10)).astype("float32")
    >>> plots.layout(latent).shape
    (30, 2)
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

    Examples
    --------
    >>> import numpy as np
    >>> from pyrosc import plots
    >>> ax = plots.embedding(np.arange(8.0).reshape(4, 2), ["B", "T", "T", None])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['unlabelled (1)', 'B (1)', 'T (2)']
    """
    known = pd.Categorical(labels).remove_unused_categories()
    if len(known) != len(xy):
        msg = f"{len(xy)} cells but {len(known)} labels"
        raise ValueError(msg)
    ax = axes_or_new(ax, 7.5, 4.8)
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
