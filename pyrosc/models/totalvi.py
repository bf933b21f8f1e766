"""TOTALVI: the variational autoencoder of RNA and surface proteins of the same cells (totalVI)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.nn.functional import softplus

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.distributions.counts import NegativeBinomial
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import CellsLinear, Decoder
from pyrosc.nn.layers import MLP, activation, normal
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import StandardNormal
from pyrosc.nn.proteins import Background, BothLinear


class TOTALVI(nn.Module):
    r"""Variational autoencoder of RNA and protein counts (CITE-seq): totalVI (Gayoso 2021).

    For cell n, in batch s, gene g and protein t::

        z_n    ~ Normal(0, I)                                the cell's state
        l_n    ~ LogNormal(m_s, v_s^2)                       library size of the RNA; or the observed total
        h_n    = f(z_n, s)
        rho_n  = softmax(W h_n + b)                          shares of the genes, rows sum to 1
        x_ng   ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated
        beta_nt ~ LogNormal(c_st, d_st^2)                    background of the protein, in counts
        v_nt   ~ Bernoulli(p_nt)                             foreground: the cell has the protein
        y_nt   ~ NB(beta_nt alpha_nt^v_nt, phi_t)            counts of the protein

    with alpha = exp(softplus(A h)) > 1 and p = sigmoid(B h). v is summed out. The guide is q(z given x, y)
    q(beta given x, y) q(l given x).

    A protein that was not measured in a cell (-1, all those of another panel, say) is left out of the
    likelihood and of the KL, and the guide is told that it is missing: no zero stands for it. Its beta is
    drawn from the prior.

    Departures from totalVI: z is normal, not its softmax; proteins and genes share the features h; the guide
    reads beta off the counts, not off z; no classifier is trained against differences between batches.
    c and d start at the lower of two normal distributions fitted to log(1 + y) of each batch and protein. All
    parameters have a normal prior of precision 5 (the attribute ``weight_decay``), c and log d around their
    start; the losses reported leave it out. :func:`pyrosc.log_likelihood` is log p(x, y).

    The deterministic sites ``"foreground"`` and ``"protein_mean"`` are the probability that v = 1 given y (p
    where y is missing), and that times beta alpha: counts of the protein without the background. Ask with
    :func:`pyrosc.foreground` and :func:`pyrosc.impute_proteins`.

    Parameters
    ----------
    encoder
        From cells to features, (cells, hidden).
    z_moments, beta_moments
        From features to the moments of z, (cells, 2 latent), and of log beta, (cells, 2 proteins).
    decoder, likelihood, library, library_encoder, prior
        See :class:`VAE`.
    foreground
        From h to what gives alpha and p, (cells, 2 proteins).
    background
        From cells to the prior of beta, (cells, proteins).

    References
    ----------
    Gayoso, Steier, Lopez, Regier, Nazor, Streets and Yosef, Joint probabilistic modeling of single-cell
    multi-omic data with totalVI, 2021.

    Examples
    --------
    >>> from pyrosc import TOTALVI, datasets, fit_svi, from_anndata, impute_proteins
    >>> adata = datasets.simulate_proteins(datasets.simulate(60, 20), 3)
    >>> data = from_anndata(adata, protein_key="protein_expression")
    >>> fit = fit_svi(TOTALVI.for_data(data), data, epochs=1, progress=False)
    >>> impute_proteins(fit, data).mean.shape
    (60, 3)
    """

    elbo = TraceMeanField_ELBO
    weight_decay = 5.0

    def __init__(
        self,
        encoder: nn.Module,
        z_moments: nn.Linear,
        beta_moments: nn.Linear,
        decoder: Decoder,
        likelihood: Likelihood,
        foreground: nn.Linear,
        background: Background,
        library: nn.Module,
        library_encoder: nn.Module,
        prior: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder, self.z_moments, self.beta_moments = encoder, z_moments, beta_moments
        self.decoder, self.likelihood = decoder, likelihood
        self.foreground, self.background = foreground, background
        self.library, self.library_encoder, self.prior = library, library_encoder, prior
        self.log_inverse_dispersion = nn.Parameter(torch.full((foreground.out_features // 2,), 2.0))

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        likelihood: str = "nb",
        library: str = "observed",
        dispersion: str = "gene",
        n_latent: int = 20,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        seed: int = 0,
    ) -> "TOTALVI":
        """Build a TOTALVI for data from plain numbers.

        Parameters
        ----------
        data
            Counts with proteins: :func:`~pyrosc.from_anndata` with `protein_key`.
        likelihood, library, dispersion, n_latent, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`; there is a hidden layer at least.
        """
        require(hidden, "hidden names a layer at least, not ()")
        n_proteins = len(data.schema.proteins)
        require(n_proteins, 'the data have no proteins: read them with from_anndata(..., protein_key="...")')
        decoder = decoder_for(data, n_latent, hidden[::-1], norm=norm, dropout=dropout)
        return cls(
            nn.Sequential(
                BothLinear(CellsLinear(data.n_genes, hidden[0], Covariates()), n_proteins, hidden[0]),
                *activation(hidden[0], norm=norm, dropout=dropout),
                MLP(hidden[0], hidden[1:], norm=norm, dropout=dropout),
            ),
            nn.Linear(hidden[-1], 2 * n_latent),
            nn.Linear(hidden[-1], 2 * n_proteins),
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            nn.Linear(decoder.n_out, 2 * n_proteins),
            Background.for_data(data),
            *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
            StandardNormal(n_latent),
        )

    def model(self, cells: Cells) -> None:
        """Sample z, l, beta and the counts of genes and proteins."""
        measured = cells.proteins >= 0
        y = cells.proteins.clamp_min(0.0)
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            l = pyro.sample("l", self.library(cells).to_event(1))
            h, logits = self.decoder(z, cells)
            pyro.deterministic("rho", logits.softmax(-1), event_dim=1)
            x = self.likelihood(h, cells.batch, logits=logits, total=l)
            pyro.sample("x", x.to_event(1), obs=cells.x)
            beta = pyro.sample("beta", self.background(cells).mask(measured).to_event(1))
            log_alpha, logits = self.foreground(h).chunk(2, -1)
            mean = torch.stack([beta, beta * softplus(log_alpha).clamp_max(15.0).exp()], -1)
            of_v = NegativeBinomial(mean, self.log_inverse_dispersion.exp()[:, None])
            v = dist.Categorical(logits=torch.stack([-logits, logits], -1) / 2)
            pyro.sample("proteins", dist.MixtureSameFamily(v, of_v).mask(measured).to_event(1), obs=y)
            ratio = (of_v.log_prob(y[..., None]) * measured[..., None]).diff(dim=-1).squeeze(-1)
            present = pyro.deterministic("foreground", (logits + ratio).sigmoid(), event_dim=1)
            pyro.deterministic("protein_mean", present * mean[..., 1], event_dim=1)

    def guide(self, cells: Cells) -> None:
        """Sample z, l and beta given the counts."""
        measured = cells.proteins >= 0
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            h = self.encoder(cells)
            pyro.sample("z", normal(self.z_moments(h)).to_event(1))
            pyro.sample("l", self.library_encoder(cells).to_event(1))
            prior, shift = self.background(cells), normal(self.beta_moments(h))
            loc = torch.where(measured, prior.loc + shift.loc, prior.loc)
            scale = torch.where(measured, shift.scale, prior.scale)
            pyro.sample("beta", dist.LogNormal(loc, scale).mask(measured).to_event(1))
