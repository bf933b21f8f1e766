import threading
import time

import pytest
import torch

from pyrosc.engine.rng import seeded

CPU = torch.device("cpu")


def test_the_same_seed_gives_the_same_numbers(untouched):
    with untouched():
        with seeded(CPU, 5):
            first = torch.randn(3)
        with seeded(CPU, 5):
            again = torch.randn(3)
        with seeded(CPU, 6):
            other = torch.randn(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_callers_numbers_go_on_as_if_nothing_had_been():
    torch.manual_seed(1)
    torch.randn(2)
    expected = torch.randn(2)
    torch.manual_seed(1)
    torch.randn(2)
    with seeded(CPU, 7):
        torch.randn(100)
    assert torch.equal(torch.randn(2), expected)


def test_the_state_comes_back_after_an_exception(untouched):
    def interrupted():
        with seeded(CPU, 0):
            torch.randn(3)
            raise ZeroDivisionError

    with untouched(), pytest.raises(ZeroDivisionError):
        interrupted()


def test_threads_wait_for_their_turn():
    """Random numbers are the process's: without turns one thread would draw from the other's seed."""

    def draw(seed, drawn):
        for _ in range(50):
            with seeded(torch.device("cpu"), seed):
                time.sleep(0.0005)
                drawn.append(float(torch.rand(())))

    both = [[], []]
    threads = [threading.Thread(target=draw, args=(seed, drawn)) for seed, drawn in enumerate(both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(set(drawn)) == 1 for drawn in both)
