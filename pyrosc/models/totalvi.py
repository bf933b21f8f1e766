"""TOTALVI: the variational autoencoder of RNA and surface proteins of the same cells (totalVI)."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from anndata import AnnData
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.data.read import as_counts
from pyrosc.data.schema import Schema
from pyrosc.distributions.counts import NegativeBinomial
from pyrosc.engine.rng import seeded
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import CellsLinear, Decoder
from pyrosc.nn.layers import MLP, activation, check_sizes, normal
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood, likelihood_of
from pyrosc.nn.priors import StandardNormal


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
    decoder
        From z and cells to features h and logits of the shares rho.
    likelihood
        From l rho, h and batches to the distribution of the RNA counts.
    foreground
        From h to what gives alpha and p, (cells, 2 proteins).
    background
        From cells to the prior of beta, (cells, proteins).
    library, library_encoder
        From cells to the prior and to the guide's distribution of l, (cells, 1).
    prior
        From cells to the prior of z, vectors of batch shape (cells,).

    References
    ----------
    Gayoso, Steier, Lopez, Regier, Nazor, Streets and Yosef, Joint probabilistic modeling of single-cell
    multi-omic data with totalVI, 2021.
    """

    elbo = TraceMeanField_ELBO
    weight_decay = 5.0
    recipe: dict[str, Any] | None = None
    schema: Schema | None = None

    def __init__(
        self,
        encoder: nn.Module,
        z_moments: nn.Linear,
        beta_moments: nn.Linear,
        decoder: Decoder,
        likelihood: Likelihood,
        foreground: nn.Linear,
        background: "Background",
        library: nn.Module,
        library_encoder: nn.Module,
        prior: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.z_moments = z_moments
        self.beta_moments = beta_moments
        self.decoder = decoder
        self.likelihood = likelihood
        self.foreground = foreground
        self.background = background
        self.library = library
        self.library_encoder = library_encoder
        self.prior = prior
        self.log_inverse_dispersion = nn.Parameter(torch.full((foreground.out_features // 2,), 2.0))

    @classmethod
    def for_data(
        cls,
        data: Counts | AnnData,
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
            See :meth:`VAE.for_data`.

        Raises
        ------
        ValueError
            If the data have no proteins, `hidden` no layer, or a name is unknown.
        """
        recipe = {key: value for key, value in locals().items() if key not in ("cls", "data")}
        check_sizes(hidden=hidden, n_latent=n_latent)
        data = as_counts(data)
        if not hidden:
            msg = "hidden names a layer at least, not ()"
            raise ValueError(msg)
        n_proteins = len(data.schema.proteins)
        if not n_proteins:
            msg = 'the data have no proteins: read them with from_anndata(..., protein_key="...")'
            raise ValueError(msg)
        seen = Covariates.for_data(data)
        with seeded(torch.device("cpu"), seed):
            decoder = Decoder(n_latent, data.n_genes, seen, hidden[::-1], norm=norm, dropout=dropout)
            decoder.start_at(torch.as_tensor(data.share))
            totalvi = cls(
                nn.Sequential(
                    BothLinear(CellsLinear(data.n_genes, hidden[0], Covariates()), n_proteins, hidden[0]),
                    *activation(hidden[0], norm=norm, dropout=dropout),
                    MLP(hidden[0], hidden[1:], norm=norm, dropout=dropout),
                ),
                nn.Linear(hidden[-1], 2 * n_latent),
                nn.Linear(hidden[-1], 2 * n_proteins),
                decoder,
                likelihood_of(
                    likelihood,
                    n_genes=data.n_genes,
                    n_hidden=decoder.n_out,
                    n_batches=len(data.schema.batches),
                    dispersion=dispersion,
                ),
                nn.Linear(decoder.n_out, 2 * n_proteins),
                Background.for_data(data),
                *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
                StandardNormal(n_latent),
            )
        totalvi.recipe, totalvi.schema = recipe, data.schema
        return totalvi

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


class BothLinear(nn.Module):
    """A linear map of log(1 + x), and of log(1 + y) of the proteins measured and of which these are.

    Parameters
    ----------
    cells
        The map of the genes' counts.
    n_proteins, n_out
        Widths of y and of the result.
    """

    def __init__(self, cells: CellsLinear, n_proteins: int, n_out: int) -> None:
        super().__init__()
        self.cells = cells
        self.proteins = nn.Linear(2 * n_proteins, n_out, bias=False)

    def forward(self, cells: Cells) -> Float[Tensor, "cells out"]:
        """Return the map of each cell."""
        measured = (cells.proteins >= 0).to(cells.x)
        y = cells.proteins.clamp_min(0.0).log1p()
        return self.cells(cells) + self.proteins(torch.cat([y * measured, measured], -1))


class Background(nn.Module):
    """p(beta) = LogNormal(c, d^2) of each batch and protein, learned.

    Parameters
    ----------
    log_mean, log_sd
        Where c and log d start, (batches, proteins), natural log of counts; NaN where it is not known.
    """

    start: Tensor

    def __init__(
        self, log_mean: Float[Tensor, "batches proteins"], log_sd: Float[Tensor, "batches proteins"]
    ):
        super().__init__()
        self.register_buffer("start", torch.cat([log_mean, log_sd], -1))
        self.change = nn.Parameter(torch.zeros_like(self.start))  # 0 is where weight decay draws it to

    @classmethod
    def for_data(cls, data: Counts) -> "Background":
        """Start at the lower of two normals fitted to log(1 + y) in each batch that has the protein."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture  # takes long to import

        n_batches, n_proteins = len(data.schema.batches), len(data.schema.proteins)
        moments = np.full((2, n_batches, n_proteins), np.nan)
        for s in range(n_batches):
            for t, y in enumerate(data.proteins[data.batch == s].T):
                y = np.log1p(y[y >= 0])
                if len(np.unique(y)) < 3:
                    moments[:, s, t] = (y.mean(), 0.5) if len(y) else np.nan
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # a start need not be the end
                    mixture = GaussianMixture(2, random_state=0).fit(y[:, None])
                lower = mixture.means_.argmin()
                moments[:, s, t] = mixture.means_[lower, 0], mixture.covariances_[lower, 0, 0] ** 0.5
        # A batch without the protein starts at the mean of those that have it; without any, it is not known.
        have = ~np.isnan(moments)
        total, n = np.where(have, moments, 0).sum(1, keepdims=True), have.sum(1, keepdims=True)
        mean = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
        c, d = torch.as_tensor(np.where(have, moments, mean)).float()
        return cls(c.clamp_min(-1.0), d.clamp(0.05, 2.0).log())

    def forward(self, cells: Cells) -> dist.LogNormal:
        """Return LogNormal, (cells, proteins)."""
        c, log_d = (self.start.nan_to_num() + self.change)[cells.batch].chunk(2, -1)
        return dist.LogNormal(c, log_d.exp())
