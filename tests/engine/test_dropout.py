"""Dropout: what it keeps of the mean, how many it drops, and that no two units share their fate."""

import pytest
import torch

from pyrosc.engine.cpu import dropout
from pyrosc.nn import layers
from pyrosc.nn.layers import Dropout


@pytest.fixture(params=[True, False], ids=["loop", "torch"], autouse=True)
def loop(request, monkeypatch):
    """Where numba is, and where it is not: there torch draws all numbers."""
    if not request.param:
        monkeypatch.setattr(layers, "kernels", lambda: None)
    return request.param


def dropped(probability, *shape, seed=0):
    """Ones after dropout in training."""
    layer = Dropout(probability).train()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return layer(torch.ones(*shape))


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_the_mean_stays_and_the_share_is_as_asked(probability):
    n = 400_000
    out = dropped(probability, n // 40, 40)
    error = (probability * (1 - probability) / n) ** 0.5
    assert float((out == 0).float().mean()) == pytest.approx(probability, abs=5 * error + 2**-16)
    assert float(out.double().mean()) == pytest.approx(1, abs=5 * error / (1 - probability) + 2**-16)


def test_the_loop_runs_where_it_can(loop, monkeypatch):
    calls, original = [], dropout._keep
    monkeypatch.setattr(dropout._keeps, "alone", lambda *a: calls.append(a) or original(*a))
    dropped(0.3, 5, 4)
    assert bool(calls) == loop


def test_bits_do_not_depend_on_the_threads():
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(dropped(0.3, 700, 128))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("lag", [1, 4, 512, 4096])
def test_units_some_way_apart_are_dropped_independently(lag):
    gone = (dropped(0.5, 1, 1 << 18)[0] == 0).double()
    pair = torch.stack([gone[:-lag], gone[lag:]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 2**9


def test_what_is_kept_is_scaled_up_by_the_share_that_is():
    out = dropped(0.25, 1000, 10)
    kept = out[out != 0]
    assert len(kept) < out.numel()
    torch.testing.assert_close(kept, torch.full_like(kept, 4 / 3))


def test_a_mean_stays_to_the_last_digit_where_the_probability_is_rounded():
    """Else the scale would be that of the probability asked for, not of the one that is."""
    layer = Dropout(0.3)
    share = layer.dropped / 2**16
    assert share != 0.3
    out = dropped(0.3, 64, 64)
    assert float(out.max()) == pytest.approx(1 / (1 - share), rel=1e-6)


@pytest.mark.parametrize("place", range(4))
def test_each_of_the_four_units_of_a_random_number_is_dropped_as_often(place):
    out = dropped(0.1, 100_000, 4)[:, place]
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=5 * (0.09 / 100_000) ** 0.5)


def test_units_of_a_random_number_are_dropped_independently():
    gone = (dropped(0.5, 100_000, 4) == 0).double()
    correlation = torch.corrcoef(gone.T)
    torch.testing.assert_close(correlation, torch.eye(4, dtype=torch.float64), rtol=0, atol=5 / 100_000**0.5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 1), (7, 3), (2, 3, 5), (0, 4)])
def test_sizes_need_not_be_multiples_of_four(shape):
    out = dropped(0.5, *shape)
    assert out.shape == shape
    assert set(out.flatten().tolist()) <= {0.0, 2.0}


def test_the_last_of_an_odd_number_is_dropped_too():
    last = torch.stack([dropped(0.5, 1, 5, seed=i)[0, -1] for i in range(40)])
    assert 0 < int((last == 0).sum()) < 40


def test_calls_are_independent_and_a_seed_repeats_them():
    layer, ones = Dropout(0.5).train(), torch.ones(400, 10)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        first, second = layer(ones), layer(ones)
        torch.manual_seed(3)
        again = layer(ones)
    assert torch.equal(first, again)
    assert float((first == second).float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_input_is_returned_as_it_is_in_evaluation_and_where_none_is_dropped(probability, untouched):
    layer = Dropout(probability)
    h = torch.randn(5, 3)
    with untouched():
        assert layer.eval()(h) is h
        if not probability:
            assert layer.train()(h) is h


def test_the_gradient_is_that_of_the_scaling():
    layer, h = Dropout(0.5).train(), torch.ones(30, 7, requires_grad=True)
    out = layer(h)
    (gradient,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(gradient, out.detach())


def test_the_dtype_stays():
    assert Dropout(0.5).train()(torch.ones(8, 1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("probability", [1.0, 1.5, -0.1, float("nan")])
def test_what_is_no_probability_below_one_is_refused(probability):
    with pytest.raises(ValueError, match="dropout is a probability"):
        Dropout(probability)
