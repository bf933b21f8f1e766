"""What an Imputation holds, in memory and on disk, and its way into an AnnData."""

import anndata
import numpy as np
import pytest
import zarr
from known_rates import GATE, MEAN, THETA, X, known
from scipy import stats
from tqdm.auto import tqdm

from pyrosc import from_anndata
from pyrosc.posterior import imputation, intervals, sampling
from pyrosc.posterior import impute as impute_module
from pyrosc.posterior.impute import impute

# --- what an Imputation can do


def test_a_layer_has_the_genes_and_cells_of_the_anndata(vae_fit, data, adata, tmp_path):
    imputed = impute(vae_fit, data, n_draws=2)
    few = adata[::-3, 5:30].copy()
    imputed.to_layer(few, "imputed")
    np.testing.assert_array_equal(few.layers["imputed"], imputed.mean[::-3, 5:30])
    assert "share" in few.uns["pyrosc_imputed"]["imputed"]
    impute(vae_fit, data, "rate", n_draws=2).to_layer(few, "imputed")  # replaced
    assert "rates" in few.uns["pyrosc_imputed"]["imputed"]
    imputed.to_layer(few, "other")
    few.write_h5ad(tmp_path / "few.h5ad")
    again = anndata.read_h5ad(tmp_path / "few.h5ad")
    assert set(again.uns["pyrosc_imputed"]) == {"imputed", "other"}
    with pytest.raises(ValueError, match=r"imputed has imputed values .*rates.*fit and test the raw counts"):
        from_anndata(again, layer="imputed")
    assert from_anndata(again).n_genes == 25


def test_a_layer_is_refused(vae_fit, data, adata):
    imputed = impute(vae_fit, data, n_draws=1, genes=["gene_0", "gene_1"])
    with pytest.raises(ValueError, match=r"38 of adata's 40 genes were not imputed \(gene_2.*select others"):
        imputed.to_layer(adata, "imputed")
    imputed = impute(vae_fit, data[np.arange(50)], n_draws=1)
    with pytest.raises(ValueError, match="150 of adata's 200 cells were not imputed"):
        imputed.to_layer(adata, "imputed")
    few = adata[:50].copy()
    few.layers["counts"] = few.X.copy()
    for name in ("counts", "X"):
        with pytest.raises(ValueError, match=f"'{name}', which is not imputed: choose another name"):
            imputed.to_layer(few, name)
    assert "pyrosc_imputed" not in few.uns
    few.obs_names = ["same"] * 50
    with pytest.raises(ValueError, match="names of cells are not unique"):
        imputed.to_layer(few, "imputed")


def test_information_is_one_less_the_share_of_the_variance_that_is_left():
    rng = np.random.default_rng(1)
    mean, theta = np.array([0.05, 5.0, 500.0]), np.array([1.0, 1.0, 1.0])
    x = np.maximum(rng.poisson(rng.gamma(theta, mean / theta, (2000, 3))), [0, 0, 1])
    fit, adata = known(x, mean, theta)
    imputed = impute(fit, adata, "rate", n_draws=400)
    right = stats.gamma(theta + x, scale=1 / (theta / mean + 1))
    total = right.var().mean(0) + right.mean().var(0)
    np.testing.assert_allclose(total, mean**2 / theta, rtol=0.2)  # the prior's variance
    information = imputed.information
    total = (imputed.sd**2).mean(0) + imputed.mean.var(0)
    np.testing.assert_allclose(information, (1 - imputed.sd**2 / total).clip(0), atol=1e-4)
    assert np.abs(information - (1 - right.var() / total).clip(0)).mean() < 0.05
    # On average that of a gamma with a Poisson count: mu / (mu + theta).
    np.testing.assert_allclose(1 - right.var().mean(0) / total, mean / (mean + theta), atol=0.05)
    assert (information >= 0).all()
    assert (information <= 1).all()
    fit, adata = known(x, mean)
    assert (impute(fit, adata, "rate", n_draws=1).information == 0).all()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rate", "rates of the cell's own counts, in counts at library size of the cell"),
        ("log1p", "log1p of rates"),
        ("repaired", "counts before dropout: as observed, but zeros are P(dropout) x mean"),
    ],
)
def test_its_repr_says_what_it_is(what, words):
    fit, adata = known(X, MEAN, THETA, GATE)
    assert words in repr(impute(fit, adata, what, n_draws=2))


# --- its numbers, in memory and on disk

FIELDS = ("mean", "sd", "lower", "upper")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_disk_are_the_numbers_of_memory(vae_fit, data, adata, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(sampling, "_ELEMENTS", 3 * 40 * 30)  # 30 cells at a time, and the last 20
    monkeypatch.setattr(imputation, "_CHUNK", 40 * 50)  # 60 are written at a time
    asked = {"what": "count", "n_draws": 3, "dtype": dtype}
    memory = impute(vae_fit, data, **asked)
    disk = impute(vae_fit, data, **asked, store=tmp_path / "imputed")
    for name in FIELDS:
        array = getattr(disk, name)
        assert isinstance(array, zarr.Array)
        assert array.chunks == (60, 40)
        assert array.dtype == getattr(memory, name).dtype == dtype
        np.testing.assert_array_equal(array[:], getattr(memory, name))
        again = zarr.open_array(str(tmp_path / "imputed" / name), mode="r")
        np.testing.assert_array_equal(again[:], getattr(memory, name))
    assert repr(disk) == repr(memory)
    np.testing.assert_array_equal(disk.information, memory.information)
    few = adata[::-3, 5:30].copy()
    disk.to_layer(few, "imputed")
    np.testing.assert_array_equal(few.layers["imputed"], memory.mean[::-3, 5:30])


def test_nothing_is_overwritten_and_nothing_half_written_stays(vae_fit, few, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").touch()
    with pytest.raises(FileExistsError, match="there is there already: name another folder to store to, or"):
        impute(vae_fit, few, store=str(there))
    assert [path.name for path in there.iterdir()] == ["kept"]
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to make new in: make it first"):
        impute(vae_fit, few, store=tmp_path / "none" / "new")
    monkeypatch.setattr(sampling, "_ELEMENTS", 1)
    monkeypatch.setattr(imputation, "_CHUNK", 1)
    place, seen = tmp_path / "new", []

    def broken(drawn, interval):
        seen.append((place / "upper").exists())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return intervals.of_draws(drawn, interval)

    monkeypatch.setattr(impute_module, "of_draws", broken)
    with pytest.raises(KeyboardInterrupt):
        impute(vae_fit, few, store=place)
    assert seen == [False] + [True] * 4
    assert not place.exists()


def test_half_precision_keeps_three_digits_and_says_what_it_cannot_hold():
    fit, adata = known(X, MEAN, THETA, GATE)
    for what in ("rate", "predictive", "log1p", "repaired"):
        half, whole = (impute(fit, adata, what, n_draws=9, dtype=d) for d in ("float16", "float32"))
        for name in FIELDS:
            assert getattr(half, name).dtype == np.float16
            # (Ends are rounded outwards, by up to a digit.)
            rtol = 5e-4 if name in ("mean", "sd") else 1e-3
            np.testing.assert_allclose(getattr(half, name), getattr(whole, name), rtol=rtol, atol=1e-6)
        assert (half.lower <= whole.lower).all()
        assert (half.upper >= whole.upper).all()
    with pytest.raises(ValueError, match=r'float16 has no room for .*: ask for dtype="float32", or for'):
        impute(fit, adata, "rate", library=1e7, dtype="float16")
    with pytest.raises(ValueError, match=r"shares are too small for float16: .*library=1e4"):
        impute(fit, adata, dtype="float16")
    with pytest.raises(ValueError, match=r'dtype must be "float32" or "float16", not \'float64\''):
        impute(fit, adata, "rate", dtype="float64")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_refused_by_the_cell(bad):
    mean = np.array(MEAN, np.float32)
    mean[2] = bad
    fit, adata = known(X, mean, THETA)
    with pytest.raises(ValueError, match=f"answer for cell {adata.obs_names[0]} is not finite"):
        impute(fit, adata, "rate", n_draws=2)


@pytest.mark.parametrize("slow", [True, False])
def test_a_progress_bar_is_of_what_takes_long(slow, few, vae_fit, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "_ELEMENTS", 1)
    monkeypatch.setattr(imputation, "tqdm", lambda **kw: tqdm(**kw | {"delay": 0 if slow else kw["delay"]}))
    impute(vae_fit, few, n_draws=2)
    assert ("12/12" in capsys.readouterr().err) == slow
    impute(vae_fit, few, n_draws=2, progress=False)
    assert capsys.readouterr().err == ""
