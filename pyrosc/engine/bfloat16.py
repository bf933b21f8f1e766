"""Linear maps in bfloat16: half the bytes, and on processors that know it twice the speed."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class LinearInBfloat16(TorchFunctionMode):
    """Computes ``torch.nn.functional.linear``, of ``nn.Linear`` too, there and back from bfloat16 factors.

    bfloat16 has float32's range and three digits. Sums, the offset and all that comes after are float32:
    a log share of -8 would lose 2% by rounding, what is added to it loses little.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not linear:
            return function(*args, **(kwargs or {}))
        return _linear(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
    if not input.dtype == weight.dtype == torch.float32:
        return linear(input, weight, bias)
    product = linear(input.bfloat16(), weight.bfloat16())
    return product.float() if bias is None else product + bias
