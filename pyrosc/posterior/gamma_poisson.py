r"""Gamma-Poisson conjugacy: what a count says of its own rate.

A negative binomial count is a Poisson whose rate is the decoder's mean times a factor of this very cell::

    x ~ Poisson(w),    w = mu u,    u ~ Gamma(theta, theta)

With u summed out x is NB(mu, theta); given x the factor is Gamma(theta + x, theta + mu), so that w is
Gamma(theta + x, theta / mu + 1), and the count of a new measurement of the cell, x' ~ Poisson(w), is
negative binomial with inverse dispersion theta + x. The factor of a Poisson is 1. A count that says nothing
of its rate, a zero of the inflation component or one that was not measured, leaves the factor as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyrosc.distributions.counts import ZeroInflated, new_counts


@dataclass(frozen=True, eq=False)
class Rates:
    """Counts, and the rates that may lie behind them.

    Attributes
    ----------
    likelihood
        The distribution of the counts.
    x : Tensor of shape (draws, cells, genes)
        Counts.
    mean : Tensor of shape (draws, cells, genes)
        mu, in counts, before dropout.
    inverse_dispersion : Tensor of shape (draws, cells, genes), or None
        theta; None of a Poisson.
    hidden : Tensor of shape (draws, cells, genes)
        Probability that the count says nothing of its rate: 0 of a positive count; of a zero, the posterior
        probability that it came from the inflation component, a dropout; 1 of a gene that was not measured.
    """

    likelihood: Any
    x: Float[Tensor, "draws cells genes"]
    mean: Float[Tensor, "draws cells genes"]
    inverse_dispersion: Float[Tensor, "draws cells genes"] | None
    hidden: Float[Tensor, "draws cells genes"]

    def expected_factor(self) -> Float[Tensor, "draws cells genes"]:
        """Return the mean of u = w / mu given the count: 1, where that says nothing."""
        theta = self.inverse_dispersion
        if theta is None:
            return torch.ones_like(self.mean)
        return torch.lerp((theta + self.x) / (theta + self.mean), torch.ones_like(self.mean), self.hidden)

    def variance_of_factor(self) -> Float[Tensor, "draws cells genes"]:
        """Return the variance of u given the count."""
        theta = self.inverse_dispersion
        if theta is None:
            return torch.zeros_like(self.mean)
        seen, scale = (theta + self.x) / (theta + self.mean), theta + self.mean
        apart = self.hidden * (1 - self.hidden) * (seen - 1) ** 2
        return torch.lerp(seen / scale, 1 / theta, self.hidden) + apart

    def chances(self, mean: Tensor, n: int) -> Iterator[Float[Tensor, "draws cells genes"]]:
        """Yield P(x' = k given the count), k = 0 to n - 1, of a new count x' ~ Poisson(mean u)."""
        theta = self.inverse_dispersion
        if theta is None:
            yield from _poisson_chances(mean, n)
        elif not self.hidden.any():
            yield from _chances(theta + self.x, mean / (theta + self.mean), n)
        else:
            seen = _chances(theta + self.x, mean / (theta + self.mean), n)
            for saw, anew in zip(seen, _chances(theta, mean / theta, n), strict=True):
                yield torch.lerp(saw, anew, self.hidden)

    def draw_factor(self) -> Float[Tensor, "draws cells genes"]:
        """Draw u given the count."""
        seen = 1 - torch.bernoulli(self.hidden)
        return self._gamma(seen * self.x, seen * self.mean)

    def expected_count(self) -> Float[Tensor, "draws cells genes"]:
        """Return the mean of the count before dropout: as observed, or the mean count where it is hidden."""
        return torch.lerp(self.x, self.mean, self.hidden)

    def draw_count(self) -> Float[Tensor, "draws cells genes"]:
        """Draw the count before dropout."""
        anew = new_counts(self.mean * self._gamma(torch.zeros_like(self.x), torch.zeros_like(self.mean)))
        return torch.where(torch.bernoulli(self.hidden) > 0, anew, self.x)

    def _gamma(self, counted: Tensor, expected: Tensor) -> Tensor:
        """Draw from Gamma(theta + counted, theta + expected)."""
        theta = self.inverse_dispersion
        if theta is None:
            return torch.ones_like(self.mean)
        return torch._standard_gamma(theta + counted) / (theta + expected)


def _poisson_chances(mean: Tensor, n: int) -> Iterator[Tensor]:
    """Yield the probabilities of 0 to n - 1 of a Poisson."""
    p = torch.exp(-mean)
    for k in range(n):
        yield p
        p = p * (mean / (k + 1))


def _chances(shape: Tensor, scale: Tensor, n: int) -> Iterator[Tensor]:
    """Yield the probabilities of 0 to n - 1 of a Poisson whose rate is Gamma(shape) times scale."""
    p, odds = torch.exp(-shape * torch.log1p(scale)), scale / (1 + scale)
    for k in range(n):
        yield p
        p = p * odds * ((shape + k) / (k + 1))


def zero_inflated(counts: Any) -> ZeroInflated:
    """Return the distribution if it is zero-inflated.

    Raises
    ------
    TypeError
        If it is another one.
    """
    if not isinstance(counts, ZeroInflated):
        msg = f'{type(counts).__name__} has no dropouts: fit a model with likelihood="zinb" or "zip"'
        raise TypeError(msg)
    return counts
