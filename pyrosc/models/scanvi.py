"""SCANVI: the semi-supervised variational autoencoder, in which some cells bring their labels (scANVI)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.nn.functional import one_hot

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.models.building import decoder_for, likelihood_for, recipe, require
from pyrosc.nn.covariates import Covariates, with_type
from pyrosc.nn.encoder_decoder import Decoder, Encoder
from pyrosc.nn.layers import network, normal
from pyrosc.nn.library_size import library_of
from pyrosc.nn.likelihoods import Likelihood


class SCANVI(nn.Module):
    r"""Semi-supervised variational autoencoder of counts: scANVI (Xu 2021), M1 + M2 of Kingma (2014).

    For cell n, in batch s, and gene g::

        y_n   ~ Categorical(1 / K)                          the cell's type; NaN where it is not known
        u_n   ~ Normal(0, I)                                what varies within the type
        z_n   ~ Normal(m(u_n, y_n), v(u_n, y_n)^2)          the cell's state
        l_n   ~ LogNormal(m_s, v_s^2)                       library size; or the observed total
        rho_n = softmax(W f(z_n, s) + U s + b)              shares of the genes, rows sum to 1
        x_ng  ~ NB(l_n rho_ng, theta_g)                     or Poisson, or either zero-inflated

    and the guide is q(z given x) q(y given z) q(u given z, y), where q(y given z), the classifier, is certain
    of a label that is known. Types are enumerated in the ELBO, all in parallel; the decoder runs once.

    The objective has a further term, `classification` times log q(y given z) of the known labels, in nats:
    without it the ELBO of a labelled cell does not train the classifier (Kingma 2014, eq. 9). So it is the
    ELBO plus that term. :func:`pyrosc.predict` gives the probabilities of the types. Of a cell with a label,
    :func:`pyrosc.log_likelihood` is log p(x, y), not log p(x).

    Parameters
    ----------
    encoder, decoder, likelihood, library, library_encoder
        See :class:`VAE`.
    classifier
        From z to logits of the types.
    within_encoder, within_decoder
        From z and y to the moments of u, and from u and y to those of z: (cells, 2 latent) each.
    n_labels, n_latent
        K, and the width of u and z.
    classification
        Weight of the further term.

    References
    ----------
    Xu et al., Probabilistic harmonization and annotation of single-cell transcriptomics data with deep
    generative models, 2021. Kingma, Rezende, Mohamed and Welling, Semi-supervised learning with deep
    generative models, 2014.

    Examples
    --------
    >>> from pyrosc import SCANVI, datasets, fit_svi, from_anndata, predict
    >>> data = from_anndata(datasets.simulate(60, 20, n_types=2), labels_key="cell_type")
    >>> fit = fit_svi(SCANVI.for_data(data), data, epochs=1, progress=False)
    >>> list(predict(fit, data).probability)
    ['type_0', 'type_1']
    """

    elbo = TraceEnum_ELBO

    def __init__(
        self,
        encoder: Encoder,
        classifier: nn.Module,
        within_encoder: nn.Module,
        within_decoder: nn.Module,
        decoder: Decoder,
        likelihood: Likelihood,
        library: nn.Module,
        library_encoder: nn.Module,
        n_labels: int,
        n_latent: int,
        classification: float,
    ) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier
        self.within_encoder, self.within_decoder = within_encoder, within_decoder
        self.decoder, self.likelihood = decoder, likelihood
        self.library, self.library_encoder = library, library_encoder
        self.n_labels, self.n_latent, self.classification = n_labels, n_latent, classification

    @classmethod
    @recipe
    def for_data(
        cls,
        data: Counts,
        *,
        likelihood: str = "nb",
        library: str = "observed",
        dispersion: str = "gene",
        classification: float = 50.0,
        n_latent: int = 10,
        hidden: Sequence[int] = (128,),
        norm: str | None = "batch",
        dropout: float = 0.1,
        seed: int = 0,
    ) -> "SCANVI":
        """Build a SCANVI for data from plain numbers.

        Parameters
        ----------
        data
            Counts with two labels or more (:func:`~pyrosc.from_anndata` with `labels_key`); a cell without
            one is unlabelled.
        classification
            Weight of the known labels' classification, in nats per cell; at least 0.
        likelihood, library, dispersion, n_latent, hidden, norm, dropout, seed
            See :meth:`VAE.for_data`. All networks have these hidden layers.
        """
        n_labels = len(data.schema.labels)
        require(n_labels >= 2, f"{n_labels} labels: give from_anndata a labels_key that has two or more")
        require(classification >= 0, f"classification is a weight of at least 0, not {classification!r}")
        decoder = decoder_for(data, n_latent, hidden[::-1], norm=norm, dropout=dropout)
        return cls(
            Encoder(data.n_genes, n_latent, Covariates(), hidden, norm=norm, dropout=dropout),
            network(n_latent, hidden, n_labels, norm=None, dropout=dropout),
            network(n_latent + n_labels, hidden, 2 * n_latent, norm=None, dropout=dropout),
            network(n_latent + n_labels, hidden, 2 * n_latent, norm=None, dropout=dropout),
            decoder,
            likelihood_for(data, likelihood, dispersion, decoder.n_out),
            *library_of(library, data, Covariates(), hidden[:1], norm=norm, dropout=dropout),
            n_labels,
            n_latent,
            classification,
        )

    def model(self, cells: Cells) -> None:
        """Sample y, u, z, l and the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            equal = cells.x.new_zeros(len(cells), self.n_labels)
            y = pyro.sample("y", dist.Categorical(logits=equal))
            zero = cells.x.new_zeros(self.n_latent)
            u = pyro.sample("u", dist.Normal(zero, 1.0).to_event(1))
            z = pyro.sample("z", normal(self.within_decoder(with_type(u, y, self.n_labels))).to_event(1))
            known = cells.labels >= 0
            log_q = self.classifier(z).log_softmax(-1)
            label = cells.labels.clamp_min(0).expand(log_q.shape[:-1]).unsqueeze(-1)
            log_q = log_q.gather(-1, label).squeeze(-1)
            pyro.factor("classification", self.classification * torch.where(known, log_q, 0.0))
            l = pyro.sample("l", self.library(cells).to_event(1))
            h, logits = self.decoder(z, cells)
            pyro.deterministic("rho", logits.softmax(-1), event_dim=1)
            x = self.likelihood(h, cells.batch, logits=logits, total=l)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells: Cells) -> None:
        """Sample z given the counts, y given z or the label, and u given both; l given the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            z = pyro.sample("z", self.encoder(cells).to_event(1))
            logits = self.classifier(z)
            pyro.deterministic("p_y", logits.softmax(-1), event_dim=1)
            certain = 60.0 * (one_hot(cells.labels.clamp_min(0), self.n_labels) - 0.5)
            logits = torch.where((cells.labels >= 0).unsqueeze(-1), certain, logits)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("u", normal(self.within_encoder(with_type(z, y, self.n_labels))).to_event(1))
            pyro.sample("l", self.library_encoder(cells).to_event(1))
