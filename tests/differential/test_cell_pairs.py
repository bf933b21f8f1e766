"""Random cells that a fit decodes: which, how many, where, and what is made of them."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrosc
from pyrosc.differential import cell_pairs
from pyrosc.differential.calls import compare
from pyrosc.differential.expression import differential_expression


def ask(fit, data, **options):
    return differential_expression(fit, data, **({"groupby": "cell_type"} | options))


@pytest.fixture
def decoded(monkeypatch):
    """Each call of `draws`: its data, draws a cell and batch."""
    calls = []

    def recording(fit, data, *sites, **options):
        calls.append((data, options["n_draws"], options["batch"]))
        return pyrosc.draws(fit, data, *sites, **options)

    monkeypatch.setattr(cell_pairs, "draws", recording)
    return calls


def test_no_more_is_decoded_than_the_draws_asked_for(typed, typed_fit, decoded):
    ask(typed_fit, typed, group="type_0", estimand="cell", n_draws=30)
    assert sum(len(data) * n for data, n, _ in decoded) == 2 * 30
    decoded.clear()
    ask(typed_fit, typed)
    assert not decoded


@pytest.fixture
def blocks(monkeypatch):
    """Fold changes and shares of each block."""
    found, decoded = [], cell_pairs._decoded
    monkeypatch.setattr(cell_pairs, "_decoded", lambda *a, **k: found.append(decoded(*a, **k)) or found[-1])
    return found


def test_draws_in_blocks_are_summarised_as_all_of_them_together(typed, typed_fit, blocks, monkeypatch):
    """Means and variances are sums of float32 numbers: in any order off by u sum|terms|, u = eps / 2.

    So are the sums of either table, and the means differ by eps sum|lfc| at most. Variances, of blocks
    mean(lfc^2) - mean^2 with such means, differ by 4 eps sum(lfc^2) at most: n u of the sum of squares about
    the mean in either, and 2 |mean| times the error of the mean; n var and |mean| sum|lfc| are no more than
    sum(lfc^2). Shares of the draws are counts, and exact.
    """
    monkeypatch.setattr(cell_pairs, "_BLOCK", 11)
    table = ask(typed_fit, typed, group="type_0", estimand="cell", n_draws=31).set_index("gene")
    lfc = np.concatenate([lfc for lfc, _ in blocks])
    assert [len(lfc) for lfc, _ in blocks] == [11, 10, 10]
    assert lfc.dtype == np.float32
    together = compare(lfc).set_index(pd.Index(typed_fit.schema.genes)).loc[table.index]
    places = [typed_fit.schema.genes.index(name) for name in table.index]
    wide, eps = lfc[:, places].astype(float), np.finfo(np.float32).eps
    assert ((table.lfc_mean - together.lfc_mean).abs() <= eps * np.abs(wide).sum(0)).all()
    assert ((table.lfc_sd**2 - together.lfc_sd**2).abs() <= 4 * eps * (wide**2).sum(0)).all()
    exact = ["p_up", "p_down", "p_equivalent", "p_de", "p_de_se", "bayes_factor", "expected_fdr", "is_de"]
    pd.testing.assert_frame_equal(table[exact], together[exact], check_names=False, rtol=1e-9)
    mine = np.average([shares for _, shares in blocks], 0, [11, 10, 10])[0, places]
    np.testing.assert_allclose(table.mean_share, mine)


def test_ends_of_intervals_are_means_over_blocks(typed, typed_fit, blocks, monkeypatch):
    monkeypatch.setattr(cell_pairs, "_BLOCK", 400)
    table = ask(typed_fit, typed, group="type_0", estimand="cell", n_draws=1001).set_index("gene")
    together = compare(np.concatenate([lfc for lfc, _ in blocks]))
    together = together.set_index(pd.Index(typed_fit.schema.genes)).loc[table.index]
    ends = ["lfc_lower", "lfc_upper"]
    off = (table[ends] - together[ends]).div(together.lfc_sd, axis=0)
    assert off.abs().max().max() < 0.1


def test_pairs_are_random_cells_of_their_groups(typed, typed_fit, decoded):
    ask(typed_fit, typed, group="type_0", estimand="cell", n_draws=400, batch=None)
    (mine, _, _), (rest, _, _) = decoded
    assert set(mine.obs.cell_type) == {"type_0"}
    assert set(rest.obs.cell_type) == {"type_1", "type_2"}
    share = len(set(mine.cell_names)) / (typed.obs.cell_type == "type_0").sum()
    assert 0.7 < share < 0.95  # with replacement: 1 - exp(-400 / 200) = .86


def test_a_program_that_cannot_broadcast_is_run_one_draw_at_a_time(typed, typed_fit, monkeypatch):
    asked = []
    draws = lambda *args, parallel, **options: asked.append(parallel) or pyrosc.draws(*args, **options)
    monkeypatch.setattr(cell_pairs, "draws", draws)
    ask(typed_fit, typed, group="type_0", estimand="cell", n_draws=5, batch=None, parallel=False)
    assert asked == [False, False]


def test_cells_of_no_group_are_not_decoded(typed, typed_fit, decoded):
    groups = typed.obs.cell_type.where(typed.obs.cell_type != "type_2")
    ask(typed_fit, typed, groupby=groups, group="type_0", estimand="cell", n_draws=50, batch=None)
    assert set(decoded[1][0].obs.cell_type) == {"type_1"}


def test_cells_are_decoded_in_the_batch_asked_for(typed, typed_fit, decoded):
    pair = {"group": "type_0", "estimand": "cell", "n_draws": 40}
    for batch, expected in (("batch_1", {"batch_1"}), (None, {None}), ("average", {"batch_0", "batch_1"})):
        decoded.clear()
        ask(typed_fit, typed, batch=batch, **pair)
        assert {there for _, _, there in decoded} == expected
    sizes = [[len(data) for data, _, there in decoded if there == b] for b in ("batch_0", "batch_1")]
    assert all(mine == other > 5 for mine, other in sizes)  # both of a pair in the same batch


def test_a_program_without_l_and_with_other_names_will_do(typed):
    def model(cells):
        logits = pyro.param("logits", torch.zeros(80))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            share = pyro.deterministic("share", torch.softmax(logits + 0 * z[..., None], -1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * share).to_event(1), obs=cells.x)

    def guide(cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    fit = pyrosc.fit_svi(model, typed, guide, epochs=1, progress=False, device="cpu")
    assert ask(fit, typed, group="type_0").is_de.sum() > 10
    for parallel in (True, False):
        same = ask(fit, typed, estimand="cell", site="share", n_draws=20, parallel=parallel)
        np.testing.assert_allclose(same.lfc_mean, 0, atol=1e-5)
