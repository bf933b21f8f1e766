"""Codes that are mostly exact zeros: spike-and-slab guide and priors of z, modules from Cells to these."""

import math
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.distributions.spike_slab import SpikeSlab
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import CellsLinear, trunk
from pyrosc.nn.layers import MLP
from pyrosc.nn.priors import PseudoCells


class SpikeSlabEncoder(nn.Module):
    """q(z given x), spike-and-slab: common layers, then a branch each for mean, log scale and inclusion.

    Parameters
    ----------
    n_genes, n_latent, hidden, branch, inclusion, norm, dropout
        See :meth:`pyrosc.VSC.for_data`.
    """

    SHARPNESS = 2.0
    """Of the relaxed draws: one over the temperature of the binary concrete distribution."""

    sharpness: Tensor

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        hidden: Sequence[int],
        branch: int,
        inclusion: float,
        *,
        norm: str | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.body = trunk(n_genes, Covariates(), hidden, norm=norm, dropout=dropout)
        self.loc, self.log_scale, self.logits = (
            nn.Sequential(MLP(hidden[-1], (branch,), norm=norm, dropout=dropout), nn.Linear(branch, n_latent))
            for _ in range(3)
        )
        self.n_latent, self.prior_logit = n_latent, math.log(inclusion / (1 - inclusion))
        self.register_buffer("sharpness", torch.tensor(self.SHARPNESS))

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return SpikeSlab(loc, scale, logits), (cells, latent): relaxed in training, exact otherwise."""
        q = self.exact(cells)
        return q.relaxed(self.sharpness) if self.training else q

    def exact(self, cells: Cells) -> SpikeSlab:
        """Return the distribution whose draws have exact zeros, (cells, latent)."""
        h = self.body(cells)
        loc, log_scale = self.loc(h), self.log_scale(h).clamp(-7, 7)
        scale = log_scale.exp()
        odds = self.prior_logit + log_scale + (loc / scale) ** 2 / 2
        return SpikeSlab(loc, scale, (odds + self.logits(h)).clamp(-10, 10))


class SpikeSlabPrior(nn.Module):
    """p(z): each number is 0 with probability 1 - alpha, else from N(0, 1).

    Parameters
    ----------
    n_latent
        Width of z.
    inclusion
        alpha.
    """

    logits: Tensor

    def __init__(self, n_latent: int, inclusion: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.full((n_latent,), inclusion).logit())

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return the prior, (cells, latent)."""
        zero = cells.x.new_zeros(len(cells), len(self.logits))
        return SpikeSlab(zero, torch.ones_like(zero), self.logits)


class PseudoInputPrior(nn.Module):
    r"""p(z) of the source: the guide's posterior of a pseudo-cell that a classifier chooses for each cell.

    The choice is a softmax of the cell's counts, and the pseudo-cell the weighted sum. The log density has a
    further term for each cell, -J KL(Bernoulli(its pseudo-cell's mean inclusion) || Bernoulli(alpha)) for the
    J latents, which keeps the pseudo-cells' codes sparse. A prior that looks at the cell is none: with it the
    objective is not an ELBO, and its value can't be compared with that of other models.

    Parameters
    ----------
    encoder
        The guide's, shared with it.
    pseudo
        The pseudo-cells.
    n_latent
        J.
    inclusion
        alpha.

    References
    ----------
    Tonolini, Jensen and Murray-Smith, Variational sparse coding, 2019, section 3.3.
    """

    def __init__(
        self, encoder: SpikeSlabEncoder, pseudo: PseudoCells, n_latent: int, inclusion: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pseudo = pseudo
        self.choice = CellsLinear(pseudo.start.shape[1], len(pseudo.start), Covariates())
        self.n_latent, self.inclusion = n_latent, inclusion

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return the prior of each cell, (cells, latent), and count the further term."""
        chosen = self.encoder.exact(self.pseudo(cells, self.choice(cells).softmax(-1)))
        mean = chosen.inclusion.mean(-1).clamp(1e-6, 1 - 1e-6)
        sparse = (
            mean * (mean / self.inclusion).log() + (1 - mean) * ((1 - mean) / (1 - self.inclusion)).log()
        )  # (torch's KL of Bernoulli distributions can't be recorded, see `spike_slab.py`)
        pyro.factor("sparsity", -self.n_latent * sparse)
        return chosen


def code_prior_of(
    name: str, inclusion: float, n_latent: int, encoder: SpikeSlabEncoder, data: Counts, n_pseudo: int
) -> nn.Module:
    """Return the prior called ``"fixed"`` or ``"pseudo"``.

    Parameters
    ----------
    name
        A :class:`SpikeSlabPrior`, or a :class:`PseudoInputPrior` whose pseudo-cells start at cells drawn from
        `data`.
    inclusion
        alpha.
    n_latent
        Width of z.
    encoder
        The guide's.
    data
        Counts.
    n_pseudo
        Pseudo-cells of the latter.

    Raises
    ------
    ValueError
        If the name is another one, or the encoder does not suit.
    """
    if name == "fixed":
        return SpikeSlabPrior(n_latent, inclusion)
    if name == "pseudo":
        pseudo = PseudoCells.for_data(data, n_pseudo, encoder)
        return PseudoInputPrior(encoder, pseudo, n_latent, inclusion)
    msg = f'prior must be "fixed" or "pseudo", not {name!r}'
    raise ValueError(msg)
