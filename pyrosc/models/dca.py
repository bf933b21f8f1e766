"""DCA: the deep count autoencoder, which denoises with a deterministic code."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import likelihood_for, recipe, require
from pyrosc.nn.layers import MLP
from pyrosc.nn.likelihoods import Likelihood
from pyrosc.nn.priors import Flat
from pyrosc.nn.transforms import LogNormalised


class DCA(nn.Module):
    r"""Deep count autoencoder (Eraslan 2019).

    For cell n and gene g, with the size factor s_n = total / median total and t(x) the standardised logs::

        z_n  = e(t(x_n))                                    the code, deterministic
        h_n  = f(z_n)
        mu   = s_n exp(W h_n + b)
        x_ng ~ ZINB(mu_ng, theta_ng, pi_ng)                 theta and pi read off h too

    The code has no prior. The parameters have a normal prior of precision 20 (the attribute
    ``weight_decay``), which the losses reported leave out, and the dropout probabilities the ridge lambda
    sum_g pi_ng^2, if any. The objective is no ELBO, though the loss is a likelihood that can be compared.
    :func:`pyrosc.dropout_probability` says which zeros are dropouts.

    ``"rho"`` is mu divided by its sum, and ``"l"`` that sum.

    Departures from the source: the prior of the parameters; theta is the exponential of what a layer gives
    (there softplus); offsets start at the genes' mean counts; the likelihood is exact in float32; Adam has
    the place of RMSprop, with gradients shortened to a norm of 5 (there each number to 5; the attribute
    ``clip_norm``, ``math.inf`` for none). It does not know of batches.

    Parameters
    ----------
    transform, prior
        From cells to the standardised logs, and to the prior of z: none.
    encoder, decoder
        Networks from the logs to the code, and from the code to h.
    mean
        Linear layer from h to log(mu / s).
    likelihood
        From mu, h and batches to the distribution of the counts.
    ridge
        lambda, nats.

    References
    ----------
    Eraslan, Simon, Mircea, Mueller and Theis, Single-cell RNA-seq denoising using a deep count autoencoder,
    2019.

    Examples
    --------
    >>> from pyrosc import DCA, datasets, dropout_probability, fit_svi
    >>> adata = datasets.simulate(60, 20)
    >>> fit = fit_svi(DCA.for_data(adata), adata, epochs=1, progress=False)
    >>> dropout_probability(fit, adata).shape
    (60, 20)
    """

    clip_norm = 5.0
    weight_decay = 20.0  # at 0 or 5 cells held out are described worse, see docs/models.md

    def __init__(
        self,
        transform: LogNormalised,
        encoder: nn.Module,
        decoder: nn.Module,
        mean: nn.Linear,
        likelihood: Likelihood,
        prior: Flat,
        ridge: float = 0.0,
    ) -> None:
        super().__init__()
        self.transform, self.encoder, self.decoder = transform, encoder, decoder
        self.mean, self.likelihood, self.prior, self.ridge = mean, likelihood, prior, ridge

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        likelihood: str = "zinb",
        dispersion: str = "gene-cell",
        hidden: Sequence[int] = (64, 32, 64),
        ridge: float = 0.0,
        norm: str | None = "batch",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> "DCA":
        """Build a DCA for data from plain numbers.

        Parameters
        ----------
        likelihood
            ``"zinb"``, ``"nb"``, ``"zip"`` or ``"poisson"``.
        dispersion
            Of NB and ZINB. ``"gene-cell"``: theta read off h (the source's "conditional"); ``"gene"`` (its
            "constant").
        hidden
            Widths of the layers; the middle one is the code.
        ridge
            lambda, at least 0.
        data, norm, dropout, seed
            See :meth:`VAE.for_data`.
        """
        require(hidden, "hidden names a layer at least, the code, not ()")
        require(ridge >= 0, f"ridge must be at least 0, not {ridge!r}")
        require(
            not ridge or likelihood in ("zip", "zinb"),
            f'the ridge is on dropout probabilities: it needs "zinb" or "zip", not {likelihood!r}',
        )
        require(
            dispersion in ("gene", "gene-cell"),
            f'dispersion must be "gene" or "gene-cell", not {dispersion!r}: a DCA knows no batches',
        )
        middle = len(hidden) // 2
        transform = LogNormalised.for_data(data)
        decoder = MLP(hidden[middle], hidden[middle + 1 :], norm=norm, dropout=dropout)
        mean = nn.Linear(decoder.n_out, data.n_genes)
        with torch.no_grad():
            mean.bias.copy_((torch.as_tensor(data.share) * transform.target).log())
        of_nb = dispersion if likelihood in ("nb", "zinb") else "gene"
        return cls(
            transform,
            MLP(data.n_genes, hidden[: middle + 1], norm=norm, dropout=dropout),
            decoder,
            mean,
            likelihood_for(data, likelihood, of_nb, decoder.n_out),
            Flat(hidden[middle]),
            ridge,
        )

    def model(self, cells: Cells) -> None:
        """Sample the counts given the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.prior(cells))
            h = self.decoder(z)
            size = cells.library.clamp_min(1) / self.transform.target
            mu = size * self.mean(h).clamp(-12, 14).exp()
            l = pyro.deterministic("l", mu.sum(-1, keepdim=True), event_dim=1)
            pyro.deterministic("rho", mu / l, event_dim=1)
            x = self.likelihood(h, cells.batch, mean=mu)
            if self.ridge:
                pyro.factor("ridge", -self.ridge * torch.sigmoid(x.gate_logits).square().sum(-1))
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells: Cells) -> None:
        """Give z the code."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Delta(self.encoder(self.transform(cells)), event_dim=1))
