"""Threads that wait for each other: where other programs use the cores, fewer are sooner done.

Torch's threads meet after every operation, thousands of times in a second. While one of them waits for a
core, the others wait for it and burn theirs, so that several threads beside busy programs take many times as
long as one.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyrosc.engine.cpu.threads import kept, set_here

_GRAIN = 1 << 15  # entries that torch gives each thread at least
_MEETINGS = 20  # operations of a trial
_SLOWER, _LEAST = 4.0, 1e-3  # times as long as on one thread, and seconds: then they wait for each other
_OFTEN = 3  # trials that find so, less those that don't
_SOON, _SELDOM = 0.2, 5.0  # seconds from a trial to the next one

_log = logging.getLogger(__name__)


class Threads:
    """The threads of a fit: halved where they are found to wait for each other.

    Parameters
    ----------
    number
        How many torch has in this thread.

    Attributes
    ----------
    numbers : tuple of int
        How many there were, one after the other: one number, unless cores were busy.
    """

    def __init__(self, number: int) -> None:
        self.numbers: tuple[int, ...] = (number,)
        self._alone = math.inf  # seconds of one thread's share in a trial
        self._often, self._pause, self._next = 0, _SOON, 0.0
        # Made once, so that trials touch no new memory.
        self._x, self._y = torch.ones(2, number * _GRAIN if number > 1 else 0, device="cpu")

    @property
    def number(self) -> int:
        """How many there are."""
        return self.numbers[-1]

    def settle(self) -> None:
        """Before the first step: try until it is clear whether the threads wait for each other."""
        self.notice()
        while self._often:
            time.sleep(max(0.0, self._next - time.perf_counter()))
            self.notice()

    def notice(self) -> None:
        """Between two steps: try, now and then, whether the threads wait for each other; halve them if so.

        Last digits depend on how many there are, and from then on on what else ran. With
        ``torch.use_deterministic_algorithms(True)`` they stay as many.
        """
        set_here(self.number)  # the step may have launched numba's pool
        if self.number == 1 or time.perf_counter() < self._next:
            return
        if torch.are_deterministic_algorithms_enabled():
            return
        self._often = max(0, self._often + (1 if self._wait_for_each_other() else -1))
        self._pause = _SOON if self._often else min(2 * self._pause, _SELDOM)
        self._next = time.perf_counter() + self._pause
        if self._often == _OFTEN:
            self._halve()

    def _halve(self) -> None:
        before, now = self.number, self.number // 2
        self._often, self.numbers = 0, (*self.numbers, now)
        set_here(now)
        _log.warning(
            "other programs use the cores, and torch's %d threads wait for each other: the fit goes on with "
            "%d. Last digits depend on that number; for the same ones each time, call "
            "torch.set_num_threads(%d) before the fit",
            before,
            now,
            now,
        )

    def _wait_for_each_other(self) -> bool:
        """Say whether operations take several times as long on all threads as on one."""
        x, y = self._x[: self.number * _GRAIN], self._y[: self.number * _GRAIN]
        few_x, few_y = x[: _GRAIN // 2], y[: _GRAIN // 2]  # too few to be shared
        torch.mul(x, x, out=y)  # (the first makes the threads)
        start = time.perf_counter()
        for _ in range(2 * _MEETINGS):
            torch.mul(few_x, few_x, out=few_y)
        self._alone = min(self._alone, time.perf_counter() - start)
        late = time.perf_counter() + max(_LEAST, _SLOWER * self.number * self._alone)
        for _ in range(_MEETINGS):
            torch.mul(x, x, out=y)
            if time.perf_counter() > late:
                return True
        return False


@contextmanager
def watched(n_entries: int) -> Iterator[Threads]:
    """Work as in :func:`kept`, on fewer threads where other programs use the cores."""
    with kept(n_entries) as number:
        threads = Threads(number)
        threads.settle()
        yield threads
