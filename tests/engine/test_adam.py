"""Adam against torch's own."""

import pairs
import pytest
import torch

from pyrosc.engine.adam import Adam

RATE, TAKEN, SKIPPED = torch.tensor(0.05), torch.tensor(0.0), torch.tensor(1.0)


def parameters():
    return [pairs.wave(3, 4, size=2.0), pairs.wave(5, phase=1.0), torch.tensor([0.7])]


def gradients(step):
    return [pairs.wave(*p.shape, phase=float(step + i), size=3.0) for i, p in enumerate(parameters())]


def state(optimiser):
    tensors = [*optimiser.parameters, *optimiser.mean, *optimiser.mean_square, *optimiser.steps]
    return [tensor.detach().clone() for tensor in tensors]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_steps_are_those_of_torch(decay):
    theirs = [p.requires_grad_() for p in parameters()]
    ours = [p.requires_grad_() for p in parameters()]
    reference = torch.optim.Adam(theirs, lr=0.05, weight_decay=decay, fused=True)
    optimiser = Adam(ours, decay)
    for step in range(20):
        rate = 0.05 / (1 + step)
        reference.param_groups[0]["lr"] = rate
        for p, gradient in zip(theirs, gradients(step), strict=True):
            p.grad = gradient
        reference.step()
        optimiser.step(gradients(step), torch.tensor(rate), TAKEN)
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert (a - start).abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_weight_decay_pulls_towards_zero():
    p = torch.full((3,), 2.0, requires_grad=True)
    optimiser = Adam([p], 0.1)
    for _ in range(20):
        optimiser.step([torch.zeros(3)], RATE / 5, TAKEN)
    assert (p < 2 - 0.1).all()


def test_a_parameter_without_a_gradient_stays_with_its_moments():
    optimiser = Adam([p.requires_grad_() for p in parameters()], 0.1)
    optimiser.step(gradients(0), RATE, TAKEN)
    before = state(optimiser)
    first, _, last = gradients(1)
    optimiser.step([first, None, last], RATE, TAKEN)
    for i, (old, new) in enumerate(zip(before, state(optimiser), strict=True)):
        assert torch.equal(old, new) == (i % 3 == 1), i


def test_a_step_that_is_skipped_leaves_everything():
    optimiser = Adam([p.requires_grad_() for p in parameters()], 0.1)
    optimiser.step(gradients(0), RATE, TAKEN)
    before = state(optimiser)
    optimiser.step(gradients(1), RATE, SKIPPED)
    assert same(before, state(optimiser))
    assert [float(n) for n in optimiser.steps] == [1, 1, 1]
    optimiser.step([torch.full_like(p, torch.nan) for p in parameters()], RATE, SKIPPED)
    assert same(before, state(optimiser))


def test_after_a_skipped_step_the_next_is_as_if_there_had_been_none():
    with_skip, without = (Adam([p.requires_grad_() for p in parameters()], 0.1) for _ in range(2))
    with_skip.step(gradients(0), RATE, TAKEN)
    with_skip.step([torch.full_like(p, torch.inf) for p in parameters()], RATE, SKIPPED)
    with_skip.step(gradients(1), RATE, TAKEN)
    without.step(gradients(0), RATE, TAKEN)
    without.step(gradients(1), RATE, TAKEN)
    assert same(state(with_skip), state(without))


def test_gradients_are_left_alone():
    given = gradients(0)
    Adam([p.requires_grad_() for p in parameters()], 0.1).step(given, RATE, TAKEN)
    assert same(given, gradients(0))
