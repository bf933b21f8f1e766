"""Known answers of the models, and truths that they recover."""

import anndata as ad
import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.linalg import subspace_angles
from scipy.sparse import csr_matrix
from scipy.special import logsumexp
from sklearn.metrics import adjusted_rand_score, roc_auc_score

import pyrosc
from pyrosc import (
    DCA,
    GMVAE,
    LDVAE,
    SCANVI,
    VAE,
    VASC,
    Autoencoder,
    AutoZI,
    GaussianVAE,
    datasets,
    fit_svi,
    from_anndata,
)
from pyrosc.inference.contract import traces


def counts_of(mean, seed=0, theta=np.inf):
    """Counts of this mean as an AnnData."""
    rng = np.random.default_rng(seed)
    noise = 1 if np.isinf(theta) else rng.gamma(theta, 1 / theta, mean.shape)
    return ad.AnnData(csr_matrix(rng.poisson(mean * noise).astype(np.float32)))


def low_rank(n_cells, n_genes, n_factors, seed=0, size=0.5, library=500.0):
    """Factors, loadings, and means whose log shares are linear in the factors."""
    rng = np.random.default_rng(seed)
    z, w = rng.normal(size=(n_cells, n_factors)), rng.normal(0, size, (n_factors, n_genes))
    rho = np.exp(rng.normal(0, 0.5, n_genes) + z @ w)
    return z, w, library * rho / rho.sum(1, keepdims=True)


def degrees(a, b):
    """Largest principal angle between the spaces of the columns."""
    return np.rad2deg(subspace_angles(np.asarray(a, float), np.asarray(b, float)).max())


# --- GMVAE


def test_gmvae_sums_over_its_components(rich):
    """Its ELBO is that of q(y given z) by brute force: sum over y of q (log p(y, z, x) - log q(y, z))."""
    gmvae = GMVAE.for_data(rich, n_components=4, n_latent=2, hidden=(8,), proportions="learned").eval()
    with torch.no_grad():
        gmvae.prior.logits.normal_()
        gmvae.prior.log_scale.normal_(0, 0.3)
        cells = rich.on("cpu").cells(torch.arange(9))
        guided, modelled = traces(gmvae.model, gmvae.guide, cells)
        modelled.compute_log_prob()
        guided.compute_log_prob()
    z, q = (
        guided.nodes["z"]["value"].double().numpy(),
        guided.nodes["z"]["unscaled_log_prob"].double().numpy(),
    )
    log_pi = torch.log_softmax(gmvae.prior.logits, -1).detach().double().numpy()
    normals = gmvae.prior.components.base_dist
    components = stats.norm(normals.mean.detach().double().numpy(), normals.stddev.detach().double().numpy())
    joint = log_pi + components.logpdf(z[:, None]).sum(-1)
    log_q_y = joint - logsumexp(joint, 1, keepdims=True)
    log_p_x = modelled.nodes["x"]["unscaled_log_prob"].double().numpy()
    expected = log_p_x - q + (np.exp(log_q_y) * (joint - log_q_y)).sum(1)
    found = sum(
        site["unscaled_log_prob"].double().numpy() * sign
        for trace, sign in ((modelled, 1), (guided, -1))
        for name, site in trace.nodes.items()
        if name in ("z", "x", "l")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # With any other q(y given z), and z from the same draw, it is lower.
    other = np.random.default_rng(0).dirichlet(np.ones(4), len(z))
    assert (log_p_x - q + (other * (joint - np.log(other))).sum(1) < found).all()
    np.testing.assert_allclose(modelled.nodes["p_y"]["value"], np.exp(log_q_y), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("proportions", ["learned", "uniform"])
def test_gmvae_finds_clusters(proportions):
    adata = datasets.simulate(1500, 150, n_types=4, log2_fold_change=1.5, seed=0)
    data = from_anndata(adata)
    found = []
    for seed in range(2):
        model = GMVAE.for_data(data, n_components=4, proportions=proportions, seed=seed)
        fit = fit_svi(model, data, seed=seed, epochs=60, progress=False)
        answer = pyrosc.clusters(fit, data)
        found.append(adjusted_rand_score(adata.obs.cell_type, answer.most_probable))
    assert min(found) > 0.95


# --- linear models


@pytest.fixture(scope="module")
def linear_data():
    z, w, mean = low_rank(1500, 60, 3, size=0.8, library=3000.0)
    return z, w, from_anndata(counts_of(mean))


@pytest.mark.parametrize(
    "model",
    [
        lambda data: Autoencoder.for_data(data, n_latent=4, hidden=()),
        lambda data: GaussianVAE.for_data(data, n_latent=4, hidden=(), scale=1.0),
    ],
)
def test_linear_gaussian_models_recover_the_subspace_of_pca(linear_data, model):
    """Probabilistic PCA (Tipping and Bishop 1999), with one sigma, and least squares have PCA's space.

    Of dimension 4: three factors, and the common library size.
    """
    *_, data = linear_data
    fit = fit_svi(model(data), data, progress=False, validation=0.0, epochs=120)
    t = fit.program.transform(data.on("cpu").cells(torch.arange(data.n_cells))).double().numpy()
    top = np.linalg.svd(t - t.mean(0), full_matrices=False)[2][:4].T
    assert degrees(fit.program.decoder[-1].weight.detach(), top) < 5


def test_ldvae_recovers_the_space_of_the_loadings(linear_data):
    _, w, data = linear_data
    model = LDVAE.for_data(data, n_latent=3, hidden=(64,), likelihood="poisson")
    fit = fit_svi(model, data, progress=False, validation=0.0)
    table = pyrosc.loadings(fit)
    assert table.shape == (60, 3)
    np.testing.assert_allclose(table.mean(), 0, atol=1e-5)
    assert degrees(table, w.T - w.T.mean(0)) < 10


# --- AutoZI, DCA, SCANVI


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_autozi_separates_zero_inflated_genes(share):
    _, _, mean = low_rank(1200, 60, 2)
    adata = counts_of(mean, theta=3.0)
    inflated = np.arange(60) < share * 60
    dropped = np.random.default_rng(1).random(adata.shape) < 0.4
    adata.X = csr_matrix(np.where(inflated & dropped, 0, adata.X.toarray()))
    data = from_anndata(adata)
    fit = fit_svi(AutoZI.for_data(data, n_latent=2, hidden=(64,)), data, epochs=120, progress=False)
    p = pyrosc.zero_inflation(fit)
    assert p[~inflated].mean() < 0.15
    assert share == 0 or roc_auc_score(inflated, p) > 0.95


def test_dca_finds_dropouts_and_stays_finite_without_batch_normalisation():
    adata = datasets.simulate(
        800, 100, n_types=3, dropout=0.3, library_mean=1500.0, inverse_dispersion=5.0, seed=2
    )
    for norm in ("batch", None):
        fit = fit_svi(DCA.for_data(adata, norm=norm), adata, progress=False)
        p = pyrosc.dropout_probability(fit, adata)
        x, before = adata.X.toarray(), adata.layers["counts_before_dropout"].toarray()
        assert (p[x > 0] == 0).all()
        assert roc_auc_score((before > 0)[x == 0], p[x == 0]) > 0.85
    with pytest.raises(TypeError, match="zinb"):
        pyrosc.dropout_probability(fit_svi(VAE.for_data(adata), adata, epochs=1, progress=False), adata)


def test_all_noise_of_vasc_is_drawn_at_sites(data):
    """So that a model replayed on what the guide drew has nothing left to chance."""
    vasc, cells = VASC.for_data(data, hidden=(4,)), data.on("cpu").cells(torch.arange(5))
    with torch.random.fork_rng():
        guide = poutine.trace(vasc.guide).get_trace(cells)
        runs = [poutine.trace(poutine.replay(vasc.model, guide)).get_trace(cells) for _ in range(2)]
        assert torch.equal(*(run.nodes["x"]["fn"].base_dist.probs for run in runs))
        assert not torch.equal(guide.nodes["u"]["value"], vasc_noise(vasc, cells))
    for trace in (guide, runs[0]):
        trace.compute_log_prob()
        assert float(trace.nodes["u"]["log_prob_sum"]) == 0
    vasc.eval()
    with torch.random.fork_rng():
        assert vasc_noise(vasc, cells) is None


def vasc_noise(vasc, cells):
    """What a further run of the guide draws at the site, None without one."""
    return poutine.trace(vasc.guide).get_trace(cells).nodes.get("u", {}).get("value")


def test_a_program_may_carry_its_epochs_and_validation(data):
    vae = VAE.for_data(data, n_latent=2, hidden=(4,))
    vae.epochs, vae.validation = 2, 0.0
    carried = fit_svi(vae, data, progress=False)
    assert (carried.settings["epochs"], carried.settings["validation"]) == (2, 0.0)
    assert carried.found.n_train == data.n_cells
    asked = fit_svi(vae, data, epochs=1, validation=0.5, progress=False)
    assert (asked.settings["epochs"], asked.settings["validation"]) == (1, 0.5)
    assert asked.found.n_train == data.n_cells // 2
    vae.validation = 1.0
    with pytest.raises(ValueError, match="validation is a share"):
        fit_svi(vae, data, progress=False)


def test_scanvi_labels_the_unlabelled():
    adata = datasets.simulate(600, 150, n_types=3, log2_fold_change=1.0, seed=1)
    hidden = np.random.default_rng(0).random(600) < 0.9
    adata.obs["label"] = adata.obs.cell_type.astype(object).where(~hidden, np.nan)
    data = from_anndata(adata, labels_key="label")
    fit = fit_svi(SCANVI.for_data(data, hidden=(32,), n_latent=5), data, epochs=60, progress=False)
    answer = pyrosc.predict(fit, data)
    right = answer.most_probable.astype(str).to_numpy() == adata.obs.cell_type.astype(str).to_numpy()
    assert right[hidden].mean() > 0.9
    assert list(answer.probability.columns) == list(data.schema.labels)
    with pytest.raises(ValueError, match="labels_key"):
        SCANVI.for_data(adata)
