"""Arguments of questions, checked: the fit, its cells, genes and batches, numbers of draws."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import anndata
import numpy as np

from pyrosc.data.alignment import in_order as in_order
from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.inference.fit import Fit


def check_fit(fit: Any) -> None:
    """Raise unless it is one: a model, too, has many of its names."""
    if not isinstance(fit, Fit):
        msg = (
            f"a question is put to a Fit, not to {type(fit).__name__}: pyrosc.fit_svi(model, data) makes "
            "one; it stands first, before the data"
        )
        raise TypeError(msg)


def counts_of(fit: Any, data: Counts | anndata.AnnData) -> Counts:
    """Return the data in the genes and codes of the fit; raise if there are no cells, or there is no fit."""
    check_fit(fit)
    counts = as_counts(data, fit.schema)
    if not counts.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    return counts


def _is_between(value: Any, low: Any, high: Any) -> bool:
    """Say whether it is a number between these, and neither of them."""
    return bool(isinstance(value, Real) and low < value < high)


def check_draws(n_draws: Any, name: str = "n_draws") -> None:
    """Raise unless it is a number of draws."""
    if not isinstance(n_draws, int | np.integer):
        msg = f"{name} must be a whole number, not {n_draws!r}"
        raise TypeError(msg)
    if n_draws < 1:
        msg = f"{name} must be at least 1, not {n_draws}"
        raise ValueError(msg)


def check_interval(interval: Any) -> None:
    """Raise unless it is the probability of an interval."""
    if not _is_between(interval, 0, 1):
        msg = f"interval is a probability between 0 and 1, not {interval!r}"
        raise ValueError(msg)


def batch_code(fit: Fit, batch: str | int | None) -> int | None:
    """Return the code of a batch's name; None for None. Raise if the fit does not know it."""
    batch = None if batch is None else str(batch)
    if batch is not None and batch not in fit.schema.batches:
        msg = f"no batch {batch!r}; the fit knows {', '.join(fit.schema.batches)}"
        raise ValueError(msg)
    return None if batch is None else fit.schema.batches.index(batch)


def batch_codes(fit: Fit, batch: str | int | None) -> list[int | None]:
    """Return the codes of the batches to decode in; ``"average"`` is all."""
    return list(range(len(fit.schema.batches))) if batch == "average" else [batch_code(fit, batch)]


def columns_of(fit: Fit, data: Counts | anndata.AnnData, genes: Sequence[str] | None) -> np.ndarray:
    """Return where the genes asked for stand in the fit; by default its genes, in the order of the data."""
    check_fit(fit)
    places = {name: i for i, name in enumerate(fit.schema.genes)}
    if genes is None:
        have = map(str, data.var_names) if isinstance(data, anndata.AnnData) else data.schema.genes
        return np.array([places[name] for name in have if name in places])
    genes = [genes] if isinstance(genes, str) else [str(name) for name in genes]
    if not genes:
        msg = "genes is empty: name at least one, or leave it out for all"
        raise ValueError(msg)
    unknown = [name for name in genes if name not in places]
    if unknown:
        msg = f"the fit has no gene {', '.join(unknown[:5])}"
        raise ValueError(msg)
    return np.array([places[name] for name in genes])
