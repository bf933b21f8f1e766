"""Shares and densities as one loop: the values and slopes of autograd in float64, in both of its forms."""

import numpy as np
import pytest
import torch
from test_count_density import ALL, MANY

from pyrosc.distributions.counts import NegativeBinomial, Poisson, ZeroInflated
from pyrosc.engine.cpu.softmax_density import softmax_density, softmax_density_backward
from pyrosc.engine.cpu.weighted_softmax_density import weighted_softmax_density_


def example(rows, n_genes, likelihood, spread=2.0, seed=0, kept=False):
    """Logits, gate, each with a bias, total, x, theta, which genes are kept and weight of rows."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, spread, (rows, n_genes))
    x = draw.poisson(draw.gamma(0.3, 3, (rows, n_genes)))
    total = (x.sum(1, keepdims=True) + 1) * draw.lognormal(0, 0.3, (rows, 1))
    theta = draw.lognormal(0, 2, (1, n_genes)) if "nb" in likelihood else None
    gate = draw.normal(0, 3, (rows, n_genes)) if "z" in likelihood else None
    weight = draw.normal(0, 1, rows)
    bias = draw.normal(0, 1, n_genes)
    gate_bias = None if gate is None else draw.normal(0, 1, n_genes)
    kept = (draw.random((1, n_genes)) < 0.7) if kept else None
    x = x if kept is None else x * kept
    numbers = (logits, bias, gate, gate_bias, total, x, theta, kept, weight)
    return [None if n is None else torch.tensor(n, dtype=torch.float32) for n in numbers]


def by_torch(logits, bias, gate, gate_bias, total, x, theta, kept, weight):
    """Log p and slopes of its weighted sum by autograd, float64, in the order of arguments."""
    given = (logits, bias, gate, gate_bias, theta, total)
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    logits, bias, gate, gate_bias, theta, total = leaves
    mean = total * (logits if bias is None else logits + bias).softmax(-1)
    d = Poisson(mean) if theta is None else NegativeBinomial(mean, theta)
    if gate is not None:
        d = ZeroInflated(d, gate if gate_bias is None else gate + gate_bias)
    log_p = d.log_prob(x.double())
    log_p = (log_p if kept is None else log_p * kept).sum(-1)
    wanted = [leaf for leaf in leaves if leaf is not None]
    slopes = iter(torch.autograd.grad((log_p * weight.double()).sum(), wanted))
    return [log_p.detach(), *(None if leaf is None else next(slopes) for leaf in leaves)]


def at_once(logits, bias, gate, gate_bias, *others):
    """The same by the loop that knows the weights."""
    logits, gate = logits.clone(), None if gate is None else gate.clone()
    theta = others[2]
    log_p, d_bias, d_gate_bias, d_theta, d_total = weighted_softmax_density_(
        logits, bias, gate, gate_bias, *others
    )
    found = {"bias": (bias, d_bias), "gate_bias": (gate_bias, d_gate_bias), "theta": (theta, d_theta)}
    d_bias, d_gate_bias, d_theta = (None if t is None else slope.view(t.shape) for t, slope in found.values())
    return [log_p, logits, d_bias, gate, d_gate_bias, d_theta, d_total]


def there_and_back(logits, bias, gate, gate_bias, total, x, theta, kept, weight):
    """The same by the loop that does not, and its backward."""
    logits = logits if bias is None else logits + bias
    gate = gate if gate_bias is None else gate + gate_bias
    wanted = [True, theta is not None, gate is not None]
    log_p, *slopes = softmax_density(logits, total, x, theta, gate, kept, wanted)
    d_logits, d_total, d_theta, d_gate = softmax_density_backward(weight, *slopes, [False, True, False])
    d_bias, d_gate_bias = d_logits.sum(0), d_gate.sum(0)
    none = lambda slope, t: None if t is None else slope
    parts = (
        d_logits,
        none(d_bias, bias),
        none(d_gate, gate),
        none(d_gate_bias, gate_bias),
        none(d_theta, theta),
    )
    return [log_p, *parts, d_total]


WAYS = pytest.mark.parametrize("way", [at_once, there_and_back], ids=lambda way: way.__name__)


def assert_close(found, true, x, rtol=3e-6):
    """To `rtol` of the largest, or of the counts: slopes in logits are differences of such numbers."""
    assert [t is None for t in found] == [t is None for t in true]
    for a, b in zip(found, true, strict=True):
        if a is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=0, atol=rtol * float(max(b.abs().max(), x.max())))


@pytest.mark.parametrize("n_genes", [1, 7, 512, 1300])
@pytest.mark.parametrize("rows", [1, 16, 37])
@ALL
@WAYS
def test_the_loop_has_the_values_and_slopes_of_autograd_in_float64(way, rows, n_genes, name):
    arguments = example(rows, n_genes, name)
    assert_close(way(*arguments), by_torch(*arguments), x=arguments[5])


@ALL
@WAYS
def test_without_a_bias(way, name):
    arguments = example(20, 600, name)
    arguments[1] = arguments[3] = None
    assert_close(way(*arguments), by_torch(*arguments), x=arguments[5])


@ALL
@WAYS
def test_genes_left_out_have_a_share_and_no_density(way, name):
    arguments = example(20, 600, name, kept=True)
    assert_close(way(*arguments), by_torch(*arguments), x=arguments[5])
    whole = way(*arguments[:7], None, arguments[8])
    assert not torch.allclose(way(*arguments)[0], whole[0])


@ALL
@WAYS
def test_logits_far_apart_are_no_trouble(way, name):
    """Shares down to e^-60. (Below e^-87 they are that.)"""
    arguments = example(20, 600, name, spread=8.0)
    arguments[0] += 1000.0 * torch.arange(20)[:, None]
    arguments[1] = None  # or the sum is rounded as the logits are not
    assert_close(way(*arguments), by_torch(*arguments), x=arguments[5])


@ALL
@WAYS
def test_a_total_of_nothing_has_its_slopes(way, name):
    """A mean of 0 in a cell without counts: log p is 0, or that of a dropout, and every slope a number."""
    arguments = example(5, 40, name)
    arguments[4][1], arguments[5][1] = 0, 0
    assert_close(way(*arguments), by_torch(*arguments), x=arguments[5])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@WAYS
def test_logits_that_are_no_numbers_are_not_hidden(way, value):
    arguments = example(4, 40, "nb")
    arguments[0][1, 3] = value
    log_p, *_ = way(*arguments)
    assert torch.isfinite(log_p).tolist() == [True, False, True, True]


@WAYS
def test_the_number_of_threads_changes_no_bit(way):
    arguments = example(100, 700, "zinb")
    assert arguments[0].numel() > MANY
    found = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(way(*arguments))
    finally:
        torch.set_num_threads(threads)
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        if way is there_and_back and i in (2, 4, 5):  # sums over rows are torch's own
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
        else:
            assert torch.equal(a, b)


@ALL
def test_arguments_are_read_and_not_written(name):
    arguments = example(5, 600, name)
    logits, _, gate, _, total, x, theta, kept, _ = arguments
    before = [None if t is None else t.clone() for t in arguments]
    wanted = [True, theta is not None, gate is not None]
    softmax_density(logits, total, x, theta, gate, kept, wanted)
    for a, b in zip(arguments, before, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@ALL
def test_slopes_that_nobody_wants_are_empty(name):
    logits, _, gate, _, total, x, theta, kept, _ = example(5, 600, name)
    all_ = softmax_density(logits, total, x, theta, gate, kept, [True, theta is not None, gate is not None])
    for wanted in ([False] * 3, [True, False, False], [False, theta is not None, False]):
        log_p, d_logits, d_total, d_theta, d_gate = softmax_density(
            logits, total, x, theta, gate, kept, wanted
        )
        assert torch.equal(log_p, all_[0])
        assert torch.equal(d_total, all_[2])
        for want, some, whole in zip(wanted, (d_logits, d_theta, d_gate), (all_[1], *all_[3:]), strict=True):
            assert torch.equal(some, whole) if want else some.shape == (0, 600)
        back = softmax_density_backward(torch.ones(5), d_logits, d_total, d_theta, d_gate, [False] * 3)
        assert [len(part) for part in back] == [5 * wanted[0], 5, 5 * wanted[1], 5 * wanted[2]]
