"""Saved fits: the same answers, nothing executed, and never half a fit."""

import builtins
import json
import math
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pairs
import pandas as pd
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrosc
from pyrosc.engine.adam import Adam
from pyrosc.inference import storage as persist
from pyrosc.inference import svi

QUICK = {"epochs": 2, "minibatch_size": 64, "learning_rate": 1e-2, "progress": False}


def answers(fit, data):
    """Every question, as arrays."""
    imputed = pyrosc.impute(fit, data, n_draws=3)
    counts = pyrosc.impute(fit, data, "count", library=1e3, batch="average", n_draws=2)
    nats = pyrosc.log_likelihood(fit, data, 3)
    return [
        imputed.mean,
        imputed.sd,
        imputed.lower,
        imputed.upper,
        counts.mean,
        nats.nats,
        nats.ess,
        pyrosc.posterior_predictive(fit, data, 2)[1].toarray(),
        np.concatenate([d["rho"].numpy() for d in pyrosc.draws(fit, data, "rho", n_draws=2)], 1),
    ]


def same_answers(a, b, data):
    return all(np.array_equal(x, y) for x, y in zip(answers(a, data), answers(b, data), strict=True))


@pytest.fixture
def saved(vae_fit, tmp_path):
    vae_fit.save(tmp_path / "fit")
    return tmp_path / "fit"


# --- the same fit comes back


def test_a_vae_comes_back_with_the_same_bits(vae_fit, data, saved, untouched):
    with untouched():
        again = pyrosc.load(saved)
    assert pairs.same_bits(vae_fit, again)
    assert same_answers(vae_fit, again, data)
    assert np.array_equal(pyrosc.latent(vae_fit, data), pyrosc.latent(again, data))
    assert again.schema == vae_fit.schema
    assert again.settings == vae_fit.settings
    assert again.history.equals(vae_fit.history)
    assert again.history.index.name == "epoch"
    assert repr(again) == repr(vae_fit)


def test_a_vae_with_all_that_is_optional_comes_back(rich_fit, rich, tmp_path):
    rich_fit.save(tmp_path / "fit")
    again = pyrosc.load(tmp_path / "fit")
    assert same_answers(rich_fit, again, rich)
    assert again.schema == rich_fit.schema
    assert isinstance(again.schema.categorical["plate"], tuple)


def test_a_loaded_fit_is_saved_again(vae_fit, data, saved, tmp_path):
    pyrosc.load(saved).save(tmp_path / "copy")
    assert pairs.same_bits(vae_fit, pyrosc.load(tmp_path / "copy"))


def test_users_programs_come_back_with_their_model_and_guide(data, tmp_path):
    n = data.n_genes

    def auto():
        model = pairs.global_model(n)
        return model, AutoNormal(model)

    built = {
        "class": lambda: (pairs.TwoMethods(n), None),
        "registered": lambda: (pairs.TwoMethods(n, register=True), None),
        "functions": lambda: pairs.two_functions(n),
        "autoguide": auto,
    }
    for name, build in built.items():
        model, guide = build()
        fit = pyrosc.fit_svi(model, data, guide=guide, **QUICK)
        fit.save(tmp_path / name)
        fresh, fresh_guide = build()
        modules = [m for m in (fresh, fresh_guide) if isinstance(m, nn.Module)]
        before = [{k: t.clone() for k, t in m.state_dict().items()} for m in modules]
        again = pyrosc.load(tmp_path / name, fresh, fresh_guide)
        assert pairs.same_bits(fit, again), name
        assert same_answers(fit, again, data), name
        # What was passed is left as it was.
        for m, state in zip(modules, before, strict=True):
            assert all(torch.equal(t, state[k]) for k, t in m.state_dict().items()), name
        with pytest.raises(ValueError, match=r"model=.*guide="):
            pyrosc.load(tmp_path / name)


def test_a_vae_with_a_guide_of_its_own_is_not_loaded_with_another(data, tmp_path):
    vae = pyrosc.VAE.for_data(data, n_latent=2, hidden=(8,))

    def guide(cells):
        shift = pyro.param("shift", lambda: torch.zeros(2))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            where = shift.expand(len(cells), 2)
            pyro.sample("z", pyro.distributions.Normal(where, 1.0).to_event(1))
            pyro.sample("l", pyro.distributions.Delta(cells.library, event_dim=1))

    fit = pyrosc.fit_svi(vae, data, guide=guide, **QUICK)
    fit.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="guide="):
        pyrosc.load(tmp_path / "fit")
    assert pairs.same_bits(fit, pyrosc.load(tmp_path / "fit", vae, guide))


# --- nothing is executed, nothing is trained


def test_no_pickle_is_written_or_read(vae_fit, saved, monkeypatch):
    files = sorted(path.name for path in saved.iterdir())
    assert files == ["fit.json", "parameters.safetensors"]
    json.loads((saved / "fit.json").read_text())
    for path in saved.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
        for word in (b"pickle", b"__reduce__", b"torch._utils", b"cloudpickle"):
            assert word not in content

    def forbidden(*args, **kwargs):
        raise AssertionError

    for module, name in [
        (torch, "load"),
        (torch, "save"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (builtins, "eval"),
    ]:
        monkeypatch.setattr(module, name, forbidden)
    assert pairs.same_bits(pyrosc.load(saved), vae_fit)
    vae_fit.save(saved)


def test_loading_trains_nothing(saved, vae_fit, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(svi, "train", forbidden)
    monkeypatch.setattr(Adam, "step", forbidden)
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    again = pyrosc.load(saved)
    assert pairs.same_bits(again, vae_fit)  # the running moments of batch norm too


@pytest.mark.parametrize("name", ["os", "__init__", "vae", "Path", "VAE2"])
def test_a_class_that_is_no_model_is_refused(saved, name):
    record = json.loads((saved / "fit.json").read_text())
    record["program"]["class"] = name
    (saved / "fit.json").write_text(json.dumps(record))
    with pytest.raises((ValueError, AttributeError)):
        pyrosc.load(saved)


# --- what is refused


def test_another_model_is_told_so(data, adata, tmp_path):
    n = data.n_genes
    pyrosc.fit_svi(pairs.TwoMethods(n), data, **QUICK).save(tmp_path / "fit")
    for wrong in (pairs.TwoMethods(n, n_latent=3), pairs.Conjugate(data.share), pairs.TwoMethods(n + 1)):
        with pytest.raises(ValueError, match="do not fit this model"):
            pyrosc.load(tmp_path / "fit", wrong)


def test_no_saved_fit(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no saved fit.*fit\.json"):
            pyrosc.load(place)


def test_an_older_format_asks_for_another_fit(saved):
    record = json.loads((saved / "fit.json").read_text())
    record["format"] -= 1
    (saved / "fit.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="fit it again"):
        pyrosc.load(saved)


def test_a_newer_format_asks_for_an_upgrade(saved):
    record = json.loads((saved / "fit.json").read_text())
    record["format"] += 1
    record["versions"]["pyrosc"] = "99.0"
    (saved / "fit.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"99\.0.*upgrade"):
        pyrosc.load(saved)


def test_other_peoples_files_are_never_replaced(vae_fit, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("one")
    mixed = tmp_path / "mixed"
    vae_fit.save(mixed)
    (mixed / "figure.txt").write_text("one")
    for place in (tmp_path / "notes", tmp_path / "file", mixed):
        with pytest.raises(FileExistsError, match="choose another"):
            vae_fit.save(place)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "file").read_text() == "one"
    assert (mixed / "figure.txt").read_text() == "one"
    assert pairs.same_bits(pyrosc.load(mixed), vae_fit)
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "file", "mixed"}


# --- where and how it is written


def test_directories_are_made_replaced_and_left_clean(vae_fit, rich_fit, tmp_path, monkeypatch):
    vae_fit.save(tmp_path / "a" / "b" / "fit")
    assert pairs.same_bits(pyrosc.load(str(tmp_path / "a" / "b" / "fit")), vae_fit)
    empty = tmp_path / "empty"
    empty.mkdir()
    vae_fit.save(str(empty))
    rich_fit.save(empty)
    assert pairs.same_bits(pyrosc.load(empty), rich_fit)
    monkeypatch.chdir(tmp_path)
    vae_fit.save("here/")
    assert pairs.same_bits(pyrosc.load("here/"), vae_fit)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "empty", "here"}
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["fit"]


def test_a_saved_fit_can_be_read_by_whoever_may_read_a_new_directory(saved, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(saved) == mode(tmp_path / "other")
    for path in saved.iterdir():
        assert mode(path) == mode(tmp_path / "file")


@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_the_umask_is_kept_and_never_lifted(vae_fit, tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is that of all threads"))
            vae_fit.save(tmp_path / "fit")
    finally:
        os.umask(before)
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(tmp_path / "fit") == 0o777 & ~mask
    assert {mode(path) for path in (tmp_path / "fit").iterdir()} == {0o666 & ~mask}


def test_the_record_says_what_made_the_fit(saved, data):
    record = json.loads((saved / "fit.json").read_text())
    assert record["versions"].keys() >= {"pyrosc", "torch", "pyro-ppl", "python"}
    assert record["settings"]["seed"] == 0
    assert record["schema"]["genes"] == list(data.schema.genes)
    assert record["schema"]["batches"] == ["batch_0", "batch_1"]
    assert record["program"]["class"] == "VAE"
    assert record["program"]["arguments"]["n_latent"] == 4


# --- a crash leaves the old fit or the new


class CrashError(Exception):
    """What a crash is in these tests."""


def calls_of_saving(fit, place, monkeypatch, crash_at):
    """Save, and raise at the n-th point before or after touching the disk; return how many there are."""
    count = 0

    def point():
        nonlocal count
        count += 1
        if count == crash_at:
            raise CrashError

    def watched(original):
        def call(*args, **kwargs):
            point()
            result = original(*args, **kwargs)
            point()
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(persist, "save_file", watched(persist.save_file))
        patch.setattr(Path, "write_text", watched(Path.write_text))
        patch.setattr(Path, "rename", watched(Path.rename))
        patch.setattr(os, "fsync", watched(os.fsync))
        patch.setattr(persist.shutil, "rmtree", watched(persist.shutil.rmtree))
        fit.save(place)
    return count


def test_a_crash_at_any_point_leaves_the_old_fit_or_the_new(vae_fit, rich_fit, tmp_path, monkeypatch):
    total = calls_of_saving(rich_fit, tmp_path / "whole", monkeypatch, 0)
    vae_fit.save(tmp_path / "whole")
    total = max(total, calls_of_saving(rich_fit, tmp_path / "whole", monkeypatch, 0))
    assert total >= 12  # two files, two flushes, two renames, each before and after
    found = set()
    for crash_at in range(1, total + 1):
        place = tmp_path / f"fit{crash_at}"
        vae_fit.save(place)
        with pytest.raises(CrashError):
            calls_of_saving(rich_fit, place, monkeypatch, crash_at)
        left = pyrosc.load(place)
        old, new = pairs.same_bits(left, vae_fit), pairs.same_bits(left, rich_fit)
        assert old or new, crash_at
        found.add("old" if old else "new")
        rich_fit.save(place)  # and the next try succeeds
        assert pairs.same_bits(pyrosc.load(place), rich_fit)
    assert found == {"old", "new"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_crash_of_the_first_save_leaves_nothing_or_the_fit(vae_fit, tmp_path, monkeypatch):
    total = calls_of_saving(vae_fit, tmp_path / "whole", monkeypatch, 0)
    for crash_at in range(1, total + 1):
        place = tmp_path / f"fit{crash_at}"
        with pytest.raises(CrashError):
            calls_of_saving(vae_fit, place, monkeypatch, crash_at)
        if place.exists():
            assert pairs.same_bits(pyrosc.load(place), vae_fit)
        else:
            with pytest.raises(FileNotFoundError):
                pyrosc.load(place)


def test_crashes_in_a_row_do_not_lose_the_old_fit(vae_fit, rich_fit, tmp_path, monkeypatch):
    """After a crash between the two renames the old fit has another name: the next crash must spare it."""
    renames = 0
    original = Path.rename

    def second_fails(self, target):
        nonlocal renames
        renames += 1
        if renames != 1:  # the old one's move succeeds, no other does
            raise CrashError
        return original(self, target)

    place = tmp_path / "fit"
    vae_fit.save(place)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second_fails)
        for _ in range(3):
            with pytest.raises(CrashError):
                rich_fit.save(place)
            assert pairs.same_bits(pyrosc.load(place), vae_fit)
    rich_fit.save(place)
    assert pairs.same_bits(pyrosc.load(place), rich_fit)


def test_a_model_with_another_part_must_be_brought_again(data, tmp_path):
    vae = pyrosc.VAE.for_data(data, n_latent=2, hidden=(4,))
    vae.likelihood = pyrosc.VAE.for_data(data, likelihood="poisson", n_latent=2, hidden=(4,)).likelihood
    fit = pyrosc.fit_svi(vae, data, epochs=1, progress=False)
    fit.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="program of your own"):
        pyrosc.load(tmp_path / "fit")
    loaded = pyrosc.load(tmp_path / "fit", model=vae)
    np.testing.assert_array_equal(pyrosc.latent(loaded, data), pyrosc.latent(fit, data))


CHANGES = {
    "AutoImpute": lambda m: setattr(m, "weight_decay", 1.0),
    "AutoZI": lambda m: setattr(m, "least_dropout", 0.2),
    "Autoencoder": lambda m: setattr(m.prior, "n_latent", 3),
    "DCA": lambda m: setattr(m, "ridge", 1.0),
    "GMVAE": lambda m: setattr(m, "elbo", Trace_ELBO),
    "GaussianVAE": lambda m: setattr(m, "epochs", 3),
    "LDVAE": lambda m: setattr(m.encoder.body[2], "dropped", 9),
    "SCANVI": lambda m: setattr(m, "classification", 1.0),
    "SCVIS": lambda m: setattr(m, "perplexity", 4.0),
    "TOTALVI": lambda m: setattr(m.decoder.covariates, "sizes", [3, 2]),
    "VAE": lambda m: setattr(m, "clip_norm", np.ones(2)),
    "VASC": lambda m: setattr(m, "temperature", 1.0),
    "VSC": lambda m: setattr(m.encoder, "prior_logit", 0.0),
}


@pytest.mark.parametrize("name", pyrosc.models.__all__)
def test_a_model_with_another_number_is_not_taken_for_its_recipe(name, rich):
    more = {"n_components": 3} if name == "GMVAE" else {}
    model = getattr(pyrosc, name).for_data(rich, hidden=(4,), **more)
    fit = pairs.untrained(model, rich)
    assert persist.recipe_of(fit)["class"] == name
    CHANGES[name](model)
    assert persist.recipe_of(fit) is None


def test_a_changed_model_is_loaded_with_its_numbers_or_not_at_all(data, tmp_path):
    scanvi = pyrosc.SCANVI.for_data(data, n_latent=2, hidden=(4,))
    scanvi.classification = 3.0
    fit = pyrosc.fit_svi(scanvi, data, epochs=1, progress=False)
    fit.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="program of your own"):
        pyrosc.load(tmp_path / "fit")
    again = pyrosc.load(tmp_path / "fit", scanvi)
    assert again.program.classification == 3.0
    assert pairs.same_bits(fit, again)


def test_an_infinite_clip_norm_is_saved(data, tmp_path):
    dca = pyrosc.DCA.for_data(data, hidden=(4,))
    dca.clip_norm = math.inf  # clip nothing
    fit = pyrosc.fit_svi(dca, data, epochs=1, progress=False)
    fit.save(tmp_path / "fit")
    text = (tmp_path / "fit" / "fit.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = pyrosc.load(tmp_path / "fit", dca)
    assert again.settings["clip_norm"] == math.inf
    assert again.settings == fit.settings


def test_numbers_of_numpy_are_saved_and_the_record_is_strict_json(data, tmp_path):
    vae = pyrosc.VAE.for_data(data, n_latent=2, hidden=(4,))
    vae.recipe = vae.recipe | {"n_latent": np.int64(2), "hidden": np.array([4])}
    fit = pyrosc.fit_svi(vae, data, epochs=1, validation=0.0, progress=False)
    fit.settings["learning_rate"] = np.float32(0.5)
    fit.save(tmp_path / "fit")
    text = (tmp_path / "fit" / "fit.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    pd.testing.assert_frame_equal(pyrosc.load(tmp_path / "fit").history, fit.history)


def test_a_link_to_a_directory_stays_a_link(vae_fit, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    vae_fit.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert pyrosc.load(tmp_path / "real").schema == vae_fit.schema


@pytest.mark.parametrize("name", [persist._RECORD, persist._TENSORS])
def test_a_damaged_file_is_named(name, vae_fit, tmp_path):
    vae_fit.save(tmp_path / "fit")
    path = tmp_path / "fit" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        pyrosc.load(tmp_path / "fit")
