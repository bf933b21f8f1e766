"""Wrong questions are told why."""

import subprocess
import sys

import numpy as np
import pytest

from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import log_likelihood
from pyrosc.posterior.predictive import posterior_predictive


def test_wrong_questions_are_told_why(vae_fit, data, adata):
    few = data[np.arange(3)]
    with pytest.raises(ValueError, match=r"share.*count.*rate.*log1p.*repaired.*'mean'"):
        impute(vae_fit, few, "mean")
    with pytest.raises(ValueError, match=r"library.*count"):
        impute(vae_fit, few, library=100.0)
    with pytest.raises(ValueError, match="library"):
        impute(vae_fit, few, "count", library=-1.0)
    for interval in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="interval"):
            impute(vae_fit, few, interval=interval)
    with pytest.raises(ValueError, match="no gene nope"):
        impute(vae_fit, few, genes=["gene_1", "nope"])
    for ask in (impute, posterior_predictive, lambda *a, **k: list(draws(*a, "z", **k))):
        with pytest.raises(ValueError, match=r"no batch 'moon'.*batch_0, batch_1"):
            ask(vae_fit, few, batch="moon")
    for ask in (
        lambda n: latent(vae_fit, few, n),
        lambda n: impute(vae_fit, few, n_draws=n),
        lambda n: posterior_predictive(vae_fit, few, n),
        lambda n: log_likelihood(vae_fit, few, n),
        lambda n: list(draws(vae_fit, few, "z", n_draws=n)),
    ):
        for n in (0, -1):
            with pytest.raises(ValueError, match="n_draws"):
                ask(n)
    for ask in (
        lambda: latent(vae_fit, few, site="w"),
        lambda: latent(vae_fit, few, 3, site="w"),
        lambda: impute(vae_fit, few, site="w"),
    ):
        with pytest.raises(KeyError, match=r"no site 'w'.*z"):
            ask()
    with pytest.raises(ValueError, match=r"1 of the fit's 40 genes are missing .* gene_0; .*fit_query"):
        latent(vae_fit, adata[:, 1:].copy())
    elsewhere = adata.copy()
    elsewhere.obs["batch"] = "moon"
    with pytest.raises(ValueError, match=r"does not know moon; it knows batch_0, batch_1; .*fit_query"):
        latent(vae_fit, elsewhere)
    with pytest.raises(ValueError, match="no cells"):
        latent(vae_fit, few[:0])
    del adata.obs["batch"]
    with pytest.raises(KeyError, match="batch"):
        latent(vae_fit, adata)


WRONG = {
    **{
        f"pyrosc.{verb}": "TypeError: a question is put to a Fit, not to VAE: pyrosc.fit_svi(model, data)"
        for verb in (
            "latent(model, adata)",
            "impute(model, adata)",
            "posterior_predictive(model, adata)",
            "dropout_probability(model, adata)",
            "log_likelihood(model, adata)",
            "elbo(model, adata)",
            "draws(model, adata, 'z')",
            "clusters(model, adata)",
            "loadings(model)",
            "fit_query(model, adata)",
            "multiple_imputation(model, adata, 2)",
            "differential_expression(model, adata, groupby='side')",
            "gene_sets(model, adata, {'a': ['0']}, groupby='side')",
            "interaction(model, adata, groupby='side', group='a', reference='b', by='side', baseline='a')",
            "null_calibration(model, adata, groupby='side')",
        )
    },
    "pyrosc.latent(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.impute(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.clusters(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.predict(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.foreground(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.from_anndata('cells.h5ad')": "TypeError: from_anndata reads an AnnData, not str",
    "pyrosc.VAE.for_data(adata, hidden=128)": "ValueError: hidden must be a tuple of whole numbers",
    "pyrosc.DCA.for_data(adata, hidden='128')": "ValueError: hidden must be a tuple of whole numbers",
    "pyrosc.VAE.for_data(adata, n_latent=10.0)": "ValueError: n_latent must be a whole number of at least 1",
    "pyrosc.fit_svi(model, adata, learning_rate='.1')": "ValueError: learning_rate must be more than 0, not",
    "pyrosc.fit_svi(model, adata, weight_decay='5')": "ValueError: weight_decay must be at least 0, not '5'",
    "pyrosc.fit_svi(model, adata, validation='.1')": "ValueError: validation is a share of the cells",
    "pyrosc.latent(fit, fit)": "TypeError: data must be an AnnData or pyrosc.Counts, not Fit",
    "pyrosc.latent(fit, adata.X)": "not ndarray; of an array or a table, cells x genes, anndata.AnnData(",
    "pyrosc.latent(fit, adata, 2.5)": "TypeError: n_draws must be a whole number, not 2.5",
    "pyrosc.compare(adata.X[0])": "ValueError: draws of fold changes are floats, draws x genes, not float32",
    "pyrosc.compare(adata.X.astype(int))": "draws of fold changes are floats, draws x genes, not int64",
    "pyrosc.gene_sets(fit, adata, ['0'], groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.gene_sets(fit, adata, {'a': 0}, groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.differential_expression(fit, adata, groupby=None)": "ValueError: groupby names a column of obs",
    "pyrosc.differential_expression(fit, groupby='side')": "TypeError: the data is missing: it stands second",
    "pyrosc.differential_expression(adata, fit, groupby='side')": "put to a Fit, not to AnnData",
    "pyrosc.differential_expression(model, groupby='side')": "must be an AnnData or pyrosc.Counts, not VAE",
    "pyrosc.differential_expression(adata)": "differential_expression() missing 1 required keyword-only",
    "pyrosc.gene_sets(adata, fit, {'a': ['0']}, groupby='side')": "put to a Fit, not to AnnData",
    "pyrosc.gene_sets(adata, groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.gene_sets(fit, {'a': ['0']}, groupby='side')": "must be an AnnData or pyrosc.Counts, not dict",
    "pyrosc.gene_sets({'a': ['0']}, adata, groupby='side')": "must be an AnnData or pyrosc.Counts, not dict",
    "pyrosc.to_scanpy(adata, None)": "the table of differential_expression stands first, then adata",
}
"""What is said of them, where nothing checks types: in a process without the tests' hook."""


def test_what_stands_in_the_wrong_place_is_named():
    program = f"""
import warnings, anndata, numpy, pyrosc
warnings.simplefilter("ignore")
adata = anndata.AnnData(numpy.ones((6, 3), "float32"))
adata.obs["side"] = ["a", "b"] * 3
before = adata.copy()
model = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(4,))
fit = pyrosc.fit_svi(model, adata, epochs=1, progress=False, device="cpu")
for use in {list(WRONG)}:
    try:
        print("answered:", eval(use))
    except Exception as error:
        print(type(error).__name__ + ":", error)
assert adata.obs.equals(before.obs) and not (adata.uns or adata.obsm or adata.layers)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said, (use, what) in zip(done.stdout.splitlines(), WRONG.items(), strict=True):
        assert what in said, use


def test_a_single_cell_is_asked_like_others(vae_fit, rich_fit, data, rich):
    for fit, d in ((vae_fit, data), (rich_fit, rich)):
        one = d[np.array([7])]
        np.testing.assert_allclose(latent(fit, one)[0], latent(fit, d)[7], rtol=1e-4, atol=1e-5)
        assert impute(fit, one).mean.shape == (1, 40)
        assert log_likelihood(fit, one).nats.shape == (1,)
