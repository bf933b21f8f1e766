"""What every model gives at fixed weights and fixed draws, against numbers kept in golden_models.json.

A change that is to change nothing leaves them as they are. Where a model is meant to change, its numbers are
made anew by ``PYROSC_GOLDEN=write pytest tests/models/test_golden_models.py``; the difference shows what
changed.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import pairs
import pytest
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO

from pyrosc import (
    DCA,
    GMVAE,
    LDVAE,
    SCANVI,
    SCVIS,
    TOTALVI,
    VAE,
    VASC,
    VSC,
    Autoencoder,
    AutoImpute,
    AutoZI,
    GaussianVAE,
    from_anndata,
)
from pyrosc.inference.elbo import _weighted_loss
from pyrosc.inference.isolation import isolated

STORED = Path(__file__).with_suffix("").with_name("golden_models.json")
CPU = torch.device("cpu")
WRITE = os.environ.get("PYROSC_GOLDEN") == "write"

# The numbers are sums of hundreds to thousands of terms in float32, each good to about 1e-7 of its size, and
# processors add in other orders. Gradients are sums of sums, some of which nearly cancel.
CLOSE, CLOSE_SLOPE = 1e-5, 1e-4
ROUNDING = 1e-6  # of what is 0 but for that: the mean of standardised values

# --- the cases

NB = [{"dispersion": name} for name in ("gene", "gene-batch", "gene-linear", "gene-cell")]
COUNTS = [
    {"likelihood": "poisson"},
    {"likelihood": "zip"},
    *({"likelihood": "nb", **more} for more in NB),
    *({"likelihood": "zinb", **more} for more in NB),
]
BOTH = [{"library": name} | more for name, more in zip(["observed", "latent"] * 5, COUNTS, strict=True)]
TRANSFORMS = [{"transform": "log"}, {"transform": "pearson"}, {"transform": "raw", "norm": "layer"}]

MODELS = {
    VAE: [
        *BOTH,
        {"prior": "mixture", "n_components": 4},
        {"prior": "vamp", "n_components": 4},
        {"library": "latent", "encode_covariates": True},
        {"norm": "layer", "encode_covariates": True},
        {"norm": "batch", "library": "latent"},
        {"hidden": (), "library": "latent", "encode_covariates": True},
    ],
    LDVAE: [*BOTH, {"library": "latent", "encode_covariates": True}],
    GMVAE: [
        *({"n_components": 4, **more} for more in BOTH),
        {"n_components": 4, "proportions": "uniform"},
        {"n_components": 3, "proportions": (1.0, 2.0, 5.0), "library": "latent", "encode_covariates": True},
    ],
    VSC: [
        *({"branch": 4, **more} for more in BOTH),
        {"branch": 4, "prior": "pseudo", "n_pseudo": 4, "inclusion": 0.4},
        {"branch": 4, "decoder": "linear", "n_latent": 2},
    ],
    SCANVI: [*BOTH, {"classification": 2.0, "norm": "batch"}],
    TOTALVI: [*BOTH, {"norm": "layer", "hidden": (5,)}],
    AutoZI: [
        {"likelihood": "poisson", "library": "latent"},
        *({"likelihood": "nb", **more} for more in NB),
        {"concentration": (0.7, 2.0), "least_dropout": 0.0},
    ],
    DCA: [
        *(
            {"likelihood": name, "dispersion": theta}
            for name in ("nb", "zinb")
            for theta in ("gene", "gene-cell")
        ),
        {"likelihood": "poisson"},
        {"likelihood": "zip", "ridge": 0.3},
        {"likelihood": "zinb", "ridge": 0.3, "norm": "batch"},
    ],
    GaussianVAE: [*TRANSFORMS, {"transform": "pearson", "scale": 1.5}, {"norm": "batch"}],
    Autoencoder: [*TRANSFORMS, {"norm": "batch"}, {"hidden": ()}],
    SCVIS: [*TRANSFORMS, {"attraction": 2.0, "perplexity": 6.0, "norm": "layer"}],
    VASC: [{}, {"norm": "layer"}],
    AutoImpute: [{}, {"hidden": (), "norm": "batch"}],
}
SMALL = {"n_latent": 3, "hidden": (5, 4), "norm": None, "dropout": 0.0}
SIZES = {DCA: {"hidden": (5, 3, 4), "norm": None}, SCVIS: SMALL | {"perplexity": 3.0}}
CASES = [(model, more, "rich") for model, recipes in MODELS.items() for more in recipes]
CASES += [(model, {"library": "latent"}, "plain") for model in (VAE, LDVAE, VSC)]


def named(model, more, data):
    return f"{model.__name__}({', '.join(f'{k}={v!r}' for k, v in more.items())}) of {data}"


@pytest.fixture(scope="session")
def plain(_simulated):
    """Counts without batches, labels, covariates or proteins."""
    return from_anndata(_simulated)


# --- numbers that stand for many


class Sum(NamedTuple):
    """A sum, and the size of its terms."""

    value: float
    size: float


def total(*terms):
    terms = torch.cat([t.detach().double().flatten() for t in terms])
    return Sum(float(terms.sum()), float(terms.norm()))


def by_formula(name, shape, size=1.0):
    """Numbers that the name and the shape decide, whatever order things were made in; no two alike."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * torch.sin(0.37 * k**2 + zlib.crc32(name.encode()) % 1000)).float().view(shape)


def weighed(name, tensor):
    """The terms of a sum that notices when numbers change places."""
    return tensor.detach().double() * by_formula(f"weight of {name}", tensor.shape).double()


def by_part(tensors):
    """The sum of each part of a model: encoder, decoder..."""
    parts = {}
    for name, tensor in sorted(tensors.items()):
        parts.setdefault(name.partition(".")[0], []).append(weighed(name, tensor))
    return {part: total(*terms) for part, terms in parts.items()}


def parameters(model):
    """By all their names: a module that two others share is in both."""
    return dict(sorted(model.named_parameters(remove_duplicate=False)))


def filled(model):
    """Weights by which a layer's outputs are of the size of its inputs; offsets that leave most units on."""
    with torch.no_grad():
        for name, p in reversed(parameters(model).items()):  # the first name of a shared one is the last
            size = 1.2 * max(p.shape) ** -0.5 if name.endswith("weight") else 0.3
            p.copy_(by_formula(name, p.shape, size) + 0.4 * name.endswith("bias"))
    return model.eval()


def slopes(model, value):
    """The gradient's, by part."""
    known = parameters(model)
    found = torch.autograd.grad(value, list(known.values()), allow_unused=True, retain_graph=True)
    zero = [torch.zeros_like(p) if g is None else g for p, g in zip(known.values(), found, strict=True)]
    return by_part(dict(zip(known, zero, strict=True)))


def labelled(prefix, sums):
    return {f"{prefix} {name}": value for name, value in sums.items()}


# --- what a model gives


def cells_of(data):
    """Twelve cells; of four the label is not known, and the last is empty."""
    cells = data.on("cpu").cells(torch.arange(4, 200, 17))
    x, labels = cells.x.clone(), cells.labels.clone()
    x[-1], labels[-4:] = 0, -1
    return dataclasses.replace(cells, x=x, labels=labels)


def loss_of(model, cells, weight, seed=9):
    elbo = getattr(model, "elbo", Trace_ELBO)(max_plate_nesting=1)
    with isolated(CPU, seed, pairs.empty_params()):
        return _weighted_loss(elbo, model.model, model.guide, cells, weight)


def draws(guide, cells):
    """Values of the guide's sites, by formula; what is certain stays, and some of z is exactly 0."""
    with isolated(CPU, 0, pairs.empty_params()), torch.no_grad():
        trace = poutine.trace(guide).get_trace(cells)
    values = {}
    for name in trace.stochastic_nodes:
        if name == "cells":
            continue
        fn, drawn = trace.nodes[name]["fn"], trace.nodes[name]["value"]
        at = by_formula(name, drawn.shape)
        formulas = {
            "z": at.where(at > -0.5, 0.0),
            "u": at,
            "l": cells.library.clamp_min(1) * (0.2 * at).exp(),
            "y": torch.arange(len(cells)) % 3,
            "beta": at.exp(),
            "delta": at.sigmoid(),
        }
        certain = isinstance(fn, Delta) or isinstance(getattr(fn, "base_dist", None), Delta)
        values[name] = drawn if certain else formulas[name]
    return values


def densities(model, cells):
    """Log densities at the draws, site by site; what is read off them; slopes of log p less log q."""
    found, difference = {}, 0.0
    values = draws(model.guide, cells)
    for name, program, sign in (("p", model.model, 1), ("q", model.guide, -1)):
        with isolated(CPU, 0, pairs.empty_params()):
            trace = poutine.trace(poutine.condition(program, values)).get_trace(cells)
        trace.compute_log_prob()
        for site, node in trace.nodes.items():
            if node["type"] != "sample" or site == "cells":
                continue
            if node["infer"].get("_deterministic"):
                found[f"value {site}"] = total(weighed(site, node["value"]))
                continue
            found[f"log {name} {site}"] = total(node["log_prob"])
            difference = difference + sign * node["log_prob_sum"]
    return found | labelled("density slope", slopes(model, difference))


def read_off(model):
    """What is a property of the parameters."""
    found = {}
    for name in ("loadings", "zero_inflation"):
        with contextlib.suppress(AttributeError, TypeError):
            found[f"value {name}"] = total(weighed(name, getattr(model, name)))
    return found


# --- comparing


@pytest.fixture(scope="module")
def golden():
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if not WRITE:
        yield stored
        return
    stored = {key: stored[key] for key in KEYS & stored.keys()}
    yield stored
    STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def check(golden, key, found, kept=None):
    """Compare sums by the size of their terms; what is `kept` is to be the same."""
    kept = json.loads(json.dumps(kept or {}))
    if WRITE:
        golden[key] = kept | {name: float(f"{s.value:.9g}") for name, s in found.items()}
    stored = golden[key]
    assert stored.keys() == kept.keys() | found.keys()
    assert {name: stored[name] for name in kept} == kept
    wrong = {
        name: f"{s.value:.9g}, was {stored[name]:.9g}"
        for name, s in found.items()
        if not abs(s.value - stored[name]) <= (CLOSE_SLOPE if "slope" in name else CLOSE) * s.size + ROUNDING
    }
    assert not wrong


KEYS = {named(*case) for case in CASES} | {f"{model.__name__} by default" for model in MODELS}


@pytest.mark.parametrize(("model", "more", "data"), CASES, ids=[named(*case) for case in CASES])
def test_a_model_at_fixed_weights(model, more, data, golden, request):
    counts = request.getfixturevalue(data)
    made = model.for_data(counts, **SIZES.get(model, SMALL) | more)
    found = labelled("start", by_part(made.state_dict()))
    cells = cells_of(counts)
    filled(made)
    for weight in (1.0, 0.3):
        loss = loss_of(made, cells, weight)
        found[f"loss {weight}"] = total(loss)
    found |= labelled(f"slope {weight}", slopes(made, loss))
    found |= densities(made, cells) | read_off(made)
    check(golden, named(model, more, data), found)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_model_by_default(model, data, rich, golden):
    """Its recipe, the names and shapes of its tensors, where they start, and a first step of a fit."""
    counts = rich if model is TOTALVI else data
    made = model.for_data(counts, **({"n_components": 3} if model is GMVAE else {}), seed=0)
    learned = parameters(made)
    found = {
        f"{'parameter' if name in learned else 'buffer'} {name} {list(t.shape)}": total(weighed(name, t))
        for name, t in made.state_dict().items()
    }
    kept = {"recipe": made.recipe}
    kept["settings"] = {
        name: value.__name__ if inspect.isclass(value) else value
        for name in ("elbo", "weight_decay", "clip_norm")
        if (value := getattr(made, name, None)) is not None
    }
    loss = loss_of(made.train(), counts.on("cpu").cells(torch.arange(0, 200, 3)), 1.0, seed=0)
    found |= {"loss in training": total(loss)} | labelled("slope in training", slopes(made, loss))
    check(golden, f"{model.__name__} by default", found, kept)


def test_each_case_is_stored_and_no_other(golden):
    assert golden.keys() == KEYS
    assert len(KEYS) == len(CASES) + len(MODELS)
