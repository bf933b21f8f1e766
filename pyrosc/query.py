"""fit_query: cells of new batches in a trained model, of which only the part of those batches is trained."""

from dataclasses import replace
from typing import Any

import anndata
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pyrosc.asking import completed
from pyrosc.counts import Counts, Schema
from pyrosc.reading import as_counts, read_as
from pyrosc.svi import Fit, fit_svi


def fit_query(fit: Fit, data: Counts | anndata.AnnData, **settings: Any) -> Fit:
    """Fit cells of new batches, a query, to a trained model: only the new batches' parameters are trained.

    All that the model shares among batches stays as it is, to the bit, batch normalisation and the answers
    about the old batches included; so the query's cells get their place in the space of the reference
    (scArches, Lotfollahi 2022). What a batch has of its own is the decoder's offsets of the genes and its
    first layer's; with ``dispersion="gene-batch"`` inverse dispersions; with ``encode_covariates=True``, the
    encoder's offsets. They start at the mean of the other batches'.

    Genes that the query lacks are missing, not zero: they are left out of the likelihood, and where the guide
    reads counts it finds what the fit itself expects of them in the cell. Questions about the query's fit are
    answered so too: :func:`~pyrosc.impute` tells the absent genes. What the new batch does to an absent gene
    is not known (it gets the mean of the other batches), and the uncertainty of its counts is not passed on:
    its intervals are too narrow.

    Parameters
    ----------
    fit
        Of a model of pyrosc's, made by its `for_data` from data with a `batch_key`. It is left as it is.
    data
        Counts, or an AnnData with the columns that the fit was read by. Genes are matched by name.
    **settings
        Of :func:`~pyrosc.fit_svi`.

    Returns
    -------
    Fit
        Of the reference's batches and the new ones; it answers about both, and is saved as any other.

    Raises
    ------
    TypeError
        If the model was not made by `for_data` alone, or has no parameters of batches.
    ValueError
        If the fit knows no batches, the data none that are new or no gene of the fit, or `fit` is of a query.

    References
    ----------
    Lotfollahi et al., Mapping single-cell data to reference atlases by transfer learning, 2022.
    """
    schema, counts = _extended(fit.schema, data)
    recipe = getattr(fit.program, "recipe", None)
    if recipe is None:
        msg = f"{type(fit.program).__name__} was not made by for_data, which is to make it for more batches"
        raise TypeError(msg)
    program = type(fit.program).for_data(counts, **recipe).to(fit.device)
    n_old = len(fit.schema.batches)
    grown = _grow(program, fit.program, n_old, len(schema.batches) - n_old)
    if not grown:
        msg = f"this {type(program).__name__} has no parameters of batches: ask the fit about the data itself"
        raise TypeError(msg)
    start = replace(fit, program=program, schema=schema)
    query = fit_svi(program, completed(start, counts) if schema.absent else counts, **settings)
    for module, name in grown:
        remove_parametrizations(query.program.get_submodule(module), name)
    query.program.requires_grad_()
    return query


def _extended(schema: Schema, data: Counts | anndata.AnnData) -> tuple[Schema, Counts]:
    """Return the schema with the data's batches and absent genes, and the data in it."""
    if schema.batch_key is None or schema.absent:
        what = "is of a query" if schema.absent else "knows no batches"
        msg = f"the fit {what}: give a fit of the reference, read with from_anndata(..., batch_key=...)"
        raise ValueError(msg)
    names = data.var_names if isinstance(data, anndata.AnnData) else data.schema.genes
    missing = ~pd.Index(schema.genes).isin([str(name) for name in names])
    if missing.all():
        msg = f"the data has none of the fit's {len(missing)} genes: are these names of the same kind?"
        raise ValueError(msg)
    schema = replace(schema, absent=tuple(pd.Index(schema.genes)[missing]))
    counts = read_as(data, schema) if isinstance(data, anndata.AnnData) else data
    new = tuple(name for name in counts.schema.batches if name not in schema.batches)
    if not new:
        msg = f"the fit knows all batches of the data ({', '.join(counts.schema.batches)}): ask it directly"
        raise ValueError(msg)
    schema = replace(schema, batches=schema.batches + new)
    return schema, as_counts(counts, schema)


def _grow(program: nn.Module, trained: nn.Module, n_old: int, n_new: int) -> list[tuple[str, str]]:
    """Give a model the tensors of a trained one of fewer batches; freeze all but what is of the new ones.

    Where a tensor has grown, what was there stands first and what belongs to the new batches last.

    Returns
    -------
    list of (str, str)
        Names of the modules and of their tensors of which a part is to be trained.
    """
    old, parameters, grown = trained.state_dict(), dict(program.named_parameters()), []
    program.requires_grad_(requires_grad=False)
    for name, tensor in program.state_dict().items():
        # A single batch has no offsets, so that there may be no such tensor.
        before = old[name] if name in old else tensor[..., :0]
        if tensor.shape == before.shape:
            tensor.copy_(before)
            continue
        (axis,) = (i for i, n in enumerate(tensor.shape) if n != before.shape[i])
        size, place = before.shape[axis], tensor.shape[axis] - n_new
        new = tensor.narrow(axis, place, n_new)
        if name in parameters:
            # A single batch has no columns of its own; two have one each, of which the old one's is 0.
            own = before.narrow(axis, size - n_old, n_old) if size == place else torch.zeros_like(new)
            new.copy_(own.mean(axis, keepdim=True))
        tensor.narrow(axis, 0, place).zero_().narrow(axis, 0, size).copy_(before)
        if name in parameters:
            grown.append(_partly(program, name, axis, place))
    return grown


def _partly(program: nn.Module, name: str, axis: int, place: int) -> tuple[str, str]:
    """Let a parameter be trained from a place on; return the names of its module and of itself."""
    owner, _, leaf = name.rpartition(".")
    module = program.get_submodule(owner)
    whole = getattr(module, leaf).detach()
    trained, new = whole.tensor_split([place], axis)
    setattr(module, leaf, nn.Parameter(new.clone()))
    register_parametrization(module, leaf, _Behind(trained.clone(), axis), unsafe=True)
    return owner, leaf


class _Behind(nn.Module):
    """A tensor whose first part is as trained before; the part behind it is the parameter."""

    trained: Tensor

    def __init__(self, trained: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("trained", trained)
        self.axis = axis

    def forward(self, new: Tensor) -> Tensor:
        """Return the whole."""
        return torch.cat([self.trained, new], self.axis)
