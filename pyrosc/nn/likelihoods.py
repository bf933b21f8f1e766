"""Likelihoods p(x given z) of counts: modules that add to a mean what else a distribution needs.

The mean is what the decoder emits, ``logits=`` of the genes' shares and a ``total=``, or ``mean=`` itself;
the distribution is given it as it is.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyrosc import distributions


@runtime_checkable
class Likelihood(Protocol):
    """From features h, batch codes and a mean to p(x given z)."""

    def __call__(
        self,
        h: Float[Tensor, "*draws cells hidden"],
        batch: Int[Tensor, "cells"],
        **mean: Float[Tensor, "..."],
    ) -> Any:  # a Pyro distribution
        """Return the distribution of the counts, batch shape (*draws, cells, genes).

        Parameters
        ----------
        h, batch
            Features of the cells, and their batches.
        mean
            ``logits=`` and ``total=``, or ``mean=``, each of last axis genes or 1.
        """
        ...


class Poisson(nn.Module):
    """x ~ Poisson(mean)."""

    def forward(self, h: Tensor, batch: Tensor, **mean: Any) -> distributions.Poisson:  # noqa: ARG002
        """Return Poisson(mean)."""
        return distributions.Poisson(**mean)


class NegativeBinomial(nn.Module):
    """x ~ NB(mean, theta), theta a free parameter of each gene, or of each gene and batch.

    Parameters
    ----------
    n_genes
        Number of genes.
    n_batches
        With more than one, each batch has inverse dispersions of its own.
    """

    def __init__(self, n_genes: int, n_batches: int = 1) -> None:
        super().__init__()
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_batches, n_genes))

    def forward(self, h: Tensor, batch: Tensor, **mean: Any) -> distributions.NegativeBinomial:  # noqa: ARG002
        """Return NegativeBinomial(mean, theta)."""
        log_theta = self.log_inverse_dispersion
        theta = log_theta.exp()[batch] if len(log_theta) > 1 else log_theta[0].exp()
        return distributions.NegativeBinomial(**mean, inverse_dispersion=theta)


class ZeroInflated(nn.Module):
    """Wraps another likelihood: with probability pi, read off h, a count is dropped to zero.

    Parameters
    ----------
    base
        Likelihood of the count that was not dropped.
    n_hidden, n_genes
        Widths of h and of the counts.
    """

    def __init__(self, base: Likelihood, n_hidden: int, n_genes: int) -> None:
        super().__init__()
        self.base = base
        self.gate_logits = nn.Linear(n_hidden, n_genes)

    def forward(self, h: Tensor, batch: Tensor, **mean: Any) -> distributions.ZeroInflated:
        """Return ZeroInflated(base, gate_logits)."""
        return distributions.ZeroInflated(self.base(h, batch, **mean), self.gate_logits(h))


class LinearNegativeBinomial(nn.Module):
    """x ~ NB(mean, theta = kappa mean), kappa of each gene: the variance is linear, mean (1 + 1 / kappa).

    NB1 of Cameron and Trivedi (1986), where a theta of the gene alone is NB2, of quadratic variance.

    Parameters
    ----------
    n_genes
        Number of genes.
    """

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, h: Tensor, batch: Tensor, **mean: Any) -> distributions.NegativeBinomial:  # noqa: ARG002
        """Return NegativeBinomial(mean, kappa mean)."""
        mu = distributions.Poisson(**mean).mean
        theta = (mu * self.log_inverse_dispersion.exp()).clamp_min(1e-10)
        return distributions.NegativeBinomial(mu, theta)


class ConditionalNegativeBinomial(nn.Module):
    """x ~ NB(mean, theta), theta of each gene and cell: log theta is linear in h, and at most 9 from 0.

    Parameters
    ----------
    n_hidden, n_genes
        Widths of h and of the counts.
    """

    def __init__(self, n_hidden: int, n_genes: int) -> None:
        super().__init__()
        self.log_inverse_dispersion = nn.Linear(n_hidden, n_genes)

    def forward(self, h: Tensor, batch: Tensor, **mean: Any) -> distributions.NegativeBinomial:  # noqa: ARG002
        """Return NegativeBinomial(mean, theta)."""
        theta = self.log_inverse_dispersion(h).clamp(-9, 9).exp()
        return distributions.NegativeBinomial(**mean, inverse_dispersion=theta)


def likelihood_of(
    name: str, *, n_genes: int, n_hidden: int, n_batches: int = 1, dispersion: str = "gene"
) -> Likelihood:
    """Return the likelihood of a name.

    Parameters
    ----------
    name
        ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``.
    n_genes, n_hidden, n_batches
        Widths of the counts and of the decoder's features; number of batches.
    dispersion
        theta is a parameter of each ``"gene"``, of each gene and batch (``"gene-batch"``), in proportion to
        the mean by a factor of each gene (``"gene-linear"``: so is the variance), or log-linear in the
        features, of each gene and cell (``"gene-cell"``).

    Raises
    ------
    ValueError
        If a name is another one.
    """
    bases = {
        "gene": lambda: NegativeBinomial(n_genes),
        "gene-batch": lambda: NegativeBinomial(n_genes, n_batches),
        "gene-linear": lambda: LinearNegativeBinomial(n_genes),
        "gene-cell": lambda: ConditionalNegativeBinomial(n_hidden, n_genes),
    }
    if dispersion not in bases:
        msg = f"dispersion must be one of {', '.join(bases)}, not {dispersion!r}"
        raise ValueError(msg)
    if name not in ("poisson", "nb", "zip", "zinb"):
        msg = f'likelihood must be "poisson", "nb", "zip" or "zinb", not {name!r}'
        raise ValueError(msg)
    if name in ("poisson", "zip") and dispersion != "gene":
        msg = f'a Poisson has no dispersion: leave it out, or give likelihood="nb"; got {dispersion!r}'
        raise ValueError(msg)
    base = bases[dispersion]() if name in ("nb", "zinb") else Poisson()
    return ZeroInflated(base, n_hidden, n_genes) if name in ("zip", "zinb") else base
