"""How probable cells are under a fit: log_likelihood by importance sampling, and the parts of the ELBO."""

from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import MixtureSameFamily, Unit
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import check_draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import Run, map_runs


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Estimates of each cell's log p(x), natural logarithm.

    Attributes
    ----------
    nats : ndarray of shape (cells,)
        Nats per cell; higher is better. A lower bound in expectation, tight as `n_draws` grows.
    ess : ndarray of shape (cells,)
        Effective sample size of the importance weights, 1 to `n_draws`: a cell with an ess near 1 is
        described badly by the guide, and its estimate is too low.
    n_draws : int

    Examples
    --------
    >>> import numpy as np
    >>> import pyrosc
    >>> pyrosc.LogLikelihood(nats=np.array([-100.0, -90.0]), ess=np.array([5.0, 3.0]), n_draws=10)
    LogLikelihood(-95.00 nats per cell, 2 cells, 10 draws, median ess 4.0)
    """

    nats: np.ndarray
    ess: np.ndarray
    n_draws: int

    @property
    def mean(self) -> float:
        """Mean over the cells, in nats per cell."""
        return float(self.nats.mean())

    def __repr__(self) -> str:
        return (
            f"LogLikelihood({self.mean:.2f} nats per cell, {len(self.nats)} cells, {self.n_draws} draws, "
            f"median ess {np.median(self.ess):.1f})"
        )


def log_likelihood(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 25,
    *,
    parallel: bool = True,
    seed: int = 0,
) -> LogLikelihood:
    """Estimate each cell's log p(x) by importance sampling from the guide (Burda 2016, eq. 8).

    The weight of a draw is p(x, z, l) / q(z, l given x); the estimate is the log of the mean weight.
    x is all that the model observes: with proteins, log p(x, y); of a query, the genes that it has.
    Latent sites outside the plate of cells are averaged over, not scored; latent sites that the guide leaves
    out (because the ELBO enumerates them) are drawn from their prior.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    n_draws
        Draws of each cell. Compare only estimates with as many.

    Returns
    -------
    LogLikelihood
        For each cell: nats and effective sample size.

    References
    ----------
    Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, 2016.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> answer = pyrosc.log_likelihood(fit, adata, n_draws=10)
    >>> answer.nats.shape, bool(answer.ess.max() <= 10)
    ((60,), True)
    """
    check_draws(n_draws)

    def estimate(cells: Cells, runs: list[Run]) -> Tensor:
        weights = [_log_density(p, cells, q) - _log_density(q, cells, q) for q, (p,) in runs]
        log_w = torch.cat(weights).double()
        nats = log_w.logsumexp(0) - np.log(n_draws)
        ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
        return torch.stack((nats, ess))

    estimates = map_runs(fit, asked(fit, data), estimate, n_draws, parallel=parallel, seed=seed)
    nats, ess = torch.cat([*estimates], 1).float().cpu().numpy()
    return LogLikelihood(nats, ess, n_draws)


def elbo(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 25,
    *,
    parallel: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the ELBO of each cell and its parts: reconstruction less the KL of each latent site.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    n_draws
        Draws of each cell, over which parts are averaged.

    Returns
    -------
    DataFrame of shape (cells, parts)
        In nats, a row for each cell: ``elbo``; ``reconstruction``, the log density of the observed sites;
        ``kl_<site>``, log q less log p at the draws. Where the prior of a site is a mixture, its KL is split
        into ``kl_y``, of the component given the draw, and ``kl_<site>``, of the site given the component.
        Sites outside the plate of cells, and terms that are no density, are left out.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> vae = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, adata, epochs=2, progress=False)
    >>> list(pyrosc.elbo(fit, adata).columns)
    ['elbo', 'reconstruction', 'kl_z', 'kl_l']
    """
    data = asked(fit, data)
    check_draws(n_draws)

    def mean_parts(cells: Cells, runs: list[Run]) -> dict[str, Tensor]:
        parts = [_parts(p, q, cells) for q, (p,) in runs]
        return {name: torch.cat([part[name] for part in parts]).mean(0) for name in parts[0]}

    tables = [*map_runs(fit, data, mean_parts, n_draws, parallel=parallel, seed=seed)]
    table = pd.DataFrame(
        {name: torch.cat([t[name] for t in tables]).double().cpu().numpy() for name in tables[0]},
        data.cell_names,
    )
    table.insert(0, "elbo", 2 * table["reconstruction"] - table.sum(axis=1))
    return table


def _parts(modelled: poutine.Trace, guided: poutine.Trace, cells: Cells) -> dict[str, Tensor]:
    """Return reconstruction and KLs, each (draws, cells)."""
    modelled.compute_log_prob()
    guided.compute_log_prob()
    parts = {"reconstruction": torch.zeros(1, len(cells), device=cells.x.device)}
    for name, p in modelled.nodes.items():
        if p["type"] != "sample" or p["infer"].get("_deterministic") or isinstance(p["fn"], Unit):
            continue
        log_p = _of_cells(p, p["unscaled_log_prob"])
        if log_p is None:
            continue
        if p["is_observed"]:
            parts["reconstruction"] = parts["reconstruction"] + log_p
        elif (q := guided.nodes.get(name)) is not None:
            kl = _of_cells(q, q["unscaled_log_prob"]) - log_p
            # An autoguide's site is a point at what an auxiliary site drew; the density is that one's.
            if (u := guided.nodes.get(f"{name}_unconstrained")) is not None:
                kl = kl + _of_cells(u, u["unscaled_log_prob"])
            if isinstance(p["fn"], MixtureSameFamily):
                prior = p["fn"].mixture_distribution.logits
                joint = prior + p["fn"].component_distribution.log_prob(q["value"].unsqueeze(-2))
                log_y = joint.log_softmax(-1)
                parts["kl_y"] = _of_cells(p, (log_y.exp() * (log_y - prior)).sum(-1))
                kl = kl - parts["kl_y"]
            parts[f"kl_{name}"] = kl
    return parts


def _of_cells(site: Any, values: Tensor) -> Any:
    """Sum over axes that are neither draws nor cells, (draws, cells); None for a site of no cell."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    if "cells" not in dims:
        return None
    values = scale_and_mask(values, 1.0, site["mask"])
    others = [d for plate, d in dims.items() if plate not in ("cells", "_draws")]
    values = values.sum(others, keepdim=True) if others else values
    values = values.movedim(dims["cells"], -1)
    return values.reshape(-1, values.shape[-1])


def _log_density(trace: poutine.Trace, cells: Cells, guided: poutine.Trace) -> Tensor:
    """Return the log density of the sites in the plate of cells, (draws, cells).

    Latent sites that the guide leaves out were drawn from their prior: it is their proposal, and cancels.
    """
    trace.compute_log_prob()
    total = torch.zeros(1, len(cells), device=cells.x.device)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not (site["is_observed"] or name in guided.nodes):
            continue
        if isinstance(site["fn"], Unit):  # a term of the objective that is no density
            continue
        log_p = _of_cells(site, site["unscaled_log_prob"])
        total = total if log_p is None else total + log_p
    return total
