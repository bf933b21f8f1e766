"""VAE: the variational autoencoder of single-cell counts (scVI, scVAE)."""

from collections.abc import Sequence

import pyro
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import prior_of


class VAE(nn.Module):
    r"""Variational autoencoder of counts: scVI (Lopez 2018), scVAE (Gronbech 2020).

    For cell n, in batch s, and gene g::

        z_n   ~ Normal(0, I)                                the cell's state; or a mixture, see `prior`
        l_n   ~ LogNormal(m_s, v_s^2)                       library size; or the observed total
        rho_n = softmax(W f(z_n, s) + U s + b)              shares of the genes, rows sum to 1
        x_ng  ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated

    and the guide reads its moments off the counts::

        z_n | x_n ~ Normal(mu(x_n), sigma(x_n)^2),    l_n | x_n ~ LogNormal(log sum_g x_ng + a(x_n), b(x_n)^2)

    f is a multilayer perceptron, theta_g a parameter of the gene (or of gene and batch), the zero inflation's
    gate logits are linear in f. s stands for batch, categorical and continuous covariates.

    Departures from scVI: the library is observed by default, and the guide of a latent one corrects the
    observed total; covariates enter the first layer and the last, where each gene has an offset of its own;
    the last layer's bias starts at the genes' mean shares; all parameters, log theta among them, have a
    normal prior of precision 5 (the attribute ``weight_decay``), which the losses reported leave out.

    Parameters
    ----------
    encoder
        From cells to the distribution of z, (cells, latent).
    decoder
        From z and cells to features h and logits of the shares rho.
    likelihood
        From l rho, h and batches to the distribution of the counts.
    library, library_encoder
        From cells to the prior and to the guide's distribution of l, (cells, 1).
    prior
        From cells to the prior of z, vectors of batch shape (cells,).

    References
    ----------
    Lopez, Regier, Cole, Jordan and Yosef, Deep generative modeling for single-cell transcriptomics, 2018.
    Gronbech et al., scVAE: variational auto-encoders for single-cell gene expression data, 2020.

    Examples
    --------
    >>> from pyrosc import VAE, datasets, fit_svi, latent
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(VAE.for_data(adata, n_latent=5), adata, epochs=1, progress=False)
    >>> latent(fit, adata).shape
    (60, 5)
    """

    elbo = TraceMeanField_ELBO
    weight_decay = 5.0  # chosen on four data sets, see the README

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        likelihood: Likelihood,
        library: nn.Module,
        library_encoder: nn.Module,
        prior: nn.Module,
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
        n_latent: int = 30,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        encode_covariates: bool = False,
        prior: str = "normal",
        n_components: int = 50,
        seed: int = 0,
    ) -> "VAE":
        """Build a VAE for data from plain numbers.

        Parameters
        ----------
        data
            Counts, or an AnnData with counts in X: sizes, mean shares, and moments of libraries and
            covariates are read off it.
        likelihood
            ``"nb"``, ``"poisson"``, ``"zip"`` or ``"zinb"``.
        library
            ``"observed"``: l is the cell's total. ``"latent"``: l is inferred; its prior has the mean and
            sd of the log totals of each batch.
        dispersion
            ``"gene"``: theta of each gene; ``"gene-batch"``: of each gene and batch; ``"gene-linear"``: theta
            in proportion to the mean, so that the variance is mean (1 + 1 / kappa_g), not mean + mean^2 /
            theta_g; ``"gene-cell"``: of each gene and cell, log theta linear in f.
        n_latent
            Width of z.
        hidden
            Widths of the encoder's hidden layers; the decoder has them in reverse.
        norm
            ``"batch"``, ``"layer"`` or None: normalisation in the hidden layers.
        dropout
            Probability that a hidden unit is dropped in training.
        encode_covariates
            Whether the encoder sees the covariates too; the decoder always does.
        prior
            Of z. ``"normal"``: N(0, I). ``"mixture"``: of `n_components` normals, learned. ``"vamp"``: the
            mean of the guide's posteriors of `n_components` pseudo-cells, learned too; it takes no batch
            normalisation.
        n_components
            Of those priors.
        seed
            Of the initial weights.

        Raises
        ------
        ValueError
            If a name is unknown or a number out of range.
        """
        require(
            prior != "vamp" or not encode_covariates,
            "pseudo-cells have no covariates: with a VampPrior give encode_covariates=False",
        )
        encoded = Covariates.for_data(data) if encode_covariates else Covariates()
        decoder = decoder_for(data, n_latent, hidden[::-1], norm=norm, dropout=dropout)
        encoder = Encoder(data.n_genes, n_latent, encoded, hidden, norm=norm, dropout=dropout)
        return cls(
            encoder,
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            *library_of(library, data, encoded, hidden[:1], norm=norm, dropout=dropout),
            prior_of(prior, n_latent, encoder, data, n_components),
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
