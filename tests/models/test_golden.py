"""ELBOs at fixed weights, computed again from the formulas in numpy and scipy."""

import numpy as np
import pairs
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from scipy.special import expit, log_softmax, softmax

from pyrosc import VAE
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.inference.isolation import isolated

CPU = torch.device("cpu")


def filled(module):
    """Set every parameter by formula: no random numbers, no two alike."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(pairs.wave(*p.shape, phase=1.0 + i, size=0.3))
    return module.eval()


def numbers(tensor):
    return tensor.detach().double().numpy()


def affine(layer, h):
    return h @ numbers(layer.weight).T + numbers(layer.bias)


def decoded(vae, z, c):
    """h = (relu(A (z, c) + a), c); rho = softmax(W h + b)."""
    hidden = np.maximum(affine(vae.decoder.body[0], np.concatenate([z, c], 1)), 0)
    h = np.concatenate([hidden, c], 1)
    return h, softmax(affine(vae.decoder.logits, h), 1)


def log_p_counts(name, x, mean, theta, gate):
    poisson = name in ("poisson", "zip")
    base = stats.poisson(mean) if poisson else stats.nbinom(theta, theta / (theta + mean))
    log_p = base.logpmf(x)
    if name in ("zip", "zinb"):
        zero = np.log(expit(gate) + expit(-gate) * base.pmf(0))
        log_p = np.where(x == 0, zero, np.log(expit(-gate)) + log_p)
    return log_p.sum(1)


def kl_normals(q, p):
    m, s, m0, s0 = q.mean(), q.std(), p.mean(), p.std()
    return np.log(s0 / s) + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("library", ["observed", "latent"])
@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])
def test_the_elbo_of_a_vae_at_fixed_weights(rich, likelihood, library, elbo):
    recipe = {"n_latent": 3, "hidden": (5,), "norm": None, "dropout": 0.0, "encode_covariates": True}
    dispersion = "gene-batch" if likelihood in ("nb", "zinb") else "gene"
    vae = filled(VAE.for_data(rich, likelihood=likelihood, library=library, dispersion=dispersion, **recipe))
    rows = torch.tensor([4, 90, 17, 3, 180])
    cells = rich.on("cpu").cells(rows)
    with isolated(CPU, 9, pairs.empty_params()), torch.no_grad():
        loss = float(_weighted_loss(elbo(), vae.model, vae.guide, cells))
    with isolated(CPU, 9, pairs.empty_params()), torch.no_grad():
        trace = poutine.trace(vae.guide).get_trace(cells)
    z, l = (numbers(trace.nodes[name]["value"]) for name in ("z", "l"))

    x = rich.x.toarray().astype(np.float64)[rows]
    batch = rich.batch[rows]
    depth = rich.continuous.astype(np.float64)[:, 0]
    c = np.column_stack(
        [
            ((depth - depth.mean()) / depth.std())[rows],
            np.eye(3)[rich.categorical[rows, 0]],
            np.eye(2)[batch],
        ]
    )
    h, rho = decoded(vae, z, c)
    theta = gate = 1.0
    zero_inflated = likelihood in ("zip", "zinb")
    if zero_inflated:
        gate = affine(vae.likelihood.gate_logits, h)
    if likelihood in ("nb", "zinb"):
        nb = vae.likelihood.base if zero_inflated else vae.likelihood
        theta = np.exp(numbers(nb.log_inverse_dispersion))[batch]
    log_p = log_p_counts(likelihood, x, l * rho, theta, gate)

    # The guide's own distributions: what the encoder computes is tested by what it gives.
    q = trace.nodes["z"]["fn"].base_dist
    q, p = stats.norm(numbers(q.loc), numbers(q.scale)), stats.norm(np.zeros((5, 3)), 1)
    kl = kl_normals(q, p) if elbo is TraceMeanField_ELBO else q.logpdf(z) - p.logpdf(z)
    total = log_p - kl.sum(1)
    if library == "latent":
        q = trace.nodes["l"]["fn"].base_dist.base_dist
        q = stats.norm(numbers(q.loc), numbers(q.scale))
        logs = [np.log(rich.library[rich.batch == b].astype(np.float64)) for b in (0, 1)]
        p = stats.norm(
            np.array([log.mean() for log in logs])[batch, None],
            np.array([log.std() for log in logs])[batch, None],
        )
        # log l is normal in both: the Jacobians cancel.
        at = np.log(l)
        kl = kl_normals(q, p) if elbo is TraceMeanField_ELBO else q.logpdf(at) - p.logpdf(at)
        total = total - kl[:, 0]
    assert loss == pytest.approx(-total.mean(), rel=1e-5)
    assert loss > 10  # nats per cell of forty genes: none of it cancelled away


def test_the_observed_library_is_the_total_and_costs_nothing(data):
    vae = filled(VAE.for_data(data, n_latent=2, hidden=(5,), norm=None, dropout=0.0))
    cells = data.on("cpu").cells(torch.arange(4))
    with isolated(CPU, 0, pairs.empty_params()), torch.no_grad():
        trace = poutine.trace(vae.guide).get_trace(cells)
    np.testing.assert_array_equal(trace.nodes["l"]["value"][:, 0], data.library[:4])
    trace.compute_log_prob()
    assert float(trace.nodes["l"]["log_prob"].abs().sum()) == 0


def test_the_elbo_of_two_functions_at_fixed_weights(data):
    model, guide = pairs.two_functions(data.n_genes)
    rows = torch.tensor([4, 90, 17])
    cells = data.on("cpu").cells(rows)
    with isolated(CPU, 1, pairs.empty_params()), torch.no_grad():
        loss = float(_weighted_loss(Trace_ELBO(), model, guide, cells))
    with isolated(CPU, 1, pairs.empty_params()), torch.no_grad():
        z = numbers(poutine.trace(guide).get_trace(cells).nodes["z"]["value"])
    x = data.x.toarray().astype(np.float64)[rows]
    log_rho = log_softmax(z @ numbers(pairs.wave(2, 40)), 1)
    mean = x.sum(1, keepdims=True) * np.exp(log_rho)
    at = np.log1p(x) @ numbers(pairs.wave(40, 2))
    expected = (
        stats.nbinom.logpmf(x, 1, 1 / (1 + mean)).sum(1)
        + stats.norm.logpdf(z).sum(1)
        - stats.norm.logpdf(z, at, 1).sum(1)
    )
    assert loss == pytest.approx(-expected.mean(), rel=1e-5)
