"""Where the loops are compiled, and what is done where they can't be."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyrosc import VAE, fit_svi
from pyrosc.data import minibatch
from pyrosc.distributions.counts import Poisson
from pyrosc.engine import backends
from pyrosc.nn import log1p_linear


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_without_the_loops_a_fit_is_nearly_the_same(data, likelihood, monkeypatch):
    vae = VAE.for_data(data, n_latent=2, hidden=(8,), likelihood=likelihood, dropout=0.0)
    settings = {"epochs": 3, "minibatch_size": 64, "learning_rate": 1e-2, "progress": False}
    with_loops = fit_svi(vae, data, **settings)
    asked = []
    for module in (backends, minibatch, log1p_linear):
        monkeypatch.setattr(module, "kernels", lambda name=module.__name__: asked.append(name))
    without = fit_svi(vae, data, **settings)
    assert set(asked) == {"pyrosc.engine.backends", "pyrosc.data.minibatch", "pyrosc.nn.log1p_linear"}
    for column in ("train", "validation", "kl_z"):
        np.testing.assert_allclose(with_loops.history[column], without.history[column], rtol=1e-3)


def test_one_warning_where_numba_does_not_import(monkeypatch, caplog):
    monkeypatch.delattr("pyrosc.engine.operators", raising=False)
    monkeypatch.setitem(sys.modules, "pyrosc.engine.operators", None)
    backends.kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert backends.kernels() is None
            assert backends.kernels() is None
            d = Poisson(torch.ones(2, 3)).to_event(1)
            torch.testing.assert_close(d.log_prob(torch.zeros(2, 3)), torch.full((2,), -3.0))
    finally:
        backends.kernels.cache_clear()
    (record,) = caplog.records
    assert record.name == "pyrosc.engine.backends"
    assert record.levelno == logging.WARNING
    assert "numba cannot be used" in record.getMessage()


def test_a_process_that_compiles_has_the_bits_of_those_that_find_the_loops_compiled(tmp_path):
    code = (
        "import hashlib, torch\n"
        "from pyrosc.engine.operators import weighted_softmax_density_\n"
        "torch.set_num_threads(1)\n"
        "some = lambda *shape: torch.rand(*shape, generator=random)\n"
        "random = torch.Generator().manual_seed(0)\n"
        "logits, gate, x = some(64, 700), some(64, 700), (4 * some(64, 700)).floor()\n"
        "theta = 3 * some(1, 700)\n"
        "library, weight = x.sum(1, keepdim=True), torch.ones(64)\n"
        "parts = logits, some(700), gate, some(700), library, x, theta, None, weight\n"
        "done = weighted_softmax_density_(*parts)\n"
        "print(hashlib.md5(b''.join(t.numpy().tobytes() for t in (logits, gate, *done))).hexdigest())\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))
    assert found[0] == found[1]
