import numpy as np
import pytest
import torch

from pyrosc.nn.transforms import LogNormalised, PearsonResiduals, RawCounts, transform_of


@pytest.fixture
def cells(data):
    return data.on("cpu").cells(torch.arange(data.n_cells))


def test_logs_are_standardised_at_the_median_total(data, cells):
    x, l = data.x.toarray().astype(float), data.library
    log = np.log1p(x / l[:, None] * np.median(l))
    expected = (log - log.mean(0)) / log.std(0)
    t = LogNormalised.for_data(data)(cells)
    np.testing.assert_allclose(t, expected, rtol=1e-3, atol=1e-4)


def test_pearson_residuals_by_the_formula(data, cells):
    x = data.x.toarray().astype(float)
    mu = data.library[:, None] * data.share
    expected = (x - mu) / np.sqrt(mu + mu**2 / 100)
    limit = np.sqrt(data.n_cells)
    t = PearsonResiduals.for_data(data)(cells)
    np.testing.assert_allclose(t, expected.clip(-limit, limit), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["log", "pearson", "raw"])
def test_shares_undo_the_transform(name, data, cells):
    transform = transform_of(name, data)
    share = transform.share(transform(cells), cells)
    expected = cells.x / cells.library
    kept = (cells.x > 0) if name == "log" else torch.ones_like(cells.x, dtype=torch.bool)
    clipped = (transform(cells).abs() >= data.n_cells**0.5 - 1e-3).any(1) if name == "pearson" else None
    kept = kept if clipped is None else kept & ~clipped[:, None]
    torch.testing.assert_close(share[kept], expected[kept], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(share.sum(1), torch.ones(len(cells)))


def test_values_below_zero_are_no_negative_shares(cells):
    share = RawCounts().share(torch.tensor([[1.0, -2.0, 3.0]]), cells)
    assert (share > 0).all()
    torch.testing.assert_close(share[0, 2], torch.tensor(0.75), rtol=1e-4, atol=0)


def test_a_gene_that_does_not_vary_is_left_at_zero(data):
    few = data[np.zeros(3, int)]
    cells = few.on("cpu").cells(torch.arange(3))
    assert torch.isfinite(LogNormalised.for_data(few)(cells)).all()


def test_an_unknown_transform_is_told_the_known_ones(data):
    with pytest.raises(ValueError, match='"log", "pearson" or "raw"'):
        transform_of("sqrt", data)
