"""Counts of cells, and their sums over two groups, for the tests."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data.read import from_anndata
from pyrosc.differential.group_sums import Pseudobulk, pseudobulk
from pyrosc.differential.quasi_likelihood import LFC


def arms_of(x, group, batch=None):
    """Sums over the cells of group 1 and of group 0."""
    batch = np.zeros(len(x), int) if batch is None else batch
    zero, one = pseudobulk(sp.csr_array(x.astype(np.float32)), group, 2, batch, int(batch.max()) + 1)
    return one, zero


def negative_binomial(rng, mean, theta=3.0):
    return rng.poisson(rng.gamma(theta, mean / theta))


def donors(seed, n_donors, tau, *, paired=False, genes=300, lfc_sd=0.0, mean=None, equal=False, lfc=None):
    """Counts, each cell's side and donor, and true log2 fold changes; tau: of a donor on a side."""
    rng = np.random.default_rng(seed)
    mean = rng.gamma(0.6, 1.5, genes) + 0.3 if mean is None else np.full(genes, mean)
    donor = np.repeat(np.arange(n_donors), 100 if equal else rng.integers(30, 170, n_donors))
    side = rng.integers(0, 2, len(donor)) if paired else donor % 2
    lfc = rng.normal(0, lfc_sd, genes) if lfc is None else lfc
    own = rng.normal(0, 0.5, (n_donors, genes)) * paired  # of the donor, the same on either side
    rates = np.log(mean) + np.log(2) * lfc * side[:, None] + own[donor]
    rates = rates + rng.normal(0, tau, (n_donors, 2, genes))[donor, side]
    lfc = lfc - np.log2((mean * 2**lfc).sum() / mean.sum())  # of shares
    mu = np.exp(rates) * rng.lognormal(0, 0.3, (len(donor), 1))
    return rng.poisson(rng.gamma(3, mu / 3)).astype(np.float32), side, donor, lfc


def counts_of_donors(x, side, donor, batches=None):
    """Counts of named cells, with columns "side", "ref" or "case", and "donor"."""
    names = [f"cell {i}" for i in range(len(x))]
    obs = pd.DataFrame({"side": np.array(["ref", "case"])[side], "donor": [f"d{i}" for i in donor]}, names)
    if batches is not None:
        obs["batch"] = [f"b{i}" for i in batches]
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
    return from_anndata(adata, batch_key=None if batches is None else "batch")


def arms_of_donors(x, side, donor):
    """Sums over the donors' cells of side 1 and side 0, and the strata: of paired donors each its own."""
    zero, one = pseudobulk(sp.csr_array(x), side, 2, donor, int(donor.max()) + 1)
    paired = (one.cells > 0) & (zero.cells > 0)
    stratum = np.unique(np.where(paired, 1 + np.arange(len(paired)), 0), return_inverse=True)[1]
    return one, zero, stratum


def poisson_arms(seed, n, tau, *, paired, genes=3000, mean=10.0, unequal=False):
    """Arms of n donors a side, each one unit of Poisson counts: there is no dispersion between cells."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(np.arange(n), 2) if paired else np.arange(2 * n)
    depth = rng.uniform(0.3, 1.7, 2 * n) if unequal else np.ones(2 * n)
    mu = mean * depth[:, None] * np.exp(tau * rng.normal(0, 1, (2 * n, genes)))
    return arms_of_donors(rng.poisson(mu).astype(np.float32), np.arange(2 * n) % 2, donor)


def arm_of_one_gene(x, l, cells=30):
    """Sums over units of so many cells alike, of which a gene has x counts."""
    x, l = np.array(x, float), np.array(l, float)
    column = x[:, None]
    return Pseudobulk(np.where(l > 0, cells, 0.0), column, l, l**2 / cells, column, column, column)


def normal_curves(r, se):
    """Likelihoods of fold changes that are normal, at r and of sd se."""
    return np.exp(-0.5 * ((LFC - r[:, None]) / np.asarray(se)[:, None]) ** 2)
