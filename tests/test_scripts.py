"""Processes of their own: what importing pyrosc does, and every example and benchmark with --smoke."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    {*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")} - {ROOT / "benchmarks/common.py"}
)


def run(*arguments, cwd=None):
    """Run Python in a process of its own, this pyrosc first on its path; half an hour means that it hangs."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_pyrosc_is_light_and_leaves_the_process_alone():
    code = (
        "import numpy as np, torch, pyro, anndata, sys\n"
        "state = lambda: (torch.get_rng_state().sum(), np.random.get_state()[1].sum(), pyro.settings.get(),"
        " torch.get_num_threads())\n"
        "before, modules = state(), {*sys.modules}\n"
        "import pyrosc\n"
        "assert state() == before\n"
        "print(*{*sys.modules} - modules)\n"
    )
    imported = {*run("-W", "error", "-c", code).split()}
    assert "pyrosc.posterior.latent" in imported
    assert not imported & {"scanpy", "scvi", "lightning", "jax", "mpmath", "beartype", "triton"}
    # They take long beside what pyrosc is built on.
    assert not imported & {"scipy.stats", "scipy.signal", "scipy.interpolate", "scipy.optimize"}
    assert not imported & {"sklearn", "matplotlib", "matplotlib.pyplot", "numba"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_examples_and_benchmarks_run(script, tmp_path):
    run(str(script), "--smoke", cwd=tmp_path)
