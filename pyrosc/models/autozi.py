"""AutoZI: the variational autoencoder that decides, gene by gene, whether counts are zero-inflated."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.distributions.counts import ZeroInflated
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import StandardNormal


class AutoZI(nn.Module):
    r"""Variational autoencoder of counts with a decision about each gene's zero inflation (Clivio 2019).

    For gene g and cell n, in batch s::

        delta_g ~ Beta(a, b)                                share of the gene's counts that are not inflated
        z_n     ~ Normal(0, I)                              the cell's state
        l_n     ~ LogNormal(m_s, v_s^2)                     library size; or the observed total
        rho_n   = softmax(W f(z_n, s) + U s + c)            shares of the genes, rows sum to 1
        m_ng    ~ Bernoulli(delta_g)
        x_ng    ~ NB(l_n rho_ng, theta_g) if m_ng, else ZINB(l_n rho_ng, theta_g, pi(z_n))

    m is summed out: that is a ZINB with dropout probability (1 - delta_g) pi_ng, and pi is at least
    `least_dropout`. Inflation by less is none: with a bound of .01, as in the source, counts of a few
    thousand cells can't tell the two stories apart, and genes without inflation keep P near the prior's 1/2.
    The guide's delta_g has a beta distribution for each gene, and :func:`pyrosc.zero_inflation` gives
    P(delta_g < 1/2). The library size is latent by default: an observed total takes up dropouts that all
    genes have. The decisions hardly move the validation loss, by which a fit would stop before they are made,
    so fits train on all cells to the end (the attribute ``validation``).

    Parameters
    ----------
    encoder, decoder, likelihood, library, library_encoder, prior
        See :class:`VAE`; the likelihood is of counts that are not inflated.
    gate
        From features to the logits of pi.
    concentration
        a and b.
    least_dropout
        Smallest pi.

    References
    ----------
    Clivio, Lopez, Regier, Gayoso, Jordan and Yosef, Detecting zero-inflated genes in single-cell
    transcriptomics data, 2019.

    Examples
    --------
    >>> from pyrosc import AutoZI, datasets, fit_svi, zero_inflation
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(AutoZI.for_data(adata), adata, epochs=1, progress=False)
    >>> zero_inflation(fit).shape
    (20,)
    """

    elbo = TraceMeanField_ELBO
    validation = 0.0

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        likelihood: Likelihood,
        gate: nn.Linear,
        library: nn.Module,
        library_encoder: nn.Module,
        prior: StandardNormal,
        concentration: tuple[float, float] = (0.5, 0.5),
        least_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood, self.gate = encoder, decoder, likelihood, gate
        self.library, self.library_encoder, self.prior = library, library_encoder, prior
        self.concentration, self.least_dropout = concentration, least_dropout
        self.log_concentration = nn.Parameter(torch.zeros(2, gate.out_features))

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        likelihood: str = "nb",
        library: str = "latent",
        dispersion: str = "gene",
        concentration: Sequence[float] = (0.5, 0.5),
        least_dropout: float = 0.1,
        n_latent: int = 10,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        seed: int = 0,
    ) -> "AutoZI":
        """Build an AutoZI for data from plain numbers.

        Parameters
        ----------
        likelihood
            Of counts that are not inflated: ``"nb"`` or ``"poisson"``.
        concentration
            a and b of the prior of delta, above 0. Below 1, genes tend to be inflated all or not at all.
        least_dropout
            Smallest dropout probability of inflated counts, at least 0 and below 1.
        data, library, dispersion, n_latent, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`.
        """
        require(
            likelihood in ("nb", "poisson"),
            f'likelihood is of counts that are not inflated, "nb" or "poisson", not {likelihood!r}',
        )
        above = len(concentration) == 2 and min(concentration) > 0
        require(above, f"concentration needs two numbers above 0, not {concentration!r}")
        require(0 <= least_dropout < 1, f"least_dropout is a probability below 1, not {least_dropout!r}")
        decoder = decoder_for(data, n_latent, hidden[::-1], norm=norm, dropout=dropout)
        return cls(
            Encoder(data.n_genes, n_latent, Covariates(), hidden, norm=norm, dropout=dropout),
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            nn.Linear(decoder.n_out, data.n_genes),
            *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
            StandardNormal(n_latent),
            (float(concentration[0]), float(concentration[1])),
            least_dropout,
        )

    def model(self, cells: Cells) -> None:
        """Sample delta, z, l and the counts."""
        a, b = (cells.x.new_full((cells.x.shape[1],), c) for c in self.concentration)
        delta = pyro.sample("delta", dist.Beta(a, b).to_event(1))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            l = pyro.sample("l", self.library(cells).to_event(1))
            h, logits = self.decoder(z, cells)
            pyro.deterministic("rho", logits.softmax(-1), event_dim=1)
            pi = self.least_dropout + (1 - self.least_dropout) * torch.sigmoid(self.gate(h))
            gate_logits = ((1 - delta) * pi).clamp(1e-6, 1 - 1e-6).logit()
            x = ZeroInflated(self.likelihood(h, cells.batch, logits=logits, total=l), gate_logits)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells: Cells) -> None:
        """Sample delta, and z and l given the counts."""
        pyro.sample("delta", dist.Beta(*self.log_concentration.exp()).to_event(1))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", self.encoder(cells).to_event(1))
            pyro.sample("l", self.library_encoder(cells).to_event(1))

    @property
    def zero_inflation(self) -> Float[Tensor, "genes"]:
        """P(delta_g < 1/2): probability that most of the gene's counts are zero-inflated."""
        from scipy.special import betainc

        a, b = self.log_concentration.detach().cpu().double().exp()
        return torch.as_tensor(betainc(a.numpy(), b.numpy(), 0.5))
