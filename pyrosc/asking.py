"""Asking a fit: its programs run on minibatches of cells, many draws at a time. What all questions stand on.

One primitive, :func:`draws`. Nothing of the size draws x cells x genes is held for more than a minibatch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

import anndata
import numpy as np
import pandas as pd
import pyro
import scipy.sparse as sp
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyrosc.cells import Cells
from pyrosc.counts import Counts
from pyrosc.programs import is_plate
from pyrosc.reading import as_counts
from pyrosc.svi import Fit

ELEMENTS = 2**23
"""Draws x cells x genes that are decoded at a time."""

Answer = TypeVar("Answer")


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
    data = asked(fit, data)
    code = batch_code(fit, batch)
    check_draws(n_draws)
    return (
        {name: values[0] for name, values in drawn.items()}
        for _, drawn in stream(fit, data, sites, n_draws, [code], parallel=parallel, seed=seed)
    )


def stream(
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

    def read(
        cells: Cells, guided: list[poutine.Trace], modelled: list[list[poutine.Trace]]
    ) -> tuple[Cells, dict[str, Tensor]]:
        names = (*sites, "l") if library and "l" in modelled[0][0].nodes else sites
        drawn = {}
        for name in names:
            runs = [[value_of(m, q, name) for m in p] for p, q in zip(modelled, guided, strict=True)]
            by_batch = [part[0] if len(part) == 1 else torch.cat(part) for part in zip(*runs, strict=True)]
            drawn[name] = by_batch[0][None] if len(codes) == 1 else torch.stack(by_batch)
        return cells, drawn

    return answers(fit, data, n_draws, codes, read, parallel=parallel, seed=seed)


def answers(
    fit: Fit,
    data: Counts,
    n_draws: int,
    codes: Sequence[int | None],
    read: Callable[[Cells, list[poutine.Trace], list[list[poutine.Trace]]], Answer],
    *,
    parallel: bool,
    seed: int,
) -> Iterator[Answer]:
    """Yield what `read` makes of each minibatch and of the runs of guide and model on it (see :func:`run`).

    It reads with the fit's random numbers.
    """
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, n_draws * len(codes)))):
        with fit.asking(seed_of(seed, i)):
            guided, modelled = run(fit, cells, n_draws, codes, parallel=parallel)
            _check_guided(guided[0], modelled[0][0])
            answer = read(cells, guided, modelled)
            del guided, modelled  # or they would be there while the next are made
        # The consumer runs outside of the fit's context: two fits may be asked in turns.
        yield answer


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


def run(
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


def site_of(modelled: poutine.Trace, guided: poutine.Trace, name: str) -> Any:
    """Return a site of the model, or else of the guide; raise if neither has it."""
    trace = modelled if name in modelled.nodes else guided
    if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
        known = {*sites_of(modelled), *sites_of(guided)}
        msg = f"no site {name!r}; the programs have {sorted(known)}"
        raise KeyError(msg)
    return trace.nodes[name]


def sites_of(trace: poutine.Trace) -> list[str]:
    """Return the names of a program's sites, without plates."""
    nodes = trace.nodes.items()
    return [name for name, site in nodes if site["type"] == "sample" and not is_plate(site)]


def value_of(modelled: poutine.Trace, guided: poutine.Trace, name: str) -> Tensor:
    """Return a site's value with all its axes; of an observed site, a draw."""
    site = site_of(modelled, guided, name)
    drawn = site["is_observed"] and not site["infer"].get("_deterministic")
    value = site["fn"].sample() if drawn else site["value"]
    return cells_second(value.expand(site["fn"].batch_shape + site["fn"].event_shape), site)


def innermost(distribution: Any) -> Any:
    """Return the distribution whose rightmost axes were made one event, or some of whose entries left out."""
    while isinstance(distribution, Independent | MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def cells_second(value: Tensor, site: Any) -> Tensor:
    """Move the axis of cells behind that of draws, wherever the program's plates put it."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "cells":
            return value.movedim(frame.dim - len(site["fn"].event_shape), 1)
    return value


def rows_of(fit: Fit, n_draws: int) -> int:
    """Return how many cells are decoded at a time."""
    return min(1024, max(1, ELEMENTS // (n_draws * len(fit.schema.genes))))


def seed_of(seed: int, i: int) -> int:
    """Return the seed of the i-th minibatch."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


def check_fit(fit: Any) -> None:
    """Raise unless it is one: a model, too, has many of its names."""
    if not isinstance(fit, Fit):
        msg = (
            f"a question is put to a Fit, not to {type(fit).__name__}: pyrosc.fit_svi(model, data) makes "
            "one; it stands first, before the data"
        )
        raise TypeError(msg)


def check_proteins(fit: Fit) -> None:
    """Raise if the fit knows none."""
    if not fit.schema.proteins:
        msg = (
            f"this {type(fit.program).__name__} knows no proteins: fit a TOTALVI to "
            'from_anndata(..., protein_key="...")'
        )
        raise KeyError(msg)


def counts_of(fit: Any, data: Counts | anndata.AnnData) -> Counts:
    """Return the data in the genes and codes of the fit; raise if there are no cells, or there is no fit."""
    check_fit(fit)
    counts = as_counts(data, fit.schema)
    if not counts.n_cells:
        msg = "no cells: the selection is empty"
        raise ValueError(msg)
    return counts


def asked(fit: Fit, data: Counts | anndata.AnnData) -> Counts:
    """Return the data as the fit knows it; raise if it has parameters only of the cells it was fitted to."""
    counts = counts_of(fit, data)
    if fit.settings.get("parameters_of_each_cell") and counts.n_cells != fit.settings["n_train"]:
        msg = (
            f"the fit has parameters of each of its {fit.settings['n_train']} cells and can't be asked about "
            f"{counts.n_cells}: ask about all, in the order of the fit, and choose from the answer"
        )
        raise ValueError(msg)
    return completed(fit, counts) if fit.schema.absent else counts


def completed(fit: Fit, data: Counts, rounds: int = 5, n_draws: int = 8) -> Counts:
    """Return the counts with what the fit expects of the absent genes: the guide is to read no false zeros.

    In each round the guide reads the cells as completed so far, at first with nothing, and the model's mean
    of the absent counts, over draws, is put in: the chain of Rezende (2014, section F), with means for draws.
    The result is as large as cells x absent genes.

    Parameters
    ----------
    fit
        Whose schema has absent genes.
    data
        Counts of that schema.
    rounds, n_draws
        Rounds, and draws of each cell in each.

    References
    ----------
    Rezende, Mohamed and Wierstra, Stochastic backpropagation and approximate inference in deep generative
    models, 2014.
    """
    present = torch.as_tensor(fit.schema.present, device=fit.device)
    parts = []
    for i, cells in enumerate(data.on(fit.device).minibatches(rows_of(fit, n_draws))):
        with fit.asking(seed_of(0, i)):
            counted = torch.where(present, cells.x, 0.0)
            for _ in range(rounds):
                _, modelled = run(fit, cells, n_draws, [None], parallel=True)
                mean = innermost(modelled[0][0].nodes["x"]["fn"]).mean.mean(0)
                # At the depth at which the genes that were counted have their total.
                depth = counted.sum(-1, keepdim=True) / mean[..., present].sum(-1, keepdim=True)
                cells = replace(cells, x=torch.where(present, counted, depth * mean))
        parts.append(sp.csr_array(cells.x.cpu().numpy()))
    x = sp.csr_array(sp.vstack(parts))
    x.sort_indices()
    return replace(data, x=x)


def in_order(values: Any, data: Counts, what: str) -> Any:
    """Return one value for each cell as they are; a Series that has the cells' names in the cells' order.

    Parameters
    ----------
    values
        A Series with other names, a number or an array is taken as it is.
    data
        Counts.
    what
        Name of the argument.

    Raises
    ------
    ValueError
        If a Series has names of some cells, but not of each once.
    """
    if not (isinstance(values, pd.Series) and values.index.isin(data.cell_names).any()):
        return values
    names = pd.Index(data.cell_names)
    if not (names.is_unique and values.index.is_unique and set(values.index) == set(names)):
        msg = (
            f"{what} is a Series whose names are not those of the cells, each once: give its values, "
            ".to_numpy(), if they are in the cells' order, or make names unique, obs_names_make_unique()"
        )
        raise ValueError(msg)
    return values.loc[names]


def is_between(value: Any, low: Any, high: Any) -> bool:
    """Say whether it is a number between these, and neither of them."""
    return bool(isinstance(value, Real) and low < value < high)


def check_draws(n_draws: Any, name: str = "n_draws") -> None:
    """Raise unless it is a number of draws."""
    if not isinstance(n_draws, int | np.integer):
        msg = f"{name} must be a whole number, not {n_draws!r}"
        raise TypeError(msg)
    if n_draws < 1:
        msg = f"{name} must be at least 1, not {n_draws}"
        raise ValueError(msg)


def batch_code(fit: Fit, batch: str | int | None) -> int | None:
    """Return the code of a batch's name; None for None. Raise if the fit does not know it."""
    batch = None if batch is None else str(batch)
    if batch is not None and batch not in fit.schema.batches:
        msg = f"no batch {batch!r}; the fit knows {', '.join(fit.schema.batches)}"
        raise ValueError(msg)
    return None if batch is None else fit.schema.batches.index(batch)


def batch_codes(fit: Fit, batch: str | int | None) -> list[int | None]:
    """Return the codes of the batches to decode in; ``"average"`` is all."""
    return list(range(len(fit.schema.batches))) if batch == "average" else [batch_code(fit, batch)]


def columns_of(fit: Fit, data: Counts | anndata.AnnData, genes: Sequence[str] | None) -> np.ndarray:
    """Return where the genes asked for stand in the fit; by default its genes, in the order of the data."""
    check_fit(fit)
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
