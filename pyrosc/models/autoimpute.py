"""AutoImpute: an autoencoder whose loss looks at the positive counts only."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import recipe
from pyrosc.nn.layers import MLP, network
from pyrosc.nn.priors import Flat
from pyrosc.nn.transforms import LogNormalised


class AutoImpute(nn.Module):
    r"""Autoencoder with a masked loss (Talwar 2018).

    For cell n and gene g, with t(x) = log(1 + c x / l), the log counts at a common library size c::

        z_n     = e(t(x_n))                                 the code, deterministic
        t(x)_ng ~ Normal(mu_g(z_n), 1/2)                    where x_ng > 0; zeros say nothing

    so the loss is the squared error of the positive counts, and what mu says of the zeros is the imputation.
    A penalty on the weights (the attribute ``weight_decay``), dropout and early stopping keep mu from the
    identity. This is no likelihood of the counts, since it leaves the zeros out, and no ELBO: its value
    compares nothing.

    It does not know of batches: a question's `batch` changes nothing.

    Departures from the source: natural logarithms, ReLU where it has sigmoids, a code of 500 (there 2000),
    dropout.

    Parameters
    ----------
    transform
        The log counts.
    encoder, decoder
        Networks from these to the code, and from the code to mu.
    prior
        From cells to the prior of z: none.

    References
    ----------
    Talwar, Mongia, Sengupta and Majumdar, AutoImpute: autoencoder based imputation of single-cell RNA-seq
    data, 2018.
    """

    weight_decay = 5.0

    def __init__(self, transform: LogNormalised, encoder: nn.Module, decoder: nn.Module, prior: Flat) -> None:
        super().__init__()
        self.transform, self.encoder, self.decoder, self.prior = transform, encoder, decoder, prior

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        n_latent: int = 500,
        norm: str | None = None,
        dropout: float = 0.2,
        hidden: Sequence[int] = (),
        seed: int = 0,
    ) -> "AutoImpute":
        """Build an AutoImpute for data from plain numbers.

        Parameters
        ----------
        n_latent
            Width of the code, the source's one hidden layer.
        data, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`. Units of the code are dropped too.
        """
        fitted = LogNormalised.for_data(data)
        zero = torch.zeros(data.n_genes)
        up = network(n_latent, hidden[::-1], data.n_genes, norm=norm, dropout=dropout, start=fitted.mean)
        return cls(
            LogNormalised(float(fitted.target), zero, torch.ones_like(zero)),
            MLP(data.n_genes, (*hidden, n_latent), norm=norm, dropout=dropout),
            up,
            Flat(n_latent),
        )

    def model(self, cells: Cells) -> None:
        """Sample the positive log counts given the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            mu = self.decoder(z)
            pyro.deterministic("rho", self.transform.share(mu, cells), event_dim=1)
            x = dist.Normal(mu, 0.5**0.5).mask(cells.x > 0)
            pyro.sample("x", x.to_event(1), obs=self.transform(cells))

    def guide(self, cells: Cells) -> None:
        """Give z the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Delta(self.encoder(self.transform(cells)), event_dim=1))
