"""The density that Triton compiles: on a CUDA device, or by Triton's interpreter where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from test_count_density import ALL, BROADCASTS, MAKE, SPECIAL, check, example

from pyrosc import VAE, fit_svi
from pyrosc.distributions import cell
from pyrosc.engine import backends

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")


@pytest.fixture
def called(monkeypatch):
    """Arguments of each call of the kernel, which takes the place of the CPU's loop."""
    from pyrosc.engine.cuda import count_density as cuda

    calls = []
    compute = lambda *a: calls.append(a) or cuda.log_density(*a)
    monkeypatch.setattr(cuda, "_BLOCK", 32)
    monkeypatch.setattr(cuda, "_TABLE", 20)
    monkeypatch.setattr(cell, "log_density_for", lambda *_: compute)
    return calls


def check_there(name, x, parameters):
    check(name, x.to(DEVICE), [p.to(DEVICE) for p in parameters])


@pytest.mark.parametrize("n_genes", [1, 32, 41])
@ALL
def test_cells_are_the_sum_over_their_counts(name, n_genes, called):
    parameters, x = example(name, 3, n_genes)
    check_there(name, x, parameters)
    assert len(called) == 1


@pytest.mark.parametrize("shapes", BROADCASTS.values(), ids=BROADCASTS)
def test_parameters_are_broadcast(shapes, called):
    parameters, x = example("zinb", 6, 31, **shapes)
    check_there("zinb", x, parameters)
    check_there("zinb", x[0], parameters)
    assert len(called) == 2


@pytest.mark.parametrize("theta", [1e-4, 1e-2, 1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_counts_of_any_theta_and_mean(name, theta, called):
    x = torch.tensor(SPECIAL).repeat(6, 1)
    mean = torch.tensor([1e-20, 1e-4, 0.3, 20.0, 1e4, 1e20])[:, None].expand_as(x).contiguous()
    gate = torch.linspace(-9, 9, len(SPECIAL))
    check_there(name, x, [mean, torch.full_like(x, theta), *([gate] if name == "zinb" else [])])
    assert len(called) == 1


@pytest.mark.parametrize("name", ["zip", "zinb"])
def test_zeros_far_out_are_summed_in_log_space(name, called):
    parameters, x = example(name, 2, 40)
    parameters[-1][:, ::2], parameters[0][:, ::2] = -130.0, 5e3
    check_there(name, torch.zeros_like(x), parameters)
    assert len(called) == 1


@ALL
def test_slopes_that_nobody_wants_are_not_filled(name, called):
    parameters, x = example(name, 2, 5)
    MAKE[name](*(p.to(DEVICE) for p in parameters)).to_event(1).log_prob(x.to(DEVICE))
    assert called[0][-1] == [False] * 3


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyrosc.engine.cuda.count_density import _log_density

given = {"x_at", "mean_at", "log_p_at", "table_at", "d_mean_at"} | set(sys.argv[1:])
signature, constants = {}, {}
for i, name in enumerate(_log_density.arg_names):
    doubles = "*fp64" if name in ("log_p_at", "table_at") else "*fp32"
    fixed = {"BLOCK": 128, "N_TABLE": 256} | ({} if name in given or name[-3:] != "_at" else {name: None})
    signature[name] = "constexpr" if name in fixed else doubles if name in given else "i32"
    constants |= {(i,): fixed[name]} if name in fixed else {}
source = ASTSource(fn=_log_density, signature=signature, constexprs=constants)
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the device compiles it itself")
@pytest.mark.parametrize(
    "given", [(), ("theta_at", "d_theta_at", "gate_at", "d_gate_at")], ids=["poisson", "zinb"]
)
def test_it_compiles_without_a_device(given, tmp_path):
    told = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, *given], env=told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def test_without_triton_torch_does_the_same(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no device\nhere")

    monkeypatch.setattr(torch, "ones", fail)
    backends._on_cuda.cache_clear()
    try:
        assert backends._on_cuda() is None
    finally:
        backends._on_cuda.cache_clear()
    assert "Triton cannot be used (no device)" in caplog.text


@GPU
@ALL
def test_on_a_device(name):
    assert backends._on_cuda(), "Triton does not compile here"
    parameters, x = example(name, 64, 1025)
    check_there(name, x, parameters)


@GPU
def test_a_fit_is_replayed_as_one_graph(adata, caplog):
    caplog.set_level("INFO", "pyrosc")
    fit = fit_svi(VAE.for_data(adata), adata, epochs=200, minibatch_size=32, device="cuda", progress=False)
    assert "steps are run" not in caplog.text
    assert fit.history.train.iloc[-1] < fit.history.train.iloc[0]
