"""engine.cpu.threads."""

import os
from threading import Lock
from typing import Any

import numba
import torch

_ALONE = 1 << 15  # entries below which waking another thread costs more than it saves
_SHARES = 4  # of the rows, for each thread

_LOCK = Lock()
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# In a forked child GNU's OpenMP ends the process that asks for threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def shared(run: Any, n_rows: int, n_entries: int, *arguments: Any) -> None:
    """Call run(n_shares, n_rows, ...) on as many threads as torch has; numba's number is left as it was."""
    n_threads = 1 if _forked or n_entries < _ALONE else torch.get_num_threads()
    n_threads = min(n_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    # Not every thread layer of numba bears two callers at once: the second works alone.
    if n_threads == 1 or not _LOCK.acquire(blocking=False):
        run.alone(0, n_rows, *arguments)
        return
    before = numba.get_num_threads()
    numba.set_num_threads(n_threads)
    try:
        run(min(n_rows, _SHARES * n_threads), n_rows, *arguments)
    finally:
        numba.set_num_threads(before)
        _LOCK.release()
