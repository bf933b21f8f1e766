"""How many threads work on the CPU: as many as torch was given, whatever numba does.

OpenMP keeps a number of threads for each thread that asks for some. numba's OpenMP pool sets that of the
thread which launches it, with the first parallel function of a process (scanpy's, UMAP's or ours), to the
number of cores; torch, in the same library, takes it for its own. What torch was given, by
``torch.set_num_threads``, by OMP_NUM_THREADS or else by the cores there are, is what a new thread finds.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, local
from typing import Any

import torch

from pyrosc.engine.cpu.cores import n_cores

_SMALL = 1 << 15
"""Entries (cells x genes) below which several threads are no sooner done, and far later on busy cores."""

_SHARES = 4  # of the rows, for each thread

_LOOP, _SETTING = Lock(), Lock()
_checked = local()
_forked = False
_log = logging.getLogger(__name__)


def _note_fork() -> None:
    global _forked
    _forked = True


# In a forked child GNU's OpenMP waits for ever for threads of its parent's, and numba ends the process.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def kept(n_entries: int | None = None) -> Iterator[int]:
    """Work on as many threads as torch was given, then leave it these.

    One thread where there is little work, and in a forked child; no more than there are cores for, unless
    OMP_NUM_THREADS says so.

    Parameters
    ----------
    n_entries
        Entries (cells x genes) that are worked on at a time, if known.

    Yields
    ------
    int
        How many threads these are. Last digits of sums and products depend on it.
    """
    _undo_launch()
    before = torch.get_num_threads()
    if _forked or (n_entries is not None and n_entries < _SMALL):
        number = 1
    else:
        number = before if "OMP_NUM_THREADS" in os.environ else min(before, n_cores())
    try:
        set_here(number)
        yield number
    finally:
        set_here(before)


def _undo_launch() -> None:
    """Give torch back, in this thread, the number that numba's launch of its pool has changed: once."""
    if getattr(_checked, "here", False) or (numbas := _set_by_numba()) is None:
        return
    here, new = torch.get_num_threads(), _in_a_new_thread(torch.get_num_threads)
    # Fewer than torch was given, and not numba's number, are somebody's wish. (MKL may have cut numba's.)
    if here > new or here == numbas:
        set_here(new)
    _checked.here = True


def set_here(number: int) -> None:
    """Set torch's number of threads in this thread; new threads find what they did before."""
    if torch.get_num_threads() == number:
        return
    with _SETTING:
        new = _in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(number)
        _in_a_new_thread(torch.set_num_threads, new)


def _in_a_new_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result()


def _set_by_numba() -> int | None:
    """Return the number of threads that numba has set, if it has launched its OpenMP pool."""
    numba = sys.modules.get("numba")
    try:
        return numba.config.NUMBA_NUM_THREADS if numba and numba.threading_layer() == "omp" else None
    except ValueError:  # not launched
        return None


@cache
def _pool() -> int:
    """Launch numba's threads, if they aren't yet; return how many it has. Torch's number stays as it was."""
    import numba

    before = torch.get_num_threads()
    try:
        numba.get_num_threads()
    except ValueError as error:
        _log.warning("numba's loops run on one thread: %s", " ".join(str(error).split()))
        return 1
    finally:
        set_here(before)
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def shared(run: Any, n_rows: int, n_entries: int, *arguments: Any) -> None:
    """Call run(n_shares, n_rows, ...) on as many threads as torch has; numba's number is left as it was."""
    n_threads = 1 if _forked or n_entries < _SMALL else torch.get_num_threads()
    if n_threads > 1:
        n_threads = min(n_threads, _pool())
    # Not every thread layer of numba bears two callers at once: the second works alone.
    if n_threads == 1 or not _LOOP.acquire(blocking=False):
        run.alone(0, n_rows, *arguments)
        return
    try:
        import numba

        before = numba.get_num_threads()
        numba.set_num_threads(n_threads)
        try:
            run(min(n_rows, _SHARES * n_threads), n_rows, *arguments)
        finally:
            numba.set_num_threads(before)
    finally:
        _LOOP.release()
