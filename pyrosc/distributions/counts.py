"""Poisson and negative binomial counts, and counts of which a share drops out to zero.

Each is parameterised by its mean, or by what a decoder emits: logits of the genes' shares and a total. What
programs ask for is the density of whole cells, ``NegativeBinomial(...).to_event(1)``: see `cell.py`. That of
single counts is in `density.py`. Both are differentiable once.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Num
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyrosc.distributions.cell import as_event
from pyrosc.distributions.density import NEGATIVE_BINOMIAL, POISSON, ZERO_INFLATED, log_prob_of
from pyrosc.distributions.given import Given

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

    The same as ``scipy.stats.poisson(mean)`` and ``torch.distributions.Poisson(mean)``. Log densities are
    differentiable once.

    Parameters
    ----------
    mean
        :math:`\mu \ge 0`. Where the count is positive, a mean below 1.2e-38 (an underflowed softmax) is taken
        as that and the slope in the mean is at most 1e30, so log density and gradient remain finite.
    logits, total
        In place of `mean`, which is total * softmax(logits) along the last axis: logits of the genes' shares
        of a cell's counts, and how many counts it has, of last axis 1.
    validate_args
        Whether to check parameters and counts. Default: Pyro's global setting.

    Raises
    ------
    ValueError
        If there is not one of `mean` and of `logits` and `total`. Under validation, if a mean or a total is
        negative, a parameter NaN, or a count in ``log_prob`` negative or fractional.

    Examples
    --------
    >>> import torch
    >>> from pyrosc.distributions import Poisson
    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> counts = Poisson(logits=logits, total=torch.tensor([[10.0], [100.0]]))
    >>> counts.mean.round()
    tensor([[ 5.,  5.],
            [27., 73.]])
    >>> counts.to_event(1).log_prob(torch.tensor([[5.0, 5.0], [30.0, 70.0]])).shape
    torch.Size([2])
    """

    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self,
        mean: Float[Tensor, "..."] | None = None,
        *,
        logits: Float[Tensor, "..."] | None = None,
        total: Float[Tensor, "..."] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.given = Given(mean, logits, total).checked("Poisson")
        super().__init__(self.given.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """What parameters have to be, of those given."""
        return self.given.constraints

    @property
    def mean(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self.given.mu.expand(self.batch_shape)

    @property
    def logits(self) -> Float[Tensor, "..."]:
        """Logits of the genes' shares, in the batch shape; log of the mean where that was given."""
        return self.given.log_share.expand(self.batch_shape)

    @property
    def total(self) -> Float[Tensor, "..."]:
        """Sum of the mean over genes, of last axis 1."""
        return self.given.size

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self.mean

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, in the broadcast shape of value and distribution."""
        if self._validate_args:
            self._validate_sample(value)
        return log_prob_of(POISSON, self.batch_shape, value, self.given.mu)

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return new_counts(self.given.mu.expand(self._extended_shape(Size(sample_shape))))

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Poisson":
        """Broadcast to a larger batch shape, without copying."""
        return _expanded(self, self._get_checked_instance(Poisson, _instance), batch_shape)


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
    ``GammaPoisson(theta, theta / mu)``. Log densities are differentiable once.

    Parameters
    ----------
    mean
        :math:`\mu \ge 0`. Where the count is positive, a mean below 1.2e-38 (an underflowed softmax) is taken
        as that and the slope in the mean is at most 1e30, so log density and gradient remain finite.
    inverse_dispersion
        :math:`\theta > 0`; broadcasts against the mean.
    logits, total
        In place of `mean`, which is total * softmax(logits) along the last axis: logits of the genes' shares
        of a cell's counts, and how many counts it has, of last axis 1.
    validate_args
        Whether to check parameters and counts. Default: Pyro's global setting.

    Raises
    ------
    ValueError
        If there is not one of `mean` and of `logits` and `total`, or no `inverse_dispersion`. Under
        validation, if a parameter is out of range, or a count in ``log_prob`` negative or fractional.

    Examples
    --------
    >>> import torch
    >>> from pyrosc.distributions import NegativeBinomial
    >>> theta = torch.tensor([2.0, 0.5])
    >>> counts = NegativeBinomial(torch.tensor([[1.0, 3.0]]), theta)
    >>> counts.variance
    tensor([[ 1.5000, 21.0000]])
    >>> logits, total = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[4.0]])
    >>> same = NegativeBinomial(logits=logits, total=total, inverse_dispersion=theta)
    >>> x = torch.tensor([[0.0, 7.0]])
    >>> bool(same.to_event(1).log_prob(x).isclose(counts.to_event(1).log_prob(x)))
    True
    """

    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(
        self,
        mean: Float[Tensor, "..."] | None = None,
        inverse_dispersion: Float[Tensor, "..."] | None = None,
        *,
        logits: Float[Tensor, "..."] | None = None,
        total: Float[Tensor, "..."] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if inverse_dispersion is None:
            msg = "NegativeBinomial takes inverse_dispersion=; without dispersion it is a Poisson"
            raise ValueError(msg)
        self.given = Given(mean, logits, total, inverse_dispersion).checked("NegativeBinomial")
        super().__init__(self.given.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """What parameters have to be, of those given."""
        return self.given.constraints

    @property
    def mean(self) -> Float[Tensor, "..."]:
        r""":math:`\mu`, in the batch shape."""
        return self.given.mu.expand(self.batch_shape)

    @property
    def logits(self) -> Float[Tensor, "..."]:
        """Logits of the genes' shares, in the batch shape; log of the mean where that was given."""
        return self.given.log_share.expand(self.batch_shape)

    @property
    def total(self) -> Float[Tensor, "..."]:
        """Sum of the mean over genes, of last axis 1."""
        return self.given.size

    @property
    def inverse_dispersion(self) -> Float[Tensor, "..."]:
        r""":math:`\theta`, in the batch shape."""
        return self.given.inverse_dispersion.expand(self.batch_shape)

    @property
    def variance(self) -> Float[Tensor, "..."]:
        r""":math:`\mu + \mu^2 / \theta`, in the batch shape."""
        mean = self.mean
        return mean + mean**2 / self.inverse_dispersion

    def log_prob(self, value: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, in the broadcast shape of value and distribution."""
        if self._validate_args:
            self._validate_sample(value)
        return log_prob_of(
            NEGATIVE_BINOMIAL, self.batch_shape, value, self.given.mu, self.given.inverse_dispersion
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            theta = self.given.inverse_dispersion.expand(self._extended_shape(Size(sample_shape)))
            return new_counts(torch._standard_gamma(theta) * (self.given.mu / theta))

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "NegativeBinomial":
        """Broadcast to a larger batch shape, without copying."""
        return _expanded(self, self._get_checked_instance(NegativeBinomial, _instance), batch_shape)


@final
class ZeroInflated(TorchDistribution):
    r"""Counts of which a share drops out to zero: a mixture of a point mass at 0 and a base distribution.

    .. math::

        p(x) &= \pi\, [x = 0] + (1 - \pi)\, p_0(x), \qquad \pi = \mathrm{sigmoid}(g), \quad x = 0, 1, \dots \\
        \mathrm E x &= (1 - \pi)\, \mu_0, \qquad \mathrm{Var}\, x = (1 - \pi)\, (\sigma_0^2 + \pi \mu_0^2)

    ZIP is ``ZeroInflated(Poisson(...), g)`` and ZINB is ``ZeroInflated(NegativeBinomial(...), g)``. Source:
    Lopez et al. 2018, Grønbech et al. 2020.

    The same as Pyro's ``ZeroInflatedDistribution(base, gate_logits=g)``; torch and scipy have none. Log
    densities are differentiable once.

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
    >>> from pyrosc.distributions import Poisson, ZeroInflated
    >>> counts = ZeroInflated(Poisson(torch.tensor([4.0])), gate_logits=torch.tensor([0.0]))
    >>> counts.mean
    tensor([2.])
    >>> counts.dropout_probability().round(decimals=2)
    tensor([0.9800])
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
        self.base = base
        # Of a base of ours: all that a loop over whole cells needs.
        of_base = base.given if isinstance(base, Poisson | NegativeBinomial) else Given(None, None, None)
        self.given = of_base._replace(gate_logits=gate_logits)
        batch_shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    @property
    def gate_logits(self) -> Float[Tensor, "..."]:
        """Log odds of dropout, in the batch shape."""
        return self.given.gate_logits.expand(self.batch_shape)

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
        return log_prob_of(ZERO_INFLATED, self.batch_shape, value, log_p0, self.given.gate_logits)

    def dropout_probability(self) -> Float[Tensor, "..."]:
        r"""Probability that an observed zero is a dropout, :math:`\pi / p(0)`, in the batch shape."""
        zero = self.given.gate_logits.new_zeros(())
        return torch.sigmoid(self.gate_logits - self.base.log_prob(zero))

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            counts = self.base.expand(self.batch_shape).sample(Size(sample_shape))
            dropout = torch.bernoulli(torch.sigmoid(self.given.gate_logits).expand(counts.shape))
            return counts.masked_fill(dropout.bool(), 0)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Make the rightmost axes one event: a cell's counts, whose log density is summed in one pass."""
        return as_event(self, reinterpreted_batch_ndims)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ZeroInflated":
        """Broadcast to a larger batch shape, without copying."""
        new = self._get_checked_instance(ZeroInflated, _instance)
        new.base = self.base
        return _expanded(self, new, batch_shape)


def _expanded(old: Any, new: Any, batch_shape: Sequence[int]) -> Any:
    """Give `new` the batch shape while its parameters keep theirs, so that gene-wise ones stay cheap."""
    if torch.broadcast_shapes(old.batch_shape, batch_shape) != Size(batch_shape):
        msg = f"cannot expand batch shape {tuple(old.batch_shape)} to {tuple(batch_shape)}"
        raise ValueError(msg)
    new.given = old.given
    TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
    new._validate_args = old._validate_args
    return new
