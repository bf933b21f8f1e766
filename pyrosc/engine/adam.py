"""Adam, as torch's fused kernel: one operation a step, which takes a learning rate on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma and Ba 2015) with weight decay added to the gradient.

    The numbers are those of ``torch.optim.Adam(fused=True)``, whose first use imports torch's compiler, which
    takes over a second.

    Parameters
    ----------
    parameters
        Updated in place.
    weight_decay
        Times the parameter, is added to its gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.mean = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.mean_square = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.steps = [torch.zeros((), device=p.device) for p in parameters]

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes beside the parameters."""
        return [*self.mean, *self.mean_square, *self.steps]

    def step(self, gradients: Sequence[Tensor | None], rate: Tensor, skip: Tensor) -> None:
        """Take a step.

        Parameters
        ----------
        gradients
            One for each parameter; what has None stays.
        rate
            Learning rate, a scalar on the parameters' device.
        skip
            1 to leave the parameters as they are, else 0; a scalar on their device.
        """
        with_gradient = [i for i, gradient in enumerate(gradients) if gradient is not None]
        # In the layout of the parameter, which a gradient need not have and the kernel counts on.
        given = [
            g if g.stride() == p.stride() else torch.empty_like(p, requires_grad=False).copy_(g)
            for p, g in zip(self.parameters, gradients, strict=True)
            if g is not None
        ]
        parameters, mean, mean_square, steps = (
            [tensors[i] for i in with_gradient]
            for tensors in (self.parameters, self.mean, self.mean_square, self.steps)
        )
        with torch.no_grad():
            torch._foreach_add_(steps, 1 - skip)
            torch._fused_adam_(
                parameters,
                given,
                mean,
                mean_square,
                [],
                steps,
                lr=rate,
                beta1=0.9,
                beta2=0.999,
                weight_decay=self.weight_decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
