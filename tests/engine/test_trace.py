"""Operations written down: the same bits on other arguments, and no graph of what depends on numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout

from pyrosc.engine.trace import traced
from pyrosc.nn.layers import Dropout

_aten = torch.ops.aten


def wave(*shape):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(1.0, n + 1)).view(shape)


HERE, THERE = wave(4, 6), wave(4, 6).cos()


def slopes(x):
    """Autograd keeps inputs and results of operations for the way back."""
    weight = x[:, :3].t().contiguous().requires_grad_()
    h = torch.softmax(x @ torch.cat([weight, weight.exp()]).sigmoid(), -1)
    loss = (h.log() * h).sum() + weight.relu().logsumexp(0).square().mean()
    return loss.detach(), *torch.autograd.grad(loss, [weight])


def written_into(x):
    total = torch.zeros(6)
    total.add_(x.sum(0))
    total[1:3] = x[0, 1:3]
    torch.mul(total, 2.0, out=total)
    return [total * 1.0]


def made_of_numbers(x):
    total = torch.tensor([1.0, 2.0])
    total += x[0, :2]
    return total


def in_parts(x):
    a, b = x.split(3, 1)
    values, places = torch.max(a, 1)
    return {"values": values, "places": (places, None), "rest": [b.unbind(0)[2]]}


def one_of_the_arguments(x):
    return x, x.view(6, 4)


def random(x):
    return dropout(x, 0.5) + torch.rand_like(x).bernoulli_(0.3) + Dropout(0.5).train()(x)


@pytest.mark.parametrize("f", [slopes, written_into, made_of_numbers, in_parts, one_of_the_arguments, random])
def test_the_graph_does_what_the_function_does(f):
    graph = traced(f, [HERE])
    for x in (THERE, HERE, THERE):
        results = []
        for run in (graph, f):
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                results.append(run(x))
        found, true = results
        torch.testing.assert_close(found, true, rtol=0, atol=0)


def test_what_is_read_beside_the_arguments_is_itself_and_no_copy():
    shift, scale = torch.ones(6), torch.nn.Parameter(torch.ones(6))
    graph = traced(lambda x: (x + shift) * scale.detach(), [HERE])
    shift.fill_(3.0)
    with torch.no_grad():
        scale.fill_(0.5)
    assert torch.equal(graph(THERE), (THERE + 3.0) * 0.5)


def after_a_write(x):
    zeros = torch.zeros(3)
    zeros[1:] = x[0, :2]
    return x * zeros.sum().item()


READING = {
    "item()": lambda x: x * x.sum().item(),
    "a branch": lambda x: x if x.mean() > 0 else -x,
    "equal()": lambda x: x * torch.equal(x, x + 0),
    "tolist()": lambda x: x * x.tolist()[0][0],
    "numpy()": lambda x: x + float(x.numpy().sum()),
    "asarray()": lambda x: x + float(np.asarray(x).sum()),
    "dlpack": lambda x: x + float(np.from_dlpack(x).sum()),
    "tensor()": lambda x: x * torch.tensor([x[0, 0], x[1, 1]]).sum(),
    "as_tensor()": lambda x: x * torch.as_tensor([part for part in x[0]]),  # noqa: C416
    "a random number": lambda x: x * float(torch.rand(())),
    "after a write": after_a_write,
}


@pytest.mark.parametrize("f", READING.values(), ids=READING)
def test_numbers_are_not_read(f):
    with torch.random.fork_rng([]), pytest.raises(RuntimeError, match="a program reads the numbers"):
        traced(f, [HERE])


SHAPES = {
    "nonzero": lambda x: torch.nonzero(x > 0),
    "a mask": lambda x: x[x > 0],
    "a mask to write to": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
}


@pytest.mark.parametrize("f", SHAPES.values(), ids=SHAPES)
def test_a_shape_does_not_depend_on_the_data(f):
    with pytest.raises(RuntimeError, match="the shape of a result depends on the data"):
        traced(f, [HERE])


def test_a_random_generator_is_no_part_of_a_graph():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="such as a random generator"):
        traced(lambda x: x + torch.rand(1, generator=generator), [HERE])


def test_it_says_what_operations_return():
    graph = traced(lambda x: x.t().contiguous().double().view(3, 8), [HERE])
    (view,) = (node for node in graph.graph.nodes if node.target == _aten.view.default)
    (turned,) = (node for node in graph.graph.nodes if node.target == _aten.t.default)
    made, source = view.meta["made"], turned.meta["made"]
    assert (made.shape, made.dtype, made.device.type) == ((3, 8), torch.float64, "cpu")
    assert (source.shape, source.stride) == ((6, 4), (1, 6))


def test_nothing_is_imported_for_it():
    """Of torch's compiler, which takes a second and 140 MB."""
    code = """if True:
        import sys, torch
        from pyrosc.engine.trace import traced
        before = set(sys.modules)
        traced(lambda x: x.exp() + torch.tensor(2.0), [torch.ones(3)])(torch.ones(3))
        assert not set(sys.modules) - before, sorted(set(sys.modules) - before)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
