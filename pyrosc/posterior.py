"""Questions put to a Fit: draws, latent, impute, posterior_predictive, log_likelihood.

Site names are known here, models are not. One primitive, :func:`draws`; the others summarise its stream, and
nothing of the size draws x cells x genes is ever held for more than a minibatch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pyro
import scipy.sparse as sp
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import constraints

from pyrosc.cells import Cells
from pyrosc.counts import Counts
from pyrosc.reading import as_counts
from pyrosc.svi import Fit

ELEMENTS = 2**23
"""Draws x cells x genes that are decoded at a time."""


@dataclass(frozen=True, eq=False)
class Imputation:
    """Imputed expression of each cell and gene, and how sure it is.

    Attributes
    ----------
    mean, sd, lower, upper : ndarray of shape (cells, genes), float32
        Posterior mean and standard deviation, and a central interval of probability `interval`.
    unit : str
        What the numbers are.
    interval : float
    cell_names, gene_names : ndarray of str
    """

    mean: np.ndarray
    sd: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    unit: str
    interval: float
    cell_names: np.ndarray
    gene_names: np.ndarray

    def __repr__(self) -> str:
        cells, genes = self.mean.shape
        return (
            f"Imputation of {cells} cells x {genes} genes: {self.unit}; posterior mean and sd, "
            f"and {self.interval:.0%} interval in lower and upper"
        )


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


def draws(
    fit: Fit,
    data: Counts | anndata.AnnData,
    *sites: str,
    n_draws: int = 25,
    batch: str | int | None = None,
    parallel: bool = True,
    seed: int = 0,
) -> Iterator[dict[str, Float[Tensor, "..."]]]:
    """Yield draws of sites from the posterior, one minibatch of cells after the other, in the data's order.

    Parameters
    ----------
    fit
        Of :func:`~pyrosc.fit_svi`.
    data
        Counts, or an AnnData; genes are matched by name. A program with parameters of each cell has them only
        for the cells it was fitted to: ask it about those, in that order.
    sites
        Names of sites of the model or of the guide; deterministic ones too. Of an observed site (``"x"``),
        draws of new counts.
    n_draws
        Number of draws for each cell.
    batch
        Name of a batch: what the cells would have been there. The guide sees the true batch, the model this
        one. By default each cell's own.
    parallel
        Run all draws at once, in a plate left of the program's own. A program that can't broadcast needs
        False: one run a draw.
    seed
        Of the draws.

    Yields
    ------
    dict of str to Tensor of shape (draws, cells, ...)
        Genes are in the fit's order.

    Raises
    ------
    ValueError
        If the batch is unknown, `n_draws` is below 1, or the data does not suit the fit.
    KeyError
        If there is no such site.
    """
    data = _asked(fit, data)
    code = _batch_code(fit, batch)
    _check_draws(n_draws)
    return (
        {name: values[0] for name, values in drawn.items()}
        for _, drawn in _stream(fit, data, sites, n_draws, [code], parallel=parallel, seed=seed)
    )


def latent(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int | None = None,
    *,
    site: str = "z",
    parallel: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Return the posterior mean of the cells' state, or draws of it.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    n_draws
        By default the mean: of the guide's distribution, averaged over draws of whatever it depends on.
    site
        Name of the latent site.

    Returns
    -------
    ndarray of shape (cells, latent), or (draws, cells, latent)
        float32.
    """
    if n_draws is not None:
        stream = draws(fit, data, site, n_draws=n_draws, parallel=parallel, seed=seed)
        return np.concatenate([drawn[site].cpu().numpy() for drawn in stream], axis=1)
    data = _asked(fit, data)
    means = []
    for i, cells in enumerate(data.on(fit.device).minibatches(_rows(fit, 1))):
        with fit.asking(_seed(seed, i)):
            guided, _ = _traces(fit, cells, 16, [], parallel=parallel)
            means.append(torch.stack([_mean(trace, site) for trace in guided]).mean(0).mean(0))
    return torch.cat(means).cpu().numpy()


def impute(
    fit: Fit,
    data: Counts | anndata.AnnData,
    what: str = "share",
    *,
    library: float | None = None,
    batch: str | int | None = None,
    genes: Sequence[str] | None = None,
    n_draws: int = 50,
    interval: float = 0.9,
    site: str = "rho",
    parallel: bool = True,
    seed: int = 0,
) -> Imputation:
    """Return the posterior mean, sd and interval of each cell's expression of each gene.

    Parameters
    ----------
    fit, data, parallel, seed
        See :func:`draws`.
    what
        ``"share"``: rho, each gene's share of the cell's counts, rows sum to 1. ``"count"``: the mean count
        at a library size, l rho (of a zero-inflated model: before dropout).
    library
        With ``"count"``: the library size, in counts. By default the cell's own: site ``"l"``, or the
        observed total where the program has no such site.
    batch
        Name of a batch: expression as if measured there. ``"average"``: the mean over all batches, each draw
        decoded in each. By default the cell's own.
    genes
        Names of the genes to return, in this order; by default all of the fit's, in the order of `data`.
    n_draws
        Posterior draws of each cell.
    interval
        Probability of the interval between `lower` and `upper`.
    site
        Name of the site of shares.

    Returns
    -------
    Imputation

    Raises
    ------
    ValueError
        If `what` is another one, a gene or batch is unknown, or a number is out of range.
    """
    if what not in ("share", "count"):
        msg = f'what must be "share" or "count", not {what!r}'
        raise ValueError(msg)
    if library is not None and (what != "count" or not library > 0):
        msg = f'library, a number of counts above 0, goes with what="count"; got {library!r} with {what!r}'
        raise ValueError(msg)
    if not 0 < interval < 1:
        msg = f"interval is a probability between 0 and 1, not {interval!r}"
        raise ValueError(msg)
    _check_draws(n_draws)
    data, columns = _asked(fit, data), torch.as_tensor(_columns(fit, data, genes), device=fit.device)
    codes = range(len(fit.schema.batches)) if batch == "average" else [_batch_code(fit, batch)]
    own = what == "count" and library is None
    tail = (1 - interval) / 2
    done, summary = 0, np.empty((4, data.n_cells, len(columns)), np.float32)
    stream = _stream(fit, data, (site,), n_draws, list(codes), parallel=parallel, seed=seed, library=own)
    for cells, drawn in stream:
        rho = drawn[site].mean(0)[..., columns]
        if own:
            l = drawn["l"].mean(0) if "l" in drawn else cells.library
            value = rho * (l if l.shape[-1:] == (1,) else l[..., None])  # l is (draws, cells) or has one more
        else:
            value = rho * (library or 1.0)
        mean = value.mean(0)
        parts = (mean, _sd(value, mean), _low_quantile(value, tail), -_low_quantile(-value, tail))
        summary[:, done : done + len(cells)] = torch.stack(parts).cpu().numpy()
        done += len(cells)
    units = {
        "share": "share of the cell's counts",
        "count": f"counts at library size {library or 'of the cell'}",
    }
    names = np.array(fit.schema.genes)[columns.cpu().numpy()]
    center, sd, low, high = summary
    return Imputation(center, sd, low, high, units[what], interval, data.cell_names, names)


def posterior_predictive(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 1,
    *,
    batch: str | int | None = None,
    site: str = "x",
    parallel: bool = True,
    seed: int = 0,
) -> list[sp.csr_matrix]:
    """Return draws of new counts of the same cells.

    Parameters
    ----------
    fit, data, n_draws, batch, parallel, seed
        See :func:`draws`.
    site
        Name of the observed site.

    Returns
    -------
    list of csr_matrix of shape (cells, genes)
        One for each draw, float32. Columns are the fit's genes in the order of `data`, so that of an AnnData
        with just these genes each can become a layer.
    """
    parts: list[list[sp.csr_matrix]] = [[] for _ in range(n_draws)]
    columns = _columns(fit, data, None)
    for drawn in draws(fit, data, site, n_draws=n_draws, batch=batch, parallel=parallel, seed=seed):
        for part, x in zip(parts, drawn[site].cpu().numpy()[..., columns], strict=True):
            part.append(sp.csr_matrix(x))
    return [sp.vstack(part, format="csr") for part in parts]


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
    """
    data = _asked(fit, data)
    _check_draws(n_draws)
    nats, ess = [], []
    for i, cells in enumerate(data.on(fit.device).minibatches(_rows(fit, n_draws))):
        with fit.asking(_seed(seed, i)):
            guided, modelled = _traces(fit, cells, n_draws, [None], parallel=parallel)
            log_w = torch.cat(
                [
                    _log_density(p[0], cells, q) - _log_density(q, cells, q)
                    for p, q in zip(modelled, guided, strict=True)
                ]
            )
            nats.append(log_w.logsumexp(0) - np.log(n_draws))
            ess.append((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
    return LogLikelihood(torch.cat(nats).cpu().numpy(), torch.cat(ess).cpu().numpy(), n_draws)


def _stream(
    fit: Fit,
    data: Counts,
    sites: Sequence[str],
    n_draws: int,
    codes: Sequence[int | None],
    *,
    parallel: bool,
    seed: int,
    library: bool = False,
) -> Iterator[tuple[Cells, dict[str, Tensor]]]:
    """Yield each minibatch and its draws, (batches, draws, cells, ...): latent ones alike in each batch.

    With `library`, site ``"l"`` too where there is one.
    """
    for i, cells in enumerate(data.on(fit.device).minibatches(_rows(fit, n_draws * len(codes)))):
        with fit.asking(_seed(seed, i)):
            guided, modelled = _traces(fit, cells, n_draws, codes, parallel=parallel)
            _check_guided(guided[0], modelled[0][0])
            if library and i == 0 and "l" in modelled[0][0].nodes:
                sites = (*sites, "l")
            drawn = {}
            for name in sites:
                runs = [[_value(m, q, name) for m in p] for p, q in zip(modelled, guided, strict=True)]
                by_batch = [
                    part[0] if len(part) == 1 else torch.cat(part) for part in zip(*runs, strict=True)
                ]
                drawn[name] = by_batch[0][None] if len(codes) == 1 else torch.stack(by_batch)
        # The consumer runs outside of the fit's context: two fits may be asked in turns.
        yield cells, drawn


def _check_guided(guided: poutine.Trace, modelled: poutine.Trace) -> None:
    """Raise if the model has latent sites that the guide leaves out: they were drawn from their prior."""
    alone = [
        name
        for name in modelled.stochastic_nodes
        if name not in guided.nodes and modelled.nodes[name]["infer"].get("enumerate")
    ]
    if alone:
        msg = f"the guide samples no {alone}, so there are no posterior draws: sample it in the guide too"
        raise ValueError(msg)


def _traces(
    fit: Fit, cells: Cells, n_draws: int, codes: Sequence[int | None], *, parallel: bool
) -> tuple[list[poutine.Trace], list[list[poutine.Trace]]]:
    """Run the guide, and the model on what it drew in each batch: once for all draws, or once for each."""
    size, runs = (n_draws, 1) if parallel else (1, n_draws)
    dim = -1 - fit.settings["plate_nesting"]
    guided, modelled = [], []
    for _ in range(runs):
        guided.append(poutine.trace(_repeated(fit.guide, size, dim)).get_trace(cells))
        model = poutine.replay(_repeated(fit.model, size, dim), guided[-1])
        seen = [cells if code is None else cells.in_batch(code) for code in codes]
        modelled.append([poutine.trace(model).get_trace(there) for there in seen])
    return guided, modelled


def _repeated(program: Any, n_draws: int, dim: int) -> Any:
    """Return the program in a plate of draws."""

    def repeated(cells: Cells) -> None:
        with pyro.plate("_draws", n_draws, dim=dim):
            program(cells)

    return repeated


def _value(modelled: poutine.Trace, guided: poutine.Trace, name: str) -> Tensor:
    """Return a site's value with all its axes; of an observed site, a draw."""
    trace = modelled if name in modelled.nodes else guided
    if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
        known = sorted(
            name for name in {*modelled.nodes, *guided.nodes} if name not in ("_INPUT", "_RETURN", "_draws")
        )
        msg = f"no site {name!r}; the programs have {known}"
        raise KeyError(msg)
    site = trace.nodes[name]
    drawn = site["is_observed"] and not site["infer"].get("_deterministic")
    value = site["fn"].sample() if drawn else site["value"]
    return _cells_second(value.expand(site["fn"].batch_shape + site["fn"].event_shape), site)


def _cells_second(value: Tensor, site: Any) -> Tensor:
    """Move the axis of cells behind that of draws, wherever the program's plates put it."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "cells":
            return value.movedim(frame.dim - len(site["fn"].event_shape), 1)
    return value


def _mean(trace: poutine.Trace, name: str) -> Tensor:
    """Return the mean of a guide's site given what it depends on; its draw where no mean is known."""
    if name not in trace.nodes:
        msg = f"the guide has no site {name!r}; it has {[*trace.stochastic_nodes]}"
        raise KeyError(msg)
    site = trace.nodes[name]
    # An autoguide's site is a point at what this site drew; on the real line the two are the same.
    free = trace.nodes.get(f"{name}_unconstrained")
    if free is not None and site["fn"].support is constraints.real:
        site = free
    try:
        return _cells_second(site["fn"].mean, site)
    except NotImplementedError:
        return _cells_second(site["value"], site)


def _log_density(trace: poutine.Trace, cells: Cells, guided: poutine.Trace) -> Tensor:
    """Return the log density of the sites in the plate of cells, (draws, cells).

    Latent sites that the guide leaves out were drawn from their prior: it is their proposal, and cancels.
    """
    trace.compute_log_prob()
    total = torch.zeros(1, len(cells), device=cells.x.device)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not (site["is_observed"] or name in guided.nodes):
            continue
        dims = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
        if "cells" not in dims:
            continue
        log_p = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
        others = [d for plate, d in dims.items() if plate not in ("cells", "_draws")]
        log_p = log_p.sum(others, keepdim=True) if others else log_p
        total = total + log_p.movedim(dims["cells"], -1).reshape(-1, len(cells))
    return total


def _sd(values: Float[Tensor, "draws cells genes"], mean: Tensor) -> Tensor:
    """Return the standard deviation over draws: torch.std takes ten times as long over a leading axis."""
    return sum((value - mean).square_() for value in values).div_(len(values)).sqrt_()


def _low_quantile(values: Float[Tensor, "draws cells genes"], share: float) -> Tensor:
    """Return a quantile below the median over draws, linearly interpolated.

    Of the draws only the smallest need be in order: each is let sink to its place among those before it.
    """
    place = share * (len(values) - 1)
    below = int(place)
    n_smallest = min(below + 2, len(values))
    if n_smallest > 8:
        smallest = list(values.sort(0).values[:n_smallest])
    else:
        smallest = [torch.full_like(values[0], torch.inf) for _ in range(n_smallest)]
        for value in values:
            for i, other in enumerate(smallest):
                smallest[i], value = torch.minimum(other, value), torch.maximum(other, value)
    return torch.lerp(smallest[below], smallest[-1], place - below)


def _rows(fit: Fit, n_draws: int) -> int:
    """Return how many cells are decoded at a time."""
    return min(1024, max(1, ELEMENTS // (n_draws * len(fit.schema.genes))))


def _seed(seed: int, i: int) -> int:
    """Return the seed of the i-th minibatch."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


def _asked(fit: Fit, data: Counts | anndata.AnnData) -> Counts:
    """Return the data as the fit knows it; raise if it has parameters only of the cells it was fitted to."""
    counts = as_counts(data, fit.schema)
    if fit.settings.get("parameters_of_each_cell") and counts.n_cells != fit.settings["n_train"]:
        msg = (
            f"the fit has parameters of each of its {fit.settings['n_train']} cells and can't be asked about "
            f"{counts.n_cells}: ask about all, in the order of the fit, and choose from the answer"
        )
        raise ValueError(msg)
    if not counts.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    return counts


def _check_draws(n_draws: int) -> None:
    if n_draws < 1:
        msg = f"n_draws must be at least 1, not {n_draws}"
        raise ValueError(msg)


def _batch_code(fit: Fit, batch: str | int | None) -> int | None:
    batch = None if batch is None else str(batch)
    if batch is not None and batch not in fit.schema.batches:
        msg = f"no batch {batch!r}; the fit knows {', '.join(fit.schema.batches)}"
        raise ValueError(msg)
    return None if batch is None else fit.schema.batches.index(batch)


def _columns(fit: Fit, data: Counts | anndata.AnnData, genes: Sequence[str] | None) -> np.ndarray:
    """Return where the genes asked for stand in the fit; by default its genes, in the order of the data."""
    places = {name: i for i, name in enumerate(fit.schema.genes)}
    if genes is None:
        have = map(str, data.var_names) if isinstance(data, anndata.AnnData) else data.schema.genes
        return np.array([places[name] for name in have if name in places])
    genes = [genes] if isinstance(genes, str) else [str(name) for name in genes]
    if not genes:
        msg = "genes is empty: name at least one, or leave it out for all"
        raise ValueError(msg)
    unknown = [name for name in genes if name not in places]
    if unknown:
        msg = f"the fit has no gene {', '.join(unknown[:5])}"
        raise ValueError(msg)
    return np.array([places[name] for name in genes])
