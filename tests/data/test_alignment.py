"""Values of cells: which are taken as they are, and which are brought into the cells' order."""

import numpy as np
import pandas as pd
import pytest

from pyrosc.data.alignment import categories_of, in_order


def test_a_series_is_matched_by_the_names_of_cells(data):
    values = pd.Series(np.arange(200), data.cell_names)
    np.testing.assert_array_equal(in_order(values[::-1], data, "sizes"), np.arange(200))


@pytest.mark.parametrize("values", [3.0, np.arange(200), pd.Series(np.arange(200))])
def test_what_has_no_names_of_cells_is_left_as_it_is(values, data):
    assert in_order(values, data, "sizes") is values


def test_a_series_of_some_cells_or_of_one_twice_is_refused(data):
    values = pd.Series(np.arange(200), data.cell_names)
    for wrong in (values[:-1], pd.concat([values, values[:1]])):
        with pytest.raises(ValueError, match="sizes is a Series whose names are not those of the cells"):
            in_order(wrong, data, "sizes")


def test_categories_have_the_columns_order_and_none_where_a_value_is_missing(data):
    codes, names = categories_of(data, "cell_type", "groupby")
    assert names == ["type_0", "type_1", "type_2"]
    np.testing.assert_array_equal(np.array(names)[codes], data.obs.cell_type)
    kinds = pd.Categorical(["b", None] * 100, categories=["c", "b"])
    codes, names = categories_of(data, kinds, "groupby")
    assert names == ["c", "b"]
    np.testing.assert_array_equal(codes, [1, -1] * 100)


def test_categories_of_named_cells_are_in_the_cells_order(data):
    turned = data.obs["cell_type"][::-1]
    np.testing.assert_array_equal(
        categories_of(data, turned, "groupby")[0], categories_of(data, "cell_type", "groupby")[0]
    )


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ("type", KeyError, "no column 'type' in obs; it has"),
        (["a"] * 5, ValueError, "groupby has 5 values for 200 cells"),
        (
            np.zeros((200, 2)),
            ValueError,
            "groupby names a column of obs, or has one value for each cell; nda",
        ),
        (None, ValueError, "groupby names a column of obs, or has one value for each cell; NoneType is"),
        ([1, "1"] * 100, ValueError, r"values of different types that are written alike \(1\)"),
    ],
)
def test_what_is_no_category_of_each_cell_is_refused(values, error, says, data):
    with pytest.raises(error, match=says):
        categories_of(data, values, "groupby")
