import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from pyrosc import VAE
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Encoder
from pyrosc.nn.priors import Flat, Mixture, PseudoCells, StandardNormal, VampPrior


@pytest.fixture
def cells(data):
    return data.on("cpu").cells(torch.arange(5))


def test_standard_normal_of_each_cell(cells):
    p = StandardNormal(3)(cells)
    assert (p.batch_shape, p.event_shape) == ((5,), (3,))
    assert torch.equal(p.base_dist.loc, torch.zeros(5, 3))
    assert torch.equal(p.base_dist.scale, torch.ones(5, 3))
    assert not list(StandardNormal(3).parameters())


def test_a_flat_prior_says_nothing(cells):
    p = Flat(3)(cells)
    assert (p.batch_shape, p.event_shape) == ((5,), (3,))
    assert torch.equal(p.log_prob(torch.randn(2, 5, 3)), torch.zeros(2, 5))


def mixture_log_density(prior, z):
    """By scipy, each component's log pi N(z), (cells, components)."""
    pi = torch.softmax(prior.logits, -1).detach().double().numpy()
    loc, log_scale = (p.detach().double().numpy() for p in (prior.paced_loc, prior.log_scale))
    normals = stats.norm(prior.PACE * loc, np.exp(log_scale)).logpdf(z.double().numpy()[:, None]).sum(-1)
    return np.log(pi) + normals


@pytest.mark.parametrize("proportions", ["uniform", "learned", (1.0, 5.0, 2.0)])
def test_a_mixture_against_scipy(cells, proportions):
    torch.manual_seed(0)
    prior = Mixture(3, 2, proportions)
    prior.log_scale.data.normal_()
    if proportions == "learned":
        prior.logits.data.normal_()
    z = torch.randn(5, 2)
    expected = mixture_log_density(prior, z)
    p = prior(cells)
    assert (p.batch_shape, p.event_shape) == ((5,), (2,))
    np.testing.assert_allclose(p.log_prob(z).detach(), logsumexp(expected, 1), rtol=1e-5)
    expected = np.exp(expected - logsumexp(expected, 1, keepdims=True))
    np.testing.assert_allclose(prior.responsibilities(z).detach(), expected, rtol=1e-4, atol=1e-6)
    assert isinstance(prior.logits, torch.nn.Parameter) == (proportions == "learned")
    assert prior.responsibilities(z.expand(4, 5, 2)).shape == (4, 5, 3)


def test_a_mixture_starts_at_the_centres_of_clusters():
    """Of codes in three far places: on the scale on which all codes have mean 0 and sd 1."""
    torch.manual_seed(0)
    places = torch.tensor([[9.0, 0.0], [5.0, 4.0], [5.0, -4.0]])
    codes = places.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    prior = Mixture(3, 2)
    prior.start_at(codes)
    sd = (codes - codes.mean(0)).std()
    found = (prior.PACE * prior.paced_loc).detach() * sd + codes.mean(0)
    distance, place = torch.cdist(places, found).min(1)
    assert sorted(place.tolist()) == [0, 1, 2]
    assert distance.max() < 0.2
    assert isinstance(prior.paced_loc, torch.nn.Parameter)


def test_codes_that_do_not_differ_move_no_mixture():
    prior = Mixture(3, 2)
    before = prior.paced_loc.clone()
    prior.start_at(torch.full((10, 2), 3.0))
    assert (prior.paced_loc == before).all()


@pytest.mark.parametrize("proportions", ["equal", (1.0, 2.0), (1.0, 0.0, 2.0), (1.0, float("nan"), 2.0)])
def test_proportions_are_named_or_numbers(proportions):
    with pytest.raises(ValueError, match='"uniform", "learned" or 3 numbers above 0'):
        Mixture(3, 2, proportions)


def test_a_vamp_prior_is_the_mean_of_the_guides_posteriors(cells, data):
    torch.manual_seed(0)
    encoder = Encoder(data.n_genes, 2, Covariates(), (8,), norm="layer", dropout=0.0)
    start = torch.as_tensor(data.x[[3, 7, 9, 9]].toarray())
    prior = VampPrior(encoder, PseudoCells(start, encoder))
    torch.testing.assert_close(prior.pseudo(cells).x, start + 0.01, rtol=1e-4, atol=1e-5)
    z = torch.randn(5, 2)
    q = encoder(prior.pseudo(cells)).to_event(1)
    each = torch.stack([q.log_prob(v) for v in z])
    torch.testing.assert_close(prior(cells).log_prob(z), each.logsumexp(1) - np.log(4))
    weights = torch.eye(4)[[0, 0, 1, 2, 3]]
    torch.testing.assert_close(prior.pseudo(cells, weights).x[4], prior.pseudo(cells).x[3])


def test_pseudo_cells_take_no_batch_normalisation(data):
    with pytest.raises(ValueError, match='norm="layer" or None'):
        VAE.for_data(data, prior="vamp")


def test_an_unknown_prior_is_told_the_known_ones(data):
    with pytest.raises(ValueError, match='"normal", "mixture" or "vamp"'):
        VAE.for_data(data, prior="gauss")
