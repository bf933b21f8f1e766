"""Threads that wait for each other are halved, once it is clear, and the log says so."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrosc.engine.cpu import contention
from pyrosc.engine.cpu.contention import Threads, watched


@pytest.fixture
def four(monkeypatch):
    """Torch has four threads, and a trial comes at every step."""
    monkeypatch.setattr(contention, "_SOON", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def finding(monkeypatch, *outcomes):
    """Let trials have these outcomes."""
    left = iter(outcomes)
    monkeypatch.setattr(Threads, "_wait_for_each_other", lambda _: next(left))
    return left


@pytest.mark.usefixtures("four")
def test_threads_that_often_wait_for_each_other_are_halved(monkeypatch, caplog):
    left = finding(monkeypatch, False, *[True, True, False, True, True], *[True] * 3, False)
    with caplog.at_level(logging.WARNING), watched(1 << 20) as threads:
        assert threads.numbers == (4,)
        numbers = []
        for _ in range(8):
            threads.notice()
            numbers.append(torch.get_num_threads())
        assert numbers == [4, 4, 4, 4, 2, 2, 2, 1]
        threads.notice()  # of one thread there is nothing to try
        assert threads.numbers == (4, 2, 1)
        assert threads.number == 1
    assert torch.get_num_threads() == 4
    assert list(left) == [False]
    assert [r.name for r in caplog.records] == ["pyrosc.engine.cpu.contention"] * 2
    assert "torch's 4 threads wait for each other: the fit goes on with 2" in caplog.messages[0]


@pytest.mark.usefixtures("four")
def test_cores_that_are_busy_before_the_first_step(monkeypatch):
    finding(monkeypatch, True, True, True)
    with watched(1 << 20) as threads:
        assert threads.numbers == (4, 2)
    finding(monkeypatch, True, False)
    with watched(1 << 20) as threads:
        assert threads.numbers == (4,)


@pytest.mark.usefixtures("four")
def test_trials_are_seldom_while_cores_are_free(monkeypatch):
    monkeypatch.setattr(contention, "_SOON", 10.0)
    monkeypatch.setattr(contention, "_SELDOM", 50.0)
    clock = [100.0]
    monkeypatch.setattr(contention.time, "perf_counter", lambda: clock[0])
    tried = []
    monkeypatch.setattr(Threads, "_wait_for_each_other", lambda _: tried.append(clock[0]))
    with watched(1 << 20) as threads:
        for _ in range(200):
            clock[0] += 1
            threads.notice()
    assert tried == [100, 120, 160, 210, 260]


@pytest.mark.usefixtures("four")
def test_deterministic_algorithms_keep_the_number(monkeypatch):
    finding(monkeypatch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with watched(1 << 20) as threads:
        threads.notice()
        assert threads.numbers == (4,)


def test_a_number_that_changed_during_a_step_is_set_again():
    with watched(1 << 20) as threads:
        torch.set_num_threads(3)
        threads.notice()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="sets the process's affinity")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_two_threads_on_one_core_wait_for_each_other():
    """As two that have a core each wait where other programs use these."""
    code = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"  # (known to OpenMP as two cores)
        "from pyrosc.engine.cpu.contention import watched\n"
        "before = torch.get_rng_state()\n"
        "with watched(1 << 20) as threads:\n"
        "    print(threads.numbers)\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
    )
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | path,
        check=False,
    )
    assert done.stdout == "(2, 1)\n", done.stderr[-3000:]
    assert "the fit goes on with 1" in done.stderr
