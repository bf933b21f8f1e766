"""Calls under permuted labels: which labels change places, and what is made of the calls."""

import inspect

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
from matplotlib.figure import Figure

from pyrosc import differential_expression, fit_svi, from_anndata, null_calibration, plots
from pyrosc.differential import null_calibration as calibration
from pyrosc.differential.null_calibration import NullCalibration


def simulated(seed=0, n=240, genes=60, lfc=0.0, n_donors=6):
    """Two conditions in two batches; with donors of one condition each, and samples of both."""
    rng = np.random.default_rng(seed)
    donor = np.arange(n) % n_donors
    case = donor % 2
    mean = rng.gamma(2, 2, genes) * np.where(np.arange(genes) < 10, 2.0, 1.0) ** (lfc * case[:, None])
    obs = pd.DataFrame(
        {
            "condition": np.where(case, "case", "control"),
            "donor": [f"d{d}" for d in donor],
            "sample": [f"s{i % 4}" for i in rng.permutation(n)],
            "batch": np.where(rng.random(n) < 0.3 + 0.4 * case, "one", "two"),
        },
        index=[f"c{i}" for i in range(n)],
    )
    x = rng.poisson(mean * rng.lognormal(0, 0.3, (n, 1))).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(x), obs=obs)


def read(adata):
    return from_anndata(adata, batch_key="batch")


@pytest.fixture
def asked(monkeypatch):
    """The labels of each question asked."""
    labels, original = [], calibration.differential_expression

    def spy(fit, data, *, groupby, **question):
        values = data.obs[groupby] if isinstance(groupby, str) else groupby
        labels.append(np.asarray(values))
        return original(fit, data, groupby=groupby, **question)

    monkeypatch.setattr(calibration, "differential_expression", spy)
    return labels


QUESTION = {"groupby": "condition", "group": "case"}


def test_a_difference_is_gone_with_the_labels():
    adata = simulated(1, lfc=1.0)
    found = calibration.differential_expression(read(adata), **QUESTION)
    assert found.is_de.sum() >= 10
    null = null_calibration(read(adata), **QUESTION, n_permutations=10)
    assert null.calls.shape == (10, 4)
    assert null.n_rows == adata.n_vars
    assert null.calls.max() <= 1


def test_cells_change_labels_within_their_batch(asked):
    adata = simulated()
    null_calibration(read(adata), **QUESTION, n_permutations=3)
    true = adata.obs.condition.to_numpy()
    assert len({tuple(labels) for labels in [true, *asked]}) == 4
    for labels in asked:
        for batch in ("one", "two"):
            mine = (adata.obs.batch == batch).to_numpy()
            assert sorted(labels[mine]) == sorted(true[mine])


def test_without_batches_they_change_anywhere(asked):
    adata = simulated()
    null_calibration(read(adata), **QUESTION, batch=None, n_permutations=1)
    mine = (adata.obs.batch == "one").to_numpy()
    true = adata.obs.condition
    assert sorted(asked[0]) == sorted(true)
    assert sorted(asked[0][mine]) != sorted(true[mine])


def test_cells_without_a_group_stay_without_one(asked):
    adata = simulated()
    left_out = np.arange(adata.n_obs) % 5 == 0
    labels = adata.obs.condition.where(~left_out)
    null_calibration(read(adata), groupby=labels, group="case", n_permutations=1)
    assert (pd.isna(asked[0]) == left_out).all()


def test_groups_that_are_not_asked_about_stay_out(asked):
    adata = simulated()
    labels = adata.obs.condition.where(adata.obs.donor != "d0", "third")
    null_calibration(read(adata), groupby=labels, group="case", reference="control", n_permutations=1)
    assert pd.isna(asked[0])[labels == "third"].all()


def test_replicates_of_one_condition_change_labels_as_wholes(asked):
    adata = simulated()
    null = null_calibration(read(adata), **QUESTION, replicate_key="donor", batch=None)
    assert len(null.calls) == 9  # of 20 ways to choose 3 of 6 half are mirrors, and one is as it was
    for labels in asked:
        table = pd.crosstab(adata.obs.donor, labels)
        assert ((table > 0).sum(1) == 1).all()
        assert ((table > 0).sum(0) == 3).all()
    sides = {
        frozenset(adata.obs.donor[labels == labels[0]]) for labels in [adata.obs.condition.to_numpy(), *asked]
    }
    assert len(sides) == 10


def test_in_replicates_of_both_conditions_the_names_change_places(asked):
    adata = simulated()
    null = null_calibration(read(adata), **QUESTION, replicate_key="sample", batch=None)
    assert len(null.calls) == 7  # 4 samples as they are or not, half of them mirrors, less the true one
    for labels in asked:
        same = (
            pd.Series(labels == adata.obs.condition.to_numpy()).groupby(adata.obs["sample"].to_numpy()).mean()
        )
        assert set(same) == {0.0, 1.0}


def test_a_lone_pair_of_replicates_that_is_not_compared_makes_no_labelling(asked):
    """Two replicates of both conditions in one batch, one of either in the other: these change nothing."""
    adata = simulated()
    here = (adata.obs.batch == "one").to_numpy()
    replicate = np.where(here, np.array(["p", "q"])[np.arange(adata.n_obs) // 2 % 2], adata.obs.condition)
    null_calibration(read(adata), **QUESTION, replicate_key=replicate)
    assert len(asked) == 1
    changed = asked[0] != adata.obs.condition.to_numpy()
    assert len(set(replicate[here & changed])) == 1


def test_replicates_that_can_be_labelled_in_one_way_only_are_refused():
    adata = simulated(n_donors=2)
    with pytest.raises(ValueError, match="no other way: two of each group"):
        null_calibration(read(adata), **QUESTION, replicate_key="donor", batch=None)


def test_where_nothing_can_be_called_there_is_nothing_to_count():
    """One replicate against three."""
    cells = simulated(n_donors=4)
    cells.obs["condition"] = np.where(cells.obs.donor == "d0", "case", "control")
    with pytest.warns(UserWarning, match="replicate"), pytest.raises(ValueError, match="fewer than two rep"):
        null_calibration(read(cells), replicate_key="donor", n_permutations=2, **QUESTION)


def test_the_same_seed_gives_the_same_labels_and_calls(asked):
    adata = simulated(lfc=0.3)
    results = [null_calibration(read(adata), **QUESTION, n_permutations=2, seed=seed) for seed in (0, 0, 1)]
    assert (results[0].calls == results[1].calls).all()
    first, again, other = (np.concatenate(asked[i : i + 2]) for i in (0, 2, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_the_table_counts_permutations_with_a_call():
    calls = np.array([[0, 0, 1], [0, 2, 1], [0, 0, 5], [0, 0, 3]])
    table = NullCalibration(np.array([0.01, 0.05, 0.2]), calls, 40).table()
    assert list(table.realised) == [0.0, 0.25, 1.0]
    assert list(table.mean_calls) == [0.0, 0.5, 2.5]
    assert list(table.max_calls) == [0, 2, 5]
    # Beta(1/2, 9/2), Beta(3/2, 7/2) and Beta(9/2, 1/2): quantiles by mpmath
    np.testing.assert_allclose(table.lower, [0, 0.0460072, 0.6375131], rtol=1e-5)
    np.testing.assert_allclose(table.upper, [0.3624868, 0.6507072, 1], rtol=1e-5)


def test_intervals_cover_the_true_rate():
    """Of 40 permutations and rates of any size, by simulation."""
    rng = np.random.default_rng(0)
    rates = rng.random(4000)
    calls = (rng.random((40, 4000)) < rates).astype(int)
    table = NullCalibration(np.full(4000, 0.05), calls, 1).table(0.9)
    assert np.mean((table.lower <= rates) & (rates <= table.upper)) == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"nominal": (0.05, 1.0)}, "between 0 and 1"),
        ({"nominal": ()}, "between 0 and 1"),
        ({"n_permutations": 0}, "at least 1, not 0"),
        ({"group": "nobody"}, "no group 'nobody'"),
        ({"delta": -1.0}, "at least 0"),
    ],
)
def test_what_can_not_be_asked_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        null_calibration(read(simulated()), **{**QUESTION, **wrong})


@pytest.mark.parametrize("name", ["fdr", "n_perm"])
def test_an_argument_that_it_does_not_have_is_no_argument_of_another(name):
    with pytest.raises(TypeError, match=f"got an unexpected keyword argument '{name}'"):
        null_calibration(read(simulated()), **QUESTION, **{name: 1})


def test_the_question_has_the_defaults_of_differential_expression():
    mine, other = (inspect.signature(verb).parameters for verb in (null_calibration, differential_expression))
    shared = set(mine) & set(other)
    assert set(other) - shared == {"fdr", "interval"}
    assert {name: mine[name].default for name in shared} == {name: other[name].default for name in shared}


class Nothing:
    """A program that says nothing of the counts."""

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(cells.x + 1.0).to_event(1), obs=cells.x)

    def guide(self, cells):
        loc = pyro.param("loc", lambda: cells.x.new_zeros(()))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(loc, 1.0))


def test_the_question_is_asked_as_told(monkeypatch):
    told = {}
    data, original = read(simulated()), calibration.differential_expression
    fit = fit_svi(Nothing(), data, epochs=1, progress=False)

    def spy(*args, **question):
        told.update(question)
        return original(*args, **question)

    monkeypatch.setattr(calibration, "differential_expression", spy)
    options = {"group": "case", "reference": "control", "estimand": "cell", "delta": 0.4, "n_draws": 3}
    options |= {"site": "share", "parallel": False, "batch": "one", "seed": 4}
    with pytest.raises(KeyError, match="no site 'share'"):
        null_calibration(fit, data, groupby="condition", **options)
    assert {name: told[name] for name in options} == options


def test_the_picture_has_a_point_for_each_rate_and_the_line():
    calls = np.array([[0, 0], [0, 1], [0, 0], [0, 0]])
    result = NullCalibration(np.array([0.05, 0.1]), calls, 40)
    mine = Figure().subplots()
    assert plots.calibration(result, ax=mine) is mine
    line, points = mine.get_lines()[0], mine.containers[0][0]
    np.testing.assert_allclose(points.get_xydata(), [[0.05, 0.0], [0.1, 0.25]])
    assert (line.get_xdata() == line.get_ydata()).all()
    assert "4 permutations, 90% intervals" in [text.get_text() for text in mine.get_legend().get_texts()]
    assert "NullCalibration(4 permutations, 40 genes)" in repr(result)
