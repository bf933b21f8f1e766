"""Genes that the data of a query lack: their counts are filled in before a question is asked."""

from dataclasses import replace

import anndata
import scipy.sparse as sp
import torch

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import counts_of
from pyrosc.posterior.sampling import innermost, map_minibatches, run


def asked(fit: Fit, data: Counts | anndata.AnnData) -> Counts:
    """Return the data as the fit knows it; raise if it has parameters only of the cells it was fitted to."""
    counts = counts_of(fit, data)
    if fit.found.parameters_of_each_cell and counts.n_cells != fit.found.n_train:
        msg = (
            f"the fit has parameters of each of its {fit.found.n_train} cells and can't be asked about "
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

    def complete(cells: Cells) -> sp.csr_array:
        counted = torch.where(present, cells.x, 0.0)
        for _ in range(rounds):
            ((_, (model,)),) = run(fit, cells, n_draws, parallel=True)
            mean = innermost(model.nodes["x"]["fn"]).mean.mean(0)
            # At the depth at which the genes that were counted have their total.
            depth = counted.sum(-1, keepdim=True) / mean[..., present].sum(-1, keepdim=True)
            cells = replace(cells, x=torch.where(present, counted, depth * mean))
        return sp.csr_array(cells.x.cpu().numpy())

    x = sp.csr_array(sp.vstack([*map_minibatches(fit, data, complete, n_draws, seed=0)]))
    x.sort_indices()
    return replace(data, x=x)
