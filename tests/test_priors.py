import torch

from pyrosc.priors import StandardNormal


def test_standard_normal_of_each_cell(data):
    p = StandardNormal(3)(data.on("cpu").cells(torch.arange(5)))
    assert p.batch_shape == (5, 3)
    assert torch.equal(p.loc, torch.zeros(5, 3))
    assert torch.equal(p.scale, torch.ones(5, 3))
    assert not list(StandardNormal(3).parameters())
