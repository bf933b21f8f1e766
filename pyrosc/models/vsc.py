"""VSC: variational sparse coding, an autoencoder whose code is mostly exact zeros."""

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from anndata import AnnData
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.data.read import as_counts
from pyrosc.data.schema import Schema
from pyrosc.distributions.spike_slab import SpikeSlab
from pyrosc.engine.rng import seeded
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import CellsLinear, Decoder, trunk
from pyrosc.nn.ica import independent_components
from pyrosc.nn.layers import MLP, check_sizes
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood, likelihood_of
from pyrosc.nn.priors import PseudoCells


class VSC(nn.Module):
    r"""Variational sparse coding of counts (Tonolini 2019); with ``fit_svi(kl_weight=2.0)``, beta-VSC.

    For cell n, in batch s, latent k and gene g::

        z_nk  ~ (1 - alpha) delta_0 + alpha Normal(0, 1)    the cell's code: 0, or from the slab
        l_n   ~ LogNormal(m_s, v_s^2)                       library size; or the observed total
        rho_n = softmax(W f(z_n, s) + U s + b)              shares of the genes, rows sum to 1
        x_ng  ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated

    and the guide is spike-and-slab too, its three parameters read off the counts::

        z_nk | x_n ~ (1 - gamma_nk) delta_0 + gamma_nk Normal(mu_nk, sigma_nk^2)

    gamma starts where a likelihood that is Gaussian in z_nk would have it, at the prior odds times the ratio
    of the densities of 0 under prior and posterior slab (Titsias 2011)::

        logit gamma_nk = logit alpha + log sigma_nk + (mu_nk / sigma_nk)^2 / 2 + g(x_n)_k

    and the network g learns the rest. So gates are open while sigma is small, and close as the KL bites.

    With ``decoder="linear"``, rho_n = softmax(W z_n + U s + b), the code itself can be recovered and not just
    its space: a rotation of sparse numbers is less sparse. Rotated pairs of numbers are local optima, so W
    starts at the data's independent components. :func:`pyrosc.loadings` then gives W.

    In training a draw is relaxed: nothing is exactly 0, and the loss, whose KL is that of exact draws, is no
    bound. In evaluation zeros are exact, and the validation loss is the ELBO. :func:`pyrosc.inclusion` gives
    gamma.

    Departures from the source: the likelihood is of counts; gamma's logit is as above; relaxed draws
    are binary concrete of one sharpness, see :class:`SpikeSlab`, not of one that rises from 50 to 200 in a
    function of gamma; and there is no warm-up of the slab.

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
        From cells to the prior of z, (cells, latent).

    References
    ----------
    Tonolini, Jensen and Murray-Smith, Variational sparse coding, 2019. Higgins et al., beta-VAE, 2017.
    Titsias and Lazaro-Gredilla, Spike and slab variational inference for multi-task learning, 2011.
    """

    elbo = TraceMeanField_ELBO
    recipe: dict[str, Any] | None = None
    schema: Schema | None = None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder,
        likelihood: Likelihood,
        library: nn.Module,
        library_encoder: nn.Module,
        prior: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.library = library
        self.library_encoder = library_encoder
        self.prior = prior

    @classmethod
    def for_data(
        cls,
        data: Counts | AnnData,
        *,
        likelihood: str = "nb",
        library: str = "observed",
        dispersion: str = "gene",
        inclusion: float = 0.2,
        prior: str = "fixed",
        n_pseudo: int = 10,
        n_latent: int = 6,
        hidden: Sequence[int] = (128, 32),
        branch: int = 16,
        decoder: str = "mlp",
        norm: str | None = "batch",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> "VSC":
        """Build a VSC for data from plain numbers.

        Parameters
        ----------
        data
            Counts, or an AnnData with counts in X.
        inclusion
            alpha: prior probability that a number of the code is not 0.
        prior
            ``"fixed"``: as in the story. ``"pseudo"``: the source's, see :class:`PseudoInputPrior`.
        n_pseudo
            Pseudo-inputs of the latter.
        hidden, branch
            Widths of the encoder's common layers, and of the layer that mean, scale and inclusion have each
            of their own.
        decoder
            ``"mlp"``: its layers are the encoder's in reverse. ``"linear"``: it has none.
        likelihood, library, dispersion, n_latent, norm, dropout, seed
            See :meth:`VAE.for_data`.

        Raises
        ------
        ValueError
            If a name is unknown, or `inclusion` no probability.
        """
        recipe = {key: value for key, value in locals().items() if key not in ("cls", "data")}
        check_sizes(hidden=hidden, n_latent=n_latent)
        if not 1e-6 <= inclusion <= 1 - 1e-6 or not hidden:
            msg = (
                "inclusion is a probability, 1e-6 or more from 0 and 1, and hidden names a layer at least, "
                f"not {inclusion!r} and {hidden!r}"
            )
            raise ValueError(msg)
        data = as_counts(data)
        seen = Covariates.for_data(data)
        with seeded(torch.device("cpu"), seed):
            encoder = SpikeSlabEncoder(
                data.n_genes, n_latent, hidden, branch, inclusion, norm=norm, dropout=dropout
            )
            priors = {
                "fixed": lambda: SpikeSlabPrior(n_latent, inclusion),
                "pseudo": lambda: PseudoInputPrior(
                    encoder, PseudoCells.for_data(data, n_pseudo, encoder), n_latent, inclusion
                ),
            }
            layers = {"mlp": (branch, *hidden[::-1]), "linear": ()}
            for name, value, known in (("prior", prior, priors), ("decoder", decoder, layers)):
                if value not in known:
                    msg = f"{name} must be {' or '.join(map(repr, known))}, not {value!r}"
                    raise ValueError(msg)
            shares = Decoder(n_latent, data.n_genes, seen, layers[decoder], norm=norm, dropout=dropout)
            shares.start_at(torch.as_tensor(data.share))
            if decoder == "linear":
                parts = torch.as_tensor(independent_components(data, n_latent))
                with torch.no_grad():  # the code's numbers have the variance alpha
                    shares.logits.weight[:, : parts.shape[1]] = parts / inclusion**0.5
            vsc = cls(
                encoder,
                shares,
                likelihood_of(
                    likelihood,
                    n_genes=data.n_genes,
                    n_hidden=shares.n_out,
                    n_batches=len(data.schema.batches),
                    dispersion=dispersion,
                ),
                *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
                priors[prior](),
            )
        vsc.recipe, vsc.schema = recipe, data.schema
        return vsc

    def model(self, cells: Cells) -> None:
        """Sample the code z, l and the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells).to_event(1))
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
        """W of a linear decoder: see :attr:`LDVAE.loadings`."""
        if len(self.decoder.body):
            msg = 'only the VSC of decoder="linear" has loadings'
            raise TypeError(msg)  # (an AttributeError of a property of a module is not shown)
        weight = self.decoder.logits.weight[:, : self.encoder.n_latent].detach()
        return weight - weight.mean(0)


class SpikeSlabEncoder(nn.Module):
    """q(z given x), spike-and-slab: common layers, then a branch each for mean, log scale and inclusion.

    Parameters
    ----------
    n_genes, n_latent, hidden, branch, inclusion, norm, dropout
        See :meth:`VSC.for_data`.
    """

    SHARPNESS = 2.0
    """Of the relaxed draws: one over the temperature of the binary concrete distribution."""

    sharpness: Tensor

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        hidden: Sequence[int],
        branch: int,
        inclusion: float,
        *,
        norm: str | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.body = trunk(n_genes, Covariates(), hidden, norm=norm, dropout=dropout)
        self.loc, self.log_scale, self.logits = (
            nn.Sequential(MLP(hidden[-1], (branch,), norm=norm, dropout=dropout), nn.Linear(branch, n_latent))
            for _ in range(3)
        )
        self.n_latent, self.prior_logit = n_latent, math.log(inclusion / (1 - inclusion))
        self.register_buffer("sharpness", torch.tensor(self.SHARPNESS))

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return SpikeSlab(loc, scale, logits), (cells, latent): relaxed in training, exact otherwise."""
        q = self.exact(cells)
        return q.relaxed(self.sharpness) if self.training else q

    def exact(self, cells: Cells) -> SpikeSlab:
        """Return the distribution whose draws have exact zeros, (cells, latent)."""
        h = self.body(cells)
        loc, log_scale = self.loc(h), self.log_scale(h).clamp(-7, 7)
        scale = log_scale.exp()
        odds = self.prior_logit + log_scale + (loc / scale) ** 2 / 2
        return SpikeSlab(loc, scale, (odds + self.logits(h)).clamp(-10, 10))


class SpikeSlabPrior(nn.Module):
    """p(z): each number is 0 with probability 1 - alpha, else from N(0, 1).

    Parameters
    ----------
    n_latent
        Width of z.
    inclusion
        alpha.
    """

    logits: Tensor

    def __init__(self, n_latent: int, inclusion: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.full((n_latent,), inclusion).logit())

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return the prior, (cells, latent)."""
        zero = cells.x.new_zeros(len(cells), len(self.logits))
        return SpikeSlab(zero, torch.ones_like(zero), self.logits)


class PseudoInputPrior(nn.Module):
    r"""p(z) of the source: the guide's posterior of a pseudo-cell that a classifier chooses for each cell.

    The choice is a softmax of the cell's counts, and the pseudo-cell the weighted sum. The log density has a
    further term for each cell, -J KL(Bernoulli(its pseudo-cell's mean inclusion) || Bernoulli(alpha)) for the
    J latents, which keeps the pseudo-cells' codes sparse. A prior that looks at the cell is none: with it the
    objective is not an ELBO, and its value can't be compared with that of other models.

    Parameters
    ----------
    encoder
        The guide's, shared with it.
    pseudo
        The pseudo-cells.
    n_latent
        J.
    inclusion
        alpha.

    References
    ----------
    Tonolini, Jensen and Murray-Smith, Variational sparse coding, 2019, section 3.3.
    """

    def __init__(
        self, encoder: SpikeSlabEncoder, pseudo: PseudoCells, n_latent: int, inclusion: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pseudo = pseudo
        self.choice = CellsLinear(pseudo.start.shape[1], len(pseudo.start), Covariates())
        self.n_latent, self.inclusion = n_latent, inclusion

    def forward(self, cells: Cells) -> SpikeSlab:
        """Return the prior of each cell, (cells, latent), and count the further term."""
        chosen = self.encoder.exact(self.pseudo(cells, self.choice(cells).softmax(-1)))
        mean = chosen.inclusion.mean(-1).clamp(1e-6, 1 - 1e-6)
        sparse = (
            mean * (mean / self.inclusion).log() + (1 - mean) * ((1 - mean) / (1 - self.inclusion)).log()
        )  # (torch's KL of Bernoulli distributions can't be recorded, see `spike_slab.py`)
        pyro.factor("sparsity", -self.n_latent * sparse)
        return chosen
