"""VSC: variational sparse coding, an autoencoder whose code is mostly exact zeros."""

from collections.abc import Sequence

import pyro
import torch
from jaxtyping import Float
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder
from pyrosc.nn.ica import independent_components
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.sparse_code import SpikeSlabEncoder, code_prior_of


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
    encoder, decoder, likelihood, library, library_encoder
        See :class:`VAE`; the encoder's distribution is a :class:`SpikeSlab`.
    prior
        From cells to the prior of z, (cells, latent).

    References
    ----------
    Tonolini, Jensen and Murray-Smith, Variational sparse coding, 2019. Higgins et al., beta-VAE, 2017.
    Titsias and Lazaro-Gredilla, Spike and slab variational inference for multi-task learning, 2011.

    Examples
    --------
    >>> from pyrosc import VSC, datasets, fit_svi, inclusion
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(VSC.for_data(adata), adata, epochs=1, progress=False)
    >>> inclusion(fit, adata).shape
    (60, 6)
    """

    elbo = TraceMeanField_ELBO

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
        data, likelihood, library, dispersion, n_latent, norm, dropout, seed
            See :meth:`VAE.for_data`.
        """
        require(hidden, "hidden names a layer at least, not ()")
        within = 1e-6 <= inclusion <= 1 - 1e-6
        require(within, f"inclusion is a probability, 1e-6 or more from 0 and 1, not {inclusion!r}")
        require(decoder in ("mlp", "linear"), f"decoder must be 'mlp' or 'linear', not {decoder!r}")
        encoder = SpikeSlabEncoder(
            data.n_genes, n_latent, hidden, branch, inclusion, norm=norm, dropout=dropout
        )
        layers = (branch, *hidden[::-1]) if decoder == "mlp" else ()
        shares = decoder_for(data, n_latent, layers, norm=norm, dropout=dropout)
        if decoder == "linear":
            parts = torch.as_tensor(independent_components(data, n_latent))
            with torch.no_grad():  # the code's numbers have the variance alpha
                shares.logits.weight[:, : parts.shape[1]] = parts / inclusion**0.5
        return cls(
            encoder,
            shares,
            likelihood_for(data, likelihood, dispersion, shares.n_out),
            *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
            code_prior_of(prior, inclusion, n_latent, encoder, data, n_pseudo),
        )

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
