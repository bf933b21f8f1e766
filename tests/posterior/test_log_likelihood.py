"""How probable cells are, against known evidence; and the parts of the ELBO."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc import GMVAE, SCANVI, VAE, fit_svi
from pyrosc.inference.contract import elbo_of
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import log_likelihood
from pyrosc.posterior.predictive import posterior_predictive

QUICK = {"epochs": 2, "minibatch_size": 64, "progress": False}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("n_draws", [1, 7])
def test_every_weight_of_the_exact_posterior_is_the_evidence(exact, data, n_draws, parallel):
    answer = log_likelihood(exact, data, n_draws, parallel=parallel)
    np.testing.assert_allclose(answer.nats, pairs.Conjugate(data.share).evidence(data.x.toarray()), rtol=2e-5)
    np.testing.assert_allclose(answer.ess, n_draws, rtol=1e-3)
    assert answer.mean == pytest.approx(answer.nats.mean())
    assert answer.n_draws == n_draws
    assert f"{answer.mean:.2f} nats per cell" in repr(answer)


def test_a_guide_that_is_off_gives_a_lower_bound_that_tightens(data):
    program = pairs.Conjugate(data.share, shift=0.05)
    fit = pairs.untrained(program, data)
    evidence = program.evidence(data.x.toarray()).mean()
    few_draws, many = log_likelihood(fit, data, 1), log_likelihood(fit, data, 3000)
    assert few_draws.mean < evidence - 0.1
    assert few_draws.mean < many.mean
    assert many.mean == pytest.approx(evidence, abs=0.1)
    assert (many.ess < 3000).all()
    assert (many.ess >= 1).all()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["cells x genes", "genes x cells"])
def test_a_plate_of_genes_beside_that_of_cells(data, transposed, parallel):
    program = pairs.GenesPlate(np.linspace(0.5, 8, 40), transposed=transposed)
    fit = pairs.untrained(program, data, plates=2)
    few = data[np.arange(9)]
    x = few.x.toarray()
    options = {"parallel": parallel}
    answer = log_likelihood(fit, few, 5, **options)
    np.testing.assert_allclose(answer.nats, program.evidence(x), rtol=2e-5)
    np.testing.assert_allclose(answer.ess, 5, rtol=1e-3)
    (drawn,) = draws(fit, few, "w", "x", n_draws=4, **options)
    assert drawn["w"].shape == drawn["x"].shape == (4, 9, 40)
    np.testing.assert_allclose(latent(fit, few, site="w", **options), program.posterior_mean(x), rtol=1e-4)
    assert posterior_predictive(fit, few, 2, **options)[0].shape == (9, 40)
    assert impute(fit, few, site="w", n_draws=2, **options).mean.shape == (9, 40)


def test_a_sequential_plate_beside_that_of_cells(data):
    shares = torch.as_tensor(data.share).float()

    def model(cells):
        over_cells = pyro.plate("cells", cells.n_total, subsample=cells.index)
        for g in pyro.plate("genes", 40):
            with over_cells:
                mean = cells.library[:, 0] * shares[g]
                pyro.sample(f"x{g}", dist.Poisson(mean), obs=cells.x[:, g])

    fit = pairs.untrained(model, data, guide=lambda cells: None)
    few = data[np.arange(5)]
    expected = stats.poisson.logpmf(few.x.toarray(), few.library[:, None] * data.share).sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 2).nats, expected, rtol=1e-4)


def test_global_latent_sites_are_averaged_over(data):
    """The weight of a cell is the density of its counts, whatever the global draw's own density."""

    def model(cells):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            rate = (cells.library + 0 * w[..., None]) / 40
            rate = rate.expand(*rate.shape[:-1], 40)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    fit = pairs.untrained(model, data, guide=lambda cells: pyro.sample("w", dist.Normal(5.0, 0.1)))
    few = data[np.arange(5)]
    expected = stats.poisson.logpmf(few.x.toarray(), few.library[:, None] / 40).sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 3).nats, expected, rtol=1e-4)


def test_a_site_is_scored_with_its_mask(data):
    keep = torch.arange(40) < 30

    class Masked(pairs.GenesPlate):
        def model(self, cells):
            with pyro.poutine.mask(mask=keep):
                super().model(cells)

        def guide(self, cells):
            with pyro.poutine.mask(mask=keep):
                super().guide(cells)

    mean = np.linspace(0.5, 8, 40)
    fit = pairs.untrained(Masked(mean), data, plates=2)
    few = data[np.arange(5)]
    expected = stats.nbinom.logpmf(few.x.toarray(), 2, 2 / (2 + mean))[:, :30].sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 3).nats, expected, rtol=1e-4)


# --- the parts of the ELBO


def loss_of(fit, data, n):
    """The training loss of all cells, a mean over draws."""
    cells = data.on(fit.device).cells(torch.arange(data.n_cells))
    with fit.asking(0):
        elbo = elbo_of(fit.program, None)
        return np.mean([float(_weighted_loss(elbo, fit.model, fit.guide, cells)) for _ in range(n)])


@pytest.mark.parametrize(
    "model",
    [
        lambda data: VAE.for_data(data, n_latent=2, hidden=(8,), library="latent"),
        lambda data: VAE.for_data(data, n_latent=2, hidden=(8,), prior="mixture", n_components=3),
        lambda data: GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)),
        lambda data: SCANVI.for_data(data, classification=0.0, n_latent=2, hidden=(8,)),
    ],
)
def test_the_parts_are_those_of_the_loss(model, rich):
    data = type(rich)(**{**vars(rich), "labels": np.full(rich.n_cells, -1)})
    fit = fit_svi(model(data), data, **QUICK)
    table = pyrosc.elbo(fit, data, n_draws=100)
    kl = table.filter(like="kl_").sum(axis=1)
    np.testing.assert_allclose(table.elbo, table.reconstruction - kl, rtol=1e-9)
    assert (table.filter(like="kl_").mean() > -1e-3).all()
    assert -table.elbo.mean() == pytest.approx(loss_of(fit, data, 20), abs=0.3)
    assert list(table.index) == list(data.cell_names)


def test_a_mixtures_kl_is_split_by_the_chain_rule(data):
    """KL of z and y together is that of the mixture, and KL_y that of responsibilities against pi."""
    fit = fit_svi(GMVAE.for_data(data, n_components=3, n_latent=2, hidden=(8,)), data, **QUICK)
    table = pyrosc.elbo(fit, data, n_draws=40)
    (drawn,) = pyrosc.draws(fit, data, "p_y", n_draws=40)
    p = drawn["p_y"].double().numpy()
    pi = torch.softmax(fit.program.prior.logits, -1).detach().double().numpy()
    assert np.ptp(pi) > 1e-4  # learned
    by_hand = (p * np.log(p / pi)).sum(-1).mean(0)
    np.testing.assert_allclose(table.kl_y, by_hand, atol=1e-4)


def test_an_empty_elbo_is_refused(vae_fit, data):
    with pytest.raises(ValueError, match="n_draws must be at least 1"):
        pyrosc.elbo(vae_fit, data, n_draws=0)
