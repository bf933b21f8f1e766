"""The losses of a fit over its epochs."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pyrosc.inference.fit import Fit
from pyrosc.plots.style import BLUE, GREY, ORANGE, PALETTE, axes_or_new


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

    Examples
    --------
    >>> import pyrosc
    >>> from pyrosc import plots
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> plots.history(fit).get_ylabel()
    'loss, nats per cell'
    """
    ax = axes_or_new(ax, 7, 5)
    losses, epoch = fit.history, fit.history.index + 1
    best = fit.found.best_epoch
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
