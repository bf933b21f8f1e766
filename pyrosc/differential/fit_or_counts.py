"""What a question is put to: a fit and data, or data alone. Means need no fit; only a fit decodes cells."""

from typing import Any

import anndata

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_fit, counts_of


def fit_and_counts(fit: Any, data: Counts | anndata.AnnData | None) -> tuple[Fit | None, Counts]:
    """Return the fit, None where there is none, and the counts: of a fit in its genes and batches.

    Parameters
    ----------
    fit, data
        A fit and data; or data alone, in either place.

    Raises
    ------
    TypeError
        If one of them is something else, they have changed places, or a fit has no data.
    ValueError
        If there are no cells.
    """
    if isinstance(fit, Fit):
        if data is None:
            msg = "the data is missing: it stands second, after the fit"
            raise TypeError(msg)
        return fit, counts_of(fit, data)
    if not (fit is None or data is None):
        check_fit(fit)
    counts = as_counts(fit if data is None else data)
    if not counts.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    return None, counts
