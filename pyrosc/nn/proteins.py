"""Counts of surface proteins: a first layer that knows which are missing, and the prior of the background."""

import warnings

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.nn.encoder_decoder import CellsLinear


class BothLinear(nn.Module):
    """A linear map of log(1 + x), and of log(1 + y) of the proteins measured and of which these are.

    Parameters
    ----------
    cells
        The map of the genes' counts.
    n_proteins, n_out
        Widths of y and of the result.
    """

    def __init__(self, cells: CellsLinear, n_proteins: int, n_out: int) -> None:
        super().__init__()
        self.cells = cells
        self.proteins = nn.Linear(2 * n_proteins, n_out, bias=False)

    def forward(self, cells: Cells) -> Float[Tensor, "cells out"]:
        """Return the map of each cell."""
        measured = (cells.proteins >= 0).to(cells.x)
        y = cells.proteins.clamp_min(0.0).log1p()
        return self.cells(cells) + self.proteins(torch.cat([y * measured, measured], -1))


class Background(nn.Module):
    """p(beta) = LogNormal(c, d^2) of each batch and protein, learned.

    Parameters
    ----------
    log_mean, log_sd
        Where c and log d start, (batches, proteins), natural log of counts; NaN where it is not known.
    """

    start: Tensor

    def __init__(
        self, log_mean: Float[Tensor, "batches proteins"], log_sd: Float[Tensor, "batches proteins"]
    ):
        super().__init__()
        self.register_buffer("start", torch.cat([log_mean, log_sd], -1))
        self.change = nn.Parameter(torch.zeros_like(self.start))  # 0 is where weight decay draws it to

    @classmethod
    def for_data(cls, data: Counts) -> "Background":
        """Start at the lower of two normals fitted to log(1 + y) in each batch that has the protein."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture  # takes long to import

        n_batches, n_proteins = len(data.schema.batches), len(data.schema.proteins)
        moments = np.full((2, n_batches, n_proteins), np.nan)
        for s in range(n_batches):
            for t, y in enumerate(data.proteins[data.batch == s].T):
                y = np.log1p(y[y >= 0])
                if len(np.unique(y)) < 3:
                    moments[:, s, t] = (y.mean(), 0.5) if len(y) else np.nan
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # a start need not be the end
                    mixture = GaussianMixture(2, random_state=0).fit(y[:, None])
                lower = mixture.means_.argmin()
                moments[:, s, t] = mixture.means_[lower, 0], mixture.covariances_[lower, 0, 0] ** 0.5
        # A batch without the protein starts at the mean of those that have it; without any, it is not known.
        have = ~np.isnan(moments)
        total, n = np.where(have, moments, 0).sum(1, keepdims=True), have.sum(1, keepdims=True)
        mean = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
        c, d = torch.as_tensor(np.where(have, moments, mean)).float()
        return cls(c.clamp_min(-1.0), d.clamp(0.05, 2.0).log())

    def forward(self, cells: Cells) -> dist.LogNormal:
        """Return LogNormal, (cells, proteins)."""
        c, log_d = (self.start.nan_to_num() + self.change)[cells.batch].chunk(2, -1)
        return dist.LogNormal(c, log_d.exp())
