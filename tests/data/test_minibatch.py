"""Minibatches: gathered from CSR, and what is known of their entries."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pyrosc.data import minibatch


@pytest.fixture
def csr():
    """Counts of which some rows are empty: the first, the last, and two side by side."""
    rng = np.random.default_rng(0)
    x = rng.poisson(2, (30, 17)) * (rng.random((30, 17)) < 0.3)
    x[[0, 11, 12, 29]] = 0
    return scipy.sparse.csr_matrix(x.astype(np.float32))


def resident(csr):
    n = csr.shape[0]
    none = torch.zeros(n, 0)
    start = torch.as_tensor(csr.indptr, dtype=torch.int64)
    return minibatch.DeviceCounts(
        start=start[:-1],
        stop=start[1:],
        gene=torch.as_tensor(csr.indices, dtype=torch.int32),
        count=torch.as_tensor(csr.data),
        total=torch.as_tensor(csr.sum(1)).ravel(),
        n_genes=csr.shape[1],
        batch=torch.zeros(n, dtype=torch.int64),
        labels=torch.zeros(n, dtype=torch.int64),
        categorical=none.long(),
        continuous=none,
        proteins=none,
    )


ROWS = {
    "all": list(range(30)),
    "backwards": list(range(29, -1, -1)),
    "repeated": [5, 5, 3, 5, 3],
    "empty ones": [0, 12, 11, 29, 29],
    "one": [7],
    "none": [],
}


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_gathered_rows_are_those_of_the_matrix(csr, rows, loops, monkeypatch):
    """With the compiled loop, and as other devices gather."""
    if not loops:
        monkeypatch.setattr(minibatch, "kernels", lambda: None)
    x = resident(csr).cells(torch.tensor(rows, dtype=torch.int64)).x
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), csr[rows].toarray())


def test_a_gather_in_shares_is_one_in_order(csr):
    wide = scipy.sparse.hstack([csr] * 100).tocsr()
    rows = torch.tensor([*range(30)] * 3)
    assert len(rows) * wide.shape[1] > 1 << 15
    alone = resident(wide).cells(rows).x
    torch.set_num_threads(2)
    try:
        shared = resident(wide).cells(rows).x
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, shared)
    np.testing.assert_array_equal(shared.numpy(), wide[rows.numpy()].toarray())


@pytest.mark.parametrize("loops", [True, False])
def test_no_cell_has_an_entry(loops, monkeypatch):
    if not loops:
        monkeypatch.setattr(minibatch, "kernels", lambda: None)
    x = resident(scipy.sparse.csr_matrix((4, 5), dtype=np.float32)).cells(torch.tensor([3, 0])).x
    assert torch.equal(x, torch.zeros(2, 5))


def test_cells_that_are_taken_share_their_entries(rich):
    rows = torch.tensor([7, 3, 199, 3, 0])
    whole = rich.on("cpu")
    assert whole.count.data_ptr() == rich.x.data.ctypes.data
    taken = whole.take(rows)
    assert len(taken) == 5
    for name in ("gene", "count"):
        assert getattr(taken, name).data_ptr() == getattr(whole, name).data_ptr()
    copied = rich[rows.numpy()].on("cpu")
    for size in (2, 5):
        ours, theirs = list(taken.minibatches(size)), list(copied.minibatches(size))
        assert len(ours) == len(theirs) == -(-5 // size)
        for a, b in zip(ours, theirs, strict=True):
            assert a.n_total == b.n_total == 5
            for name in ("x", "index", "batch", "labels", "categorical", "continuous"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_cells_taken_from_taken_ones(data):
    whole = data.on("cpu")
    twice = whole.take(torch.tensor([9, 4, 6, 2])).take(torch.tensor([3, 0]))
    np.testing.assert_array_equal(twice.cells(torch.arange(2)).x.numpy(), data.x[[2, 9]].toarray())


# --- entries


def test_entries_are_those_of_the_dense_counts(rich):
    cells = rich.on("cpu").cells(torch.tensor([7, 3, 199, 3]))
    entries = cells.entries
    assert entries.x is cells.x
    for i, row in enumerate(cells.x):
        own = slice(entries.start[i], entries.stop[i])
        dense = torch.zeros_like(row)
        dense[entries.gene[own].long()] = entries.count[own]
        assert torch.equal(dense, row)
    assert torch.equal(entries.total, cells.x.sum(-1, keepdim=True))
    assert cells.library is entries.total


def test_entries_of_other_counts_are_not_used(rich):
    cells = rich.on("cpu").cells(torch.arange(4))
    other = dataclasses.replace(cells, x=cells.x * 2)
    assert torch.equal(other.library, 2 * cells.library)
    assert torch.equal(dataclasses.replace(cells, entries=None).library, cells.library)
    assert dataclasses.replace(cells, n_total=9).library is cells.library
    assert cells.in_batch(1).library is cells.library


def same(a, b):
    """All the same tensors, and the same entries of the same counts."""
    mine, others = ([getattr(c, f.name) for f in dataclasses.fields(c)] for c in (a, b))
    *mine, my_entries = mine
    *others, their_entries = others
    assert all(m is o or m == o for m, o in zip(mine, others, strict=True))
    if my_entries is None:
        return their_entries is None
    names = [f.name for f in dataclasses.fields(my_entries)]
    return all(getattr(my_entries, name) is getattr(their_entries, name) for name in names)


def test_cells_are_a_tree_of_tensors(rich):
    cells = rich.on("cpu").cells(torch.arange(4), n_total=77)
    for one in (
        cells,
        dataclasses.replace(cells, entries=None),
        dataclasses.replace(cells, x=cells.x + 1),
    ):
        leaves, tree = tree_flatten((one, torch.tensor(1.0)))
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert len({id(leaf) for leaf in leaves}) == len(leaves)
        again, _ = tree_unflatten(leaves, tree)
        assert same(one, again)
    assert len(tree_leaves(cells)) == 7 + 5
    moved = tree_map(torch.clone, cells)
    assert moved.entries.x is moved.x
    assert moved.n_total == 77
    entries = tree_map(torch.clone, cells.entries)
    assert torch.equal(entries.gene, cells.entries.gene)
