"""TOTALVI: density of the proteins, proteins that were not measured, recovery of a known foreground."""

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy.sparse import csr_array, csr_matrix
from scipy.stats import nbinom
from sklearn.metrics import roc_auc_score

import pyrosc
from pyrosc import TOTALVI, fit_svi, from_anndata
from pyrosc.datasets.simulate import simulate, simulate_proteins


@pytest.fixture(scope="module")
def truth():
    adata = simulate(1000, 60, n_types=4, n_batches=2, de_fraction=0.4, log2_fold_change=2.0, seed=1)
    return simulate_proteins(adata, 8, unmeasured_batches=["batch_1"], seed=1)


@pytest.fixture(scope="module")
def fit(truth):
    data = from_anndata(truth, batch_key="batch", protein_key="protein_expression")
    return fit_svi(TOTALVI.for_data(data, n_latent=8, hidden=(32,)), data, epochs=100, progress=False)


def test_the_density_of_proteins_is_scipys(rich):
    model = TOTALVI.for_data(rich, n_latent=2, hidden=(8,)).eval()
    with torch.no_grad():
        model.log_inverse_dispersion.copy_(torch.linspace(-1, 2, 5))
    cells = rich.on("cpu").cells(torch.arange(20))
    with torch.no_grad():
        guided = poutine.trace(model.guide).get_trace(cells)
        trace = poutine.trace(poutine.replay(model.model, guided)).get_trace(cells)
        h, _ = model.decoder(trace.nodes["z"]["value"], cells)
        log_alpha, logits = model.foreground(h).double().chunk(2, -1)
    trace.compute_log_prob()
    beta = trace.nodes["beta"]["value"].double()
    alpha = (1 + log_alpha.exp()).numpy()  # exp of softplus
    theta, p = model.log_inverse_dispersion.detach().double().exp().numpy(), logits.sigmoid().numpy()
    y = cells.proteins.numpy()

    def pmf(mean):
        return nbinom.pmf(np.maximum(y, 0), theta, theta / (theta + mean))

    background, foreground = (1 - p) * pmf(beta.numpy()), p * pmf(beta.numpy() * alpha)
    expected = np.where(y >= 0, np.log(background + foreground), 0).sum(1)
    assert (y < 0).any()
    assert (y >= 0).any()
    np.testing.assert_allclose(trace.nodes["proteins"]["unscaled_log_prob"], expected, rtol=1e-5)
    of_v = np.where(y >= 0, foreground / (background + foreground), p)
    np.testing.assert_allclose(trace.nodes["foreground"]["value"], of_v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        trace.nodes["protein_mean"]["value"], of_v * beta.numpy() * alpha, rtol=1e-4, atol=1e-6
    )


def test_a_protein_that_was_not_measured_counts_for_nothing(rich):
    model = TOTALVI.for_data(rich, n_latent=2, hidden=(8,)).eval()
    cells = rich.on("cpu").cells(torch.arange(rich.n_cells))
    unmeasured = cells.batch == 1
    with torch.no_grad():
        guided = poutine.trace(model.guide).get_trace(cells)
        trace = poutine.trace(poutine.replay(model.model, guided)).get_trace(cells)
    trace.compute_log_prob()
    guided.compute_log_prob()
    for site in (trace.nodes["proteins"], trace.nodes["beta"], guided.nodes["beta"]):
        assert (site["log_prob"][unmeasured] == 0).all()
        assert (site["log_prob"][~unmeasured] != 0).all()


def test_the_foreground_is_found_also_where_only_genes_were_measured(truth, fit):
    v = truth.obsm["protein_foreground"].to_numpy()
    found = pyrosc.foreground(fit, truth)
    assert list(found.columns) == list(truth.obsm["protein_foreground"].columns)
    measured = (truth.obs["batch"] == "batch_0").to_numpy()
    for cells in (measured, ~measured):
        assert roc_auc_score(v[cells].ravel(), found.to_numpy()[cells].ravel()) > 0.99
        assert np.abs(found.to_numpy()[cells] - v[cells]).mean() < 0.1


def test_intervals_cover_the_proteins_without_background(truth, fit):
    v = truth.obsm["protein_foreground"].to_numpy()
    mean = truth.obsm["protein_background"].to_numpy() * 20
    measured = (truth.obs["batch"] == "batch_0").to_numpy()
    imputed = pyrosc.impute_proteins(fit, truth, n_draws=100)
    assert list(imputed.gene_names) == list(truth.obsm["protein_foreground"].columns)
    covered = (imputed.lower <= mean) & (mean <= imputed.upper)
    assert 0.8 < covered[measured][v[measured]].mean() < 0.97
    # Of cells without proteins their genes tell the type: a wider interval.
    there = pyrosc.impute_proteins(fit, truth, batch="batch_0", n_draws=100)
    covered = (there.lower <= mean) & (mean <= there.upper)
    assert 0.7 < covered[~measured][v[~measured]].mean() < 0.99
    wide = np.log(there.upper / there.lower)
    assert np.median(wide[~measured][v[~measured]]) > 1.5 * np.median(wide[measured][v[measured]])


def test_rna_alone_is_enough_to_ask(truth, fit):
    alone = truth.copy()
    del alone.obsm["protein_expression"]
    assert np.isfinite(pyrosc.foreground(fit, alone)).all(axis=None)


def test_proteins_are_matched_by_name(truth, fit):
    few = truth[:20].copy()
    turned = few.copy()
    turned.obsm["protein_expression"] = few.obsm["protein_expression"].iloc[:, ::-1].assign(more=1.0)
    pd.testing.assert_frame_equal(pyrosc.foreground(fit, few), pyrosc.foreground(fit, turned))


def test_missing_is_nan_or_minus_one(truth):
    other = truth.copy()
    table = truth.obsm["protein_expression"]
    other.obsm["protein_expression"] = table.where(table >= 0)
    a, b = (from_anndata(x, protein_key="protein_expression") for x in (truth, other))
    np.testing.assert_array_equal(a.proteins, b.proteins)
    assert a.proteins.dtype == np.float32


def test_an_array_of_proteins_has_numbers_for_names(truth):
    other = truth.copy()
    other.obsm["protein_expression"] = truth.obsm["protein_expression"].to_numpy()
    assert from_anndata(other, protein_key="protein_expression").schema.proteins[1] == "protein_1"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t * 0.5, ValueError, "not whole.*another protein_key"),
        (lambda t: t.astype(str) + "x", ValueError, "values that are no numbers"),
        (lambda t: t - 5, ValueError, "negative"),
        (lambda t: t * np.inf, ValueError, "infinite"),
        (lambda t: t.set_axis(["a"] * t.shape[1], axis=1), ValueError, "same name"),
    ],
)
def test_bad_proteins_are_refused(truth, change, error, says):
    other = truth.copy()
    table = truth.obsm["protein_expression"]
    other.obsm["protein_expression"] = change(table.where(table >= 0))
    with pytest.raises(error, match=says):
        from_anndata(other, protein_key="protein_expression")


def test_a_sparse_array_of_proteins_is_read(truth):
    other = truth.copy()
    y = truth.obsm["protein_expression"].to_numpy()
    for sparse in (csr_array(y), csr_matrix(y)):
        other.obsm["protein_expression"] = sparse
        np.testing.assert_array_equal(from_anndata(other, protein_key="protein_expression").proteins, y)


def test_cells_without_a_measured_protein_are_answered(truth, fit):
    alone = truth[truth.obs["batch"] == "batch_1"].copy()
    assert np.isfinite(pyrosc.foreground(fit, alone)).all(axis=None)
    drawn = pyrosc.posterior_predictive(fit, truth[:5], site="proteins")
    assert drawn[0].shape == (5, 8)


def test_data_without_proteins_are_refused(truth):
    with pytest.raises(KeyError, match="no 'adt' in obsm"):
        from_anndata(truth, protein_key="adt")
    with pytest.raises(ValueError, match="protein_key"):
        TOTALVI.for_data(from_anndata(truth))


def test_every_protein_has_types_with_and_without_it(truth):
    v, types = truth.obsm["protein_foreground"].to_numpy(), truth.obs["cell_type"].to_numpy()
    share = pd.DataFrame(v).groupby(types).mean()
    assert set(np.unique(share)) == {0.0, 1.0}
    assert (share.nunique() == 2).all()
    with pytest.raises(ValueError, match="names of batches"):
        simulate_proteins(truth, unmeasured_batches=["nowhere"])
