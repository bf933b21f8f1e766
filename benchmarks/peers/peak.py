"""Peak resident memory of this process while something runs. Used by our programs and by the peers'."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STATUS = Path("/proc/self/status")


@contextmanager
def peak_memory() -> Iterator[dict]:
    """Put into the dict, at the end: `bytes`, the peak of resident memory less what was resident before.

    Free memory is handed back and the kernel's high-water mark set back before, so that an earlier peak
    hides nothing. `bytes` is None where the kernel doesn't let that be done (any but Linux).
    """
    found: dict = {"bytes": None}
    before = None
    with suppress(OSError, AttributeError):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    yield found
    if before is not None:
        found["bytes"] = _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def quiet_stdout() -> int:
    """Send what libraries print to nowhere; return a descriptor of the stdout there was."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return out
