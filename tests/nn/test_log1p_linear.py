"""The first layer of an encoder, looked up, against the product of dense matrices."""

import anndata
import pytest
import torch
from scipy.sparse import csr_matrix

from pyrosc import from_anndata
from pyrosc.engine.cpu import log1p_linear as loops
from pyrosc.nn.log1p_linear import Log1pLinear


def counts(n_cells, n_genes, density, largest=50, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(1, largest + 1, (n_cells, n_genes), generator=rng).float()
    return x * (torch.rand(n_cells, n_genes, generator=rng) < density)


def layer(n_genes, n_out, dtype=torch.float32):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Log1pLinear(n_genes, n_out).to(dtype)


def check(x, linear, rtol=1e-5):
    """Value and gradients, with another gradient for each entry of the result, against float64."""
    upstream = torch.randn(len(x), linear.bias.numel(), generator=torch.Generator().manual_seed(1)).to(x)
    out = linear(x)
    got = [out, *torch.autograd.grad(out, [linear.weight, linear.bias], upstream)]
    dense, d_out = torch.log1p(x.double()), upstream.double()
    want = [dense @ linear.weight.double() + linear.bias.double(), dense.T @ d_out, d_out.sum(0)]
    for name, a, b in zip(("value", "weight", "bias"), got, want, strict=True):
        assert a.dtype == x.dtype
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        close = torch.isclose(a.double(), b, rtol=rtol, atol=rtol * scale)
        assert close.all(), name


@pytest.fixture
def looked_up(monkeypatch):
    """The arguments of each call of embedding_bag: whether entries were looked up."""
    calls, original = [], loops.embedding_bag
    monkeypatch.setattr(loops, "embedding_bag", lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(
    ("n_cells", "n_genes", "n_out"), [(9, 31, 5), (1, 40, 3), (6, 1, 2), (1, 1, 1), (128, 700, 16)]
)
def test_it_is_the_map_of_log1p(n_cells, n_genes, n_out, density):
    check(counts(n_cells, n_genes, density), layer(n_genes, n_out))


@pytest.mark.parametrize(("density", "sparse"), [(0.1, True), (0.9, False)])
def test_entries_are_looked_up_where_they_are_few(density, sparse, looked_up):
    check(counts(20, 50, density), layer(50, 4))
    assert len(looked_up) == 2 * sparse


def test_large_counts_and_fractions(looked_up):
    x = torch.zeros(4, 40)
    x[0, :4] = torch.tensor([1022.0, 1023.0, 1024.0, 1025.0])
    x[1, 7], x[1, 39], x[3, 0] = 5000.0, 2e5, 0.37
    check(x, layer(40, 6))
    assert looked_up


def test_cells_without_counts_and_genes_that_nobody_has(looked_up):
    x = counts(30, 40, 0.2)
    x[[0, 7, 29]] = 0
    x[:, [0, 11, 39]] = 0
    linear = layer(40, 5)
    check(x, linear)
    out = linear(x)
    assert torch.equal(out[[0, 7, 29]], linear.bias.expand(3, -1))
    (gradient,) = torch.autograd.grad(out.sum(), linear.weight)
    assert not gradient[[0, 11, 39]].any()
    assert looked_up


def test_no_cells():
    linear = layer(12, 3)
    assert linear(torch.zeros(0, 12)).shape == (0, 3)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_transposed_and_strided_counts(density):
    check(counts(40, 30, density).T, layer(40, 5))
    check(counts(20, 60, density)[:, ::2], layer(30, 5))
    check(counts(20, 30, density)[:1].expand(8, -1), layer(30, 5))


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_double_precision_is_kept(density, looked_up):
    x = counts(20, 50, density, largest=5000).double()
    check(x, layer(50, 4, torch.float64), rtol=1e-12)
    assert not looked_up


def test_without_a_gradient_the_value_is_the_same():
    x, linear = counts(20, 50, 0.1), layer(50, 4)
    with torch.no_grad():
        value = linear(x)
    assert not value.requires_grad
    assert torch.equal(value, linear(x).detach())


def test_a_frozen_weight_has_no_gradient_and_the_bias_keeps_its_own():
    x, linear = counts(20, 50, 0.1), layer(50, 4)
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(linear.bias.grad, torch.full((4,), 20.0))


def test_bits_do_not_depend_on_the_threads():
    x, linear = counts(300, 500, 0.1), layer(500, 16)
    upstream = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))

    def run():
        out = linear(x)
        return [out.detach(), *torch.autograd.grad(out, [linear.weight], upstream)]

    alone = run()
    torch.set_num_threads(2)
    try:
        shared = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.fixture
def cells():
    """A minibatch in which rows repeat."""
    x = counts(240, 500, 0.1)
    data = from_anndata(anndata.AnnData(csr_matrix(x.numpy()))).on("cpu")
    return data.cells(torch.arange(300) * 7 % 240)


@pytest.fixture
def scanned(monkeypatch):
    """Calls that look for the entries."""
    calls, original = [], loops._counts
    monkeypatch.setattr(loops, "_counts", lambda *a: calls.append(a) or original(*a))
    loops._counts.alone = lambda *a: calls.append(a) or original.alone(*a)
    return calls


def slopes(linear, x, entries=None):
    upstream = torch.randn(len(x), linear.bias.numel(), generator=torch.Generator().manual_seed(1))
    out = linear(x, entries)
    return [out.detach(), *torch.autograd.grad(out, [linear.weight], upstream)]


def test_entries_that_are_known_give_the_bits_of_those_that_are_found(cells, scanned):
    linear = layer(cells.x.shape[1], 4)
    known = slopes(linear, cells.x, cells.entries)
    assert not scanned
    assert all(torch.equal(a, b) for a, b in zip(known, slopes(linear, cells.x), strict=True))
    assert scanned


def test_entries_of_other_counts_are_not_used(cells, scanned):
    linear, other = layer(cells.x.shape[1], 4), cells.x.flip(1)
    found = slopes(linear, other, cells.entries)
    assert scanned
    assert all(torch.equal(a, b) for a, b in zip(found, slopes(linear, other), strict=True))
    same_numbers = cells.x.clone()
    scanned.clear()
    linear(same_numbers, cells.entries)
    assert scanned


def test_bits_of_known_entries_do_not_depend_on_the_threads(cells):
    linear = layer(cells.x.shape[1], 4)
    alone = slopes(linear, cells.x, cells.entries)
    torch.set_num_threads(2)
    try:
        shared = slopes(linear, cells.x, cells.entries)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("bad", [-1.0, -2.0, float("nan"), float("inf")])
def test_what_is_no_count_is_not_hidden(bad):
    x = counts(20, 50, 0.1)
    x[3, 4] = bad
    assert not torch.isfinite(layer(50, 2)(x)[3]).any()


@pytest.mark.parametrize("known", [True, False])
def test_in_inference_mode_the_map_is_the_same(rich, known):
    linear = layer(rich.n_genes, 4)
    with torch.inference_mode():
        cells = rich.on("cpu").cells(torch.arange(4))
        found = linear(cells.x, cells.entries if known else None)
    torch.testing.assert_close(found, torch.log1p(cells.x) @ linear.weight + linear.bias)


def test_a_second_derivative_is_refused_and_the_way_to_have_it_named():
    x, linear = counts(20, 50, 0.1), layer(50, 4)
    (slope,) = torch.autograd.grad(linear(x).sigmoid().sum(), linear.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once.*log1p\(x\) @ layer.weight"):
        torch.autograd.grad(slope.sum(), linear.weight)
