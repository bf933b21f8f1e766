"""Operations called the short way: the same bits, and nothing computed once that a step changes."""

import pytest
import torch

from pyrosc.engine import lower as calling
from pyrosc.engine.lower import shorten
from pyrosc.engine.trace import traced

_aten = torch.ops.aten


def shortened(f, *arguments):
    """A function, recorded and shortened, and the operations that are left."""
    graph = traced(f, arguments)
    shorten(graph)
    return graph, [node.target for node in graph.graph.nodes if node.op == "call_function"]


def wave(*shape):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(1.0, n + 1)).view(shape)


# Arguments of each operator that is called another way.
ROWS, COLUMN = wave(5, 4), wave(4)
ARGUMENTS = {
    _aten.add.Tensor: (ROWS, COLUMN),
    _aten.sub.Tensor: (ROWS, COLUMN),
    _aten.mul.Tensor: (ROWS, COLUMN),
    _aten.div.Tensor: (ROWS, COLUMN),
    _aten.add_.Tensor: (ROWS, COLUMN),
    _aten.addmm.default: (wave(5), ROWS, wave(4, 5)),
    _aten.cat.default: ([ROWS, 2 * ROWS], 1),
    _aten.clamp.default: (ROWS, -0.5, 0.5),
    _aten.clamp_min.default: (ROWS, 0.1),
    _aten.eq.Tensor: (ROWS, COLUMN),
    _aten.exp.default: (ROWS,),
    _aten.expand.default: (COLUMN, [5, 4]),
    _aten.ge.Scalar: (ROWS, 0.2),
    _aten.le.Scalar: (ROWS, 0.2),
    _aten.log.default: (ROWS + 2,),
    _aten.mm.default: (ROWS, wave(4, 3)),
    _aten.mul.Scalar: (ROWS, 2.5),
    _aten.native_batch_norm.default: (ROWS, COLUMN, COLUMN, wave(4), wave(4) ** 2, True, 0.1, 1e-5),
    _aten.neg.default: (ROWS,),
    _aten.pow.Tensor_Scalar: (ROWS, 2),
    _aten.relu.default: (ROWS,),
    _aten.sum.default: (ROWS,),
    _aten.sum.dim_IntList: (ROWS, [0], True),
    _aten.t.default: (ROWS,),
    _aten.unsqueeze.default: (ROWS, -1),
    _aten.view.default: (ROWS, [2, -1]),
    _aten.where.self: (ROWS > 0, ROWS, COLUMN),
}


@pytest.mark.parametrize("operator", calling._FUNCTIONS, ids=str)
def test_a_function_has_the_bits_of_its_operator(operator):
    copied = lambda argument: argument.clone() if isinstance(argument, torch.Tensor) else argument
    results = []
    for call in (operator, calling._FUNCTIONS[operator]):
        arguments = [copied(argument) for argument in ARGUMENTS[operator]]
        result = call(*arguments)
        changed = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        results.append([*(result if isinstance(result, tuple) else (result,)), *changed])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_the_same_in_each_step_is_computed_once():
    def f(x):
        weight = torch.ones(4).neg().div(3.0).expand(5, 4)
        return x * weight

    graph, calls = shortened(f, ROWS)
    assert calls == [torch.mul]
    assert torch.equal(graph(2 * ROWS), f(2 * ROWS))


@pytest.mark.parametrize("number", [3, 0.1, 1e-30])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_a_number_becomes_a_tensor_with_the_same_bits(name, number):
    f = lambda x: getattr(torch, name)(x, number)
    graph, _ = shortened(f, ROWS)
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert isinstance(node.args[1], torch.fx.Node)
    assert torch.equal(graph(ROWS), f(ROWS))


def test_the_type_of_a_result_stays():
    def f(n, x):
        return n + 1, x * 2, n * 0.5

    n, x = torch.arange(4), wave(4).double()
    graph, _ = shortened(f, n, x)
    for found, true in zip(graph(n, x), f(n, x), strict=True):
        assert found.dtype == true.dtype
        assert torch.equal(found, true)


def written_into(x):
    return torch.zeros(4).add_(x.sum(0))


def written_into_a_view(x):
    zeros = torch.zeros(2, 4)
    zeros[0].add_(x.sum(0))
    return zeros * 1.0


def moments_of_a_norm(x):
    mean = torch.zeros(4)
    out = torch.nn.functional.batch_norm(x, mean, torch.ones(4), training=True)
    return mean + out.sum(0)


def handed_out(x):
    return torch.ones(4).neg(), x * 1.0


def written_as_out(x):
    zeros = torch.zeros(4)
    torch.add(zeros, x.sum(0), out=zeros)
    return zeros * 1.0


def written_in_a_list(x):
    zeros = torch.zeros(4)
    torch._foreach_add_([zeros], [x.sum(0)])
    return zeros * 1.0


def written_into_a_product(x):
    product = torch.ones(2, 3, 4) @ torch.ones(4, 4)
    product.add_(x.sum())
    return product * 1.0


WRITING = [
    written_into,
    written_into_a_view,
    written_as_out,
    written_in_a_list,
    written_into_a_product,
    moments_of_a_norm,
    handed_out,
]


@pytest.mark.parametrize("f", WRITING)
def test_what_a_step_writes_into_or_hands_out_is_made_anew(f):
    graph, _ = shortened(f, ROWS)
    for _ in range(3):
        found, true = graph(ROWS), f(ROWS)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, true)), strict=True):
            assert torch.equal(a, b)
            a.fill_(7.0)  # what a caller does with it is no business of the next step


def test_keywords_of_what_is_computed_once_are_tensors_too():
    f = lambda x: x * torch.searchsorted(torch.ones(4), torch.ones(4), sorter=torch.arange(4))
    graph, _ = shortened(f, ROWS)
    assert torch.equal(graph(ROWS), f(ROWS))


def test_the_type_does_not_depend_on_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        graph, _ = shortened(lambda x: x.sum() * 3.0, ROWS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert graph(ROWS).dtype == torch.float32


def test_random_numbers_are_drawn_in_each_step():
    graph, _ = shortened(lambda x: x + torch.rand(5, 4), ROWS)
    with torch.random.fork_rng([]):
        assert not torch.equal(graph(ROWS), graph(ROWS))
