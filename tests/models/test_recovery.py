"""Recovery of a simulated truth."""

import anndata
import numpy as np
import pairs
import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import pyrosc
from pyrosc.datasets.simulate import simulate
from pyrosc.nn.likelihoods import likelihood_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def truth():
    return simulate(
        1200,
        150,
        n_types=4,
        n_batches=2,
        de_fraction=0.3,
        log2_fold_change=1.5,
        library_mean=600,
        inverse_dispersion=np.tile([0.5, 2.0, 8.0], 50),
        seed=1,
    )


@pytest.fixture(scope="module")
def data(truth):
    return pyrosc.from_anndata(truth, batch_key="batch")


@pytest.fixture(scope="module")
def fit(data):
    vae = pyrosc.VAE.for_data(data, n_latent=8, hidden=(64,))
    return pyrosc.fit_svi(vae, data, epochs=80, learning_rate=5e-3, progress=False)


def test_imputed_shares_are_nearer_the_true_ones_than_raw_shares(fit, data, truth):
    true = truth.layers["share"]
    raw = data.x.toarray() / data.library[:, None]
    pooled = np.broadcast_to(data.share, true.shape)
    imputed = pyrosc.impute(fit, data, n_draws=10).mean
    error = lambda share: np.sqrt(((np.sqrt(share) - np.sqrt(true)) ** 2).sum(1)).mean()  # Hellinger
    assert error(imputed) < 0.35 * error(raw)
    assert error(imputed) < 0.7 * error(pooled)


def test_theta_is_recovered(fit, truth):
    log_theta = fit.program.likelihood.log_inverse_dispersion[0].detach().numpy()
    true = np.log(truth.var["inverse_dispersion"].to_numpy())
    seen = truth.var["base_share"].to_numpy() > 1 / 300  # two counts a cell: the rest say little of theta
    assert seen.sum() > 50
    assert stats.spearmanr(log_theta[seen], true[seen]).statistic > 0.85
    assert np.median(np.abs(log_theta[seen] - true[seen])) < 0.4


def test_the_latent_space_separates_the_types_and_mixes_the_batches(fit, data, truth):
    z = pyrosc.latent(fit, data)
    found = KMeans(4, n_init=5, random_state=0).fit_predict(z)
    assert adjusted_rand_score(truth.obs["cell_type"], found) > 0.9
    assert abs(adjusted_rand_score(truth.obs["batch"], found)) < 0.05


def test_a_batch_effect_is_taken_out_by_a_counterfactual(fit, data, truth):
    """In one batch the shares of a type are the same, whatever the cells' own batch."""
    there = np.log(pyrosc.impute(fit, data, batch="batch_0", n_draws=10).mean)
    own = np.log(pyrosc.impute(fit, data, n_draws=10).mean)
    first = (truth.obs["batch"] == "batch_0").to_numpy()
    gap = lambda log: np.abs(log[first].mean(0) - log[~first].mean(0)).mean()
    assert gap(there) < 0.5 * gap(own)
    effect = truth.varm["log_batch_effect"]
    change = (own - there)[~first].mean(0)
    assert stats.pearsonr(change, effect[:, 1] - effect[:, 0]).statistic > 0.85


def test_predictive_counts_look_like_the_counts(fit, data):
    drawn = np.stack([x.toarray() for x in pyrosc.posterior_predictive(fit, data, 4)])
    x = data.x.toarray()
    assert np.corrcoef(np.log(drawn.mean((0, 1)) + 0.01), np.log(x.mean(0) + 0.01))[0, 1] > 0.99
    assert np.abs((drawn == 0).mean((0, 1)) - (x == 0).mean(0)).mean() < 0.03


def test_intervals_of_the_model_itself_have_their_coverage():
    """Data from the prior of a conjugate model, its exact posterior: 90 % of the truths lie inside."""
    rng = np.random.default_rng(4)
    mean = np.linspace(1, 9, 30)
    w = rng.gamma(2, mean / 2, (400, 30))
    x = rng.poisson(w)
    x[:, 0] += x.sum(1) == 0
    data = pyrosc.from_anndata(anndata.AnnData(x.astype("f4")))
    fit = pairs.untrained(pairs.GenesPlate(mean), data, plates=2)
    imputed = pyrosc.impute(fit, data, site="w", n_draws=400, interval=0.9)
    inside = ((imputed.lower <= w) & (w <= imputed.upper)).mean()
    # 12000 independent truths have a standard error of .003; 400 draws shorten the interval by about as much.
    assert inside == pytest.approx(0.9, abs=0.015)


def test_more_structure_has_a_higher_likelihood(fit, data):
    shares = data.share
    x, l = data.x.toarray(), data.library[:, None]
    pooled = stats.poisson.logpmf(x, l * shares).sum(1).mean()
    assert pyrosc.log_likelihood(fit, data, 10).mean > pooled + 10


def sparse_codes(seed, n_cells=1000, n_genes=200, n_latent=6):
    """Codes, three in ten of their numbers not 0 and those at least .3 from it, and their counts."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_cells, n_latent))
    z = np.where(rng.random(z.shape) < 0.3, z + 0.3 * np.sign(z), 0)
    rho = np.exp(z @ rng.normal(0, 0.5, (n_latent, n_genes)) + rng.normal(0, 0.5, n_genes))
    library = rng.lognormal(np.log(3000), 0.3, (n_cells, 1))
    x = rng.poisson(library * rho / rho.sum(1, keepdims=True))
    return z, pyrosc.from_anndata(anndata.AnnData(csr_matrix(x.astype("f4"))))


def support_f1(found, true):
    """F1 of which numbers are not 0, the columns matched one to one."""
    pairs = [[2 * (f & t).sum() / max(1, f.sum() + t.sum()) for f in found.T] for t in true.T]
    _, order = linear_sum_assignment(pairs, maximize=True)
    found = found[:, order]
    return 2 * (found & true).sum() / (found.sum() + true.sum())


def test_vsc_recovers_sparse_codes_where_a_vae_does_not():
    z, data = sparse_codes(seed=0)
    vsc = pyrosc.VSC.for_data(data, decoder="linear", inclusion=0.3)
    fit = pyrosc.fit_svi(vsc, data, progress=False)
    assert support_f1(pyrosc.inclusion(fit, data) > 0.5, z != 0) > 0.95
    assert pyrosc.loadings(fit).shape == (200, 6)
    fit = pyrosc.fit_svi(pyrosc.VAE.for_data(data, n_latent=6), data, epochs=60, progress=False)
    size = np.abs(pyrosc.latent(fit, data))
    size /= size.std(0)
    best = max(support_f1(size > cut, z != 0) for cut in np.quantile(size, np.linspace(0, 0.95, 20)))
    assert best < 0.8


def test_a_linear_variance_is_told_from_a_quadratic_one():
    """Counts of either kind are best described by the likelihood of that kind; kappa is found."""
    rng = np.random.default_rng(0)
    rho = rng.dirichlet(np.ones(50), 3)[rng.integers(3, size=1000)]
    mean = 300 * rho
    for name, theta in (("gene-linear", 0.5 * mean), ("gene", np.full(mean.shape, 2.0))):
        x = rng.poisson(rng.gamma(np.maximum(theta, 1e-9), mean / np.maximum(theta, 1e-9))).astype("f4")
        data = pyrosc.from_anndata(anndata.AnnData(csr_matrix(x)))
        fits = {
            kind: pyrosc.fit_svi(
                pyrosc.VAE.for_data(data, n_latent=4, dispersion=kind), data, epochs=30, progress=False
            )
            for kind in ("gene", "gene-linear")
        }
        nats = {kind: pyrosc.log_likelihood(fit, data, 10).mean for kind, fit in fits.items()}
        assert max(nats, key=nats.get) == name
        if name == "gene-linear":
            likelihood, none = likelihood_of("nb", n_genes=50, n_hidden=1, dispersion=name), torch.zeros(0)
            adam = torch.optim.Adam(likelihood.parameters(), lr=0.05)
            for _ in range(100):
                adam.zero_grad()
                p = likelihood(none, none.long(), mean=torch.as_tensor(mean).float())
                (-p.log_prob(torch.as_tensor(x)).mean()).backward()
                adam.step()
            kappa = likelihood.log_inverse_dispersion.detach().exp()
            assert float(kappa.median()) == pytest.approx(0.5, rel=0.05)
