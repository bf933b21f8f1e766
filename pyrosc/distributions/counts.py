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
from torch.distributions import Distribution, constraints

from pyrosc.distributions.density import _NEGATIVE_BINOMIAL, _POISSON, _ZERO_INFLATED, _log_prob, _Rows
from pyrosc.engine.backends import log_density_for

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

    Examples
    --------
    >>> import torch
    >>> from pyrosc import distributions
    >>> d = distributions.Poisson(torch.tensor([0.5, 2.0]))
    >>> d.log_prob(torch.tensor([0.0, 3.0])).numpy().round(3)
    array([-0.5  , -1.712], dtype=float32)

    A cell's counts as one event, as programs observe them:

    >>> round(d.to_event(1).log_prob(torch.tensor([0.0, 3.0])).item(), 3)
    -2.212
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

    Examples
    --------
    >>> import torch
    >>> from pyrosc import distributions
    >>> d = distributions.NegativeBinomial(torch.tensor([0.5, 2.0]), torch.tensor(4.0))
    >>> d.mean, d.variance
    (tensor([0.5000, 2.0000]), tensor([0.5625, 3.0000]))
    >>> d.log_prob(torch.tensor([0.0, 3.0])).numpy().round(3)
    array([-0.471, -1.922], dtype=float32)
    >>> d.sample((5,)).shape
    torch.Size([5, 2])
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

    Examples
    --------
    >>> import torch
    >>> from pyrosc import distributions
    >>> base = distributions.Poisson(torch.tensor([0.5, 2.0]))
    >>> d = distributions.ZeroInflated(base, gate_logits=torch.tensor(0.0))
    >>> d.mean
    tensor([0.2500, 1.0000])
    >>> d.log_prob(torch.tensor([0.0, 3.0])).numpy().round(3)
    array([-0.219, -2.405], dtype=float32)

    How likely a zero is a dropout, of a gene that is rarely seen and of one that mostly is:

    >>> d.dropout_probability().numpy().round(3)
    array([0.622, 0.881], dtype=float32)
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
