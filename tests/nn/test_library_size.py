from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyrosc.nn.covariates import Covariates
from pyrosc.nn.library_size import LatentLibrary, LibraryEncoder, ObservedLibrary, library_of


def cells_of(data, n=6):
    return data.on("cpu").cells(torch.arange(n))


def test_the_observed_library_is_the_total(data):
    p = ObservedLibrary()(cells_of(data))
    assert isinstance(p, dist.Delta)
    np.testing.assert_array_equal(p.v[:, 0], data.library[:6])


def test_an_empty_cell_has_a_library_of_one(data):
    cells = cells_of(data)
    x = cells.x.clone()
    x[2] = 0
    cells = replace(cells, x=x)
    assert ObservedLibrary()(cells).v[2] == 1
    q = LibraryEncoder(lambda cells: dist.Normal(torch.zeros(6, 1), torch.ones(6, 1)))(cells)
    assert q.base_dist.loc[2] == 0


def test_the_latent_library_has_the_moments_of_each_batch(data):
    p = LatentLibrary.for_data(data)
    for b in range(2):
        log = np.log(data.library[data.batch == b])
        np.testing.assert_allclose(p.log_mean[b], log.mean(), rtol=1e-5)
        np.testing.assert_allclose(p.log_sd[b], log.std(), rtol=1e-4)
    q = p(cells_of(data))
    assert isinstance(q, dist.LogNormal)
    assert q.batch_shape == (6, 1)
    np.testing.assert_allclose(q.loc[:, 0], p.log_mean.numpy()[data.batch[:6]])
    np.testing.assert_allclose(q.scale[:, 0], p.log_sd.numpy()[data.batch[:6]])


def test_cells_all_alike_leave_a_spread_that_is_not_zero(data):
    p = LatentLibrary.for_data(data[np.array([0, 0])][np.array([0, 1])])
    assert torch.isfinite(p.log_sd[data.batch[0]])
    assert p.log_sd[data.batch[0]] > 0


def test_a_batch_without_cells_does_not_break_the_others(data):
    only = data[np.flatnonzero(data.batch == 0)]
    p = LatentLibrary.for_data(only)
    assert torch.isfinite(p.log_mean).all()
    assert torch.isfinite(p.log_sd).all()
    assert (p.log_sd > 0).all()


def test_the_guide_of_the_library_corrects_the_total(data):
    encoder = lambda cells: dist.Normal(torch.full((6, 1), 0.3), torch.full((6, 1), 0.2))
    q = LibraryEncoder(encoder)(cells_of(data))
    np.testing.assert_allclose(q.loc[:, 0], np.log(data.library[:6]) + 0.3, rtol=1e-5)
    np.testing.assert_allclose(q.scale, np.full((6, 1), 0.2), rtol=1e-5)


def test_library_by_name(data):
    parts = {"norm": "batch", "dropout": 0.1}
    p, q = library_of("observed", data, Covariates(), (8,), **parts)
    assert isinstance(p, ObservedLibrary)
    assert isinstance(q, ObservedLibrary)
    p, q = library_of("latent", data, Covariates(), (8,), **parts)
    assert isinstance(p, LatentLibrary)
    assert q(cells_of(data)).batch_shape == (6, 1)
    with pytest.raises(ValueError, match=r'"observed" or "latent".*free'):
        library_of("free", data, Covariates(), (8,), **parts)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_the_guide_of_the_library_starts_near_the_total(data, hidden):
    _, encoder = library_of("latent", data, Covariates.for_data(data), hidden, norm="batch", dropout=0.1)
    q = encoder(cells_of(data))
    np.testing.assert_allclose(q.loc[:, 0].detach(), np.log(data.library[:6]), atol=0.05)
    torch.testing.assert_close(q.scale, torch.full((6, 1), 0.1), rtol=0.05, atol=0)
