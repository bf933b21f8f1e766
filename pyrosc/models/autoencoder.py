"""Autoencoder: a deterministic code of transformed counts, fitted by least squares."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import recipe
from pyrosc.nn.layers import MLP, network
from pyrosc.nn.priors import Flat
from pyrosc.nn.transforms import Transform, moments_of, transform_of


class Autoencoder(nn.Module):
    r"""Deep autoencoder of transformed counts, by mean squared error.

    For cell n and gene g, with t(x) the transformed counts::

        t(x)_ng ~ Normal(mu_g(z_n), 1/2),    z_n = e(t(x_n))

    The code has no prior, and the guide is a point: the loss is the squared error, summed over the genes,
    plus log(pi) / 2 a gene. Its interval of any question is of no width, for it has no posterior.
    The site ``"x"`` is of transformed counts; ``"rho"`` is what mu stands for as shares.

    It does not know of batches: a question's `batch` changes nothing.

    Parameters
    ----------
    transform
        From cells to values of each gene, and back to shares.
    encoder, decoder
        Networks from the transformed counts to the code, and from the code to mu.
    prior
        From cells to the prior of z: none.

    References
    ----------
    Hinton and Salakhutdinov, Reducing the dimensionality of data with neural networks, 2006.
    """

    def __init__(self, transform: Transform, encoder: nn.Module, decoder: nn.Module, prior: Flat) -> None:
        super().__init__()
        self.transform, self.encoder, self.decoder, self.prior = transform, encoder, decoder, prior

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        transform: str = "log",
        n_latent: int = 6,
        hidden: Sequence[int] = (128, 32, 16),
        norm: str | None = "batch",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> "Autoencoder":
        """Build an autoencoder for data from plain numbers.

        Parameters
        ----------
        transform
            ``"log"``, ``"pearson"`` or ``"raw"``; see :mod:`pyrosc.nn.transforms`.
        data, n_latent, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`. Without hidden layers the optimum is the subspace of PCA.
        """
        to_values = transform_of(transform, data)
        mean, _ = moments_of(to_values, data)
        down = MLP(data.n_genes, hidden, norm=norm, dropout=dropout)
        up = network(n_latent, hidden[::-1], data.n_genes, norm=norm, dropout=dropout, start=mean)
        encoder = nn.Sequential(down, nn.Linear(down.n_out, n_latent))
        return cls(to_values, encoder, up, Flat(n_latent))

    def model(self, cells: Cells) -> None:
        """Sample the transformed counts given the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            mu = self.decoder(z)
            pyro.deterministic("rho", self.transform.share(mu, cells), event_dim=1)
            pyro.sample("x", dist.Normal(mu, math.sqrt(0.5)).to_event(1), obs=self.transform(cells))

    def guide(self, cells: Cells) -> None:
        """Give z the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Delta(self.encoder(self.transform(cells)), event_dim=1))
