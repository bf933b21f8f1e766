"""SCVIS: a VAE with a Student-t likelihood whose plane keeps neighbours together, as t-SNE does."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import recipe, require
from pyrosc.nn.layers import MLP, network, normal
from pyrosc.nn.neighbours import divergence, similarities
from pyrosc.nn.priors import StandardNormal
from pyrosc.nn.transforms import Transform, moments_of, transform_of


class SCVIS(nn.Module):
    r"""Variational autoencoder for pictures: scvis (Ding 2018).

    For cell n and gene g, with t(x) the transformed counts::

        z_n     ~ Normal(0, I)                              a point of the plane
        t(x)_ng ~ StudentT(nu_g, mu_g(z_n), sigma_g)        heavy tails: an outlier bends nothing

    with nu_g and sigma_g parameters of the gene, and a guide of two moments. The objective has a further
    term, `attraction` times the Kullback-Leibler divergence of the cells' similarities in the minibatch, p_ij
    by t(x), from those in the plane, q_ij by a Student-t kernel of z, as in t-SNE. It is the ELBO less that
    term, in nats per cell, so no bound of the likelihood: :func:`pyrosc.log_likelihood` leaves the term out.

    It does not know of batches: a question's `batch` changes nothing.

    Departures from the source: similarities and likelihood are of transformed counts, not of 100 principal
    components; sigma is of the gene, not read off z; the attraction and the KL keep their weights (the source
    lets the one rise and the other fall in training), and all cells weigh the same.

    Parameters
    ----------
    transform, prior
        From cells to values of each gene, and back to shares; to the prior of z.
    encoder, decoder
        Networks from the values to the moments of z, and from z to mu.
    scale
        Start of sigma, (genes,).
    attraction
        Weight of the further term, nats per cell.
    perplexity
        Effective number of a cell's neighbours.

    References
    ----------
    Ding, Condon and Shah, Interpretable dimensionality reduction of single cell transcriptome data with deep
    generative models, 2018.

    Examples
    --------
    >>> from pyrosc import SCVIS, datasets, fit_svi, latent
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(SCVIS.for_data(adata), adata, epochs=1, progress=False)
    >>> latent(fit, adata).shape
    (60, 2)
    """

    elbo = TraceMeanField_ELBO
    start: Tensor

    def __init__(
        self,
        transform: Transform,
        encoder: nn.Module,
        decoder: nn.Module,
        scale: Float[Tensor, "genes"],
        prior: StandardNormal,
        attraction: float,
        perplexity: float,
    ) -> None:
        super().__init__()
        self.transform, self.encoder, self.decoder = transform, encoder, decoder
        self.register_buffer("start", scale)
        self.log_change = nn.Parameter(torch.zeros_like(scale))
        self.raw_df = nn.Parameter(torch.full_like(scale, 5.0))
        self.prior = prior
        self.attraction, self.perplexity = attraction, perplexity

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        transform: str = "log",
        attraction: float | None = None,
        perplexity: float = 10.0,
        n_latent: int = 2,
        hidden: Sequence[int] = (128, 64, 32),
        norm: str | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> "SCVIS":
        """Build a scvis for data from plain numbers.

        Parameters
        ----------
        attraction
            Weight of the neighbours, nats per cell; the number of genes by default, as the source has that of
            its components.
        perplexity
            Effective number of a cell's neighbours in the minibatch, above 1.
        data, transform, n_latent, hidden, norm, dropout, seed
            See :meth:`GaussianVAE.for_data`.
        """
        require(perplexity > 1, f"perplexity must be above 1, not {perplexity!r}")
        require(attraction is None or attraction >= 0, f"attraction must be at least 0, not {attraction!r}")
        to_values = transform_of(transform, data)
        mean, sd = moments_of(to_values, data)
        down = MLP(data.n_genes, hidden, norm=norm, dropout=dropout)
        up = network(n_latent, hidden[::-1], data.n_genes, norm=norm, dropout=dropout, start=mean)
        encoder = nn.Sequential(down, nn.Linear(down.n_out, 2 * n_latent))
        attraction = float(data.n_genes if attraction is None else attraction)
        return cls(to_values, encoder, up, sd, StandardNormal(n_latent), attraction, perplexity)

    def model(self, cells: Cells) -> None:
        """Sample z and the transformed counts; count the further term."""
        t = self.transform(cells)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            apart = divergence(similarities(t, self.perplexity), z)
            pyro.factor("neighbours", -self.attraction * apart)
            mu = self.decoder(z)
            pyro.deterministic("rho", self.transform.share(mu, cells), event_dim=1)
            # At least a twentieth of the start: the density of a gene that does not vary has no bound.
            sigma = self.start * self.log_change.clamp_min(-3).exp()
            x = dist.StudentT(1.0 + softplus(self.raw_df), mu, sigma)
            pyro.sample("x", x.to_event(1), obs=t)

    def guide(self, cells: Cells) -> None:
        """Sample z given the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", normal(self.encoder(self.transform(cells))).to_event(1))
