"""Summaries: mean, sd and interval of each entry, of draws, or in closed form where there is one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pyrosc.distributions.counts import new_counts
from pyrosc.posterior.gamma_poisson import Rates, zero_inflated

Summary = Float[Tensor, "4 cells genes"]
"""Mean, sd, lower and upper."""

_FEW = 6
"""Counts below this one are summed over, not drawn."""


def of_draws(drawn: Float[Tensor, "draws cells genes"], interval: float) -> Summary:
    """Summarise draws.

    Parameters
    ----------
    drawn
        Draws of each entry.
    interval
        Probability of the interval.
    """
    mean = drawn.mean(0)
    return torch.stack((mean, _variance(drawn, mean).sqrt_(), *_quantiles(drawn, interval)))


def of_rates(rates: Rates, mean: Tensor, interval: float) -> Summary:
    """Summarise w = mean u, u the factor of this very cell."""
    center, spread = _moments(rates, mean)
    return torch.stack((center, spread.sqrt_(), *_quantiles(mean * rates.draw_factor(), interval)))


def of_new_counts(rates: Rates, mean: Tensor, interval: float) -> Summary:
    """Summarise x' ~ Poisson(w), whose variance is E w + Var w."""
    center, spread = _moments(rates, mean)
    ends = _whole(_quantiles(new_counts(mean * rates.draw_factor()), interval))
    return torch.stack((center, spread.add_(center).sqrt_(), *ends))


def of_logs(rates: Rates, mean: Tensor, interval: float) -> Summary:
    """Summarise log(1 + w)."""
    return of_draws(torch.log1p(mean * rates.draw_factor()), interval)


def of_logs_of_new_counts(rates: Rates, mean: Tensor, scale: Tensor, interval: float) -> Summary:
    """Summarise log(1 + scale x'), x' ~ Poisson(w): without draws, where a new count is surely small.

    Parameters
    ----------
    rates, mean, interval
        See :func:`of_new_counts`.
    scale : Tensor of shape (cells, 1)
        Of a new count.
    """
    chances = [p.mean(0) for p in rates.chances(mean, _FEW)]
    new = new_counts(mean * rates.draw_factor())
    logs, many = torch.log1p(scale * new), new >= _FEW
    n_many = many.sum(0)

    def expected(f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of f: each small count by its chance, those above by their mean among the draws."""
        of_many = torch.where(many, f(logs), 0.0).sum(0) / n_many.clamp_min(1)
        of_many = torch.where(n_many > 0, of_many, f(torch.log1p(scale * _FEW)))
        of_few = sum(p * f(torch.log1p(scale * k)) for k, p in enumerate(chances))
        return of_few + (1 - torch.stack(chances).sum(0)).clamp_min_(0) * of_many

    center = expected(lambda log: log)
    spread = expected(lambda log: (log - center) ** 2)
    ends = (torch.log1p(scale * end) for end in _whole(_quantiles(new, interval)))
    return torch.stack((center, spread.sqrt_(), *ends))


def of_repaired(rates: Rates, threshold: float | None, interval: float) -> Summary:
    """Summarise the count before dropout: as observed, or a new one where that is a dropout."""
    zero_inflated(rates.likelihood)
    if threshold is not None:
        dropped = rates.hidden.mean(0) > threshold
        rates = replace(rates, hidden=dropped.float().expand_as(rates.hidden))
    drawn = rates.draw_count()
    spread = _variance(drawn, drawn.mean(0))
    ends = _whole(_quantiles(drawn, interval))
    return torch.stack((rates.expected_count().mean(0), spread.sqrt_(), *ends))


def _moments(rates: Rates, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of w: E E[w | z], and E Var[w | z] + Var E[w | z], z the cell's state."""
    expected = mean * rates.expected_factor()
    center = expected.mean(0)
    spread = (mean.square() * rates.variance_of_factor()).mean(0)
    return center, spread.add_(_variance(expected, center))


def _variance(values: Float[Tensor, "draws cells genes"], mean: Tensor) -> Tensor:
    """Return the variance over draws: torch.var takes ten times as long over a leading axis."""
    return sum((value - mean).square_() for value in values).div_(len(values))


def _quantiles(values: Float[Tensor, "draws cells genes"], interval: float) -> tuple[Tensor, Tensor]:
    """Return the ends of a central interval of this probability over draws."""
    tail = (1 - interval) / 2
    return _low_quantile(values, tail), -_low_quantile(-values, tail)


def _whole(ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the least interval of whole numbers around one."""
    low, high = ends
    return low.floor_(), high.ceil_()


def _low_quantile(values: Float[Tensor, "draws cells genes"], share: float) -> Tensor:
    """Return a quantile below the median over draws: with so many below it a new draw is, on average.

    That is the value at place share (draws + 1), linearly interpolated (numpy's "weibull"); with the more
    common share (draws - 1) + 1 an interval of 90% from 50 draws would cover 86.5%.
    Of the draws only the smallest need be in order: each is let sink to its place among those before it.
    """
    place = max(0.0, share * (len(values) + 1) - 1)
    below = int(place)
    n_smallest = min(below + 2, len(values))
    if n_smallest > 8:
        smallest = list(values.sort(0).values[:n_smallest])
    else:
        smallest = [torch.full_like(values[0], torch.inf) for _ in range(n_smallest)]
        for value in values:
            for i, other in enumerate(smallest):
                smallest[i], value = torch.minimum(other, value), torch.maximum(other, value)
    return torch.lerp(smallest[below], smallest[-1], place - below)
