"""Which compiled loops can be had: where numba or Triton does not import, torch operations do the same."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


@cache
def kernels() -> Any:
    """Return the module `operators`; None, and a word in the log, where numba does not import."""
    try:
        # numba takes a while to import: not before there are counts to work on.
        from pyrosc.engine import operators
    except Exception as error:  # an ImportError, or a RuntimeError where its cache can be written nowhere
        _log.warning(
            "numba cannot be used (%s): slower torch operations take the place of its loops. If its cache "
            "is the cause, set NUMBA_CACHE_DIR to a folder that can be written",
            error,
        )
        return None
    return operators


@cache
def _on_cuda() -> Any:
    """Return the module `cuda.count_density`; None, and a word in the log, where Triton can't compile it."""
    try:
        from pyrosc.engine.cuda import count_density

        one = torch.ones(1, 1, device="cuda")
        count_density.log_density(one, one, one, one, (True, True, True))
    except Exception as error:  # an ImportError, or whatever its compiler stumbles on
        why = str(error).partition("\n")[0] or type(error).__name__
        _log.warning("Triton cannot be used (%s): slower torch operations take the place of its loop", why)
        return None
    return count_density


def log_density_for(counts: Tensor, parameters: Sequence[Tensor | None]) -> Callable[..., Any] | None:
    """Return the compiled log density of rows for tensors of that device and type; None if there is none."""
    device = _device_of(counts, parameters)
    if device == "cpu" and kernels():
        return torch.ops.pyrosc.log_density
    if device == "cuda" and _on_cuda():
        return _on_cuda().log_density
    return None


def softmax_density_for(counts: Tensor, parameters: Sequence[Tensor | None]) -> Callable[..., Any] | None:
    """Return that of rows whose mean is a total times a softmax, None if there is none."""
    compiled = _device_of(counts, parameters) == "cpu" and kernels()
    return torch.ops.pyrosc.softmax_density if compiled else None


def _device_of(counts: Tensor, parameters: Sequence[Tensor | None]) -> str | None:
    """Return the kind of device where all are, the parameters as float32; else None."""
    given = [p for p in parameters if p is not None]
    alike = all(p.dtype == torch.float32 and p.device == counts.device for p in given)
    return counts.device.type if alike else None
