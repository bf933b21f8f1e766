"""Linear maps in bfloat16: what is rounded, and what is not."""

import pytest
import torch
from torch import nn

from pyrosc import VAE, fit_svi
from pyrosc.engine.bfloat16 import LinearInBfloat16


def rounded(t):
    return t.to(torch.bfloat16).double()


@pytest.mark.parametrize("bias", [True, False])
def test_factors_and_product_are_rounded_once_each_and_the_offset_is_not(bias):
    torch.manual_seed(0)
    layer, h = nn.Linear(64, 300, bias=bias), torch.randn(5, 40, 64)
    exact = rounded(h) @ rounded(layer.weight).T
    with LinearInBfloat16():
        found = layer(h)
    assert found.dtype == torch.float32
    assert not torch.allclose(found, layer(h), rtol=1e-4)
    offset = layer.bias.double() if bias else 0.0
    # One rounding to eight binary digits, 2^-9 of the product; sums of products by blocks lose a little more.
    error = (found.double() - offset - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-5).all()


def test_gradients_are_float32_and_those_of_the_rounded_map():
    torch.manual_seed(0)
    layer, h = nn.Linear(30, 20), torch.randn(50, 30, requires_grad=True)
    slope = torch.randn(50, 20)
    with LinearInBfloat16():
        by_h, by_weight, by_bias = torch.autograd.grad(layer(h), [h, layer.weight, layer.bias], slope)
    assert {t.dtype for t in (by_h, by_weight, by_bias)} == {torch.float32}
    torch.testing.assert_close(by_bias, slope.sum(0))
    exact = rounded(slope).T @ rounded(h.detach())
    assert float((by_weight - exact).abs().max()) < 2**-7 * float(exact.abs().max())


def test_other_operations_and_other_precisions_are_left_alone():
    a = torch.randn(8, 8)
    layer = nn.Linear(8, 3).double()
    expected = [a @ a, layer(a.double())]
    with LinearInBfloat16():
        found = [a @ a, layer(a.double())]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_fit_takes_it_for_training_only(data):
    settings = {"epochs": 3, "minibatch_size": 60, "progress": False}
    exact, coarse = (
        fit_svi(VAE.for_data(data, n_latent=3, hidden=(16,)), data, precision=p, **settings)
        for p in ("float32", "bfloat16")
    )
    assert coarse.settings["precision"] == "bfloat16"
    assert {p.dtype for p in coarse.program.parameters()} == {torch.float32}
    losses = exact.history.validation.iloc[-1], coarse.history.validation.iloc[-1]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
