"""LDVAE: the variational autoencoder with a linear decoder, whose loadings can be read (linear scVI)."""

from collections.abc import Sequence

import pyro
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import decoder_for, likelihood_for, recipe
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import StandardNormal


class LDVAE(nn.Module):
    r"""Linearly decoded variational autoencoder of counts: a factor model with an encoder (Svensson 2020).

    For cell n, in batch s, and gene g::

        z_n   ~ Normal(0, I)                                factors of the cell
        l_n   ~ LogNormal(m_s, v_s^2)                       library size; or the observed total
        rho_n = softmax(W z_n + U s + b)                    shares of the genes, rows sum to 1
        x_ng  ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated

    so that a gene's loading W_gk says by how much log rho_g rises, against other genes, with factor k. The
    guide is a network, as in :class:`VAE`. :func:`pyrosc.loadings` gives W as a table.

    Departures from the source: no batch normalisation of z (there is then nothing to fold into the
    loadings), offsets and covariates enter the logits, the library size is observed by default, and the
    parameters have a normal prior of precision 5 (the attribute ``weight_decay``).

    Parameters
    ----------
    encoder, decoder, likelihood, library, library_encoder, prior
        See :class:`VAE`; the decoder has no hidden layers.

    References
    ----------
    Svensson, Gayoso, Yosef and Pachter, Interpretable factor models of single-cell RNA-seq via variational
    autoencoders, 2020.

    Examples
    --------
    >>> from pyrosc import LDVAE, datasets, fit_svi, loadings
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(LDVAE.for_data(adata, n_latent=3), adata, epochs=1, progress=False)
    >>> loadings(fit).shape
    (20, 3)
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
        prior: StandardNormal,
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
        likelihood: str = "nb",
        library: str = "observed",
        dispersion: str = "gene",
        n_latent: int = 10,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        encode_covariates: bool = False,
        seed: int = 0,
    ) -> "LDVAE":
        """Build an LDVAE for data from plain numbers.

        Parameters
        ----------
        hidden, norm, dropout
            Of the encoder.
        data, likelihood, library, dispersion, n_latent, encode_covariates, seed
            See :meth:`VAE.for_data`.
        """
        encoded = Covariates.for_data(data) if encode_covariates else Covariates()
        decoder = decoder_for(data, n_latent, (), norm=None, dropout=0.0)
        return cls(
            Encoder(data.n_genes, n_latent, encoded, hidden, norm=norm, dropout=dropout),
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            *library_of(library, data, encoded, hidden[:1], norm=norm, dropout=dropout),
            StandardNormal(n_latent),
        )

    def model(self, cells: Cells) -> None:
        """Sample z, l and the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
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

    @property
    def loadings(self) -> Float[Tensor, "genes latent"]:
        """W: change of each gene's log share with each factor, natural log; its mean over genes, 0.

        A shift common to all genes leaves the shares as they are, so it is taken off.
        """
        weight = self.decoder.logits.weight[:, : self.prior.n_latent].detach()
        return weight - weight.mean(0)
