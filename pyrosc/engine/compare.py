"""Whether two ways to compute the same thing agree: to the bit, or as far as rounding lets them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_Results = Sequence[Tensor | None]

_ROUNDING = 1e-6  # of a result's largest number
_TIMES = 50.0  # a change in the last digit of the state, by which results may differ


def restore(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Give tensors, in place, the values that were kept of them."""
    with torch.no_grad():
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)


def agree(
    results: _Results, others: _Results, outcome: Callable[[], _Results], state: Sequence[Tensor]
) -> bool:
    """Say whether results are equal but for rounding.

    Each may differ by a millionth of its largest number. Some have less digits than that: the gradient of an
    offset before batch normalisation is a sum of 0, of which rounding alone is left. So where that is not
    enough, results may differ as much as they do when the last digits of the state are others.

    Parameters
    ----------
    results, others
        Computed in the two ways, from `state` as it is.
    outcome
        Computes `results` anew, from `state` as it then is.
    state
        Tensors; afterwards they are as before.
    """
    if len(results) != len(others) or any(
        (a is None) != (b is None) for a, b in zip(results, others, strict=True)
    ):
        return False
    pairs = [(a, b) for a, b in zip(results, others, strict=True) if a is not None and b is not None]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    if all(_within(a, b, 0.0) for a, b in pairs):
        return True
    changes = _changes(outcome, state)
    slack = [change for a, change in zip(results, changes, strict=True) if a is not None]
    return all(_within(a, b, _TIMES * change) for (a, b), change in zip(pairs, slack, strict=True))


def _within(a: Tensor, b: Tensor, slack: float) -> bool:
    if torch.equal(a, b):
        return True
    a, b = a.double(), b.double()
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING * scale + slack, equal_nan=True)


def _changes(outcome: Callable[[], _Results], state: Sequence[Tensor]) -> list[float]:
    """Return how much each result changes, at most, where the last digits of the state change at random."""
    kept = [tensor.detach().clone() for tensor in state]
    random = torch.Generator().manual_seed(0)
    runs: list[_Results] = []
    try:
        for size in (0.0, 1.0, -1.0):
            with torch.no_grad():
                for tensor, value in zip(state, kept, strict=True):
                    tensor.copy_(value)
                    if value.dtype in (torch.float32, torch.float64):
                        signs = (
                            torch.randint(0, 2, value.shape, generator=random, device="cpu").to(value) * 2 - 1
                        )
                        tensor.mul_(1 + size * torch.finfo(value.dtype).eps * signs)
            runs.append(outcome())
    finally:
        restore(state, kept)
    first, *others = runs
    return [
        max(0.0 if a is None or b is None else _largest(a, b) for b in (run[i] for run in others))
        for i, a in enumerate(first)
    ]


def _largest(a: Tensor, b: Tensor) -> float:
    difference = (a.double() - b.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    return float(difference.max()) if difference.numel() else 0.0
