"""Pyro generative models for single-cell RNA counts.

AnnData -> Counts -> Cells (a minibatch) -> model, guide -> ELBO -> Fit -> draws -> array, table -> AnnData.

Axes: draws, cells, genes, latent, batches. A `batch` is experimental; one of training is a `minibatch`.
Symbols: x counts, z state of the cell, y component, l library size, rho shares of the genes, mu mean,
theta inverse dispersion, pi zero inflation. Losses are in nats per cell, fold changes in log2.
"""

__version__ = "0.1.0"

from pyrosc import criticism, datasets, distributions
from pyrosc.cells import Cells
from pyrosc.counts import Counts
from pyrosc.differential import compare, differential_expression
from pyrosc.models import VAE
from pyrosc.persist import load
from pyrosc.posterior import (
    Imputation,
    LogLikelihood,
    draws,
    impute,
    latent,
    log_likelihood,
    posterior_predictive,
)
from pyrosc.reading import from_anndata
from pyrosc.svi import Fit, fit_svi

__all__ = [
    "VAE",
    "Cells",
    "Counts",
    "Fit",
    "Imputation",
    "LogLikelihood",
    "compare",
    "criticism",
    "datasets",
    "differential_expression",
    "distributions",
    "draws",
    "fit_svi",
    "from_anndata",
    "impute",
    "latent",
    "load",
    "log_likelihood",
    "posterior_predictive",
]
