"""GMVAE: the variational autoencoder with a mixture of Gaussians for its clusters (scVAE)."""

from collections.abc import Sequence

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import decoder_for, likelihood_for, recipe
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import Mixture


class GMVAE(nn.Module):
    r"""Gaussian-mixture variational autoencoder of counts: scVAE (Gronbech 2020).

    For cell n, in batch s, and gene g::

        y_n   ~ Categorical(pi)                             the cell's cluster
        z_n   ~ Normal(mu_y, diag sigma_y^2)                the cell's state
        l_n   ~ LogNormal(m_s, v_s^2)                       library size; or the observed total
        rho_n = softmax(W f(z_n, s) + U s + b)              shares of the genes, rows sum to 1
        x_ng  ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated

    and the guide is q(z given x) = Normal(mu(x), sigma(x)^2) and q(y given z) = p(y given z), by Bayes' rule.

    y is summed out exactly: its sum is in the density of z, and the ELBO is that of the sum over y of
    q(y given z) times the ELBO of each. So the decoder runs once for each z, and no draw of y is needed.
    :func:`pyrosc.clusters` gives the probabilities of y, :func:`pyrosc.elbo` the parts of the ELBO. Mixtures
    have local optima: :meth:`for_data` starts mu at the centres of clusters of the codes that an untrained
    encoder makes of the cells (k-means). Different seeds of `for_data` with one of `fit_svi` have validation
    losses that can be compared.

    Departures from scVAE: it has a network q(y given x) and a q(z given x, y) of each component, and decodes
    each cell once a component; p(y given z) is the best q(y given z) that there is. The library size is
    observed by default, covariates and the prior of the parameters are as in :class:`VAE`.

    Parameters
    ----------
    encoder, decoder, likelihood, library, library_encoder
        See :class:`VAE`.
    prior
        The mixture.

    References
    ----------
    Gronbech et al., scVAE: variational auto-encoders for single-cell gene expression data, 2020.
    Jiang et al., Variational deep embedding, 2017 (the guide).

    Examples
    --------
    >>> from pyrosc import GMVAE, clusters, datasets, fit_svi
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(GMVAE.for_data(adata, n_components=4), adata, epochs=1, progress=False)
    >>> clusters(fit, adata).probability.shape
    (60, 4)
    """

    elbo = TraceMeanField_ELBO
    weight_decay = 5.0

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        likelihood: Likelihood,
        library: nn.Module,
        library_encoder: nn.Module,
        prior: Mixture,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.library, self.library_encoder, self.prior = library, library_encoder, prior

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        n_components: int,
        likelihood: str = "nb",
        library: str = "observed",
        dispersion: str = "gene",
        proportions: str | Sequence[float] = "learned",
        n_latent: int = 10,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        encode_covariates: bool = False,
        seed: int = 0,
    ) -> "GMVAE":
        """Build a GMVAE for data from plain numbers.

        Parameters
        ----------
        n_components
            Number of clusters.
        proportions
            pi: ``"learned"``, ``"uniform"``, or fixed numbers.
        data, likelihood, library, dispersion, n_latent, hidden, norm, dropout, encode_covariates, seed
            See :meth:`VAE.for_data`.
        """
        encoded = Covariates.for_data(data) if encode_covariates else Covariates()
        decoder = decoder_for(data, n_latent, hidden[::-1], norm=norm, dropout=dropout)
        gmvae = cls(
            Encoder(data.n_genes, n_latent, encoded, hidden, norm=norm, dropout=dropout),
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            *library_of(library, data, encoded, hidden[:1], norm=norm, dropout=dropout),
            Mixture(n_components, n_latent, proportions),
        )
        if data.n_cells > n_components:
            some = torch.randperm(data.n_cells)[:2000]  # enough to find clusters in
            gmvae.prior.start_at(gmvae.encoder(data.on("cpu").cells(some)).loc)
        return gmvae

    def model(self, cells: Cells) -> None:
        """Sample z, with y summed out, l and the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            pyro.deterministic("p_y", self.prior.responsibilities(z), event_dim=1)
            l = pyro.sample("l", self.library(cells).to_event(1))
            h, logits = self.decoder(z, cells)
            pyro.deterministic("rho", logits.softmax(-1), event_dim=1)
            x = self.likelihood(h, cells.batch, logits=logits, total=l)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells: Cells) -> None:
        """Sample z and l given the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", self.encoder(cells).to_event(1))
            pyro.sample("l", self.library_encoder(cells).to_event(1))
