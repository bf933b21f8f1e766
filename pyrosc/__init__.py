"""Pyro generative models for single-cell RNA counts.

AnnData -> Counts -> Cells (a minibatch) -> model, guide -> ELBO -> Fit -> draws -> array, table -> AnnData.

Axes: draws, cells, genes, latent, batches. A `batch` is experimental; one of training is a `minibatch`.
Symbols: x counts, z state of the cell, y component, l library size, rho shares of the genes, mu mean,
theta inverse dispersion, pi zero inflation. Losses are in nats per cell, fold changes in log2.
"""

__version__ = "0.1.0"

from pyrosc import criticism, datasets, distributions
from pyrosc.asking import draws
from pyrosc.calibration import NullCalibration, null_calibration
from pyrosc.cells import Cells
from pyrosc.counts import Counts
from pyrosc.differential import compare, differential_expression
from pyrosc.evidence import LogLikelihood, elbo, log_likelihood
from pyrosc.imputation import Imputation, impute, impute_proteins
from pyrosc.interactions import interaction
from pyrosc.models import (
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
)
from pyrosc.multiple import multiple_imputation
from pyrosc.persist import load
from pyrosc.posterior import dropout_probability, latent, posterior_predictive
from pyrosc.query import fit_query
from pyrosc.ranking import to_scanpy
from pyrosc.reading import from_anndata
from pyrosc.sets import gene_sets
from pyrosc.states import Clusters, clusters, foreground, inclusion, loadings, predict, zero_inflation
from pyrosc.svi import Fit, fit_svi

__all__ = [
    "DCA",
    "GMVAE",
    "LDVAE",
    "SCANVI",
    "SCVIS",
    "TOTALVI",
    "VAE",
    "VASC",
    "VSC",
    "AutoImpute",
    "AutoZI",
    "Autoencoder",
    "Cells",
    "Clusters",
    "Counts",
    "Fit",
    "GaussianVAE",
    "Imputation",
    "LogLikelihood",
    "NullCalibration",
    "clusters",
    "compare",
    "criticism",
    "datasets",
    "differential_expression",
    "distributions",
    "draws",
    "dropout_probability",
    "elbo",
    "fit_query",
    "fit_svi",
    "foreground",
    "from_anndata",
    "gene_sets",
    "impute",
    "impute_proteins",
    "inclusion",
    "interaction",
    "latent",
    "load",
    "loadings",
    "log_likelihood",
    "multiple_imputation",
    "null_calibration",
    "posterior_predictive",
    "predict",
    "to_scanpy",
    "zero_inflation",
]
