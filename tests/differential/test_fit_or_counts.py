"""With a fit and without: the same means."""

import pandas as pd
import pytest

import pyrosc

SETS = {"first": [f"gene_{i}" for i in range(20)], "last": [f"gene_{i}" for i in range(60, 80)]}


def differential_expression(*of, **told):
    return pyrosc.differential_expression(*of, groupby="cell_type", group="type_0", **told)


def gene_sets(*of, **told):
    return pyrosc.gene_sets(*of, SETS, groupby="cell_type", group="type_0", **told)


def interaction(*of, **told):
    told |= {"groupby": "condition", "group": "stimulated", "reference": "control"}
    return pyrosc.interaction(*of, by="cell_type", level="type_1", baseline="type_0", **told)


def null_calibration(*of, **told):
    told |= {"groupby": "condition", "group": "stimulated", "n_permutations": 2}
    return pd.DataFrame(pyrosc.null_calibration(*of, nominal=(0.05, 0.9), **told).calls)


VERBS = [differential_expression, gene_sets, interaction, null_calibration]
verbs = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)


@pytest.fixture(scope="module")
def adata(typed):
    adata = typed.copy()
    adata.obs["donor"] = [f"d{i % 6}" for i in range(600)]
    adata.obs["condition"] = ["stimulated" if i % 6 % 2 else "control" for i in range(600)]
    return adata


@verbs
@pytest.mark.parametrize(
    "told", [{}, {"replicate_key": "donor"}, {"batch": None}], ids=["", "donors", "whole"]
)
def test_a_fit_makes_no_difference_to_means(verb, told, adata, typed_fit):
    counts = pyrosc.from_anndata(adata, batch_key="batch")
    with_fit = verb(typed_fit, adata, **told)
    pd.testing.assert_frame_equal(verb(counts, **told), with_fit, check_exact=True)
    if told == {"batch": None}:
        pd.testing.assert_frame_equal(verb(adata, **told), with_fit, check_exact=True)


@verbs
def test_an_anndata_is_of_one_batch_unless_it_is_read_with_a_key(verb, adata):
    alone = verb(adata)
    pd.testing.assert_frame_equal(alone, verb(adata, batch=None))
    if verb is not null_calibration:  # (numbers of calls may be the same)
        assert not alone.equals(verb(pyrosc.from_anndata(adata, batch_key="batch")))
    with pytest.raises(ValueError, match=r"no batch 'batch_1': counts were read .* batch_key="):
        verb(adata, batch="batch_1")


def test_data_may_be_named(adata, typed_fit):
    told = {"groupby": "cell_type", "group": "type_0"}
    alone = pyrosc.differential_expression(adata, **told)
    pd.testing.assert_frame_equal(pyrosc.differential_expression(data=adata, **told), alone)
    of_sets = pyrosc.gene_sets(adata, SETS, **told)
    pd.testing.assert_frame_equal(pyrosc.gene_sets(adata, sets=SETS, **told), of_sets)
    pd.testing.assert_frame_equal(pyrosc.gene_sets(data=adata, sets=SETS, **told), of_sets)
    named = pyrosc.gene_sets(fit=typed_fit, data=adata, sets=SETS, **told)
    pd.testing.assert_frame_equal(named, pyrosc.gene_sets(typed_fit, adata, SETS, **told))


def test_counts_are_read_from_the_layer_that_was_named(adata):
    logged = adata.copy()
    logged.layers["counts"], logged.X = adata.X, adata.X.log1p()
    with pytest.raises(ValueError, match="not whole"):
        differential_expression(logged)
    counts = pyrosc.from_anndata(logged, layer="counts")
    pd.testing.assert_frame_equal(differential_expression(counts), differential_expression(adata))


@pytest.mark.parametrize("verb", [differential_expression, null_calibration], ids=lambda verb: verb.__name__)
def test_cells_are_refused_without_a_fit(verb, adata):
    with pytest.raises(ValueError, match=r"decoded by a fit: give it first.*estimand=\"mean\""):
        verb(adata, estimand="cell")


def test_no_cells_are_refused(adata):
    none = pyrosc.from_anndata(adata)[:0]
    with pytest.raises(ValueError, match="no cells"):
        differential_expression(none)
