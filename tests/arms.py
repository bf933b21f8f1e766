"""Counts of cells, and their sums over two groups, for the tests."""

import numpy as np
import scipy.sparse as sp

from pyrosc.differential.group_sums import sums


def arms_of(x, group, batch=None):
    """Sums over the cells of group 1 and of group 0."""
    batch = np.zeros(len(x), int) if batch is None else batch
    zero, one = sums(sp.csr_array(x.astype(np.float32)), group, 2, batch, int(batch.max()) + 1)
    return one, zero


def negative_binomial(rng, mean, theta=3.0):
    return rng.poisson(rng.gamma(theta, mean / theta))
