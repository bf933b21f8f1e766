"""What a count distribution was given: a mean, or what a decoder emits, logits of shares and a total."""

from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import constraints


class Given(NamedTuple):
    """Parameters in the shapes they were given in; None is what was not."""

    mean: Any
    logits: Any
    total: Any
    inverse_dispersion: Any = None
    gate_logits: Any = None

    def checked(self, name: str) -> "Given":
        """Return it, if it says what the mean is, and once.

        Raises
        ------
        ValueError
            If there is both a mean and a logit, or neither, or a part of it.
        """
        has = [parameter is not None for parameter in (self.mean, self.logits, self.total)]
        if has not in ([True, False, False], [False, True, True]):
            names = [n for n, given in zip(("mean", "logits", "total"), has, strict=True) if given]
            msg = f"{name} takes mean=, or logits= and total=, not {' and '.join(names) or 'none of them'}"
            raise ValueError(msg)
        return self

    @property
    def mu(self) -> Tensor:
        """The mean."""
        if self.mean is not None:
            return self.mean
        assert self.logits is not None
        assert self.total is not None
        return self.total * self.logits.softmax(-1)

    @property
    def log_share(self) -> Tensor:
        """Logits of the genes' shares: where a mean was given, its log."""
        return self.mu.log() if self.logits is None else self.logits

    @property
    def size(self) -> Tensor:
        """The sum of the mean over genes, of last axis 1."""
        return self.mu.sum(-1, keepdim=True) if self.total is None else self.total

    @property
    def shape(self) -> Size:
        """The batch shape."""
        return torch.broadcast_shapes(*(parameter.shape for parameter in self if parameter is not None))

    @property
    def constraints(self) -> dict[str, Any]:
        """What each of the parameters given has to be."""
        known = {
            "mean": constraints.nonnegative,
            "logits": constraints.real_vector,
            "total": constraints.nonnegative,
            "inverse_dispersion": constraints.positive,
        }
        return {name: known[name] for name, parameter in self._asdict().items() if parameter is not None}
