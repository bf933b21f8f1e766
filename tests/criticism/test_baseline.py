import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats
from scipy.optimize import minimize_scalar

import pyrosc
from pyrosc.criticism.baseline import NoStructure, baseline
from pyrosc.datasets.simulate import simulate


@pytest.fixture(scope="module")
def counts_of_equal_totals():
    """Negative binomial counts of three genes, and a fourth that makes every total 300."""
    rng = np.random.default_rng(0)
    mean, theta = np.array([10.0, 20.0, 40.0]), np.array([0.7, 3.0, 20.0])
    x = rng.negative_binomial(theta, theta / (theta + mean), size=(500, 3))
    x = x[x.sum(1) < 300]
    return np.column_stack([x, 300 - x.sum(1)])


def nats(counts, theta):
    return stats.nbinom(theta, theta / (theta + counts.mean())).logpmf(counts)


def likeliest_theta(counts):
    loss = lambda log_theta: -nats(counts, np.exp(log_theta)).sum()
    return np.exp(minimize_scalar(loss, bounds=(-5, 8), method="bounded").x)


def test_the_baseline_is_the_maximum_likelihood_of_scipy(counts_of_equal_totals):
    x = counts_of_equal_totals
    fit = baseline(AnnData(x.astype(np.float32)), epochs=400, progress=False)
    shares = fit.program.log_share.softmax(-1).detach().numpy()
    theta = fit.program.log_inverse_dispersion.exp().detach().numpy()
    # With equal totals the likeliest mean is the sample's, whatever theta is, and such shares sum to 1.
    np.testing.assert_allclose(shares, x.mean(0) / 300, rtol=1e-3)
    likeliest = [likeliest_theta(counts) for counts in x.T]
    np.testing.assert_allclose(theta, likeliest, rtol=5e-3)
    total = sum(nats(counts, best) for counts, best in zip(x.T, likeliest, strict=True))
    held_out = pyrosc.log_likelihood(fit, AnnData(x.astype(np.float32)), n_draws=1)
    np.testing.assert_allclose(held_out.nats, total, atol=0.02)


def test_one_draw_is_exact():
    data = simulate(50, 20, seed=1)
    fit = baseline(data, epochs=3, progress=False)
    one, many = (pyrosc.log_likelihood(fit, data, n_draws=n) for n in (1, 7))
    np.testing.assert_allclose(one.nats, many.nats, rtol=1e-5)  # float32 sums over the genes
    np.testing.assert_allclose(many.ess, 7, rtol=1e-5)


def test_the_default_steps_reach_the_maximum():
    data = simulate(300, 60, seed=2)
    short, long = (baseline(data, progress=False, **more) for more in ({}, {"epochs": 600}))
    gap = long.history.train.iloc[-1] - short.history.train.iloc[-1]
    assert abs(gap) < 0.02
    assert short.history.train.iloc[0] - short.history.train.iloc[-1] > 0.05  # it had some way to go


def test_it_starts_at_the_shares_and_near_the_theta_of_the_data():
    data = simulate(3000, 30, n_types=1, inverse_dispersion=3.0, library_sd=0.5, seed=3)
    start = NoStructure.for_data(data)
    truth = data.var["share_type_0"].to_numpy()
    np.testing.assert_allclose(start.log_share.softmax(-1).detach(), truth, rtol=0.2, atol=1e-4)
    seen = truth > 0.01
    theta = start.log_inverse_dispersion.exp().detach().numpy()
    assert abs(np.log(theta[seen] / 3)).max() < 0.5


def test_a_gene_without_counts_and_a_single_cell_have_a_start_and_a_fit():
    x = np.zeros((1, 3), np.float32)
    x[0, 0] = 5
    fit = baseline(AnnData(x), epochs=2, progress=False)
    assert np.isfinite(fit.history.train).all()
    assert all(torch.isfinite(p).all() for p in fit.program.parameters())


def test_it_answers_as_other_fits_do():
    data = simulate(40, 15, seed=4)
    fit = baseline(data, epochs=2, progress=False)
    shares = pyrosc.impute(fit, data, n_draws=2)
    np.testing.assert_allclose(shares.mean.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(shares.mean, np.tile(shares.mean[0], (40, 1)))
    counts = pyrosc.impute(fit, data, "count", n_draws=2)
    np.testing.assert_allclose(counts.mean.sum(1), np.asarray(data.X.sum(1)).ravel(), rtol=1e-5)
    drawn = pyrosc.posterior_predictive(fit, data)
    assert drawn[0].shape == (40, 15)
    with pytest.raises(KeyError, match="'z'"):
        pyrosc.latent(fit, data)


def test_settings_go_to_fit_svi():
    data = simulate(60, 10, seed=5)
    fit = baseline(data, epochs=3, validation=0.5, seed=9, progress=False)
    assert len(fit.history) <= 3
    assert fit.settings["seed"] == 9
    assert fit.found.n_train == 30
    assert isinstance(fit.history, pd.DataFrame)
    assert baseline(data, epochs=1, progress=False).found.n_train == 60
    with pytest.raises(ValueError, match="epochs"):
        baseline(data, epochs=0, progress=False)


def test_a_vae_gains_on_it_where_there_is_structure():
    data = simulate(400, 60, n_types=3, log2_fold_change=3.0, de_fraction=0.5, seed=6)
    train, test = data[:300], data[300:]
    vae = pyrosc.fit_svi(pyrosc.VAE.for_data(train, n_latent=5), train, epochs=80, progress=False)
    gain = (
        pyrosc.log_likelihood(vae, test).nats
        - pyrosc.log_likelihood(baseline(train, progress=False), test, n_draws=1).nats
    )
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain)) > 0
