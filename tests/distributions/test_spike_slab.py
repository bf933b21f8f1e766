import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import integrate, stats
from torch.distributions import kl_divergence

from pyrosc.distributions.spike_slab import SpikeSlab
from pyrosc.engine.trace import traced

Q = (torch.tensor([0.5, -2.0, 0.0]), torch.tensor([0.3, 1.5, 1.0]), torch.tensor([2.0, -1.0, 0.0]))
P = (torch.tensor(0.0), torch.tensor(1.0), torch.tensor(-1.4))


def test_the_density_is_a_point_mass_and_a_normal():
    q = SpikeSlab(*Q)
    gamma = 1 / (1 + np.exp(-Q[2].double().numpy()))
    np.testing.assert_allclose(q.log_prob(torch.zeros(3)), np.log1p(-gamma), rtol=1e-5)
    z = torch.tensor([0.7, -1.0, 1e-20])
    expected = np.log(gamma) + stats.norm(Q[0], Q[1]).logpdf(z)
    np.testing.assert_allclose(q.log_prob(z), expected, rtol=1e-5)
    for i in range(3):
        slab = lambda v, i=i: np.exp(SpikeSlab(*(p[i] for p in Q)).log_prob(torch.tensor(v)).item())
        mass, _ = integrate.quad(slab, -30, 30, points=[float(Q[0][i])])
        assert mass + 1 - gamma[i] == pytest.approx(1, abs=1e-5)


def test_draws_have_the_moments_and_exact_zeros():
    torch.manual_seed(0)
    q = SpikeSlab(*Q)
    z = q.sample((200_000,))
    torch.testing.assert_close((z != 0).float().mean(0), q.inclusion, atol=0.005, rtol=0)
    torch.testing.assert_close(z.mean(0), q.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(z.var(0), q.variance, atol=0.03, rtol=0)


def test_relaxed_draws_come_close_to_exact_ones_and_have_gradients():
    torch.manual_seed(0)
    parameters = [p.clone().requires_grad_() for p in Q]
    q = SpikeSlab(*parameters)
    sharp = q.relaxed(torch.tensor(1e4)).rsample((100_000,))
    torch.testing.assert_close(sharp.mean(0), q.mean, atol=0.02, rtol=0)
    assert ((sharp.abs() < 1e-6).float().mean(0) - (1 - q.inclusion)).abs().max() < 0.01
    # The mean's gradient: of gamma mu in gamma's logit, gamma (1 - gamma) mu; in mu, gamma.
    q.relaxed(torch.tensor(50.0)).rsample((400_000,)).mean(0).sum().backward()
    torch.testing.assert_close(parameters[0].grad, q.inclusion, atol=0.02, rtol=0)
    gamma = q.inclusion.detach()
    torch.testing.assert_close(parameters[2].grad, gamma * (1 - gamma) * Q[0], atol=0.03, rtol=0)


def test_an_exact_draw_has_no_pathwise_gradient_in_its_logits():
    loc, scale, logits = (p.clone().requires_grad_() for p in Q)
    exact = SpikeSlab(loc, scale, logits)
    assert not exact.has_rsample
    assert not exact.expand((4, 3)).to_event(1).has_rsample
    assert not exact.sample().requires_grad
    with pytest.raises(NotImplementedError, match=r"sample\(\), or relaxed"):
        exact.rsample()
    assert exact.relaxed(torch.tensor(9.0)).has_rsample
    fixed = SpikeSlab(loc, scale, logits.detach())  # in the slab a draw is differentiable
    assert fixed.has_rsample
    assert fixed.rsample().requires_grad


def test_an_estimator_of_exact_draws_has_the_gradient_of_the_elbo():
    """By Trace_ELBO, for z from P and x given z from Normal(z, 1), against the ELBO in closed form."""
    loc, scale, logits = (torch.tensor(v, requires_grad=True) for v in (0.5, 0.3, 0.4))
    x, n = torch.tensor(1.5), 200_000

    def model():
        with pyro.plate("draws", n):
            z = pyro.sample("z", SpikeSlab(*P))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("draws", n):
            pyro.sample("z", SpikeSlab(loc, scale, logits))

    half = 0.5 * np.log(2 * np.pi)
    gamma = logits.sigmoid()
    on = -half - ((x - loc) ** 2 + scale**2) / 2  # E log p(x given z), z from the slab
    off = -half - x**2 / 2
    elbo = gamma * on + (1 - gamma) * off - kl_divergence(SpikeSlab(loc, scale, logits), SpikeSlab(*P))
    expected = torch.autograd.grad(elbo, (loc, scale, logits))
    torch.manual_seed(0)
    loss = Trace_ELBO().differentiable_loss(model, guide)
    found = torch.autograd.grad(-loss / n, (loc, scale, logits))
    # The terms that are averaged have sds of up to 5.
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=4 * 5 / n**0.5, rtol=0)


def test_the_kl_is_the_mean_log_ratio():
    torch.manual_seed(0)
    q, p = SpikeSlab(*Q), SpikeSlab(*P)
    z = q.sample((400_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    error = ratio.std(0) / len(z) ** 0.5
    assert ((kl_divergence(q, p) - ratio.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(3))


def test_the_kl_can_be_recorded():
    """No shape in it depends on numbers, as with torch's KL of Bernoulli distributions."""
    graph = traced(
        lambda *q: kl_divergence(SpikeSlab(*q, validate_args=False), SpikeSlab(*P, validate_args=False)), Q
    )
    assert not [node for node in graph.graph.nodes if "index" in str(node.target)]


def test_batches_expand():
    q = SpikeSlab(*Q).expand((4, 3))
    assert q.batch_shape == q.sample().shape == (4, 3)
    assert q.relaxed(torch.tensor(9.0)).expand((2, 4, 3)).rsample((5,)).shape == (5, 2, 4, 3)
    with pytest.raises(ValueError, match="scale"):
        SpikeSlab(torch.zeros(2), torch.tensor([1.0, -1.0]), torch.zeros(2), validate_args=True)
