import numpy as np
import torch

from pyrosc.nn.neighbours import divergence, similarities


def test_similarities_have_the_perplexity():
    torch.manual_seed(0)
    t = torch.randn(60, 5) * torch.linspace(0.1, 10, 60)[:, None]
    p = similarities(t, 10.0).double().numpy()
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert (np.diag(p) == 0).all()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    np.testing.assert_allclose(np.exp(entropy), 10, rtol=1e-3)
    assert similarities(t[:1], 10.0).shape == (1, 1)
    few = similarities(t[:4], 10.0).double().numpy()  # of three others at most
    assert np.exp(-(few * np.log(np.maximum(few, 1e-300))).sum(1)).max() <= 3.001


def test_divergence_by_hand():
    torch.manual_seed(0)
    p, z = similarities(torch.randn(7, 3), 3.0), torch.randn(2, 7, 2)
    for z_, found in zip(z.double().numpy(), divergence(p, z), strict=True):
        q = 1 / (1 + ((z_[:, None] - z_[None]) ** 2).sum(-1))
        np.fill_diagonal(q, 0)
        q /= q.sum(1, keepdims=True)
        p_ = p.double().numpy()
        other = ~np.eye(7, dtype=bool)
        by_hand = np.where(other, p_ * np.log(np.maximum(p_, 1e-12) / np.where(other, q, 1)), 0).sum(1)
        np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)
    close = torch.zeros(1, 7, 2, requires_grad=True)
    divergence(p, close).sum().backward()
    assert torch.isfinite(close.grad).all()
