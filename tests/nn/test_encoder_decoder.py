import numpy as np
import pytest
import torch
from torch import nn

import pyrosc
from pyrosc.nn.covariates import Covariates, beside
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.layers import MLP, BatchNorm, _normalisation


def cells_of(data, n=6):
    return data.on("cpu").cells(torch.arange(n))


# --- normalisation


@pytest.mark.parametrize("model", [pyrosc.VAE, pyrosc.GaussianVAE, pyrosc.DCA, pyrosc.SCVIS, pyrosc.TOTALVI])
@pytest.mark.parametrize("hidden", [(0,), (8, -1)])
def test_widths_are_a_tuple_of_whole_numbers(model, hidden, data):
    with pytest.raises(ValueError, match=r"hidden must be a tuple of whole numbers .* such as \(128,\), not"):
        model.for_data(data, hidden=hidden)


@pytest.mark.parametrize("n_latent", [0, -1])
def test_a_latent_has_a_width(n_latent, data):
    with pytest.raises(ValueError, match="n_latent must be a whole number of at least 1"):
        pyrosc.VAE.for_data(data, n_latent=n_latent)
    with pytest.raises(ValueError, match="n_components must be a whole number of at least 1"):
        pyrosc.GMVAE.for_data(data, n_components=n_latent)


def test_batch_norm_over_draws_and_cells_is_that_of_their_rows():
    ours, torchs = BatchNorm(3), nn.BatchNorm1d(3)
    h = torch.arange(24.0).view(2, 4, 3).sin()
    torch.testing.assert_close(ours(h), torchs(h.view(8, 3)).view(2, 4, 3))
    torch.testing.assert_close(ours.norm.running_mean, torchs.running_mean)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(h), torchs(h.view(8, 3)).view(2, 4, 3))


def test_batch_norm_of_a_single_row_uses_the_running_moments():
    norm = BatchNorm(3)
    norm(torch.arange(12.0).view(4, 3))
    row = torch.tensor([[1.0, 2.0, 3.0]])
    moments = norm.norm.running_mean.clone()
    trained = norm(row)
    torch.testing.assert_close(norm.norm.running_mean, moments)
    torch.testing.assert_close(trained, norm.eval()(row))
    assert trained.abs().sum() > 0


def test_normalisation_by_name():
    assert isinstance(_normalisation("layer", 3), nn.LayerNorm)
    assert isinstance(_normalisation("batch", 3), BatchNorm)
    assert isinstance(_normalisation(None, 3), nn.Identity)
    with pytest.raises(ValueError, match=r'"layer", "batch" or None.*group'):
        _normalisation("group", 3)


# --- MLP


def test_mlp_widths_and_parts():
    mlp = MLP(5, (4, 3), norm="layer", dropout=0.2)
    kinds = [type(layer).__name__ for layer in mlp]
    assert kinds == ["Linear", "LayerNorm", "ReLU", "Dropout"] * 2
    assert mlp.n_out == 3
    assert mlp(torch.zeros(2, 7, 5)).shape == (2, 7, 3)
    assert not any(isinstance(layer, nn.Dropout) for layer in MLP(5, (4,), dropout=0.0))


def test_mlp_without_layers_is_the_identity():
    mlp = MLP(5, ())
    x = torch.randn(2, 5)
    assert mlp.n_out == 5
    assert torch.equal(mlp(x), x)


# --- covariates


def test_covariates_are_one_hot_and_standardised(rich):
    covariates = Covariates.for_data(rich)
    row = covariates(cells_of(rich, 200))
    assert row.shape == (200, covariates.n_out) == (200, 2 + 3 + 1)
    np.testing.assert_array_equal(row[:, 4:], np.eye(2)[rich.batch])
    np.testing.assert_array_equal(row[:, 1:4], np.eye(3)[rich.categorical[:, 0]])
    depth = rich.continuous[:, 0]
    np.testing.assert_allclose(row[:, 0], (depth - depth.mean()) / depth.std(), rtol=1e-4, atol=1e-5)


def test_covariates_with_one_category_take_no_place(data):
    assert Covariates(1)(cells_of(data)).shape == (6, 0)
    assert Covariates(1, [], [], []).n_out == 0


def test_a_constant_covariate_gives_zeros(rich):
    rich = rich[np.zeros(3, dtype=int)]
    row = Covariates.for_data(rich)(cells_of(rich, 3))
    assert torch.equal(row[:, 0], torch.zeros(3))


def test_moments_go_with_the_state(rich):
    covariates = Covariates.for_data(rich)
    other = Covariates(2, [3], [0.0], [1.0])
    other.load_state_dict(covariates.state_dict())
    torch.testing.assert_close(other(cells_of(rich)), covariates(cells_of(rich)))


def test_beside_broadcasts_over_draws():
    h, c = torch.randn(4, 5, 3), torch.randn(5, 2)
    both = beside(h, c)
    assert both.shape == (4, 5, 5)
    assert torch.equal(both[2, :, 3:], c)
    assert beside(h, torch.empty(5, 0)) is h


# --- encoder and decoder


def test_encoder_gives_a_normal_of_each_cell(rich):
    encoder = Encoder(40, 3, Covariates.for_data(rich), (8,))
    q = encoder(cells_of(rich))
    assert q.loc.shape == q.scale.shape == (6, 3)
    assert (q.scale > 0).all()


def test_encoder_sees_its_covariates_and_only_those(rich):
    cells = cells_of(rich)
    for covariates, sees in ((Covariates.for_data(rich), True), (Covariates(), False)):
        encoder = Encoder(40, 3, covariates, (8,), norm=None, dropout=0.0)
        same = torch.equal(encoder(cells.in_batch(0)).loc, encoder(cells.in_batch(1)).loc)
        assert same is not sees


def test_encoder_scale_stays_positive_and_finite(data):
    encoder = Encoder(40, 3, Covariates(), (8,), norm=None)
    for bias in (-1e6, 1e6):
        encoder.moments.bias.data.chunk(2)[1].fill_(bias)
        scale = encoder(cells_of(data)).scale
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


@pytest.mark.parametrize("draws", [(), (1,), (3,), (2, 3)])
def test_decoder_broadcasts_over_draws_and_its_shares_sum_to_one(rich, draws):
    decoder = Decoder(2, 40, Covariates.for_data(rich), (8,)).eval()
    cells = cells_of(rich)
    z = torch.randn(*draws, 6, 2)
    h, rho = decoder(z, cells)
    assert h.shape == (*draws, 6, decoder.n_out)
    assert rho.shape == (*draws, 6, 40)
    torch.testing.assert_close(rho.sum(-1), torch.ones(*draws, 6))
    if draws:
        first = (0,) * len(draws)
        torch.testing.assert_close(decoder(z[first], cells)[1], rho[first])


def test_decoder_starts_at_the_shares(data):
    decoder = Decoder(2, 40, Covariates.for_data(data), (8,))
    share = torch.as_tensor(data.share)
    decoder.start_at(share)
    nn.init.zeros_(decoder.logits.weight)
    _, rho = decoder(torch.randn(6, 2), cells_of(data))
    torch.testing.assert_close(rho, share.float().expand(6, -1), rtol=1e-4, atol=1e-7)


def test_decoder_depends_on_the_batch(data):
    decoder, cells = Decoder(2, 40, Covariates.for_data(data), (8,), norm=None), cells_of(data)
    z = torch.randn(6, 2)
    assert not torch.allclose(decoder(z, cells.in_batch(0))[1], decoder(z, cells.in_batch(1))[1])
