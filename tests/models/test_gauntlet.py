"""What every model, likelihood and user-style pair must pass."""

import copy
import functools

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrosc
from pyrosc import (
    DCA,
    GMVAE,
    LDVAE,
    SCANVI,
    SCVIS,
    TOTALVI,
    VAE,
    VASC,
    VSC,
    Autoencoder,
    AutoImpute,
    AutoZI,
    GaussianVAE,
    fit_svi,
    from_anndata,
)
from pyrosc.engine import replay
from pyrosc.inference import loop, step
from pyrosc.inference.contract import check_programs, elbo_of, pair
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.inference.isolation import isolated, modules_of
from pyrosc.inference.purity import is_pure

SETTINGS = {"epochs": 6, "minibatch_size": 64, "learning_rate": 1e-2, "progress": False}


def made(model, **recipe):
    return lambda data: (model.for_data(data, **recipe), None)


def vae(**recipe):
    return made(VAE, **{"n_latent": 3, "hidden": (8,)} | recipe)


def autoguide(data):
    model = pairs.global_model(data.n_genes)
    return model, AutoNormal(model)


def local_autoguide(data):
    """A state for each cell without an encoder."""

    def model(cells):
        weight = pyro.param("weight", lambda: pairs.wave(2, data.n_genes, size=0.5))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rho = pyro.deterministic("rho", torch.softmax(z @ weight, -1), event_dim=1)
            rate = cells.library.clamp_min(1) * rho
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    plates = lambda cells: pyro.plate("cells", cells.n_total, subsample=cells.index)
    return model, AutoNormal(model, create_plates=plates)


CASES = {
    **{
        f"vae {likelihood} {library}": vae(likelihood=likelihood, library=library)
        for likelihood in ("poisson", "nb", "zip", "zinb")
        for library in ("observed", "latent")
    },
    "vae theta by batch": vae(dispersion="gene-batch"),
    "vae zinb theta by batch": vae(likelihood="zinb", dispersion="gene-batch"),
    "vae layer norm": vae(norm="layer", dropout=0.0),
    "vae no norm": vae(norm=None),
    "vae encodes covariates": vae(encode_covariates=True),
    "vae deep": vae(hidden=(8, 6)),
    "vae linear": vae(hidden=()),
    "vae theta by cell": vae(dispersion="gene-cell"),
    "vae linear variance": vae(dispersion="gene-linear"),
    "vae zinb linear variance": vae(likelihood="zinb", dispersion="gene-linear"),
    "vae mixture": vae(prior="mixture", n_components=4),
    "vae vamp": vae(prior="vamp", n_components=4, norm="layer"),
    **{
        f"{name} {likelihood}": made(model, likelihood=likelihood, n_latent=2, **recipe)
        for likelihood in ("poisson", "nb", "zip", "zinb")
        for name, model, recipe in (
            ("ldvae", LDVAE, {"hidden": (8,)}),
            ("gmvae", GMVAE, {"hidden": (8,), "n_components": 3}),
            ("vsc", VSC, {"hidden": (8,), "branch": 4, "inclusion": 0.5}),
            ("scanvi", SCANVI, {"hidden": (8,)}),
            ("totalvi", TOTALVI, {"hidden": (8,)}),
        )
    },
    **{
        f"dca {name}": made(DCA, likelihood=name, hidden=(8, 2, 8))
        for name in ("poisson", "nb", "zip", "zinb")
    },
    "dca ridge": made(DCA, hidden=(8, 2, 8), dispersion="gene", ridge=0.1),
    "gmvae learned latent library": made(
        GMVAE, n_components=3, proportions="learned", library="latent", n_latent=2, hidden=(8,)
    ),
    "vsc linear": made(VSC, decoder="linear", n_latent=2, hidden=(8,), branch=4),
    "vsc pseudo": made(VSC, prior="pseudo", n_pseudo=3, norm="layer", n_latent=2, hidden=(8,), branch=4),
    "autozi nb": made(AutoZI, n_latent=2, hidden=(8,)),
    "autozi poisson": made(AutoZI, likelihood="poisson", n_latent=2, hidden=(8,)),
    **{
        f"{name} {transform}": made(model, transform=transform, n_latent=2, hidden=(8,))
        for transform in ("log", "pearson", "raw")
        for name, model in (("gaussian", GaussianVAE), ("autoencoder", Autoencoder))
    },
    "totalvi latent library": made(
        TOTALVI, library="latent", dispersion="gene-batch", n_latent=2, hidden=(8, 6)
    ),
    "scvis": made(SCVIS, hidden=(8,), perplexity=5.0),
    "vasc": made(VASC, hidden=(8,)),
    "autoimpute": made(AutoImpute, n_latent=2, hidden=(8,), norm="batch", dropout=0.0),
    "gaussian fixed scale": made(GaussianVAE, scale=1.0, n_latent=2, hidden=(8,)),
    "class": lambda data: (pairs.TwoMethods(data.n_genes), None),
    "class with pyro.module": lambda data: (pairs.TwoMethods(data.n_genes, register=True), None),
    "two functions": lambda data: pairs.two_functions(data.n_genes),
    "autoguide": autoguide,
    "autoguide of each cell": local_autoguide,
}
# Parameters of each cell: all must be trained, and the same cells are asked.
PER_CELL = {"autoguide of each cell"}
# torch's own BatchNorm1d refuses to train on a single row: these get their cell twice.
TWICE = {"class", "class with pyro.module"}
OURS = tuple(getattr(pyrosc.models, name) for name in pyrosc.models.__all__)
# Their site "x" is of transformed counts: a density may be above 1, and a draw below 0.
OF_VALUES = {name for name in CASES if name.startswith(("gaussian", "auto", "scvis")) and "zi" not in name}
# No posterior, a code of each cell: draws are all alike.
POINTS = {name for name in CASES if name.startswith(("dca", "autoe", "autoimp"))}
every_case = pytest.mark.parametrize("name", CASES)


def settings_of(name):
    return SETTINGS | ({"validation": 0.0} if name in PER_CELL else {})


def fitted(name, data, **settings):
    model, guide = CASES[name](data)
    return fit_svi(model, data, guide=guide, **settings_of(name) | settings)


@pytest.fixture
def fit(name, rich):
    return cached(name, rich)


@functools.cache
def cached_by_name(name, key):
    return fitted(name, cached_by_name.data[key])


def cached(name, data):
    cached_by_name.data = {id(data): data}
    return cached_by_name(name, id(data))


def per_cell(name, fit, data):
    """The cells to ask: few, but all where each has parameters of its own."""
    return data if name in PER_CELL else data[np.arange(7)]


def loss_of(name, fit_or_pair, data, train=False):
    """Loss and gradients of a pair at its start, over all cells."""
    program, guide = fit_or_pair
    modules = modules_of(program, guide)
    for module in modules:
        module.train(train)
    cells = data.on("cpu").cells(torch.arange(data.n_cells))
    params = pairs.empty_params()
    with isolated(torch.device("cpu"), 0, params):
        check_programs(*pair(program, guide), cells)
        loss = _weighted_loss(elbo_of(program, None), *pair(program, guide), cells)
        loss.backward()
    inside = {f"{i}.{k}": p for i, m in enumerate(modules) for k, p in m.named_parameters()}
    return loss, inside | params["params"]


@every_case
@pytest.mark.parametrize("n_draws", [1, 3])
def test_shapes_for_one_and_many_draws(name, fit, rich, n_draws):
    few = per_cell(name, fit, rich)
    n = len(few)
    (drawn,) = pyrosc.draws(fit, few, "rho", "x", n_draws=n_draws)
    assert drawn["rho"].shape == drawn["x"].shape == (n_draws, n, 40)
    torch.testing.assert_close(drawn["rho"].sum(-1), torch.ones(n_draws, n))
    assert name in OF_VALUES or (drawn["x"] >= 0).all()
    imputed = pyrosc.impute(fit, few, n_draws=n_draws)
    assert imputed.mean.shape == (n, 40)
    np.testing.assert_allclose(imputed.mean.sum(1), 1, atol=1e-4)
    assert [x.shape for x in pyrosc.posterior_predictive(fit, few, n_draws)] == [(n, 40)] * n_draws
    answer = pyrosc.log_likelihood(fit, few, n_draws)
    assert answer.nats.shape == answer.ess.shape == (n,)
    assert np.isfinite(answer.nats).all()
    assert name in OF_VALUES or (answer.nats < 0).all()
    assert (answer.ess >= 1 - 1e-3).all()
    assert (answer.ess <= n_draws + 1e-3).all()
    if name != "autoguide":
        width = 3 if name.startswith("vae") else 2
        assert pyrosc.latent(fit, few).shape == (n, width)
        assert pyrosc.latent(fit, few, n_draws).shape == (n_draws, n, width)


@every_case
def test_gradients_reach_every_parameter(name, rich):
    _, parameters = loss_of(name, CASES[name](rich), rich, train=True)
    assert parameters
    for key, p in parameters.items():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert (p.grad != 0).any(), key


@every_case
def test_the_loss_falls(name, fit, rich):
    before = float(loss_of(name, CASES[name](rich), rich)[0].detach())
    with fit.asking(0):
        cells = rich.on(fit.device).cells(torch.arange(rich.n_cells))
        after = float(_weighted_loss(elbo_of(fit.program, None), fit.model, fit.guide, cells))
    assert after < before - 0.5
    assert np.isfinite(fit.history["train"]).all()


@every_case
def test_the_same_seed_gives_the_same_bits(name, fit, rich, untouched):
    with untouched():
        again = fitted(name, rich)
    assert pairs.same_bits(fit, again)
    assert not pairs.same_bits(fit, fitted(name, rich, seed=1))


@every_case
def test_parallel_draws_equal_serial_ones_in_distribution(name, fit, rich):
    few = per_cell(name, fit, rich)
    n = 60
    a, b = (
        torch.cat(
            [d["rho"] for d in pyrosc.draws(fit, few, "rho", n_draws=n, parallel=p, seed=1)], 1
        ).double()
        for p in (True, False)
    )
    if name in POINTS:
        torch.testing.assert_close(a, b)
        return
    error = ((a.var(0) + b.var(0)) / n).sqrt() + 1e-9
    assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 6.5
    assert a.var(0).mean() == pytest.approx(float(b.var(0).mean()), rel=0.5)


@every_case
def test_one_cell_and_one_gene(name, rich, adata):
    one = rich[np.zeros(2 if name in TWICE else 1, dtype=int)]
    fit = fitted(name, one, epochs=2, minibatch_size=8)
    assert np.isfinite(fit.history["train"]).all()
    assert pyrosc.impute(fit, one, n_draws=2).mean.shape == (len(one), 40)
    alone = adata[np.asarray(adata.X[:, 5].todense()).ravel() > 0, [5]].copy()
    gene = from_anndata(alone, batch_key="batch", labels_key="cell_type", protein_key="protein_expression")
    fit = fitted(name, gene, epochs=2)
    assert np.isfinite(fit.history["train"]).all()
    np.testing.assert_allclose(pyrosc.impute(fit, gene, n_draws=2).mean, 1, atol=1e-6)
    assert np.isfinite(pyrosc.log_likelihood(fit, gene, 2).nats).all()


@every_case
def test_an_empty_cell_has_a_finite_loss_and_gradients(name, rich):
    few = rich[np.arange(5)]
    x = few.x.tolil()
    x[2] = 0
    empty = type(few)(**{**vars(few), "x": x.tocsr()})
    assert empty.library[2] == 0
    loss, parameters = loss_of(name, CASES[name](rich), empty)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in parameters.values())


@every_case
def test_save_and_load(name, fit, rich, tmp_path):
    few = per_cell(name, fit, rich)
    fit.save(tmp_path / "fit")
    model, guide = (None, None) if isinstance(fit.program, OURS) else CASES[name](rich)
    again = pyrosc.load(tmp_path / "fit", model, guide)
    assert pairs.same_bits(fit, again)
    for ask in (
        lambda f: pyrosc.impute(f, few, n_draws=2).mean,
        lambda f: pyrosc.log_likelihood(f, few, 2).nats,
        lambda f: pyrosc.posterior_predictive(f, few, 1)[0].toarray(),
    ):
        assert np.array_equal(ask(fit), ask(again))


@every_case
def test_two_fits_live_beside_each_other(name, fit, rich, vae_fit, data):
    few = per_cell(name, fit, rich)
    ask = lambda f, d: torch.cat([drawn["rho"] for drawn in pyrosc.draws(f, d, "rho", n_draws=2)], 1)
    ours, theirs = ask(fit, few), ask(vae_fit, data)
    other = fitted(name, rich, seed=5, epochs=1)
    turns = list(
        zip(
            pyrosc.draws(fit, few, "rho", n_draws=2),
            pyrosc.draws(vae_fit, data, "rho", n_draws=2),
            pyrosc.draws(other, few, "rho", n_draws=2),
            strict=True,
        )
    )
    assert torch.equal(torch.cat([a["rho"] for a, _, _ in turns], 1), ours)
    assert torch.equal(torch.cat([b["rho"] for _, b, _ in turns], 1), theirs)
    assert not torch.equal(torch.cat([c["rho"] for _, _, c in turns], 1), ours)


# --- steps that are replayed


@every_case
def test_steps_are_replayed_as_they_are_run(name, rich, monkeypatch):
    """To the bit as they are recorded; rewritten, the losses of two epochs to a few units of float32."""
    monkeypatch.setattr(step, "_RECORD_AFTER", 1)
    monkeypatch.setattr(step, "_RECORD_FOR", 0)
    monkeypatch.setattr(loop, "_CHECK_EVERY", 3)
    settings = settings_of(name) | {"epochs": 2}

    def fit(*, replay):
        program, guide = CASES[name](rich)
        return fit_svi(program, rich, guide=guide, replay=replay, **settings)

    run, rewritten = fit(replay=False), fit(replay=True)
    monkeypatch.setattr(replay, "_REWRITES", ())
    recorded = fit(replay=True)
    if name.startswith("scanvi"):
        assert "reads the numbers" in recorded.found.replayed
    else:
        assert recorded.found.replayed is rewritten.found.replayed is True
    assert pairs.same_bits(run, recorded)
    np.testing.assert_allclose(rewritten.history["train"], run.history["train"], rtol=1e-5)


@pytest.mark.parametrize("model", OURS)
def test_our_models_are_pure_and_what_is_made_of_them_is_not(model, rich):
    recipe = {"n_components": 3} if model is GMVAE else {}
    made = model.for_data(rich, **recipe)
    assert is_pure(made, None)
    assert is_pure(made.model, made.guide)
    changed = type("Changed", (model,), {})
    theirs = copy.copy(made)
    theirs.__class__ = changed
    assert not is_pure(theirs, None)
    assert not is_pure(made, lambda cells: None)
    made.part = nn.Sequential(type("Part", (nn.Linear,), {})(2, 2))
    assert not is_pure(made, None)
