"""Priors p(z) of the cells' state: modules from Cells to a distribution, (cells, latent)."""

import pyro.distributions as dist
import torch
from torch import nn

from pyrosc.cells import Cells


class StandardNormal(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.n_latent = n_latent

    def forward(self, cells: Cells) -> dist.Normal:
        """Return N(0, I), (cells, n_latent)."""
        zero = cells.x.new_zeros(len(cells), self.n_latent)
        return dist.Normal(zero, torch.ones_like(zero))
