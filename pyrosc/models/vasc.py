"""VASC: a VAE of scaled log counts with a layer that drops expression at random."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import recipe, require
from pyrosc.nn.layers import MLP, Dropout, normal, uniform_noise
from pyrosc.nn.priors import StandardNormal
from pyrosc.nn.transforms import scaled_log


class VASC(nn.Module):
    r"""Variational autoencoder with a zero-inflation layer (Wang and Gu 2018).

    For cell n and gene g, with t(x) = log(1 + x) divided by its largest in the cell::

        z_n     ~ Normal(0, I)                              the cell's state
        mu_ng   = sigmoid(f_g(z_n))
        m_ng    ~ Bernoulli(exp(-mu_ng^2))                  dropout, more often where expression is low
        t(x)_ng ~ Bernoulli(mu_ng (1 - m_ng))

    In training m is relaxed at a `temperature`, sigmoid((logit exp(-mu_ng^2) + logit u_ng) / temperature),
    where site ``"u"`` is uniform in the model and in the guide, and adds nothing to the loss; otherwise m's
    mean stands in its place. t(x) is no 0 or 1, so the Bernoulli's log density, the cross-entropy, is no
    density of it, and the objective no ELBO: its value compares nothing.

    It does not know of batches: a question's `batch` changes nothing. Site ``"x"`` holds t(x), and its draws
    are 0 or 1, not counts.

    Departures from the source: the variance of q(z given x) is learned (there it is fixed by default), the
    first layer is as the others (there linear, with an L1 penalty), and the temperature is .5, not 1.

    Parameters
    ----------
    encoder, decoder
        Networks from t(x) to the moments of z, and from z to the logit of mu.
    prior
        From cells to the prior of z.
    temperature
        Of the relaxed draws of m, above 0.

    References
    ----------
    Wang and Gu, VASC: dimension reduction and visualization of single-cell RNA-seq data by deep variational
    autoencoder, 2018.
    """

    elbo = TraceMeanField_ELBO

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, prior: StandardNormal, temperature: float = 0.5
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.prior, self.temperature = encoder, decoder, prior, temperature

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        temperature: float = 0.5,
        n_latent: int = 2,
        hidden: Sequence[int] = (512, 128, 32),
        norm: str | None = None,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> "VASC":
        """Build a VASC for data from plain numbers.

        Parameters
        ----------
        temperature
            Of the relaxed draws of dropout, above 0.
        dropout
            Probability that an input is dropped in training.
        data, n_latent, hidden, norm, seed
            See :meth:`VAE.for_data`.
        """
        require(temperature > 0, f"temperature must be above 0, not {temperature!r}")
        down = MLP(data.n_genes, hidden, norm=norm, dropout=0.0)
        up = MLP(n_latent, hidden[::-1], norm=norm, dropout=0.0)
        return cls(
            nn.Sequential(Dropout(dropout), down, nn.Linear(down.n_out, 2 * n_latent)),
            nn.Sequential(up, nn.Linear(up.n_out, data.n_genes)),
            StandardNormal(n_latent),
            temperature,
        )

    def model(self, cells: Cells) -> None:
        """Sample z and the scaled log counts."""
        t, largest = scaled_log(cells)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            mu = torch.sigmoid(self.decoder(z))
            # (A gene that is not expressed at all has the share of a millionth of a count.)
            expected = torch.expm1(mu * largest) + 1e-6
            pyro.deterministic("rho", expected / expected.sum(-1, keepdim=True), event_dim=1)
            m = torch.exp(-(mu**2)).clamp(1e-6, 1 - 1e-6)
            if self.training:
                u = pyro.sample("u", uniform_noise(t)).clamp(1e-6, 1 - 1e-6)
                m = torch.sigmoid((m.logit() + u.logit()) / self.temperature)
            kept = (mu * (1 - m)).clamp(1e-6, 1 - 1e-6)
            pyro.sample("x", dist.Bernoulli(kept, validate_args=False).to_event(1), obs=t)

    def guide(self, cells: Cells) -> None:
        """Sample z given the counts, and in training the noise of m."""
        t, _ = scaled_log(cells)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", normal(self.encoder(t)).to_event(1))
            if self.training:
                pyro.sample("u", uniform_noise(t))
