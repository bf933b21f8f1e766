import pytest
import torch
from scipy import stats

from pyrosc import distributions
from pyrosc.nn.likelihoods import NegativeBinomial, Poisson, ZeroInflated, likelihood_of

MEAN = torch.tensor([[0.5, 2.0, 9.0], [1.0, 1.0, 4.0]])
H = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
BATCH = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "outer", "inner"),
    [
        ("poisson", distributions.Poisson, None),
        ("nb", distributions.NegativeBinomial, None),
        ("zip", distributions.ZeroInflated, distributions.Poisson),
        ("zinb", distributions.ZeroInflated, distributions.NegativeBinomial),
    ],
)
def test_each_name_gives_its_distribution(name, outer, inner):
    p = likelihood_of(name, n_genes=3, n_hidden=2)(H, BATCH, mean=MEAN)
    assert type(p) is outer
    assert inner is None or type(p.base) is inner
    assert p.batch_shape == (2, 3)
    assert p.event_shape == ()


@pytest.mark.parametrize("name", ["NB", "normal", "", "zinb "])
def test_an_unknown_name_is_told_the_known_ones(name):
    with pytest.raises(ValueError, match='"poisson", "nb", "zip" or "zinb"'):
        likelihood_of(name, n_genes=3, n_hidden=2)


def test_poisson_and_nb_against_scipy():
    x = torch.tensor([[0.0, 3.0, 7.0], [1.0, 0.0, 4.0]])
    expected = torch.as_tensor(stats.poisson.logpmf(x, MEAN)).float()
    torch.testing.assert_close(Poisson()(H, BATCH, mean=MEAN).log_prob(x), expected)
    nb = NegativeBinomial(3)
    nb.log_inverse_dispersion.data = torch.tensor([[-1.0, 0.0, 2.0]])
    theta = torch.tensor([-1.0, 0.0, 2.0]).exp()
    expected = torch.as_tensor(stats.nbinom.logpmf(x, theta, theta / (theta + MEAN))).float()
    torch.testing.assert_close(nb(H, BATCH, mean=MEAN).log_prob(x), expected)


def test_each_batch_has_inverse_dispersions_of_its_own():
    nb = likelihood_of("nb", n_genes=3, n_hidden=2, n_batches=2, dispersion="gene-batch")
    nb.log_inverse_dispersion.data = torch.tensor([[0.0, 1.0, 2.0], [-1.0, -2.0, -3.0]])
    for batch in (torch.tensor([0, 1]), torch.tensor([1, 1])):
        p = nb(H, batch, mean=MEAN)
        torch.testing.assert_close(p.inverse_dispersion, nb.log_inverse_dispersion.exp()[batch])
        # With draws in front
        p = nb(H.expand(4, 2, 2), batch, mean=MEAN.expand(4, 2, 3))
        torch.testing.assert_close(p.inverse_dispersion[3], nb.log_inverse_dispersion.exp()[batch])
    assert likelihood_of("nb", n_genes=3, n_hidden=2).log_inverse_dispersion.shape == (1, 3)


def test_the_gate_is_linear_in_the_features_and_wraps_any_base():
    zi = ZeroInflated(Poisson(), 2, 3)
    p = zi(H, BATCH, mean=MEAN)
    torch.testing.assert_close(p.gate_logits, H @ zi.gate_logits.weight.T + zi.gate_logits.bias)
    twice = ZeroInflated(zi, 2, 3)(H, BATCH, mean=MEAN)
    assert type(twice.base) is distributions.ZeroInflated


def test_gradients_reach_the_parameters():
    x = torch.tensor([[0.0, 3.0, 7.0], [1.0, 0.0, 4.0]])
    zinb = likelihood_of("zinb", n_genes=3, n_hidden=2, n_batches=2, dispersion="gene-batch")
    zinb(H, BATCH, mean=MEAN).log_prob(x).sum().backward()
    assert all((p.grad != 0).any() and torch.isfinite(p.grad).all() for p in zinb.parameters())


def test_a_linear_variance_against_scipy():
    x = torch.tensor([[0.0, 3.0, 7.0], [1.0, 0.0, 4.0]])
    nb = likelihood_of("nb", n_genes=3, n_hidden=2, dispersion="gene-linear")
    kappa = torch.tensor([0.5, 1.0, 4.0])
    nb.log_inverse_dispersion.data = kappa.log()
    p = nb(H, BATCH, mean=MEAN)
    torch.testing.assert_close(p.variance, MEAN * (1 + 1 / kappa))
    expected = torch.as_tensor(stats.nbinom.logpmf(x, MEAN * kappa, (kappa / (1 + kappa)).expand(2, 3)))
    torch.testing.assert_close(p.log_prob(x), expected.float())
    with pytest.raises(ValueError, match="gene-linear"):
        likelihood_of("nb", n_genes=3, n_hidden=2, dispersion="linear")


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-linear", "gene-cell"])
@pytest.mark.parametrize("name", ["poisson", "nb", "zip", "zinb"])
def test_what_a_decoder_emits_is_as_good_as_a_mean(name, dispersion):
    if name in ("poisson", "zip") and dispersion != "gene":
        return
    x = torch.tensor([[0.0, 3.0, 7.0], [1.0, 0.0, 4.0]])
    likelihood = likelihood_of(name, n_genes=3, n_hidden=2, n_batches=2, dispersion=dispersion)
    total = MEAN.sum(-1, keepdim=True)
    ours = likelihood(H, BATCH, logits=MEAN.log() + 5, total=total)
    theirs = likelihood(H, BATCH, mean=MEAN)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.to_event(1).log_prob(x), theirs.to_event(1).log_prob(x))
    with pytest.raises(ValueError, match="takes mean=, or logits= and total="):
        likelihood(H, BATCH, mean=MEAN, total=total)
