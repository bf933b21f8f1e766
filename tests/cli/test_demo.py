"""The demo: what it writes, and what it leaves alone."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest

import pyrosc
from pyrosc.cli import demo as module
from pyrosc.cli.demo import _OWN, demo

WRITTEN = {
    "summary.txt",
    "fit/fit.json",
    "fit/parameters.safetensors",
    "cells.h5ad",
    "differential_expression.csv",
    "losses.png",
    "latent_space.png",
    "markers.png",
    "volcano.png",
}


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder and text of a short demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, demo(folder, epochs=2, smoke=True)


def test_the_demo_writes_its_files(ran):
    folder, _ = ran
    assert files(folder) == WRITTEN == {name for name in _OWN if not name.endswith("/")}
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000


def test_the_summary_has_the_figures(ran):
    folder, text = ran
    assert (folder / "summary.txt").read_text() == text + "\n"
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    test = cells[cells.obs["held_out"].to_numpy()]
    fit = pyrosc.load(folder / "fit")
    model = pyrosc.log_likelihood(fit, test, 5).mean
    assert float(re.search(r"VAE +(-\d+\.\d)", text).group(1)) == pytest.approx(model, abs=0.06)
    alike = float(re.search(r"all cells alike +(-\d+\.\d)", text).group(1))
    assert -740 < alike < -700
    assert float(re.search(r"gain +([-+]\d+\.\d)", text).group(1)) == pytest.approx(model - alike, abs=0.11)
    from sklearn.metrics import adjusted_rand_score

    ari = adjusted_rand_score(cells.obs["cell_type"], cells.obs["cluster"])
    assert float(re.search(r"10 clusters, 10 labels +(\d\.\d\d)", text).group(1)) == pytest.approx(
        ari, abs=0.006
    )
    assert re.search(r"6 clusters, the T-cell labels taken as one +\d\.\d\d +0\.[67]\d", text)
    assert "in 2 epochs" in text
    assert "adata.obsm" in text


def test_the_summary_names_genes_that_mark_the_cells(ran):
    _, text = ran
    after = dict(re.findall(r"^  (\S.*) \(\d+ cells; .*\):\n    (.*)$", text, flags=re.M))
    assert len(after) == 10
    assert "CD79A" in after["CD19+ B"]
    assert "GNLY" in after["CD56+ NK"]
    assert "FCER1A" in after["Dendritic"]


def test_the_cells_are_annotated(ran):
    cells = anndata.read_h5ad(ran[0] / "cells.h5ad")
    real = pyrosc.datasets.pbmc68k_reduced()
    assert (cells.X != real.X).nnz == 0
    assert cells.obs["held_out"].sum() == 140
    assert cells.obs["cluster"].nunique() == 10
    fit = pyrosc.load(ran[0] / "fit")
    np.testing.assert_array_equal(cells.obsm["X_vae"], pyrosc.latent(fit, real))
    assert cells.obsm["X_vae_tsne"].shape == (700, 2)
    np.testing.assert_allclose(cells.layers["imputed"].sum(1), 1, rtol=1e-4)


def test_the_table_has_every_gene_of_every_type(ran):
    table = pd.read_csv(ran[0] / "differential_expression.csv")
    assert len(table) == 10 * 765
    assert set(table["reference"]) == {"rest"}
    assert table["is_de"].any()


@pytest.mark.parametrize("seed", [0, 3])
def test_no_model_is_fitted_to_the_held_out_cells(monkeypatch, tmp_path, ran, seed):
    seen = []

    class Enough(Exception):
        pass

    def spy(data, **_):
        seen.append(data)
        raise Enough

    monkeypatch.setattr(module, "baseline", spy)
    fitted = module.fit_svi
    monkeypatch.setattr(
        module, "fit_svi", lambda model, data, **more: seen.append(data) or fitted(model, data, **more)
    )
    with pytest.raises(Enough):
        demo(tmp_path, epochs=1, smoke=True, seed=seed)
    vae, alike = ({*data.cell_names} for data in seen)
    assert vae == alike
    assert len(vae) == 560
    cells = anndata.read_h5ad(ran[0] / "cells.h5ad")  # of seed 0
    held_out = {*cells.obs_names[cells.obs["held_out"]]}
    assert vae.isdisjoint(held_out) == (seed == 0)


def test_the_same_seed_gives_the_same_and_replaces_it(ran):
    folder, text = ran
    before = anndata.read_h5ad(folder / "cells.h5ad")
    again = demo(folder, epochs=2, smoke=True)
    assert re.sub(r"All took \d+ s", "", again) == re.sub(r"All took \d+ s", "", text)
    after = anndata.read_h5ad(folder / "cells.h5ad")
    np.testing.assert_array_equal(after.obsm["X_vae"], before.obsm["X_vae"])
    assert after.obs.equals(before.obs)
    assert files(folder) == WRITTEN


@pytest.mark.parametrize("name", ["mine.txt", "fit/mine.txt", "volcano.png"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(SystemExit, match="Nothing was written") as error:
        demo(tmp_path, epochs=1, smoke=True)
    assert name in str(error.value) or "no summary.txt" in str(error.value)
    assert files(tmp_path) == {name}
    assert path.read_text() == "mine"


def test_a_summary_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "summary.txt").write_bytes(b"\xff\xfe of my thesis")
    with pytest.raises(SystemExit, match="is not empty"):
        demo(tmp_path, epochs=1)
    assert (tmp_path / "summary.txt").read_bytes() == b"\xff\xfe of my thesis"


def test_an_output_that_is_a_file_or_below_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="is no folder"):
        demo(tmp_path / "file")
    with pytest.raises(SystemExit, match="can't write to"):
        demo(tmp_path / "file" / "demo")


def test_an_unfinished_demo_may_be_run_again(tmp_path):
    module._claim(tmp_path)
    assert (tmp_path / "summary.txt").read_text() == "pyrosc demo: not finished\n"
    module._claim(tmp_path)
