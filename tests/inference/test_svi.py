"""fit_svi: Pyro's own step, schedules, early stopping, interruption, and what it leaves alone."""

import math

import numpy as np
import pairs
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, PyroOptim
from torch import nn

import pyrosc
from pyrosc import VAE, fit_svi
from pyrosc.inference import elbo, step
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.inference.isolation import isolated
from pyrosc.inference.settings import _planned_epochs, split

CPU = torch.device("cpu")
QUICK = {"epochs": 3, "minibatch_size": 64, "learning_rate": 1e-2, "progress": False}


def tiny(data, **recipe):
    return VAE.for_data(data, **{"n_latent": 2, "hidden": (8,)} | recipe)


def plate(cells):
    return pyro.plate("cells", cells.n_total, subsample=cells.index)


# --- a step is Pyro's


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_a_step_has_the_loss_and_the_gradients_of_pyros_svi(data, elbo, likelihood):
    vae = tiny(data, likelihood=likelihood, library="latent", norm="layer").train()
    cells = data.on("cpu").cells(torch.tensor([5, 0, 17, 130, 99]))

    def model(cells):
        pyro.module("vae", vae)
        vae.model(cells)

    gradients = {}

    class Recorder(PyroOptim):
        def __call__(self, params, *args):
            gradients.update({id(p): p.grad.clone() for p in params})

    with isolated(CPU, 3, pairs.empty_params()):
        theirs = SVI(model, vae.guide, Recorder(torch.optim.Adam, {"lr": 0.1}), elbo()).step(cells)
    vae.zero_grad()
    with isolated(CPU, 3, pairs.empty_params()):
        ours = _weighted_loss(elbo(), vae.model, vae.guide, cells)
    ours.backward()
    # A float32 sum, in another order.
    assert float(ours.detach()) * data.n_cells == pytest.approx(theirs, rel=1e-5)
    parameters = dict(vae.named_parameters())
    assert set(gradients) == {id(p) for p in parameters.values()}
    for name, p in parameters.items():
        expected = gradients[id(p)]
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(
            p.grad * data.n_cells, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name
        )


def test_a_whole_fit_is_pyros_svi_with_adam_on_the_same_minibatches(data, monkeypatch):
    """One minibatch of all cells, a constant rate, no warm-up: the same parameters as SVI with Adam."""
    monkeypatch.setattr(step, "_one_cycle", lambda done: 1.0)
    shares = pairs.Conjugate(data.share, shift=0.3)
    settings = {"minibatch_size": 200, "kl_warmup": 0, "validation": 0.0, "learning_rate": 0.01}
    fit = fit_svi(shares, data, epochs=20, elbo=Trace_ELBO, progress=False, **settings)
    cells = data.on("cpu").cells(torch.arange(200))
    with isolated(CPU, 0, pairs.empty_params()):

        def model(cells):
            pyro.module("shares", shares)
            shares.model(cells)

        stepper = SVI(model, shares.guide, Adam({"lr": 0.01}), Trace_ELBO())
        losses = [stepper.step(cells) / 200 for _ in range(20)]
    # Different draws, the same descent: the gradients' noise is averaged over 200 cells.
    torch.testing.assert_close(fit.program.shift, shares.shift, rtol=0, atol=0.02)
    assert fit.history["train"].iloc[-1] == pytest.approx(losses[-1], rel=0.01)


# --- known answers


def test_the_fit_finds_the_exact_posterior_and_its_evidence(data):
    start = pairs.Conjugate(data.share, shift=0.7)
    fit = fit_svi(start, data, epochs=60, minibatch_size=64, learning_rate=0.05, progress=False, seed=1)
    a, b = fit.program.shift.exp().tolist()
    assert a / b == pytest.approx(1, abs=0.01)  # the mean of the posterior
    evidence = start.evidence(data.x.toarray())
    rows = split(data.n_cells, 0.1, 1)[1]
    best = fit.history["validation"].iloc[fit.found.best_epoch]
    assert best == pytest.approx(-evidence[rows].mean(), abs=0.05)
    assert fit.history["validation"].iloc[0] > best + 0.2


def test_a_global_autoguide_finds_the_shares(data):
    model = pairs.global_model(data.n_genes)
    fit = fit_svi(
        model, data, guide=AutoNormal(model), epochs=80, minibatch_size=64, learning_rate=0.05, progress=False
    )
    rho = pyrosc.impute(fit, data, n_draws=20).mean[0]
    assert 0.5 * np.abs(rho - data.share).sum() < 0.03


# --- schedules


@pytest.mark.parametrize("cells", [1, 3, 64, 65, 200])
@pytest.mark.parametrize(("epochs", "warmup"), [(1, None), (2, 1000), (5, None), (5, 0), (7, 3)])
def test_the_kl_weight_always_ends_at_its_value(data, cells, epochs, warmup):
    fit = fit_svi(
        pairs.Conjugate(data.share),
        data[np.arange(cells)],
        epochs=epochs,
        minibatch_size=32,
        kl_warmup=warmup,
        patience=1000,
        progress=False,
    )
    weights = fit.history["kl_weight"]
    assert len(weights) == epochs
    assert weights.iloc[-1] == 1
    assert (weights.diff().dropna() >= 0).all()


def test_another_kl_weight_is_reached_too(data):
    fit = fit_svi(tiny(data), data, kl_weight=0.5, kl_warmup=4, **QUICK)
    assert fit.history["kl_weight"].iloc[-1] == 0.5
    assert fit.settings["kl_warmup"] == 4


def test_the_warm_up_rises_by_steps(data):
    seen = []

    class Watching(Trace_ELBO):
        pass

    original = elbo._weighted_loss

    def record(elbo, model, guide, cells, weight=1.0):
        if torch.is_grad_enabled():
            seen.append(float(weight))
        return original(elbo, model, guide, cells, weight)

    elbo._weighted_loss = record
    try:
        settings = {"epochs": 4, "minibatch_size": 60, "kl_warmup": 5, "progress": False}
        fit_svi(pairs.Conjugate(data.share), data, elbo=Watching, **settings)
    finally:
        elbo._weighted_loss = original
    np.testing.assert_allclose(seen, [0.2, 0.4, 0.6, 0.8, *[1] * 8])


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [step._one_cycle(t) for t in np.linspace(0, 1, 101)]
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert 0 < rates[0] < 0.2
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    peak = int(np.argmax(rates))
    assert all(np.diff(rates[: peak + 1]) > 0)
    assert all(np.diff(rates[peak:]) < 0)


def test_epochs_are_planned_from_the_data():
    planned = [_planned_epochs(steps) for steps in (1, 10, 100, 10_000)]
    assert planned == sorted(planned, reverse=True)
    assert all(isinstance(n, int) and n >= 1 for n in planned)


# --- validation and early stopping


def test_the_split_covers_all_cells_once():
    train, held = split(103, 0.1, 4)
    assert sorted([*train, *held]) == list(range(103))
    assert len(held) == 10
    assert not np.array_equal(held, split(103, 0.1, 5)[1])
    train, held = split(103, 0.0, 4)
    assert len(held) == 0
    assert list(train) == list(range(103))


@pytest.mark.parametrize(("cells", "validation"), [(1, 0.9), (2, 0.9), (3, 0.99), (5, 0.1)])
def test_a_cell_to_train_on_is_always_left(data, cells, validation):
    train, held = split(cells, validation, 0)
    assert len(train) >= 1
    assert len(train) + len(held) == cells
    rows = np.arange(cells)
    fit_svi(pairs.Conjugate(data.share), data[rows], validation=validation, epochs=1, progress=False)


class Overfits(nn.Module):
    """The validation loss is the distance of `at` from 1, and each step moves `at` on by the rate."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def model(self, cells):
        with plate(cells):
            if self.training:
                log_p = self.at.expand(len(cells))
                self.seen += 1
            else:
                log_p = -((self.at - 1).abs()).expand(len(cells))
            pyro.sample("x", dist.Delta(cells.x, log_density=log_p, event_dim=1), obs=cells.x)

    def guide(self, cells):
        pass


def test_early_stopping_keeps_the_best_state(data, monkeypatch):
    monkeypatch.setattr(step, "_one_cycle", lambda done: 1.0)
    settings = {"epochs": 50, "minibatch_size": 180, "learning_rate": 0.1, "kl_warmup": 0, "progress": False}
    fit = fit_svi(Overfits(), data, patience=4, **settings)
    history = fit.history["validation"]
    best = fit.found.best_epoch
    assert best == history.argmin()
    assert 0.9 <= float(fit.program.at.detach()) <= 1.1
    assert abs(float(fit.program.at.detach()) - 1) == pytest.approx(history.iloc[best], abs=1e-5)
    assert len(history) == best + 5  # stopped after four epochs without a better one
    assert float(fit.program.seen) == best + 1  # buffers are restored too; the check leaves them alone


def test_without_validation_the_last_epoch_is_kept(data, monkeypatch):
    monkeypatch.setattr(step, "_one_cycle", lambda done: 1.0)
    settings = {"epochs": 15, "minibatch_size": 200, "learning_rate": 0.1, "kl_warmup": 0, "progress": False}
    fit = fit_svi(Overfits(), data, validation=0.0, patience=1, **settings)
    assert len(fit.history) == 15
    assert fit.found.best_epoch == 14
    assert float(fit.program.at.detach()) == pytest.approx(1.5, abs=0.01)
    assert fit.history["validation"].isna().all()


def test_parameters_of_the_store_are_restored_too(data, monkeypatch):
    monkeypatch.setattr(step, "_one_cycle", lambda done: 1.0)

    def model(cells):
        at = pyro.param("at", torch.zeros(()))
        log_p = at if torch.is_grad_enabled() else -(at - 1).abs()
        with plate(cells):
            log_p = log_p.expand(len(cells))
            pyro.sample("x", dist.Delta(cells.x, log_density=log_p, event_dim=1), obs=cells.x)

    settings = {"epochs": 50, "minibatch_size": 180, "learning_rate": 0.1, "kl_warmup": 0, "progress": False}
    fit = fit_svi(model, data, guide=lambda cells: None, patience=4, **settings)
    assert float(fit.params["params"]["at"].detach()) == pytest.approx(1, abs=0.11)
    assert len(fit.history) < 20


# --- the history


def test_history_has_a_row_an_epoch_and_says_what_happened(data):
    fit = fit_svi(tiny(data, library="latent"), data, **QUICK)
    assert fit.history.index.name == "epoch"
    assert len(fit.history) == 3
    assert set(fit.history) == {
        "train",
        "validation",
        "kl_z",
        "kl_l",
        "kl_weight",
        "learning_rate",
        "seconds",
    }
    assert np.isfinite(fit.history).all(axis=None)
    assert (fit.history["seconds"].diff().dropna() > 0).all()
    assert (fit.history["learning_rate"] <= 1e-2 + 1e-12).all()
    s = fit.settings
    assert (s["epochs"], s["validation"], s["seed"], s["replay"]) == (3, 0.1, 0, True)
    found = fit.found
    assert (found.n_cells, found.n_train, found.threads, found.data) == (200, 180, (1,), data.fingerprint)
    assert found.replayed == "the fit has few steps"
    assert "steps run: the fit has few steps" in repr(fit)
    assert {"python", "torch", "pyrosc"} <= {*found.versions}
    assert fit_svi(fit.program, data, **s, progress=False).settings == s
    assert "3 epochs" in repr(fit)
    assert "VAE" in repr(fit)
    assert "40 genes" in repr(fit)


def test_the_validation_loss_is_the_negative_elbo_of_the_kept_parameters(data):
    fit = fit_svi(tiny(data), data, seed=2, **QUICK)
    held = data[split(200, 0.1, 2)[1]].on("cpu")
    cells = held.cells(torch.arange(20))
    with fit.asking(2):
        expected = float(_weighted_loss(TraceMeanField_ELBO(), fit.model, fit.guide, cells))
    best = fit.history["validation"].iloc[fit.found.best_epoch]
    assert best == pytest.approx(expected, rel=1e-5)


def test_a_global_kl_is_shared_by_the_training_cells_in_both_losses(data):
    """Else a hundredth of the cells would be charged with the whole of it."""

    def model(cells):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        bias = pyro.param("bias", lambda: torch.zeros(40))
        with plate(cells):
            rate = cells.library * torch.softmax(bias + 0 * w, -1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    guide = lambda cells: pyro.sample("w", dist.Normal(300.0, 1.0))
    fit = fit_svi(model, data, guide=guide, elbo=TraceMeanField_ELBO, **QUICK)
    np.testing.assert_allclose(fit.history["kl_w"], 300**2 / 2 / 180, rtol=1e-4)
    last = fit.history.iloc[-1]
    assert last["validation"] == pytest.approx(last["train"], rel=0.3)


def test_progress_is_silent_when_not_wanted(data, capfd):
    fit_svi(tiny(data), data, **QUICK)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
    fit_svi(tiny(data), data, **QUICK | {"progress": True})
    out, err = capfd.readouterr()
    assert out == ""
    assert "fit" in err


# --- reproducibility and isolation


PAIRS = {
    "vae": lambda data: (tiny(data), None),
    "class": lambda data: (pairs.TwoMethods(data.n_genes), None),
    "functions": lambda data: pairs.two_functions(data.n_genes),
    "autoguide": lambda data: (m := pairs.global_model(data.n_genes), AutoNormal(m)),
}


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(data, build):
    fits = []
    for i, seed in enumerate((1, 1, 2)):
        model, guide = build(data)
        torch.manual_seed(i)
        fits.append(fit_svi(model, data, guide=guide, seed=seed, **QUICK))
    assert pairs.same_bits(fits[0], fits[1])
    assert not pairs.same_bits(fits[0], fits[2])
    columns = ["train", "validation"]
    assert fits[0].history[columns].equals(fits[1].history[columns])


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_the_process_is_left_as_found_and_the_model_untrained(data, untouched, build):
    model, guide = build(data)
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in modules]
    modes = [m.training for m in modules]
    with untouched():
        fit = fit_svi(model, data, guide=guide, **QUICK)
        pyrosc.impute(fit, data, n_draws=2)
    for m, state in zip(modules, before, strict=True):
        assert m.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in m.state_dict().items())
        assert all(p.grad is None for p in m.parameters())
    assert [m.training for m in modules] == modes


def test_for_data_leaves_the_process_as_found(data, untouched):
    with untouched():
        one, two, other = tiny(data, seed=1), tiny(data, seed=1), tiny(data, seed=2)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert same(one, two)
    assert not same(one, other)


def test_the_callers_parameters_stay_in_the_callers_store(data):
    pyro.param("weight", torch.tensor(7.0))
    try:
        model, guide = pairs.two_functions(data.n_genes)
        fit = fit_svi(model, data, guide=guide, **QUICK)
        assert dict(pyro.get_param_store().items()).keys() == {"weight"}
        assert float(pyro.param("weight").detach()) == 7
        assert fit.params["params"]["weight"].shape == (2, 40)
    finally:
        pyro.clear_param_store()


def test_a_fit_that_fails_leaves_the_process_as_found(data, untouched):
    def broken(cells):
        pyro.param("w", torch.ones(2))
        raise ZeroDivisionError

    with untouched(), pytest.raises(ZeroDivisionError):
        fit_svi(broken, data, guide=lambda cells: None, **QUICK)


def test_tensors_that_functions_start_from_are_not_trained(data):
    start = torch.zeros(data.n_genes)

    def model(cells):
        bias = pyro.param("bias", start)
        with plate(cells):
            rate = cells.library * torch.softmax(bias, -1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    guide = lambda cells: None
    one = fit_svi(model, data, guide=guide, **QUICK)
    kept = one.params["params"]["bias"].detach().clone()
    two = fit_svi(model, data, guide=guide, **QUICK)
    assert torch.equal(start, torch.zeros(data.n_genes))
    assert torch.equal(one.params["params"]["bias"], kept)
    assert torch.equal(two.params["params"]["bias"], kept)
    assert not torch.equal(kept, start)


def test_modules_that_functions_close_over_are_refused_or_not_trained(data):
    """Functions can't be copied, so a module in their closure would be trained in place by each fit."""
    decoder = nn.Linear(1, data.n_genes)
    before = decoder.bias.detach().clone()

    def model(cells):
        pyro.module("decoder", decoder)
        with plate(cells):
            rate = cells.library * torch.softmax(decoder(torch.ones(1)), -1)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    try:
        one = fit_svi(model, data, guide=lambda cells: None, **QUICK)
    except ValueError as error:
        assert "decoder" in str(error)  # noqa: PT017
    else:
        kept = {name: t.detach().clone() for name, t in pairs.tensors_of(one).items()}
        fit_svi(model, data, guide=lambda cells: None, **QUICK)
        assert all(torch.equal(t, kept[name]) for name, t in pairs.tensors_of(one).items())
    assert torch.equal(decoder.bias, before)


def test_a_class_that_registers_itself_with_pyro_module_is_fine(data):
    two = pairs.TwoMethods(data.n_genes, register=True)
    plain = pairs.TwoMethods(data.n_genes)
    fit, other = fit_svi(two, data, **QUICK), fit_svi(plain, data, **QUICK)
    for name, t in fit.program.state_dict().items():
        assert torch.equal(t, other.program.state_dict()[name])
    assert np.array_equal(pyrosc.latent(fit, data), pyrosc.latent(other, data))


# --- ctrl-C


class Interrupts(pairs.TwoMethods):
    """Presses ctrl-C at the n-th run of the model, counted in training or in evaluation."""

    def __init__(self, n_genes, at, *, training=True):
        super().__init__(n_genes)
        self.at, self.when, self.runs = at, training, 0

    def model(self, cells):
        if self.training is self.when:
            self.runs += 1
            if self.runs == self.at:
                raise KeyboardInterrupt
        super().model(cells)


# Four steps an epoch, after the run of the check.
@pytest.mark.parametrize(("at", "epochs"), [(4, 1), (6, 2), (10, 3)])
def test_ctrl_c_returns_the_fit_so_far(data, untouched, at, epochs):
    program = Interrupts(data.n_genes, at)
    with untouched():
        fit = fit_svi(
            program, data, epochs=50, minibatch_size=45, learning_rate=1e-2, progress=False, kl_warmup=0
        )
        z = pyrosc.latent(fit, data)
        pyrosc.impute(fit, data, n_draws=2)
    assert len(fit.history) == epochs
    assert np.isfinite(z).all()
    assert "epochs" in repr(fit)
    if epochs > 1:
        started = program.decoder.weight
        assert not torch.equal(fit.program.decoder.weight, started)


def test_ctrl_c_while_the_validation_loss_is_measured_returns_the_fit_so_far(data):
    for at in (2, 3, 5):  # the check was the first run
        program = Interrupts(data.n_genes, at, training=False)
        try:
            fit = fit_svi(program, data, epochs=50, minibatch_size=45, progress=False, kl_warmup=0)
        except KeyboardInterrupt:
            pytest.fail("the fit was lost")
        assert 1 <= len(fit.history) <= 4
        assert np.isfinite(pyrosc.latent(fit, data)).all()
        assert "epochs" in repr(fit)


def test_ctrl_c_before_the_first_step_interrupts(data, untouched):
    with untouched(), pytest.raises(KeyboardInterrupt):
        fit_svi(Interrupts(data.n_genes, 1), data, **QUICK)


def test_an_interrupted_fit_is_saved_and_loaded(data, tmp_path):
    fit = fit_svi(Interrupts(data.n_genes, 6), data, epochs=50, minibatch_size=45, progress=False)
    fit.save(tmp_path / "fit")
    again = pyrosc.load(tmp_path / "fit", Interrupts(data.n_genes, 10**9))
    assert pairs.same_bits(fit, again)
    assert again.history.equals(fit.history)


# --- losses that are not finite


class Explodes(pairs.TwoMethods):
    """Its x or its z has no finite density from the n-th run on, in training or in evaluation."""

    def __init__(self, n_genes, site, at, *, when=(True,), value=math.nan):
        super().__init__(n_genes)
        self.site, self.at, self.when, self.value, self.runs = site, at, when, value, 0

    def model(self, cells):
        self.runs += self.training
        bad = self.value if self.runs >= self.at and self.training in self.when else 0.0
        with plate(cells):
            zero = cells.x.new_zeros(len(cells), self.n_latent)
            z = pyro.sample("z", dist.Normal(zero + (bad if self.site == "z" else 0), 1.0).to_event(1))
            rho = torch.softmax(self.decoder(z), -1)
            rate = cells.library * rho + (bad if self.site == "x" else 0)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("site", ["x", "z"])
@pytest.mark.parametrize("at", [3, 8])  # (the check was the first run)
def test_a_loss_that_is_not_finite_raises_and_names_the_site(data, untouched, site, at):
    program = Explodes(data.n_genes, site, at, when=(True, False))
    with untouched(), pytest.raises(FloatingPointError) as caught:
        fit_svi(program, data, **QUICK)
    message = str(caught.value)
    assert f"density now: {site}." in message
    assert f"step {at - 2} " in message
    assert "learning_rate" in message


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_validation_loss_that_is_not_finite_raises_too(data):
    program = Explodes(data.n_genes, "x", 5, when=(False,), value=math.nan)
    with pytest.raises(FloatingPointError, match="x"):
        fit_svi(program, data, **QUICK)


def test_parameters_that_are_no_longer_finite_after_the_last_step_raise(data):
    class Edge(pairs.Conjugate):
        def model(self, cells):
            super().model(cells)
            # Zero, with a slope that is not finite.
            pyro.factor("edge", torch.sqrt(self.shift.sum().square()))

    with pytest.raises(FloatingPointError):
        fit_svi(Edge(data.share), data, epochs=1, minibatch_size=200, validation=0.0, progress=False)


# --- errors


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"minibatch_size": 0},
        {"kl_warmup": -1},
        {"patience": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"kl_weight": 0.0},
        {"clip_norm": 0.0},
        {"precision": "half"},
        {"validation": 1.0},
        {"validation": -0.1},
        {"validation": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(data, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        fit_svi(pairs.Conjugate(data.share), data, progress=False, **settings)


def test_no_guide_no_model_and_nothing_to_train(data):
    with pytest.raises(TypeError, match=r"guide=.*AutoNormal"):
        fit_svi(pairs.global_model(40), data, **QUICK)
    with pytest.raises(TypeError, match="callable"):
        fit_svi(3, data, **QUICK)

    def model(cells):
        with plate(cells):
            pyro.sample("x", dist.Poisson(torch.ones_like(cells.x)).to_event(1), obs=cells.x)

    with pytest.raises(ValueError, match="nothing to train"):
        fit_svi(model, data, guide=lambda cells: None, **QUICK)


def test_for_data_names_unknown_settings(data):
    for setting in ({"likelihood": "x"}, {"library": "x"}, {"dispersion": "x"}, {"norm": "x"}):
        (name,) = setting
        with pytest.raises(ValueError, match=name):
            VAE.for_data(data, **setting)


# --- the rest


def test_an_anndata_is_as_good_as_counts(adata):
    vae = tiny(adata)
    a, b = fit_svi(vae, adata, **QUICK), fit_svi(vae, pyrosc.from_anndata(adata), **QUICK)
    assert pairs.same_bits(a, b)


def test_gradients_are_clipped(data, monkeypatch):
    # Adam forgets the size of a gradient but not its changes: clipping must change the path.
    a, b = (fit_svi(tiny(data), data, clip_norm=c, **QUICK) for c in (None, 1e-3))
    assert not pairs.same_bits(a, b)
    seen = []
    original = step._clipped

    def spy(gradients, norm):
        clipped = original(gradients, norm)
        seen.append(torch.cat([g.flatten() for g in clipped if g is not None]).norm())
        return clipped

    monkeypatch.setattr(step, "_clipped", spy)
    fit_svi(tiny(data), data, clip_norm=0.5, **QUICK)
    assert seen
    assert max(seen) <= 0.5


def test_the_fit_runs_in_evaluation_mode_without_gradients(data):
    fit = fit_svi(pairs.TwoMethods(data.n_genes), data, **QUICK)
    fit.program.train()
    with fit.asking(0):
        assert not fit.program.training
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_site_enumerated_in_the_guide(data):
    class Mixture(nn.Module):
        elbo = TraceEnum_ELBO

        def __init__(self, n_genes):
            super().__init__()
            self.logits = nn.Parameter(pairs.wave(2, n_genes))
            self.encoder = nn.Linear(n_genes, 2)
            nn.init.zeros_(self.encoder.weight)

        def model(self, cells):
            with plate(cells):
                y = pyro.sample("y", dist.Categorical(torch.ones(2)))
                rho = torch.softmax(self.logits, -1)[y]
                pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

        def guide(self, cells):
            with plate(cells):
                logits = self.encoder(torch.log1p(cells.x))
                pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    fit = fit_svi(Mixture(data.n_genes), data, elbo=TraceEnum_ELBO(max_plate_nesting=1), **QUICK)
    assert np.isfinite(fit.history[["train", "validation", "kl_y"]]).all(axis=None)
    assert fit.history["train"].iloc[-1] < fit.history["train"].iloc[0]


class OfEachCell:
    """A guide with a mean for each cell, in a plain object."""

    def __init__(self, n_cells, n_genes):
        self.loc = nn.Embedding(n_cells, 2)
        self.net = nn.Linear(2, n_genes)

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rho = pyro.deterministic("rho", self.net(z).softmax(-1), event_dim=1)
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(self.loc(cells.index), 0.1).to_event(1))


def test_parameters_of_each_cell_need_all_cells(data):
    program = OfEachCell(data.n_cells, data.n_genes)
    before = program.net.weight.detach().clone()
    with pytest.raises(ValueError, match="validation=0"):
        fit_svi(OfEachCell(180, data.n_genes), data, validation=0.1, epochs=2, progress=False)
    fit = fit_svi(program, data, validation=0.0, epochs=2, progress=False)
    assert torch.equal(program.net.weight, before)  # trained in a copy,
    assert not torch.equal(fit.program.net.weight, before)  # and trained, though the object is no module
    assert pyrosc.latent(fit, data).shape == (data.n_cells, 2)
    with pytest.raises(ValueError, match="ask about all"):
        pyrosc.latent(fit, data[:10])


def test_a_model_built_for_other_data_is_refused(data, adata):
    for name, other in {"batches": adata, "genes": data.like(data.schema)}.items():
        built = pyrosc.VAE.for_data(other if name == "batches" else adata[:, :20].copy(), hidden=(4,))
        with pytest.raises(ValueError, match=f"other {'genes' if name == 'genes' else 'batches'}"):
            fit_svi(built, data, epochs=1, progress=False)


def test_a_model_built_for_other_labels_is_refused(adata):
    """Else labels that it knows would be left out, or mean others, without a word."""
    labelled = adata.copy()
    labelled.obs["kind"] = np.array(["x", "y", "z"])[np.arange(adata.n_obs) % 3]
    model = pyrosc.SCANVI.for_data(pyrosc.from_anndata(labelled, labels_key="kind"), hidden=(4,))
    for other in (labelled, pyrosc.from_anndata(labelled[labelled.obs.kind != "x"], labels_key="kind")):
        with pytest.raises(
            ValueError, match=r"built for the labels x, y, z, this data has (none|y, z): give"
        ):
            fit_svi(model, other, epochs=1, progress=False)
    fit_svi(
        pyrosc.VAE.for_data(labelled, hidden=(4,)), pyrosc.from_anndata(labelled, labels_key="kind"), epochs=1
    )


def test_a_model_built_from_a_layer_is_not_fitted_to_x(adata):
    adata = adata.copy()
    adata.layers["raw"] = adata.X
    model = pyrosc.VAE.for_data(pyrosc.from_anndata(adata, layer="raw"), hidden=(4,))
    with pytest.raises(ValueError, match="built from layer 'raw', this data is from X: give what"):
        fit_svi(model, adata, epochs=1, progress=False)


def test_a_device_that_is_not_here_is_refused(data):
    with pytest.raises(ValueError, match=r"no device 'tpu' here \(.*takes CUDA where there is one"):
        fit_svi(pyrosc.VAE.for_data(data, hidden=(4,)), data, progress=False, device="tpu")


def test_a_class_is_refused(data):
    with pytest.raises(TypeError, match="is a class"):
        fit_svi(pyrosc.VAE, data)


def test_a_fit_is_no_model_to_train_on(vae_fit, data):
    with pytest.raises(TypeError, match=r"this is a Fit: .*fit_svi\(fit.program"):
        fit_svi(vae_fit, data)


class HoldsAnAutoguide(nn.Module):
    """A module with one of Pyro's autoguides inside."""

    def __init__(self, n_genes):
        super().__init__()
        self.n_genes = n_genes
        self.auto = AutoNormal(self.model)

    def model(self, cells):
        rho = pyro.sample("share", dist.Dirichlet(torch.ones(self.n_genes)))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    def guide(self, cells):
        self.auto(cells)


def test_an_autoguide_may_be_a_part_of_a_module(data):
    program = HoldsAnAutoguide(data.n_genes)
    fit = fit_svi(program, data, epochs=2, progress=False)
    again = fit_svi(program, data, epochs=2, progress=False)
    assert np.isfinite(fit.history.train).all()
    pd.testing.assert_series_equal(fit.history.train, again.history.train)


def test_torchs_own_validation_flag_is_left_alone(data):
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        fit_svi(pyrosc.VAE.for_data(data, hidden=(4,)), data, epochs=1, progress=False)
        assert torch.distributions.Distribution._validate_args is False
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)


def test_parameters_that_functions_close_over_are_not_left_untrained(data):
    net = nn.Linear(2, data.n_genes)

    def model(cells):
        with plate(cells):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            x = dist.Poisson(cells.library * net(z).softmax(-1))
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(cells):
        loc = pyro.param("loc", torch.zeros(2))
        with plate(cells):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match="would not be trained"):
        fit_svi(model, data, guide, epochs=1, progress=False)
    assert net.weight.grad is None


def test_a_frozen_part_runs_as_trained(data):
    vae = VAE.for_data(data, n_latent=2, hidden=(8,))
    vae.encoder.body.requires_grad_(requires_grad=False)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    fit = fit_svi(vae, data, epochs=2, progress=False)
    frozen = [name for name in before if name.startswith("encoder.body")]
    assert any("running_mean" in name for name in frozen)
    for name, tensor in fit.program.state_dict().items():
        if name in frozen or name in dict(vae.named_parameters()):
            assert torch.equal(tensor, before[name]) == (name in frozen), name
