"""The spike-and-slab distribution: exactly zero, or a draw from a normal distribution."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Normal, constraints, kl_divergence, register_kl
from torch.nn.functional import logsigmoid


class SpikeSlab(TorchDistribution):
    r"""Zero with probability 1 - gamma, else Normal(loc, scale^2): of sparse codes.

    .. math:: p(z) = (1 - \gamma)\, \delta_0(z) + \gamma\, N(z; \mu, \sigma^2)

    The density is against the sum of Lebesgue's measure and a point mass at 0: log(1 - gamma) at 0, else
    log gamma + log N(z). Mean gamma mu, variance gamma (sigma^2 + mu^2) - gamma^2 mu^2.

    A draw is differentiable where `sharpness` is finite: with eta uniform on (0, 1) it is the slab's draw
    times sigmoid(sharpness (logit eta + logit gamma)), a binary concrete draw, which is not exactly 0.
    Tonolini 2019, eq. 11, has sigmoid(sharpness (eta - 1 + gamma)): where gamma is near 0 or 1 hardly any
    eta has a gradient in it, unless the sharpness is so low that numbers with gamma = 0 leak. An exact draw
    is differentiable in the slab, but jumps with gamma: where `logits` wants a gradient there is no pathwise
    one, ``has_rsample`` is False, and estimators use the score function.

    Parameters
    ----------
    loc, scale
        Of the slab.
    logits
        Log odds of inclusion, of z not being 0.
    sharpness
        Of the relaxed draws; a scalar. None: exact draws, without gradient in `logits`.
    validate_args
        Whether to check parameters and values. Default: Pyro's global setting.

    Notes
    -----
    The KL of two of these is known in closed form: that of the slabs times gamma, plus that of the two
    Bernoulli distributions. With others it is not.

    References
    ----------
    Tonolini, Jensen and Murray-Smith, Variational sparse coding, 2019. Maddison, Mnih and Teh, The concrete
    distribution, 2017.

    Examples
    --------
    >>> import torch
    >>> from pyrosc import distributions
    >>> d = distributions.SpikeSlab(torch.tensor(2.0), torch.tensor(1.0), logits=torch.tensor([0.0, -3.0]))
    >>> d.inclusion.numpy().round(3)
    array([0.5  , 0.047], dtype=float32)
    >>> d.log_prob(torch.tensor([0.0, 2.0])).numpy().round(3)
    array([-0.693, -3.968], dtype=float32)
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "logits": constraints.real,
    }
    support = constraints.real

    def __init__(
        self,
        loc: Float[Tensor, "..."],
        scale: Float[Tensor, "..."],
        logits: Float[Tensor, "..."],
        sharpness: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.logits = torch.broadcast_tensors(loc, scale, logits)
        self.sharpness = sharpness
        super().__init__(self.loc.shape, validate_args=validate_args)

    def relaxed(self, sharpness: Float[Tensor, ""]) -> "SpikeSlab":
        """Return the same distribution with draws that are differentiable in all parameters."""
        return SpikeSlab(self.loc, self.scale, self.logits, sharpness, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the pathwise gradient of a draw is all of its gradient."""
        return self.sharpness is not None or not self.logits.requires_grad

    @property
    def inclusion(self) -> Float[Tensor, "..."]:
        """Probability gamma of not being 0, in the batch shape."""
        return torch.sigmoid(self.logits)

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """Gamma mu, in the batch shape."""
        return self.inclusion * self.loc

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """Gamma (sigma^2 + mu^2) - gamma^2 mu^2, in the batch shape."""
        return self.inclusion * (self.scale**2 + self.loc**2) - self.mean**2

    def log_prob(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log density in nats, against Lebesgue's measure and a point mass at 0."""
        if self._validate_args:
            self._validate_sample(value)
        slab = logsigmoid(self.logits) + Normal(self.loc, self.scale, validate_args=False).log_prob(value)
        return torch.where(value == 0, logsigmoid(-self.logits), slab)

    def sample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw without gradient, of shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return self._drawn(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw with gradients, of shape ``sample_shape + batch_shape``.

        Raises
        ------
        NotImplementedError
            If the draws are exact and `logits` wants a gradient, of which a draw has none.
        """
        if not self.has_rsample:
            msg = "an exact draw has no gradient in logits: take sample(), or relaxed(sharpness).rsample()"
            raise NotImplementedError(msg)
        return self._drawn(sample_shape)

    def _drawn(self, sample_shape: Sequence[int]) -> Float[Tensor, "..."]:
        shape = Size(sample_shape) + self.batch_shape
        slab = self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        above = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).logit(1e-6) + self.logits
        return slab * (
            (above > 0).to(slab.dtype) if self.sharpness is None else (self.sharpness * above).sigmoid()
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "SpikeSlab":
        """Broadcast to a larger batch shape."""
        new = self._get_checked_instance(SpikeSlab, _instance)
        new.loc, new.scale, new.logits = (t.expand(batch_shape) for t in (self.loc, self.scale, self.logits))
        new.sharpness = self.sharpness
        super(SpikeSlab, new).__init__(Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new


@register_kl(SpikeSlab, SpikeSlab)
def _kl(q: SpikeSlab, p: SpikeSlab) -> Tensor:
    slabs = kl_divergence(
        Normal(q.loc, q.scale, validate_args=False), Normal(p.loc, p.scale, validate_args=False)
    )
    # Not torch's KL of Bernoulli distributions: it assigns to a mask, which no recording of a step can hold.
    on = slabs + logsigmoid(q.logits) - logsigmoid(p.logits)
    off = logsigmoid(-q.logits) - logsigmoid(-p.logits)
    return q.inclusion * on + torch.sigmoid(-q.logits) * off
