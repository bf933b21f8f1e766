"""Log densities of counts entry by entry, with partial derivatives in closed form, in torch operations.

Each log density is written twice: at a zero, where it is simple and is evaluated densely, and at a positive
count, where it needs special functions and is evaluated in float64 for just those entries (a tenth of a
typical count matrix). These are the reference that the compiled loops over whole cells are compared with.

Partial derivatives are computed with the density, only those that are wanted, and autograd differentiates
none of it: a log density is differentiable once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn.functional import softplus

from pyrosc.engine.once import only_once

_SMALLEST_MEAN = torch.finfo(torch.float32).tiny  # at a positive count, where a mean of 0 gives -inf
_STEEPEST = 1e30  # bounds d log p / d mean as mean -> 0, so that times a library size it is finite in float32

ONCE = (
    "pyrosc's densities of counts are differentiable once: their slopes are closed forms. For second "
    "derivatives use Pyro's of the same counts, dist.Poisson(mean), dist.GammaPoisson(theta, theta / mean) "
    "and dist.ZeroInflatedDistribution(base, gate_logits=...), which torch differentiates again"
)

# The log densities at zero and at a positive count x, each with its partial derivatives, computed only if
# called. mu: mean, theta: inverse dispersion, log_p0: the base's log density, g: logit of dropout.

_Terms = tuple[Tensor, *tuple[Callable[[], Tensor], ...]]
_Density = tuple[Callable[..., _Terms], Callable[..., _Terms]]


def _poisson_at_zero(mu: Tensor) -> _Terms:
    return -mu, lambda: mu.new_full((), -1.0)


def _poisson_at_count(x: Tensor, mu: Tensor) -> _Terms:
    mu = mu.clamp(min=_SMALLEST_MEAN)
    return x * mu.log() - mu - torch.lgamma(x + 1), lambda: ((x - mu) / mu).clamp(max=_STEEPEST)


def _negative_binomial_at_zero(mu: Tensor, theta: Tensor) -> _Terms:
    log1p_ratio = (mu / theta).log1p()
    total = mu + theta
    return -theta * log1p_ratio, lambda: -theta / total, lambda: _less_log1p_ratio(mu / total, log1p_ratio)


def _negative_binomial_at_count(x: Tensor, mu: Tensor, theta: Tensor) -> _Terms:
    mu = mu.clamp(min=_SMALLEST_MEAN)
    log1p_ratio = (mu / theta).log1p()
    total = mu + theta
    share = mu / total
    log_rising, d_log_rising = _log_rising_factorial(theta, x)
    return (
        log_rising - torch.lgamma(x + 1) + x * share.log() - theta * log1p_ratio,
        lambda: ((x - mu) / mu * (theta / total)).clamp(max=_STEEPEST),
        lambda: d_log_rising() - x / total + _less_log1p_ratio(share, log1p_ratio),
    )


def _zero_inflated_at_zero(log_p0: Tensor, g: Tensor) -> _Terms:
    p_kept = torch.sigmoid(-g)
    p_positive = p_kept * -log_p0.expm1()
    # Where p(0) is near 1, its log needs p(x > 0) to full relative accuracy; near 0, the sum in log space.
    log_sum = torch.logaddexp(g, log_p0) + p_kept.log()
    return (
        torch.where(p_positive < 0.5, (-p_positive).log1p(), log_sum),
        lambda: torch.sigmoid(log_p0 - g),
        lambda: torch.sigmoid(g - log_p0) * p_positive,
    )


def _zero_inflated_at_count(x: Tensor, log_p0: Tensor, g: Tensor) -> _Terms:
    return log_p0 - softplus(g), lambda: torch.ones_like(x), lambda: -torch.sigmoid(g)


POISSON: _Density = (_poisson_at_zero, _poisson_at_count)
NEGATIVE_BINOMIAL: _Density = (_negative_binomial_at_zero, _negative_binomial_at_count)
ZERO_INFLATED: _Density = (_zero_inflated_at_zero, _zero_inflated_at_count)


def _less_log1p_ratio(s: Tensor, log1p_ratio: Tensor) -> Tensor:
    """Return s - log(1 + r), s = r / (1 + r); where that cancels, by its series -s^2 / 2 - s^3 / 3 - ..."""
    n_terms = 4 if s.dtype == torch.float32 else 10
    series = _polynomial(s, *(-1 / k for k in range(2, 2 + n_terms))).mul_(s).mul_(s)
    return torch.lerp(s - log1p_ratio, series, (s < 0.05).to(s.dtype))  # faster than torch.where on a CPU


def _log_rising_factorial(theta: Tensor, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Log of Gamma(theta + x) / Gamma(theta), and its derivative in theta, within 1e-11.

    A difference of lgammas loses its digits where theta is large: lgamma(1e8) is 1.7e9. Instead the first six
    factors come off each gamma function, and Stirling's series of the rest are subtracted term by term.
    """
    a, b = theta.clone(), theta + x
    factors, slope = torch.ones_like(b), torch.zeros_like(b)
    for _ in range(6):
        factors *= a / b
        slope.addcdiv_(x, a * b)  # 1 / a - 1 / b
        a += 1
        b += 1
    log_growth = (x / a).log1p()
    value = factors.log() + (b - 0.5) * log_growth + x * (a.log() - 1) + _stirling(b) - _stirling(a)
    return value, lambda: slope + log_growth + x / (2 * a * b) + _stirling_slope(b) - _stirling_slope(a)


def _stirling(z: Tensor) -> Tensor:
    """Log Gamma(z) less (z - 1/2) log z - z + log(2 pi) / 2, for z >= 6 (Abramowitz and Stegun 6.1.41)."""
    return _polynomial(1 / z**2, 1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188) / z


def _stirling_slope(z: Tensor) -> Tensor:
    """Digamma(z) less log z - 1 / (2 z), for z >= 6 (Abramowitz and Stegun 6.3.18)."""
    return _polynomial(1 / z**2, 0.0, -1 / 12, 1 / 120, -1 / 252, 1 / 240, -1 / 132)


def _polynomial(x: Tensor, *coefficients: float) -> Tensor:
    """c0 + c1 x + c2 x^2 + ..., in place but for the first product."""
    c0, *middle, last = coefficients
    total = last * x
    for c in reversed(middle):
        total.add_(c).mul_(x)
    return total.add_(c0)


# --- evaluating them

_SMALL = 2**15
"""Entries up to which a density is evaluated at all of them, instead of looking up the positive counts."""


def log_prob_of(density: _Density, batch_shape: Size, value: Tensor, *parameters: Tensor) -> Tensor:
    """Return the log density of each count, in nats, in the broadcast shape of counts and batch shape."""
    if not torch.is_grad_enabled():
        parameters = tuple(p.detach() for p in parameters)  # so that no partial derivative is computed
    log_prob = _ClosedForm.apply(density, value, *parameters)
    return log_prob.expand(torch.broadcast_shapes(batch_shape, log_prob.shape))


class _ClosedForm(torch.autograd.Function):
    """A log density of counts whose gradients are the closed forms it comes with."""

    @staticmethod
    def forward(ctx: Any, density: _Density, value: Tensor, *parameters: Tensor) -> Any:
        at_zero, at_count = density
        ctx.wanted, ctx.shapes = ctx.needs_input_grad[2:], [p.shape for p in parameters]
        shape = torch.broadcast_shapes(value.shape, *ctx.shapes)
        zeros = [y.expand(shape) for y in _evaluate(at_zero(*parameters), ctx.wanted)]
        # A lookup would have CUDA wait for the host, and no recording of a step can hold it.
        if value.is_cuda or shape.numel() <= _SMALL:
            counts = _evaluate(at_count(*map(_widen, (value, *parameters))), ctx.wanted)
            terms = [torch.where(value == 0, y, at.to(y.dtype)) for y, at in zip(zeros, counts, strict=True)]
        else:
            entries = _positive_entries(value, shape)
            taken = (_widen(_take(t, entries, shape)) for t in (value, *parameters))
            counts = _evaluate(at_count(*taken), ctx.wanted)
            terms = [y.contiguous() for y in zeros]
            for y, at in zip(terms, counts, strict=True):
                y.view(-1).index_copy_(0, entries, at.to(y.dtype))
        log_prob, *partials = terms
        ctx.save_for_backward(*(p for p, want in zip(parameters, ctx.wanted, strict=True) if want), *partials)
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n = sum(ctx.wanted)
        parameters, partials = ctx.saved_tensors[:n], iter(ctx.saved_tensors[n:])
        with torch.no_grad():
            wanted = zip(ctx.wanted, ctx.shapes, strict=True)
            slopes = [(grad * next(partials)).sum_to_size(n) if want else None for want, n in wanted]
        return None, None, *only_once(slopes, [grad, *parameters], ONCE)


def _evaluate(terms: _Terms, wanted: Sequence[bool]) -> list[Tensor]:
    log_prob, *partials = terms
    return [log_prob, *(partial() for partial, want in zip(partials, wanted, strict=True) if want)]


def _positive_entries(value: Tensor, shape: Size) -> Tensor:
    """Places of positive counts in the flattened broadcast; counts shared by draws are searched once."""
    tile = _tile(value, shape)
    entries = (tile != 0).nonzero().squeeze(-1)
    offsets = torch.arange(0, shape.numel(), max(tile.numel(), 1), device=value.device)
    return entries if len(offsets) <= 1 else (offsets.unsqueeze(-1) + entries).reshape(-1)


def _take(tensor: Tensor, entries: Tensor, shape: Size) -> Tensor:
    tile = _tile(tensor, shape)
    return tile.index_select(0, entries if tile.numel() == shape.numel() else entries % tile.numel())


def _tile(tensor: Tensor, shape: Size) -> Tensor:
    """Flatten to a vector whose repetition is the flattened broadcast, if possible without a copy."""
    sizes = tensor.shape
    while sizes and sizes[0] == 1:
        sizes = sizes[1:]
    return (tensor if sizes == shape[len(shape) - len(sizes) :] else tensor.expand(shape)).reshape(-1)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)  # MPS has no float64
