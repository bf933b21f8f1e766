import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

import pyrosc
from pyrosc import plots


@pytest.fixture(autouse=True)
def _pyplot_has_no_figure():
    """A picture is the caller's: pyplot, if anybody imported it, knows none."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.fixture(scope="module")
def counts():
    return pyrosc.from_anndata(pyrosc.datasets.simulate(60, 12, n_types=3, seed=1), labels_key="cell_type")


@pytest.fixture(scope="module")
def fit(counts):
    return pyrosc.fit_svi(pyrosc.VAE.for_data(counts, n_latent=3), counts, epochs=4, progress=False)


@pytest.fixture(scope="module")
def imputation(fit, counts):
    return pyrosc.impute(fit, counts, n_draws=5)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    lfc = rng.normal(0, 2, 200)
    sd = np.full(200, 0.5)
    return pd.DataFrame(
        {
            "gene": [f"gene_{i}" for i in range(200)],
            "group": "B",
            "reference": "rest",
            "lfc_mean": lfc,
            "lfc_sd": sd,
            "is_de": np.abs(lfc) > 1.5,
        }
    )


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def boxes(ax):
    ax.figure.draw_without_rendering()
    return [text.get_window_extent() for text in ax.texts]


def test_importing_the_plots_does_not_import_pyplot():
    code = "import sys, pyrosc.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- history


def test_history_draws_train_validation_and_the_epoch_kept(fit):
    ax = plots.history(fit)
    lines = {line.get_label(): line for line in ax.lines}
    best = fit.found.best_epoch
    assert_allclose(lines["train (as minimised)"].get_ydata(), fit.history.train)
    assert_allclose(lines["train (as minimised)"].get_xdata(), [1, 2, 3, 4])
    assert_allclose(lines["validation"].get_ydata(), fit.history.validation)
    kept = lines[f"epoch kept ({best + 1})"]
    assert_allclose(kept.get_xydata(), [[best + 1, fit.history.validation.iloc[best]]])
    assert texts(ax.get_legend()) == ["train (as minimised)", "validation", f"epoch kept ({best + 1})"]


def test_history_draws_the_kl_of_each_latent_site_below(fit):
    ax = plots.history(fit)
    upper, lower = ax.figure.axes
    assert upper is ax
    assert_allclose(lower.lines[0].get_ydata(), fit.history.kl_z)
    assert lower.get_ylabel() == "KL of z, nats per cell"  # the library is observed: its KL is always 0
    ax.figure.draw_without_rendering()
    assert lower.get_position().y1 < ax.get_position().y0
    assert_allclose(lower.get_xlim(), ax.get_xlim())


def test_history_names_several_sites(fit):
    two = replace(fit, history=fit.history.assign(kl_l=[1.0, 2.0, 3.0, 4.0]))
    lower = plots.history(two).figure.axes[1]
    assert set(texts(lower.get_legend())) == {"z", "l"}
    assert lower.get_ylabel() == "KL, nats per cell"


def test_history_of_a_fit_without_validation_or_latent_sites(fit):
    history = pd.DataFrame({"train": [3.0, 2.0], "validation": np.nan})
    ax = plots.history(replace(fit, history=history, found=replace(fit.found, best_epoch=1)))
    assert ax.figure.axes == [ax]
    assert [line.get_label() for line in ax.lines] == ["train (as minimised)", "epoch kept (2)"]
    assert_allclose(ax.lines[1].get_xydata(), [[2, 2.0]])
    assert ax.get_xlabel() == "epoch"


def test_a_steep_start_does_not_flatten_the_rest(fit):
    train = np.concatenate([[1e5], np.linspace(100, 90, 40)])
    ax = plots.history(replace(fit, history=pd.DataFrame({"train": train, "validation": train + 1})))
    assert ax.get_ylim()[0] < 90
    assert 101 < ax.get_ylim()[1] < 110


@pytest.mark.parametrize("place", [(0.1, 0.1, 0.8, 0.8), None])
def test_history_draws_into_the_axes_it_is_given(fit, place):
    figure = Figure()
    mine = figure.subplots(1, 2)[0] if place is None else figure.add_axes(place)
    before = mine.get_position()
    assert plots.history(fit, ax=mine) is mine
    lower = figure.axes[-1]
    figure.draw_without_rendering()
    assert lower.get_position().y0 == pytest.approx(before.y0, abs=0.01)
    assert mine.get_position().y1 == pytest.approx(before.y1, abs=0.01)
    assert lower.get_position().y1 < mine.get_position().y0


# --- layout and embedding


def test_layout_keeps_neighbours_and_is_reproducible():
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(0, 0.1, (30, 5)), rng.normal(3, 0.1, (30, 5))]).astype(np.float32)
    xy = plots.layout(z)
    assert xy.shape == (60, 2)
    assert xy.dtype == np.float32
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(60)
    same = np.arange(60) < 30
    assert (same[distance.argmin(1)] == same).all()
    assert np.array_equal(xy, plots.layout(z))


@pytest.mark.parametrize(("n", "width"), [(1, 5), (2, 5), (10, 3), (30, 2), (30, 1)])
def test_layout_of_few_cells_or_dimensions(n, width):
    z = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)
    xy = plots.layout(z)
    assert xy.shape == (n, 2)
    assert np.isfinite(xy).all()
    if width <= 2:
        assert_allclose(xy[:, :width], z)
    elif n > 2:
        centred = z - z.mean(0)
        assert_allclose(np.sort(xy.var(0)), np.sort(np.linalg.svd(centred)[1][:2] ** 2 / n), rtol=1e-4)


def test_embedding_draws_each_label_at_its_cells():
    xy = np.arange(12.0).reshape(6, 2)
    labels = pd.Categorical(["b", "a", "b", None, "a", "b"], categories=["unused", "b", "a"])
    ax = plots.embedding(xy, labels, title="here")
    assert texts(ax.get_legend()) == ["unlabelled (1)", "b (3)", "a (2)"]
    assert ax.get_title() == "here"
    grey, b, a = ax.collections
    assert_allclose(b.get_offsets(), xy[[0, 2, 5]])
    assert_allclose(a.get_offsets(), xy[[1, 4]])
    assert_allclose(grey.get_offsets(), xy[[3]])


def test_forty_labels_all_look_different():
    xy = np.zeros((40, 2))
    ax = plots.embedding(xy, np.arange(40))
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections}
    assert len(looks) == 40


def test_the_legend_is_inside_the_picture():
    ax = plots.embedding(np.zeros((10, 2)), [f"a rather long name of a cell type {i}" for i in range(10)])
    ax.figure.draw_without_rendering()
    box, whole = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert whole.x0 <= box.x0
    assert box.x1 <= whole.x1
    assert box.x0 >= ax.get_window_extent().x1  # and covers no cell


def test_embedding_needs_a_label_for_each_cell():
    with pytest.raises(ValueError, match="3 cells but 2 labels"):
        plots.embedding(np.zeros((3, 2)), ["a", "b"])


# --- imputed against observed


def test_markers_show_what_was_counted_and_what_was_imputed(imputation, counts):
    axes = plots.imputed_against_observed(imputation, counts, "cell_type", ["gene_3", "gene_0"], per=100)
    assert [ax.get_title() for ax in axes] == ["gene_3", "gene_0"]
    assert axes[0].get_xlabel() == "counts in 100"
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["type_0", "type_1", "type_2"]
    share = counts.x[:, [3]].toarray().ravel() / counts.library
    for i, name in enumerate(names):
        mine = (counts.obs["cell_type"] == name).to_numpy()
        above, below = axes[0].collections[2 * i : 2 * i + 2]
        assert_allclose(above.get_offsets()[:, 0], 100 * share[mine], rtol=1e-5)
        assert_allclose(below.get_offsets()[:, 0], 100 * imputation.mean[mine, 3], rtol=1e-5)
        assert (above.get_offsets()[:, 1] < i).all()
        assert (below.get_offsets()[:, 1] > i).all()
        observed, interval, mean = axes[0].lines[3 * i : 3 * i + 3]
        assert_allclose(observed.get_xdata(), 100 * share[mine].mean(), rtol=1e-5)
        assert_allclose(mean.get_xdata(), 100 * imputation.mean[mine, 3].mean(), rtol=1e-5)
        ends = [100 * part[mine, 3].mean() for part in (imputation.lower, imputation.upper)]
        assert_allclose(interval.get_xdata(), ends, rtol=1e-5)
    assert axes[0].get_ylim() == (2.5, -0.5)  # the first group on top


def test_markers_have_a_legend_and_at_most_five_panels_in_a_row(imputation, counts):
    axes = plots.imputed_against_observed(imputation, counts, "cell_type", [f"gene_{i}" for i in range(7)])
    figure = axes[0].figure
    assert len(axes) == len(figure.axes) == 7
    assert axes[0].get_subplotspec().get_gridspec().ncols == 4
    assert len(texts(figure.legends[0])) == 5


def test_markers_draw_into_the_axes_they_are_given(imputation, counts):
    mine = Figure().subplots(1, 2)
    axes = plots.imputed_against_observed(imputation, counts, "cell_type", ["gene_1", "gene_2"], axes=mine)
    assert list(axes) == list(mine)
    assert mine[0].figure.legends == []


def test_markers_of_cells_without_a_group_are_left_out(imputation, counts):
    obs = counts.obs.assign(half=np.where(np.arange(60) < 20, "a", None))
    (ax,) = plots.imputed_against_observed(imputation, replace(counts, obs=obs), "half", ["gene_0"])
    assert sum(len(dots.get_offsets()) for dots in ax.collections) == 2 * 20


def test_markers_refuse_what_does_not_fit_together(fit, imputation, counts):
    draw = plots.imputed_against_observed
    with pytest.raises(KeyError, match="no column 'nothing'"):
        draw(imputation, counts, "nothing", ["gene_0"])
    with pytest.raises(ValueError, match="gene nope"):
        draw(imputation, counts, "cell_type", ["gene_0", "nope"])
    with pytest.raises(ValueError, match="other cells"):
        draw(imputation, counts[np.arange(30)], "cell_type", ["gene_0"])
    with pytest.raises(ValueError, match='what="share"'):
        draw(pyrosc.impute(fit, counts, "count", n_draws=2), counts, "cell_type", ["gene_0"])
    with pytest.raises(ValueError, match="2 genes need as many axes, not 1"):
        draw(imputation, counts, "cell_type", ["gene_0", "gene_1"], axes=[Figure().subplots()])


# --- volcano


def test_volcano_colours_the_calls_by_direction(table):
    ax = plots.volcano(table)
    lfc, called = table.lfc_mean, table.is_de
    grey, up, down = ax.collections
    for dots, mask in ((grey, ~called), (up, called & (lfc > 0)), (down, called & (lfc < 0))):
        expected = np.column_stack([lfc[mask], lfc[mask].abs() / 0.5])
        assert_allclose(dots.get_offsets(), expected)
    n_up, n_down = (called & (lfc > 0)).sum(), (called & (lfc < 0)).sum()
    expected = [f"not called ({(~called).sum()})", f"higher in B ({n_up})", f"lower in B ({n_down})"]
    assert texts(ax.get_legend()) == expected
    assert ax.get_xlabel() == "log2 fold change, B against rest"
    assert len({tuple(dots.get_facecolor()[0]) for dots in ax.collections}) == 3


def test_volcano_names_the_called_genes_of_most_evidence(table):
    ax = plots.volcano(table, n_labels=5)
    best = table[table.is_de].assign(z=lambda t: t.lfc_mean.abs() / t.lfc_sd).nlargest(5, "z")
    assert [text.get_text() for text in ax.texts] == list(best.gene)
    for text, x in zip(ax.texts, best.lfc_mean, strict=True):
        assert text.xy[0] == pytest.approx(x)


def test_names_in_a_crowd_do_not_overlap_and_stay_inside(table):
    crowd = table.assign(lfc_mean=5 + 0.02 * np.arange(200) % 0.3, is_de=True)
    ax = plots.volcano(crowd, n_labels=10)
    names = boxes(ax)
    assert len(names) == 10
    overlapping = [(i, j) for i in range(10) for j in range(i) if names[i].overlaps(names[j])]
    assert not overlapping
    inside = ax.get_window_extent()
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and b.y1 <= inside.y1 for b in names)


def test_volcano_without_calls_or_names(table):
    assert not plots.volcano(table.assign(is_de=False)).texts
    assert not plots.volcano(table, n_labels=0).texts


def test_volcano_draws_into_the_axes_it_is_given(table):
    mine = Figure().subplots()
    assert plots.volcano(table, ax=mine) is mine


def test_volcano_refuses_other_tables(table):
    with pytest.raises(ValueError, match="lacks lfc_sd, is_de"):
        plots.volcano(table.drop(columns=["lfc_sd", "is_de"]))
    with pytest.raises(ValueError, match="2 comparisons"):
        plots.volcano(pd.concat([table, table.assign(group="T")]))
    with pytest.raises(ValueError, match="0 comparisons"):
        plots.volcano(table[:0])


def test_a_picture_can_be_kept(table, tmp_path):
    plots.volcano(table).figure.savefig(tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
