"""As many threads as torch was given: numba's pool, forks, two callers at once. In processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import numba
import pytest
import torch

from pyrosc.engine.cpu import threads
from pyrosc.engine.cpu.threads import _SMALL, kept, set_here, shared

linux = pytest.mark.skipif(sys.platform != "linux", reason="numba and torch share an OpenMP library on Linux")


ROOT = Path(__file__).resolve().parents[2]
# All of pyrosc takes longer to import than what is tested here.
ENGINE_ALONE = (
    "import sys, types\n"
    "sys.modules['pyrosc'] = types.ModuleType('pyrosc')\n"
    f"sys.modules['pyrosc'].__path__ = [{str(ROOT / 'pyrosc')!r}]\n"
)


def run(code, **environment):
    """Run code in a Python of its own, with these variables and no other of OpenMP's; return what it says."""
    ours = {"PYTHONPATH": str(ROOT), "NUMBA_THREADING_LAYER": "omp"} | environment
    others = {k: v for k, v in os.environ.items() if k.partition("_")[0] not in ("OMP", "MKL", "NUMBA")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=others | ours,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- what torch was given

LAUNCH = "numba.get_num_threads()\n"
SET_BY_IT = LAUNCH + "assert torch.get_num_threads() == 3, 'numba does so no longer'\n"
BY_HAND = "import torch, numba; torch.set_num_threads({}); torch.get_num_threads()\n"
FEWER = "from pyrosc.engine.cpu.threads import set_here; set_here(2)\n"
STARTS = {  # what is run, with OMP_NUM_THREADS=1, and what torch was given
    "environment": ("import torch, numba; torch.get_num_threads()\n" + SET_BY_IT, 1),
    "numba first": ("import numba\n" + LAUNCH + "import torch\n", 1),
    "set by hand": (BY_HAND.format(2) + SET_BY_IT, 2),
    "more than numba": (BY_HAND.format(5) + SET_BY_IT, 5),
    "fewer in this thread": (BY_HAND.format(5) + LAUNCH + FEWER, 2),
}


@linux
@pytest.mark.parametrize("start", STARTS)
def test_what_torch_was_given_holds_after_numba_has_launched_its_pool(start):
    first, expected = STARTS[start]
    out = run(
        ENGINE_ALONE
        + first
        + "from pyrosc.engine.cpu.threads import kept\n"
        + "for later in 4, 3, 1:\n"
        + "    with kept() as found:\n"
        + "        print(found, torch.get_num_threads(), end=' ')\n"
        + "    print(torch.get_num_threads())\n"  # for others too
        + "    torch.set_num_threads(later)\n",
        NUMBA_NUM_THREADS="3",
        OMP_NUM_THREADS="1",
    )
    assert out == f"{expected} {expected} {expected}\n4 4 4\n3 3 3\n"


@linux
def test_a_loop_that_launches_numbas_pool_leaves_torchs_number():
    out = run(
        ENGINE_ALONE + "import torch, numba\n"
        "torch.set_num_threads(2)\n"
        "from pyrosc.engine.cpu.dropout import kept\n"
        "kept(torch.tensor([1]), 2**16, 2**15)\n"
        "print(numba.threading_layer(), torch.get_num_threads())\n",
        NUMBA_NUM_THREADS="3",
    )
    assert out == "omp 2\n"


@linux
def test_a_fit_and_questions_run_on_what_torch_was_given():
    out = run(
        "import numba, torch, pyrosc\n"
        "from pyrosc.datasets.simulate import simulate\n"
        "numba.get_num_threads()\n"
        "seen = set()\n"
        "class Noting(pyrosc.VAE):\n"
        "    def guide(self, cells):\n"
        "        seen.add(torch.get_num_threads())\n"
        "        return super().guide(cells)\n"
        "data = pyrosc.from_anndata(simulate(60, 300, seed=0))\n"
        "model = Noting.for_data(data, hidden=(4,), n_latent=2)\n"
        "fit = pyrosc.fit_svi(model, data, epochs=2, progress=False)\n"
        "print(seen, torch.get_num_threads())\n"
        "seen.clear()\n"
        "pyrosc.engine.cpu.threads._checked.here = False\n"  # as if the launch were now
        "pyrosc.engine.cpu.threads.set_here(3)\n"
        "pyrosc.latent(fit, data)\n"
        "print(seen, torch.get_num_threads())\n",
        NUMBA_NUM_THREADS="3",
        OMP_NUM_THREADS="1",
    )
    assert out == "{1} 1\n{1} 1\n"


def test_a_number_is_set_in_one_thread_alone():
    def elsewhere():
        found.append(torch.get_num_threads())

    found = []
    try:
        for number in (2, 1):
            set_here(number)
            assert torch.get_num_threads() == number
            thread = Thread(target=elsewhere)
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert found == [1, 1]


def test_no_more_than_there_are_cores_and_one_for_small_work(monkeypatch):
    monkeypatch.setattr(threads, "n_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    try:
        with kept() as number:
            assert number == torch.get_num_threads() == 2
        with kept(_SMALL) as number:
            assert number == 2
        with kept(_SMALL - 1) as number:
            assert number == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with kept() as number:
            assert number == 4
            set_here(3)
        assert torch.get_num_threads() == 4
        with pytest.raises(KeyboardInterrupt), kept(1):
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


# --- loops


def noted(seen):
    """Return a loop that notes on how many threads it is run."""

    def loop(n_shares, n_rows):
        seen.append((numba.get_num_threads(), n_shares, n_rows))

    loop.alone = lambda first, last: seen.append(("alone", first, last))
    return loop


def test_as_many_threads_are_used_as_torch_has(monkeypatch):
    seen = []
    loop = noted(seen)
    before = numba.get_num_threads()
    torch.set_num_threads(1)  # (this may have been the launch)
    shared(loop, 100, _SMALL)
    torch.set_num_threads(2)
    try:
        shared(loop, 100, _SMALL - 1)
        shared(loop, 100, _SMALL)
        shared(loop, 3, _SMALL)
        monkeypatch.setattr(threads, "_forked", True)
        shared(loop, 100, _SMALL)
    finally:
        torch.set_num_threads(1)
    assert numba.get_num_threads() == before
    n = min(2, numba.config.NUMBA_NUM_THREADS)
    both = [(n, n * threads._SHARES, 100), (n, 3, 3)] if n > 1 else [("alone", 0, 100), ("alone", 0, 3)]
    assert seen == [("alone", 0, 100), ("alone", 0, 100), *both, ("alone", 0, 100)]


def test_the_number_of_threads_is_left_where_a_loop_fails():
    def loop(*_):
        raise KeyboardInterrupt

    loop.alone = None  # it has its turn each time
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(2)
    try:
        for _ in range(2):  # (the turn is given back too)
            with pytest.raises(KeyboardInterrupt):
                shared(loop, 10, _SMALL)
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
        numba.set_num_threads(before)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="numba has one thread")
def test_the_second_of_two_callers_works_alone():
    def loop(*_):
        began.set()
        seen.append("shared")
        assert done.wait(60)

    def second():
        assert began.wait(60)
        torch.set_num_threads(2)
        shared(loop, 10, _SMALL)
        done.set()

    seen, began, done = [], Event(), Event()
    loop.alone = lambda *_: seen.append("alone")
    thread = Thread(target=second)
    thread.start()
    torch.set_num_threads(2)
    try:
        shared(loop, 10, _SMALL)
    finally:
        torch.set_num_threads(1)
        thread.join()
    assert seen == ["shared", "alone"]


def test_without_a_pool_loops_run_on_one_thread_and_the_log_says_so():
    out = run(
        ENGINE_ALONE + "import logging, sys, torch\n"
        "logging.basicConfig(stream=sys.stdout, format='%(name)s %(levelname)s %(message)s')\n"
        "from pyrosc.engine.cpu.dropout import kept\n"
        "alone = kept(torch.tensor([1]), 2**16, 2**15)\n"
        "torch.set_num_threads(2)\n"
        "for _ in range(2):\n"
        "    assert torch.equal(kept(torch.tensor([1]), 2**16, 2**15), alone)\n",
        NUMBA_THREADING_LAYER="absent",
        OMP_NUM_THREADS="1",
    )
    (line,) = out.splitlines()
    assert line.startswith("pyrosc.engine.cpu.threads WARNING numba's loops run on one thread: ")
    assert "absent" in line


@linux
def test_a_forked_child_works_on_one_thread():
    """With its parent's number torch would wait for ever, and numba end the process."""
    out = run(
        ENGINE_ALONE + "import os, signal, torch\n"
        "torch.set_num_threads(2)\n"
        "from pyrosc.engine.cpu import dropout, threads\n"
        "def work():\n"
        "    a = torch.ones(700, 700, requires_grad=True)\n"
        "    (a @ a).exp().sum().backward()\n"
        "    return dropout.kept(torch.tensor([1]), 2**16, 2**15)\n"
        "here, child = work(), os.fork()\n"
        "if not child:\n"
        "    signal.alarm(60)\n"
        "    with threads.kept() as number:\n"
        "        os._exit(7 if number == 1 and torch.equal(work(), here) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert out == "7\n"
