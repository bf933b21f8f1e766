"""Pyro generative models for single-cell RNA counts.

AnnData -> Counts -> Cells (a minibatch) -> model, guide -> ELBO -> Fit -> draws -> array, table -> AnnData.

Axes: draws, cells, genes, latent, batches. A `batch` is experimental; one of training is a `minibatch`.
Symbols: x counts, z state of the cell, y component, l library size, rho shares of the genes, mu mean,
theta inverse dispersion, pi zero inflation. Losses are in nats per cell, fold changes in log2.
"""

__version__ = "0.1.0"

from pyrosc import criticism, datasets, distributions
from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.data.read import from_anndata
from pyrosc.differential.calls import compare
from pyrosc.differential.expression import differential_expression
from pyrosc.differential.gene_sets import gene_sets
from pyrosc.differential.interaction import interaction
from pyrosc.differential.null_calibration import NullCalibration, null_calibration
from pyrosc.differential.scanpy_export import to_scanpy
from pyrosc.inference.fit import Fit, load
from pyrosc.inference.svi import fit_svi
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
from pyrosc.posterior.discrete_states import Clusters, clusters, inclusion, predict
from pyrosc.posterior.draws import draws
from pyrosc.posterior.imputation import Imputation
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import LogLikelihood, elbo, log_likelihood
from pyrosc.posterior.multiple_imputation import multiple_imputation
from pyrosc.posterior.parameters import loadings, zero_inflation
from pyrosc.posterior.predictive import dropout_probability, posterior_predictive
from pyrosc.posterior.proteins import foreground, impute_proteins
from pyrosc.reference_mapping import fit_query

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
