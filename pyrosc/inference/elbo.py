"""The negative ELBO of a minibatch as a tensor: the weight on its KL, Pyro's estimators, the KL of each site.

Pyro's estimators read their value off the device in every step. Here the same sums stay there, so that a
step need not wait, and can be recorded (but for TraceEnum_ELBO, which looks at numbers while it sums out).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import (
    ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from torch import Tensor
from torch.distributions import kl_divergence

from pyrosc.data.minibatch import Cells
from pyrosc.engine.replay import gradients_of
from pyrosc.inference.contract import Program, is_plate, traces
from pyrosc.inference.handlers import ScaleKL
from pyrosc.inference.isolation import validating


def _weighted_loss(
    elbo: ELBO, model: Program, guide: Program, cells: Cells, weight: float | Tensor = 1.0
) -> Float[Tensor, ""]:
    """Return the negative ELBO with a weight on its KL, in nats per cell.

    Value and gradients are those of ``elbo.differentiable_loss``. An estimator that is none of Pyro's
    Trace_ELBO, TraceMeanField_ELBO and TraceEnum_ELBO is asked itself.
    """
    if isinstance(elbo, RenyiELBO):
        scaled = ScaleKL(weight)
        pairs = elbo._get_traces(scaled(model), scaled(guide), (cells,), {})
        return -_renyi(elbo, pairs) / cells.n_total
    # TraceEnum_ELBO compares the scales of sites as numbers: a tensor's would be a rounded one.
    scaled = ScaleKL(float(weight) if isinstance(elbo, TraceEnum_ELBO) else weight)
    estimate = _ESTIMATES.get(type(elbo))
    if estimate is None:
        ask: Any = elbo.differentiable_loss if torch.is_grad_enabled() else elbo.loss  # type: ignore[attr-defined]
        return torch.as_tensor(ask(scaled(model), scaled(guide), cells)) / cells.n_total
    particles = [
        estimate(modelled, guided)
        for modelled, guided in elbo._get_traces(scaled(model), scaled(guide), (cells,), {})
    ]
    return -torch.as_tensor(sum(particles)) / (elbo.num_particles * cells.n_total)


def _renyi(elbo: RenyiELBO, traces: Iterable[tuple[poutine.Trace, poutine.Trace]]) -> Tensor:
    """Return the bound of Li and Turner (2016), eq. 12: each cell's log mean of its particles' weights.

    Pyro's own has no gradients unless a program names its parameters, by ``pyro.param`` or ``pyro.module``.
    Sites of the guide must be reparameterised.
    """
    particles = []
    for modelled, guided in traces:
        axes = get_dependent_plate_dims(modelled.nodes.values())
        log_p = [torch_sum(site["log_prob"], axes) for site in _sampled(modelled)]
        log_q = [torch_sum(site["log_prob"], axes) for site in _sampled(guided)]
        if not all(is_identically_zero(site["score_parts"].score_function) for site in _sampled(guided)):
            msg = "RenyiELBO takes sites of the guide that are reparameterised: use TraceGraph_ELBO"
            raise NotImplementedError(msg)
        particles.append(torch.as_tensor(sum(log_p)) - sum(log_q))
    at_once = elbo.vectorize_particles and elbo.num_particles > 1
    log_w = particles[0] if at_once else torch.stack(particles)
    log_mean = ((1 - elbo.alpha) * log_w).logsumexp(0) - math.log(elbo.num_particles)
    return log_mean.sum() / (1 - elbo.alpha)


def loss_and_gradients(
    elbo: ELBO, model: Program, guide: Program, parameters: Sequence[Tensor]
) -> Callable[[Cells, Tensor], tuple[Float[Tensor, ""], list[Tensor | None]]]:
    """Return what gives :func:`weighted_loss` of cells and a KL weight, and its gradients in parameters."""
    if hasattr(elbo, "differentiable_loss") or isinstance(elbo, RenyiELBO):
        return gradients_of(partial(_weighted_loss, elbo, model, guide), parameters)

    def by_backward(cells: Cells, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Ask an estimator that has nothing to differentiate, but adds to ``grad`` itself."""
        scaled, before = ScaleKL(weight), [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            loss = elbo.loss_and_grads(scaled(model), scaled(guide), cells)  # type: ignore[attr-defined]
            slopes = [None if p.grad is None else p.grad / cells.n_total for p in parameters]
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        return torch.as_tensor(loss, device=cells.x.device) / cells.n_total, slopes

    return by_backward


def check_estimator(elbo: ELBO, *, n_minibatches: int, kl_weight: float, kl_warmup: int) -> None:
    """Raise if an estimator is none that :func:`pyrosc.fit_svi` can minimise, or not so.

    Parameters
    ----------
    elbo
        The estimator.
    n_minibatches
        Into how many the training cells are divided.
    kl_weight, kl_warmup
        See :func:`pyrosc.fit_svi`.

    Raises
    ------
    ValueError
        If it has no loss; or its particles are weighted, and cells are subsampled or the KL has a weight: the
        densities that its weights are made of are then scaled, and it bounds nothing.
    """
    name = type(elbo).__name__
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        msg = f"{name} has gradients but no loss, which a fit is judged by: use RenyiELBO or Trace_ELBO"
        raise ValueError(msg)
    if isinstance(elbo, RenyiELBO) and (n_minibatches > 1 or kl_weight != 1 or kl_warmup):
        msg = (
            f"{name} weights particles by densities, which minibatches and KL weights scale: no bound "
            "then; give minibatch_size=data.n_cells, kl_warmup=0 and kl_weight=1, or use Trace_ELBO"
        )
        raise ValueError(msg)


def checked_loss(elbo: ELBO, model: Program, guide: Program, cells: Cells) -> Tensor:
    """Return a loss to differentiate, computed by Pyro's own estimator with Pyro's validation on.

    Raises
    ------
    ValueError
        If the estimator refuses the programs.
    """
    asked: Any = elbo if hasattr(elbo, "differentiable_loss") else Trace_ELBO()
    try:
        if isinstance(elbo, RenyiELBO):
            with validating(on=True):
                return _weighted_loss(elbo, model, guide, cells)
        with validating(on=True), warnings.catch_warnings():
            # What is deterministic in a guide alone, such as probabilities to be asked for, is no fault.
            warnings.filterwarnings("ignore", "Found non-auxiliary vars in guide")
            return asked.differentiable_loss(model, guide, cells)
    except (NotImplementedError, ValueError) as error:
        name = type(elbo).__name__
        msg = f"{name} refuses these programs: {error}. Give another estimator, elbo=pyro.infer.Trace_ELBO"
        raise ValueError(msg) from error


def of_held_out(elbo: ELBO) -> ELBO:
    """Return the estimator that measures cells kept out, some at a time: itself, or else Trace_ELBO."""
    return Trace_ELBO() if isinstance(elbo, RenyiELBO) else elbo


def _trace(modelled: poutine.Trace, guided: poutine.Trace) -> Any:
    """Return the ELBO, log p less log q; draws without a gradient of their own have the score function's."""
    value: Any = 0.0
    surrogate: Any = 0.0
    log_r = None
    for site in _sampled(modelled):
        value = value + site["log_prob_sum"]
    for site in _sampled(guided):
        _, score_function, entropy = site["score_parts"]
        value = value - site["log_prob_sum"]
        if not is_identically_zero(
            score_function
        ):  # value's gradient has the density's, which is no part of it
            log_r = _compute_log_r(modelled, guided) if log_r is None else log_r
            weights = log_r.sum_to(site["cond_indep_stack"])
            surrogate = surrogate + (weights * score_function).sum() + site["log_prob_sum"]
            surrogate = surrogate - (0.0 if is_identically_zero(entropy) else entropy.sum())
    return value + surrogate - surrogate.detach() if isinstance(surrogate, Tensor) else value


def _trace_mean_field(modelled: poutine.Trace, guided: poutine.Trace) -> Any:
    """Return the ELBO with the KL of each site in closed form, where torch knows it."""
    value: Any = 0.0
    for name, p in modelled.nodes.items():
        if p["type"] != "sample":
            continue
        if p["is_observed"]:
            value = value + p["log_prob_sum"]
            continue
        q = guided.nodes[name]
        try:
            kl = scale_and_mask(kl_divergence(q["fn"], p["fn"]), q["scale"], q["mask"])
            value = value - (kl.sum() if isinstance(kl, Tensor) else kl * q["fn"].batch_shape.numel())
        except NotImplementedError:
            value = value + p["log_prob_sum"] - q["score_parts"].entropy_term.sum()
    for name, q in guided.nodes.items():
        if q["type"] == "sample" and name not in modelled.nodes:
            value = value - q["score_parts"].entropy_term.sum()
    return value


_ESTIMATES = {
    Trace_ELBO: _trace,
    TraceMeanField_ELBO: _trace_mean_field,
    TraceEnum_ELBO: _compute_dice_elbo,
}


def _sampled(trace: poutine.Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _kl_by_site(model: Program, guide: Program, cells: Cells, *, mean_field: bool = True) -> dict[str, float]:
    """Return the KL of each site that both programs sample, in nats per cell.

    Parameters
    ----------
    model, guide, cells
        The programs, and what to run them on.
    mean_field
        Whether no site of the guide depends on another: then in closed form where torch knows it. Else, and
        where it does not, from one draw.
    """
    guided, modelled = traces(model, guide, cells)
    return _kl_of_sites(modelled, guided, cells, mean_field=mean_field)


def loss_and_kl(
    elbo: ELBO, model: Program, guide: Program, cells: Cells, weight: float
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return :func:`weighted_loss` and :func:`kl_by_site`, of one run of the programs if that is enough."""
    mean_field = isinstance(elbo, TraceMeanField_ELBO)
    if type(elbo) not in (Trace_ELBO, TraceMeanField_ELBO) or elbo.num_particles > 1:
        loss = _weighted_loss(elbo, model, guide, cells, weight)
        return loss, _kl_by_site(model, guide, cells, mean_field=mean_field)
    scaled = ScaleKL(weight)
    ((modelled, guided),) = elbo._get_traces(scaled(model), scaled(guide), (cells,), {})
    loss = torch.as_tensor(_ESTIMATES[type(elbo)](modelled, guided)) / -cells.n_total
    kl = _kl_of_sites(modelled, guided, cells, mean_field=mean_field)
    return loss, {name: value / weight for name, value in kl.items()}


def _kl_of_sites(
    modelled: poutine.Trace, guided: poutine.Trace, cells: Cells, *, mean_field: bool
) -> dict[str, float]:
    """Return the KL of each site, times its scale."""
    joint = any(name.startswith("_Auto") and name.endswith("_latent") for name in guided.nodes)
    kl = {}
    for name, q in guided.nodes.items():
        if q["type"] != "sample" or q["is_observed"] or is_plate(q) or name not in modelled.nodes:
            continue
        if joint and isinstance(q["fn"], Delta):  # a part of a joint distribution has no KL of its own
            continue
        p = modelled.nodes[name]
        try:
            if isinstance(q["fn"], Delta) or not mean_field:  # Pyro's KL of a Delta leaves out its density
                raise NotImplementedError
            site = kl_divergence(q["fn"], p["fn"])
        except NotImplementedError:
            site = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(q["value"])
        kl[name] = float(scale_and_mask(site, q["scale"], q["mask"]).sum()) / cells.n_total
        # An autoguide's site is a Delta at what an auxiliary site drew; the density is that one's.
        if (u := guided.nodes.get(f"{name}_unconstrained")) is not None:
            log_q = scale_and_mask(u["fn"].log_prob(u["value"]), u["scale"], u["mask"])
            kl[name] += float(log_q.sum()) / cells.n_total
    return kl
