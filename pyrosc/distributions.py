"""Count distributions: exact, stable in float32, and fast where most counts are zero.

Each log density is written twice: at a zero, where it is simple and is evaluated densely, and at a positive
count, where it needs special functions and is evaluated in float64 for just those entries (a tenth of a
typical count matrix). Partial derivatives come in closed form, so autograd differentiates none of it.

What programs ask for is the density of whole cells, ``NegativeBinomial(...).to_event(1)``. On a CPU that is
one compiled loop (`kernels.py`), on CUDA one kernel (`cuda.py`); elsewhere, and entry by entry, the torch
operations written here.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Num
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.distributions.torch import Independent
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from pyrosc.compiled import log_density_for

_SMALLEST_MEAN = torch.finfo(torch.float32).tiny  # at a positive count, where a mean of 0 gives -inf
_STEEPEST = 1e30  # bounds d log p / d mean as mean -> 0, so that times a library size it is finite in float32
_LARGEST_RATE = 4e9


def new_counts(rate: Tensor) -> Tensor:
    """Draw Poisson counts.

    Parameters
    ----------
    rate
        Means, in counts; 4e9 where they are more, since CUDA's sampler counts in 32 bits.
    """
    return torch.poisson(rate.clamp(max=_LARGEST_RATE))


@final
class Poisson(TorchDistribution):
    r"""Poisson counts.

    .. math:: p(x) = \mu^x e^{-\mu} / x!, \quad x \in \{0, 1, \dots\}, \quad \mathrm E x = \mathrm{Var} x=\mu

    The same as ``scipy.stats.poisson(mean)`` and ``torch.distributions.Poisson(mean)``.

    Parameters
    ----------
    mean
        :math:`\mu \ge 0`. Where the count is positive, a mean below 1.2e-38 (an underflowed softmax) is taken
        as that and the slope in the mean is at most 1e30, so log density and gradient remain finite.
    validate_args
        Whether to check parameters and counts. Default: Pyro's global setting.

    Raises
    ------
    ValueError
        Under validation, if a mean is negative or NaN, or a count in ``log_prob`` negative or fractional.
    """

    arg_constraints = {"mean": constraints.nonnegative}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, mean: Float[Tensor, "..."], *, validate_args: bool | None = None) -> None:
        self._mean = mean
        super().__init__(mean.shape, validate_args=validate_args)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self._mean.expand(self.batch_shape)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self.mean

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, in the broadcast shape of value and distribution."""
        if self._validate_args:
            self._validate_sample(value)
        return _log_prob(_POISSON, self.batch_shape, value, self._mean)

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            rate = self._mean.expand(self._extended_shape(Size(sample_shape)))
            return new_counts(rate)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return _as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Poisson":
        """Broadcast to a larger batch shape, without copying."""
        new = self._get_checked_instance(Poisson, _instance)
        new._mean = self._mean
        return _expanded(self, new, batch_shape)


@final
class NegativeBinomial(TorchDistribution):
    r"""Negative binomial counts by mean and inverse dispersion: a Poisson whose rate is gamma distributed.

    .. math::

        p(x) &= \frac{\Gamma(x + \theta)}{\Gamma(\theta)\, x!}
                \left(\frac{\theta}{\theta + \mu}\right)^\theta \left(\frac{\mu}{\theta + \mu}\right)^x,
                \qquad x \in \{0, 1, \dots\} \\
        \mathrm E x &= \mu, \qquad \mathrm{Var}\, x = \mu + \mu^2 / \theta

    It tends to Poisson as :math:`\theta \to \infty`. Source: Lopez et al. 2018, Grønbech et al. 2020.

    The same as ``scipy.stats.nbinom(n=theta, p=theta / (theta + mu))``, torch's
    ``NegativeBinomial(total_count=theta, logits=log(mu) - log(theta))`` and Pyro's
    ``GammaPoisson(theta, theta / mu)``.

    Parameters
    ----------
    mean
        :math:`\mu \ge 0`. Where the count is positive, a mean below 1.2e-38 (an underflowed softmax) is taken
        as that and the slope in the mean is at most 1e30, so log density and gradient remain finite.
    inverse_dispersion
        :math:`\theta > 0`; broadcasts against ``mean``.
    validate_args
        Whether to check parameters and counts. Default: Pyro's global setting.

    Raises
    ------
    ValueError
        Under validation, if a parameter is out of range, or a count in ``log_prob`` negative or fractional.
    """

    arg_constraints = {"mean": constraints.nonnegative, "inverse_dispersion": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self,
        mean: Float[Tensor, "..."],
        inverse_dispersion: Float[Tensor, "..."],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self._mean, self._inverse_dispersion = mean, inverse_dispersion
        batch_shape = torch.broadcast_shapes(mean.shape, inverse_dispersion.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self._mean.expand(self.batch_shape)

    @property
    def inverse_dispersion(self) -> Float[Tensor, "..."]:
        r""":math:`\theta`, in the batch shape."""
        return self._inverse_dispersion.expand(self.batch_shape)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r""":math:`\mu + \mu^2 / \theta`, in the batch shape."""
        return self.mean + self.mean**2 / self.inverse_dispersion

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, in the broadcast shape of value and distribution."""
        if self._validate_args:
            self._validate_sample(value)
        return _log_prob(_NEGATIVE_BINOMIAL, self.batch_shape, value, self._mean, self._inverse_dispersion)

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            theta = self._inverse_dispersion.expand(self._extended_shape(Size(sample_shape)))
            rate = torch._standard_gamma(theta) * (self._mean / theta)
            return new_counts(rate)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return _as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "NegativeBinomial":
        """Broadcast to a larger batch shape, without copying."""
        new = self._get_checked_instance(NegativeBinomial, _instance)
        new._mean, new._inverse_dispersion = self._mean, self._inverse_dispersion
        return _expanded(self, new, batch_shape)


@final
class ZeroInflated(TorchDistribution):
    r"""Counts of which a share drops out to zero: a mixture of a point mass at 0 and a base distribution.

    .. math::

        p(x) &= \pi\, [x = 0] + (1 - \pi)\, p_0(x), \qquad \pi = \mathrm{sigmoid}(g), \quad x = 0, 1, \dots \\
        \mathrm E x &= (1 - \pi)\, \mu_0, \qquad \mathrm{Var}\, x = (1 - \pi)\, (\sigma_0^2 + \pi \mu_0^2)

    ZIP is ``ZeroInflated(Poisson(...), g)`` and ZINB is ``ZeroInflated(NegativeBinomial(...), g)``. Source:
    Lopez et al. 2018, Grønbech et al. 2020.

    The same as Pyro's ``ZeroInflatedDistribution(base, gate_logits=g)``; torch and scipy have none.

    Parameters
    ----------
    base
        Distribution of the counts that do not drop out: Poisson or NegativeBinomial.
    gate_logits
        :math:`g`, log odds of dropout; broadcasts against ``base``.
    validate_args
        Whether to check parameters and counts. Default: Pyro's global setting.

    Raises
    ------
    ValueError
        If ``base`` has an event shape. Under validation, if a logit is NaN, or a count in ``log_prob`` is
        negative or fractional.
    """

    arg_constraints = {"gate_logits": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self, base: Distribution, gate_logits: Float[Tensor, "..."], *, validate_args: bool | None = None
    ) -> None:
        if base.event_shape:
            msg = f"base must be a distribution of single counts, got event shape {tuple(base.event_shape)}"
            raise ValueError(msg)
        self.base, self._gate_logits = base, gate_logits
        batch_shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    @property
    def gate_logits(self) -> Float[Tensor, "..."]:
        """Log odds of dropout, in the batch shape."""
        return self._gate_logits.expand(self.batch_shape)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        r""":math:`(1 - \pi) \mu_0`, in the batch shape."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r""":math:`(1 - \pi) (\sigma_0^2 + \pi \mu_0^2)`, in the batch shape."""
        g = self.gate_logits
        return torch.sigmoid(-g) * (self.base.variance + torch.sigmoid(g) * self.base.mean**2)

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, in the broadcast shape of value and distribution."""
        if self._validate_args:
            self._validate_sample(value)
        log_p0 = self.base.log_prob(value)
        return _log_prob(_ZERO_INFLATED, self.batch_shape, value, log_p0, self._gate_logits)

    def dropout_probability(self) -> Float[Tensor, "..."]:
        r"""Probability that an observed zero is a dropout, :math:`\pi / p(0)`, in the batch shape."""
        zero = self._gate_logits.new_zeros(())
        return torch.sigmoid(self.gate_logits - self.base.log_prob(zero))

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            counts = self.base.expand(self.batch_shape).sample(Size(sample_shape))
            dropout = torch.bernoulli(torch.sigmoid(self._gate_logits).expand(counts.shape))
            return counts.masked_fill(dropout.bool(), 0)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return _as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ZeroInflated":
        """Broadcast to a larger batch shape, without copying."""
        new = self._get_checked_instance(ZeroInflated, _instance)
        new.base, new._gate_logits = self.base, self._gate_logits
        return _expanded(self, new, batch_shape)


def _expanded(old: Any, new: Any, batch_shape: Sequence[int]) -> Any:
    """Give `new` the batch shape while its parameters keep theirs, so that gene-wise ones stay cheap."""
    if torch.broadcast_shapes(old.batch_shape, batch_shape) != Size(batch_shape):
        msg = f"cannot expand batch shape {tuple(old.batch_shape)} to {tuple(batch_shape)}"
        raise ValueError(msg)
    TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
    new._validate_args = old._validate_args
    return new


class _Cell(Independent):
    """Counts whose rightmost axes are one event: as any Independent, but summed over genes as it goes."""

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        base = self.base_dist
        if isinstance(base, MaskedDistribution):
            return self._masked_log_prob(value)
        parameters = _parameters(base)
        # (A value narrower than the event is repeated along it; no loop does that.)
        whole = value.numel() and value.ndim and base.batch_shape[-1] in (1, value.shape[-1])
        whole = whole and 0 not in base.batch_shape
        compiled = log_density_for(value, parameters) if parameters is not None and whole else None
        if parameters is None or compiled is None:
            return base.log_prob(value).sum(tuple(range(-self.reinterpreted_batch_ndims, 0)))
        if self._validate_args:
            base._validate_sample(value)
        if not torch.is_grad_enabled():
            parameters = [p if p is None else p.detach() for p in parameters]
        log_prob = _Rows.apply(compiled, value, *parameters)
        log_prob = log_prob.expand(torch.broadcast_shapes(base.batch_shape[:-1], log_prob.shape))
        return sum_rightmost(log_prob, self.reinterpreted_batch_ndims - 1)

    def _masked_log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Leave entries out: a zero where a mean of zero allows no other is certain."""
        masked = self.base_dist
        base = _of_mean(masked.base_dist, lambda mean: torch.where(masked._mask, mean, 0.0))
        return _Cell(base, self.reinterpreted_batch_ndims).log_prob(torch.where(masked._mask, value, 0))


def _of_mean(d: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the distribution of counts with another mean."""
    if isinstance(d, ZeroInflated):
        return ZeroInflated(_of_mean(d.base, change), d._gate_logits)
    new = copy(d)
    new._mean = change(d._mean)
    return new


def without(counts: Any, kept: Bool[Tensor, "genes"]) -> Any:
    """Return the distribution of a cell's counts that leaves genes out of the density: only `kept` have one.

    Parameters
    ----------
    counts
        A distribution whose rightmost axis, that of genes, is an event.
    kept
        Which genes stay.
    """
    base, n_axes = counts.base_dist, counts.reinterpreted_batch_ndims
    masked = MaskedDistribution(base, kept.expand(base.batch_shape))
    return _Cell(masked, n_axes) if _parameters(base) is not None else masked.to_event(n_axes)


def _as_event(base: Any, n_axes: int | None) -> Any:
    n_axes = len(base.batch_shape) if n_axes is None else n_axes
    return _Cell(base, n_axes) if n_axes > 0 else TorchDistribution.to_event(base, n_axes)


def _parameters(d: Any) -> list[Tensor | None] | None:
    """Return mean, inverse dispersion and gate logits; None where there is none, or no such distribution."""
    if isinstance(d, Poisson):
        return [d._mean, None, None]
    if isinstance(d, NegativeBinomial):
        return [d._mean, d._inverse_dispersion, None]
    if isinstance(d, ZeroInflated) and isinstance(d.base, Poisson | NegativeBinomial):
        return [*_parameters(d.base)[:2], d._gate_logits]  # type: ignore[index]
    return None


class _Rows(torch.autograd.Function):
    """The log density of rows of counts by a compiled loop, and its gradients."""

    @staticmethod
    def forward(ctx: Any, compiled: Callable[..., Any], value: Tensor, *parameters: Tensor | None) -> Any:
        tensors = [value.to(torch.float32), *parameters]
        ctx.shape = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
        ctx.wanted, ctx.shapes = (
            ctx.needs_input_grad[2:],
            [None if p is None else p.shape for p in parameters],
        )
        rows = [None if t is None else _rows_of(t, ctx.shape) for t in tensors]
        log_prob, *slopes = compiled(*rows, list(ctx.wanted))
        ctx.save_for_backward(*(slope for slope, want in zip(slopes, ctx.wanted, strict=True) if want))
        return log_prob.view(ctx.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes = iter(ctx.saved_tensors)
        wanted = zip(ctx.wanted, ctx.shapes, strict=True)
        return (
            None,
            None,
            *(_chained(grad, next(slopes), ctx.shape, n) if want else None for want, n in wanted),
        )


def _rows_of(tensor: Tensor, shape: Size) -> Tensor:
    """Return (rows, genes) whose repetition is the broadcast; gene-wise parameters are one row."""
    sizes = tensor.shape
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    sizes = sizes or Size((1,))
    return tensor.reshape(sizes).expand(shape[len(shape) - len(sizes) :]).reshape(-1, shape[-1]).contiguous()


def _chained(grad: Tensor, slope: Tensor, shape: Size, to: Size) -> Tensor:
    """Multiply by the gradient in each row's density; sum over what shares a parameter."""
    rows = grad.reshape(-1)
    if to.numel() == shape[-1] and to[-1:] == shape[-1:]:  # gene-wise: a sum over rows, without their product
        return (rows @ slope).view(to)
    return (rows.unsqueeze(-1) * slope).view(shape).sum_to_size(to)


# The log densities at zero and at a positive count x, each with its partial derivatives, computed only if
# called. mu: mean, theta: inverse dispersion, log_p0: the base's log density, g: logit of dropout.

Terms = tuple[Tensor, *tuple[Callable[[], Tensor], ...]]
Density = tuple[Callable[..., Terms], Callable[..., Terms]]


def _poisson_at_zero(mu: Tensor) -> Terms:
    return -mu, lambda: mu.new_full((), -1.0)


def _poisson_at_count(x: Tensor, mu: Tensor) -> Terms:
    mu = mu.clamp(min=_SMALLEST_MEAN)
    return x * mu.log() - mu - torch.lgamma(x + 1), lambda: ((x - mu) / mu).clamp(max=_STEEPEST)


def _negative_binomial_at_zero(mu: Tensor, theta: Tensor) -> Terms:
    log1p_ratio = (mu / theta).log1p()
    total = mu + theta
    return -theta * log1p_ratio, lambda: -theta / total, lambda: _less_log1p_ratio(mu / total, log1p_ratio)


def _negative_binomial_at_count(x: Tensor, mu: Tensor, theta: Tensor) -> Terms:
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


def _zero_inflated_at_zero(log_p0: Tensor, g: Tensor) -> Terms:
    p_kept = torch.sigmoid(-g)
    p_positive = p_kept * -log_p0.expm1()
    # Where p(0) is near 1, its log needs p(x > 0) to full relative accuracy; near 0, the sum in log space.
    log_sum = torch.logaddexp(g, log_p0) + p_kept.log()
    return (
        torch.where(p_positive < 0.5, (-p_positive).log1p(), log_sum),
        lambda: torch.sigmoid(log_p0 - g),
        lambda: torch.sigmoid(g - log_p0) * p_positive,
    )


def _zero_inflated_at_count(x: Tensor, log_p0: Tensor, g: Tensor) -> Terms:
    return log_p0 - softplus(g), lambda: torch.ones_like(x), lambda: -torch.sigmoid(g)


_POISSON: Density = (_poisson_at_zero, _poisson_at_count)
_NEGATIVE_BINOMIAL: Density = (_negative_binomial_at_zero, _negative_binomial_at_count)
_ZERO_INFLATED: Density = (_zero_inflated_at_zero, _zero_inflated_at_count)


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


# Evaluating them.

SMALL = 2**15
"""Entries up to which a density is evaluated at all of them, instead of looking up the positive counts."""


def _log_prob(density: Density, batch_shape: Size, value: Tensor, *parameters: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        parameters = tuple(p.detach() for p in parameters)  # so that no partial derivative is computed
    log_prob = _ClosedForm.apply(density, value, *parameters)
    return log_prob.expand(torch.broadcast_shapes(batch_shape, log_prob.shape))


class _ClosedForm(torch.autograd.Function):
    """A log density of counts whose gradients are the closed forms it comes with."""

    @staticmethod
    def forward(ctx: Any, density: Density, value: Tensor, *parameters: Tensor) -> Any:
        at_zero, at_count = density
        ctx.wanted, ctx.shapes = ctx.needs_input_grad[2:], [p.shape for p in parameters]
        shape = torch.broadcast_shapes(value.shape, *ctx.shapes)
        zeros = [y.expand(shape) for y in _evaluate(at_zero(*parameters), ctx.wanted)]
        # A lookup would have CUDA wait for the host, and no recording of a step can hold it.
        if value.is_cuda or shape.numel() <= SMALL:
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
        ctx.save_for_backward(*partials)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        partials = iter(ctx.saved_tensors)
        wanted = zip(ctx.wanted, ctx.shapes, strict=True)
        return None, None, *((grad * next(partials)).sum_to_size(n) if want else None for want, n in wanted)


def _evaluate(terms: Terms, wanted: Sequence[bool]) -> list[Tensor]:
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
