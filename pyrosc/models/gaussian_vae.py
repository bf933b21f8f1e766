"""GaussianVAE: a variational autoencoder of transformed counts, with a normal likelihood."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import recipe, require
from pyrosc.nn.layers import network, normal
from pyrosc.nn.priors import StandardNormal
from pyrosc.nn.transforms import Transform, moments_of, transform_of


class GaussianVAE(nn.Module):
    r"""Gaussian variational autoencoder of transformed counts; with ``fit_svi(kl_weight=...)``, a beta-VAE.

    For cell n and gene g, with t(x) the transformed counts::

        z_n     ~ Normal(0, I)                              the cell's state
        t(x)_ng ~ Normal(mu_g(z_n), sigma_g^2)

    and the guide has a network each for mean and scale::

        z_n | x_n ~ Normal(m(t(x_n)), s(t(x_n))^2)

    The site ``"x"`` is of transformed counts, and so are densities and posterior predictive draws: nats per
    cell can be compared among models of one transform only. ``"rho"`` is what mu stands for as shares.

    It does not know of batches: a question's `batch` changes nothing.

    sigma_g is learned: where the decoder explains a gene, its sigma falls and the gene weighs more. With a
    sigma fixed at 1 a thousand weak genes are dearer to explain than the KL that it costs, and the optimum
    may be a z that says nothing (posterior collapse).

    Parameters
    ----------
    transform, prior
        From cells to values of each gene, and back to shares; to the prior of z.
    loc, log_variance
        Networks from the transformed counts to the moments of z.
    decoder
        Network from z to mu.
    scale
        sigma, or its start, (genes,).
    learned_scale
        Whether sigma is learned.

    References
    ----------
    Kingma and Welling, Auto-encoding variational Bayes, 2014. Higgins et al., beta-VAE, 2017.

    Examples
    --------
    >>> from pyrosc import GaussianVAE, datasets, fit_svi, impute
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(GaussianVAE.for_data(adata), adata, epochs=1, progress=False)
    >>> impute(fit, adata).mean.shape
    (60, 20)
    """

    elbo = TraceMeanField_ELBO
    start: torch.Tensor

    def __init__(
        self,
        transform: Transform,
        loc: nn.Module,
        log_variance: nn.Module,
        decoder: nn.Module,
        scale: torch.Tensor,
        prior: nn.Module,
        *,
        learned_scale: bool = True,
    ) -> None:
        super().__init__()
        self.transform, self.loc, self.log_variance = transform, loc, log_variance
        self.decoder = decoder
        self.register_buffer("start", scale)
        self.log_change = nn.Parameter(torch.zeros_like(scale)) if learned_scale else None
        self.prior = prior

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        transform: str = "log",
        scale: float | None = None,
        n_latent: int = 6,
        hidden: Sequence[int] = (128, 32, 16),
        norm: str | None = "batch",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> "GaussianVAE":
        """Build a Gaussian VAE for data from plain numbers.

        Parameters
        ----------
        transform
            ``"log"``: log counts at a common library size, standardised; ``"pearson"``: analytic Pearson
            residuals; ``"raw"``: the counts. See :mod:`pyrosc.nn.transforms`.
        scale
            sigma of all genes, in units of the transformed counts. None: learned, of each gene, from its
            standard deviation on, and at least a twentieth of that.
        data, n_latent, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`. Mean and scale of z have hidden layers of these widths each.
        """
        require(scale is None or 0 < scale < math.inf, f"scale must be above 0, or None, not {scale!r}")
        n, to_values = data.n_genes, transform_of(transform, data)
        mean, sd = moments_of(to_values, data)
        return cls(
            to_values,
            network(n, hidden, n_latent, norm=norm, dropout=dropout),
            network(n, hidden, n_latent, norm=norm, dropout=dropout),
            network(n_latent, hidden[::-1], n, norm=norm, dropout=dropout, start=mean),
            sd if scale is None else torch.full_like(sd, scale),
            StandardNormal(n_latent),
            learned_scale=scale is None,
        )

    def model(self, cells: Cells) -> None:
        """Sample z and the transformed counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            mu = self.decoder(z)
            pyro.deterministic("rho", self.transform.share(mu, cells), event_dim=1)
            # At least a twentieth of the start: the density of a gene that does not vary has no bound.
            change = 1.0 if self.log_change is None else self.log_change.clamp_min(-3).exp()
            pyro.sample("x", dist.Normal(mu, self.start * change).to_event(1), obs=self.transform(cells))

    def guide(self, cells: Cells) -> None:
        """Sample z given the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            t = self.transform(cells)
            moments = torch.cat([self.loc(t), self.log_variance(t)], -1)
            pyro.sample("z", normal(moments).to_event(1))
