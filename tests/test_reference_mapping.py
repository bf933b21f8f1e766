"""fit_query: what is shared stays to the bit, new batches are learned, absent genes are missing, not zero."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import nbinom

import pyrosc
from pyrosc import (
    GMVAE,
    LDVAE,
    SCANVI,
    TOTALVI,
    VAE,
    VSC,
    AutoZI,
    GaussianVAE,
    fit_query,
    fit_svi,
    from_anndata,
)
from pyrosc.datasets.simulate import simulate, simulate_proteins
from pyrosc.distributions.cell import without
from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.nn.priors import Mixture
from pyrosc.posterior.missing_genes import asked

SETTINGS = {"epochs": 6, "minibatch_size": 64, "learning_rate": 1e-2, "progress": False}
CASES = {
    "vae": (VAE, {}),
    "vae of everything": (
        VAE,
        {"likelihood": "zinb", "library": "latent", "dispersion": "gene-batch", "encode_covariates": True},
    ),
    "vae theta by cell": (
        VAE,
        {"dispersion": "gene-cell", "norm": "layer", "prior": "vamp", "n_components": 4},
    ),
    "ldvae": (LDVAE, {}),
    "gmvae": (GMVAE, {"n_components": 3}),
    "vsc": (VSC, {"branch": 4}),
    "scanvi": (SCANVI, {}),
    "autozi": (AutoZI, {}),
    "totalvi": (TOTALVI, {"dispersion": "gene-batch"}),
}
every_case = pytest.mark.parametrize("name", CASES)


def of_batches(adata, *names):
    few = adata[adata.obs["batch"].isin(names)].copy()
    few.obs["batch"] = few.obs["batch"].cat.remove_unused_categories()
    return few


def read(adata):
    return from_anndata(
        adata,
        batch_key="batch",
        labels_key="cell_type",
        categorical_keys=["plate"],
        continuous_keys=["depth"],
        protein_key="protein_expression",
    )


@pytest.fixture(scope="module")
def cells():
    adata = simulate(300, 40, n_types=3, n_batches=4, batch_sd=0.5, de_fraction=0.4, seed=3)
    adata = simulate_proteins(adata, 5, seed=3)
    adata.obs["depth"] = np.log(adata.obs["library"].to_numpy())
    adata.obs["plate"] = np.array(["p0", "p1", "p2"])[np.arange(300) % 3]
    return adata


def fitted(name, adata):
    model, recipe = CASES[name]
    data = read(adata)
    return fit_svi(model.for_data(data, n_latent=3, hidden=(8,), **recipe), data, **SETTINGS)


def tensors(fit):
    return fit.program.state_dict()


@every_case
@pytest.mark.parametrize("known", [("batch_0",), ("batch_0", "batch_1")])
def test_what_is_shared_stays_to_the_bit(name, known, cells, tmp_path):
    reference = of_batches(cells, *known)
    fit = fitted(name, reference)
    before = {key: tensor.clone() for key, tensor in tensors(fit).items()}
    query = fit_query(fit, of_batches(cells, "batch_2", "batch_3")[:, ::-1], **SETTINGS)
    assert query.schema.batches == (*known, "batch_2", "batch_3")
    grown = 0
    for key, tensor in tensors(query).items():
        old = before.get(key, tensor[..., :0] if tensor.ndim else tensor)
        assert torch.equal(tensor[tuple(slice(n) for n in old.shape)], old), key
        grown += tensor.shape != old.shape
    assert grown >= 1
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(fit).items())
    assert all(p.requires_grad for p in query.program.parameters())
    for ask in (
        pyrosc.latent,
        lambda f, d: pyrosc.impute(f, d, n_draws=3).mean,
        lambda f, d: pyrosc.log_likelihood(f, d, 3).nats,
    ):
        np.testing.assert_allclose(ask(query, reference), ask(fit, reference), rtol=1e-5, atol=1e-6)
    query.save(tmp_path / "query")
    again, few = pyrosc.load(tmp_path / "query"), of_batches(cells, "batch_3")
    assert np.array_equal(pyrosc.latent(again, few), pyrosc.latent(query, few))


@pytest.fixture(scope="module")
def truth():
    adata = simulate(
        1200, 100, n_types=4, n_batches=3, batch_sd=0.5, de_fraction=0.4, log2_fold_change=2.0, seed=1
    )
    return of_batches(adata, "batch_0", "batch_1"), of_batches(adata, "batch_2")


@pytest.fixture(scope="module")
def reference(truth):
    data = from_anndata(truth[0], batch_key="batch")
    return fit_svi(VAE.for_data(data, n_latent=8, hidden=(32,)), data, epochs=60, progress=False)


@pytest.fixture(scope="module")
def query(truth, reference):
    return fit_query(reference, truth[1], epochs=60, progress=False)


def test_the_new_batchs_effect_on_genes_is_found(truth, reference, query):
    e = truth[1].varm["log_batch_effect"]
    there, here = (pyrosc.impute(query, truth[1], batch=b).mean for b in ("batch_2", "batch_0"))
    found = np.log(there / here).mean(0)
    # Not 1: a part that looks like a difference between types goes to z.
    assert np.corrcoef(found, e[:, 2] - e[:, 0])[0, 1] > 0.85
    as_known = truth[1].copy()
    as_known.obs["batch"] = "batch_0"
    gain = pyrosc.log_likelihood(query, truth[1]).mean - pyrosc.log_likelihood(reference, as_known).mean
    assert gain > 10


def test_absent_genes_are_not_read_as_zeros(truth, query, reference):
    adata = truth[1]
    gone = np.random.default_rng(0).choice(100, 30, replace=False)
    less = adata[:, np.setdiff1d(np.arange(100), gone)].copy()
    masked = fit_query(reference, less, epochs=60, progress=False)
    assert set(masked.schema.absent) == set(adata.var_names[gone])
    zeros = adata.copy()
    zeros.X = adata.X.multiply(~np.isin(np.arange(100), gone)).tocsr()
    z = pyrosc.latent(query, adata)
    error, error_of_zeros = (
        np.square(pyrosc.latent(f, d) - z).mean() for f, d in ((masked, less), (query, zeros))
    )
    assert error < error_of_zeros / 2
    names = list(adata.var_names[gone])
    imputed = pyrosc.impute(masked, less, genes=names).mean
    share = adata.layers["share"][:, gone]
    assert imputed.sum() == pytest.approx(share.sum(), rel=0.1)
    of_types = [
        m.groupby(adata.obs["cell_type"].to_numpy()).mean() for m in map(pd.DataFrame, (imputed, share))
    ]
    assert np.corrcoef(*(np.log(m.to_numpy()).ravel() for m in of_types))[0, 1] > 0.85
    assert pyrosc.impute(masked, less).mean.shape == less.shape
    table = pyrosc.differential_expression(masked, less, groupby="cell_type", group="type_0")
    assert set(table.gene) == set(less.var_names)


def test_what_is_known_of_an_absent_gene_is_the_mean_of_the_other_batches(truth, reference):
    query = fit_query(reference, truth[1][:, 10:], epochs=60, progress=False)
    offsets = query.program.decoder.logits.weight.detach()
    moved = (offsets[:, -1] - offsets[:, -3:-1].mean(1)).abs()
    # All of them together are seen in the cells' depth, none alone.
    assert moved[:10].max() < 0.2
    assert moved[10:].max() > 0.3


def test_a_cell_of_a_small_panel_keeps_its_depth(truth, query):
    """Completed, the genes that were counted have their share of the total, however few they are."""
    few = truth[1][:, :15]
    small = fit_query(query_of(query), few, epochs=1, progress=False)
    counts = asked(small, few)
    share = pyrosc.impute(small, few, genes=list(few.var_names)).mean.sum(1)
    total = np.asarray(few.X.sum(1)).ravel()
    np.testing.assert_allclose(np.median(total / (counts.library * share)), 1, atol=0.1)


def query_of(query):
    """The same fit under other names of batches, all of them old."""
    names = tuple(f"old_{i}" for i in range(3))
    return replace(query, schema=replace(query.schema, batches=names))


def test_proteins_of_a_query_without_any(cells):
    fit = fitted("totalvi", of_batches(cells, "batch_0", "batch_1"))
    new = of_batches(cells, "batch_2")
    measured = pyrosc.impute_proteins(fit, of_batches(cells, "batch_0")).mean.mean(0)
    missing = new.copy()
    missing.obsm["protein_expression"][:] = -1
    del new.obsm["protein_expression"]
    for rna in (new, missing):
        query = fit_query(fit, rna, **SETTINGS)
        imputed = pyrosc.impute_proteins(query, rna).mean.mean(0)
        assert (np.abs(np.log(imputed / measured)) < np.log(2)).all()


def test_a_model_that_for_data_did_not_make_alone_is_refused(cells):
    data = read(of_batches(cells, "batch_0"))
    model = VAE.for_data(data, n_latent=3, hidden=(8,))
    model.prior = Mixture(2, 3)
    with pytest.raises(TypeError, match="for_data alone"):
        fit_query(fit_svi(model, data, **SETTINGS), of_batches(cells, "batch_2"))


def test_dropouts_of_absent_genes_are_not_known(cells):
    fit = fitted("vae of everything", of_batches(cells, "batch_0", "batch_1"))
    less = of_batches(cells, "batch_2")[:, 3:].copy()
    query = fit_query(fit, less, **SETTINGS)
    assert np.isnan(pyrosc.dropout_probability(query, less, genes=["gene_0"])).all()
    assert np.isfinite(pyrosc.dropout_probability(query, less)).all()
    # Totals, of which the prior of l is made, are of all genes.
    totals = query.program.library.log_mean.exp()
    assert float(totals[-1] / totals[0]) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (2, 6, 9)])
def test_genes_left_out_add_nothing_to_the_density(gates, shape):
    rng = np.random.default_rng(0)
    mean = torch.as_tensor(rng.uniform(0.1, 5, shape), dtype=torch.float32).requires_grad_()
    theta = torch.as_tensor(rng.uniform(0.5, 5, 9), dtype=torch.float32).requires_grad_()
    logits = torch.as_tensor(rng.normal(size=shape), dtype=torch.float32).requires_grad_()
    x = torch.as_tensor(rng.poisson(2.0, (6, 9)), dtype=torch.float32)
    kept = torch.as_tensor(rng.random(9) < 0.5)
    base = NegativeBinomial(mean, theta)
    counts = (ZeroInflated(base, logits) if gates else base).to_event(1)
    log_prob = without(counts, kept).log_prob(torch.where(kept, x, 3.5))
    log_p = nbinom.logpmf(x, theta.detach(), (theta / (theta + mean)).detach())
    if gates:
        pi = logits.detach().sigmoid().numpy()
        log_p = np.where(x == 0, np.log(pi + (1 - pi) * np.exp(log_p)), np.log1p(-pi) + log_p)
    np.testing.assert_allclose(log_prob.detach(), log_p[..., kept].sum(-1), rtol=1e-4)
    log_prob.sum().backward()
    for parameter in (mean, theta, *([logits] if gates else [])):
        assert (parameter.grad[..., ~kept] == 0).all()
        assert (parameter.grad[..., kept] != 0).any()
    drawn = without(counts, kept).sample([500])
    sd = counts.variance.detach().sqrt()
    assert ((drawn.mean(0) - counts.mean.detach()).abs() < 6 * sd / np.sqrt(500)).all()
    assert (drawn[..., ~kept] > 0).any()


def test_leaving_genes_out_of_a_users_distribution():
    kept = torch.tensor([True, False, True])
    counts = torch.distributions.Poisson(torch.tensor([1.0, 2.0, 3.0]))
    ours = without(Poisson(counts.rate).to_event(1), kept)
    theirs = without(dist.Poisson(counts.rate).to_event(1), kept)
    x = torch.tensor([2.0, 0.0, 1.0])
    expected = counts.log_prob(x)[kept].sum()
    torch.testing.assert_close(ours.log_prob(x), expected)
    torch.testing.assert_close(theirs.log_prob(x), expected)


def test_training_leaves_the_absent_genes_out(truth, reference):
    less = truth[1][:, 10:].copy()
    query = fit_query(reference, less, epochs=1, progress=False)
    few = asked(query, less)[np.arange(5)].on("cpu").cells(torch.arange(5))
    with query.asking(0):
        guided = poutine.trace(query.guide).get_trace(few)
        site = poutine.trace(poutine.replay(query.model, guided)).get_trace(few).nodes["x"]
    mean, theta = (
        site["fn"].base_dist.base_dist._mean,
        query.program.likelihood.log_inverse_dispersion.exp()[0],
    )
    theta = theta.detach()
    log_p = nbinom.logpmf(few.x[:, 10:], theta[10:], (theta / (theta + mean))[:, 10:].detach()).sum(1)
    np.testing.assert_allclose(site["fn"].log_prob(site["value"]).detach(), log_p, rtol=1e-4)
    # What the guide reads there: no zeros, and in sum about the share of these genes.
    assert (few.x[:, :10] > 0).all()
    offsets = query.program.decoder.logits.weight.detach()
    torch.testing.assert_close(offsets[:10, -1], offsets[:10, -3:-1].mean(1), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda f, q, r: fit_query(f, r), ValueError, "knows all batches"),
        (lambda f, q, r: fit_query(f, with_other_names(q)), ValueError, "none of the fit's"),
        (lambda f, q, r: fit_query(of_query(f, q), q), ValueError, "of a query"),
        (lambda f, q, r: fit_query(of_one(VAE, r), q), ValueError, "knows no batches"),
        (lambda f, q, r: fit_query(of_batches_of(GaussianVAE, r), q), TypeError, "no parameters of batches"),
    ],
)
def test_what_can_not_be_asked(truth, reference, change, error, says):
    with pytest.raises(error, match=says):
        change(reference, truth[1], truth[0])


def with_other_names(adata):
    other = adata.copy()
    other.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]
    return other


def of_query(fit, adata):
    return fit_query(fit, adata[:, 5:], epochs=1, progress=False)


def of_one(model, adata):
    return fit_svi(model.for_data(from_anndata(adata)), from_anndata(adata), epochs=1, progress=False)


def of_batches_of(model, adata):
    data = from_anndata(adata, batch_key="batch")
    return fit_svi(model.for_data(data), data, epochs=1, progress=False)
