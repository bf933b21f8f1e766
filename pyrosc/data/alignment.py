"""What a person knows of each cell besides counts, brought into the cells' order: columns, arrays, Series."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from pyrosc.data.counts import Counts


def in_order(values: Any, data: Counts, what: str) -> Any:
    """Return one value for each cell as they are; a Series that has the cells' names in the cells' order.

    Parameters
    ----------
    values
        A Series with other names, a number or an array is taken as it is.
    data
        Counts.
    what
        Name of the argument.

    Raises
    ------
    ValueError
        If a Series has names of some cells, but not of each once.
    """
    if not (isinstance(values, pd.Series) and values.index.isin(data.cell_names).any()):
        return values
    names = pd.Index(data.cell_names)
    if not (names.is_unique and values.index.is_unique and set(values.index) == set(names)):
        msg = (
            f"{what} is a Series whose names are not those of the cells, each once: give its values, "
            ".to_numpy(), if they are in the cells' order, or make names unique, obs_names_make_unique()"
        )
        raise ValueError(msg)
    return values.loc[names]


def categories_of(data: Counts, values: Any, what: str) -> tuple[Int[ndarray, "cells"], list[str]]:
    """Return each cell's category as a code, -1 for none, and the categories' names, in the column's order.

    Parameters
    ----------
    data
        Counts.
    values
        Name of a column of ``obs``, or one value for each cell; a missing value (NaN, None) is no category.
    what
        Name of the argument.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If there is not one value for each cell, or two categories are written alike.
    """
    if isinstance(values, str):
        if values not in data.obs:
            msg = f"no column {values!r} in obs; it has {list(data.obs.columns)}"
            raise KeyError(msg)
        values = data.obs[values]
    values = in_order(values, data, what)
    if len(np.shape(values)) != 1:
        kind = type(values).__name__
        msg = f"{what} names a column of obs, or has one value for each cell; {kind} is neither"
        raise ValueError(msg)
    if len(values) != data.n_cells:
        msg = f"{what} has {len(values)} values for {data.n_cells} cells: give one a cell, or a column's name"
        raise ValueError(msg)
    categories = pd.Categorical(values)
    names = [str(name) for name in categories.categories]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        msg = (
            f"{what} has values of different types that are written alike ({', '.join(twice[:5])}): make "
            "them one type, .astype(str)"
        )
        raise ValueError(msg)
    return categories.codes.astype(np.int64), names
