"""Random numbers of one's own: seeded inside, the caller's as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

_TURN = RLock()


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Run with torch's random numbers seeded, on the CPU and on a device; then they are as before.

    They are the process's, and so are Pyro's handlers: other threads wait for their turn.
    """
    cuda = [device] if device.type == "cuda" else []
    with _TURN, torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(int(seed))
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield
