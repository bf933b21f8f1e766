"""fit_query: cells of new batches in a trained model, of which only the part of those batches is trained."""

from dataclasses import replace
from typing import Any

import anndata
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts, read_as
from pyrosc.data.schema import Schema
from pyrosc.inference.fit import Fit
from pyrosc.inference.storage import recipe_of
from pyrosc.inference.svi import fit_svi
from pyrosc.posterior.checks import check_fit
from pyrosc.posterior.missing_genes import completed


def fit_query(fit: Fit, data: Counts | anndata.AnnData, **settings: Any) -> Fit:
    """Fit cells of new batches, a query, to a trained model: only the new batches' parameters are trained.

    All that the model shares among batches, and what belongs to the old ones, stays as it is, to the bit; so
    the query's cells get their place in the space of the reference (scArches, Lotfollahi 2022). What a batch
    has of its own is its columns of the decoder's first and last layers (of mean, dropout, dispersion,
    proteins); with ``dispersion="gene-batch"`` inverse dispersions; with ``encode_covariates=True`` the
    encoder's columns; with ``library="latent"`` the moments of its totals, read off the data; of a TOTALVI,
    the proteins' background. The new ones start at the mean of the other batches', and a ``weight_decay`` is
    a prior around that start.

    Genes that the query lacks are missing, not zero: they are left out of the likelihood, and where the guide
    reads counts it finds what the model expects of them in the cell (in training, with the parameters at the
    start). Questions about the query's fit are answered so too: :func:`~pyrosc.impute` tells the absent
    genes. What the new batch does to an absent gene is not known (it gets the mean of the other batches), and
    the uncertainty of its counts is not passed on: its intervals are too narrow. Such a fit leaves these
    genes out of all cells: ask the reference's own fit about the reference.

    Parameters
    ----------
    fit
        Of a model of pyrosc's, made by its `for_data` from data with a `batch_key`. It is left as it is.
    data
        Counts, or an AnnData with the columns that the fit was read by. Genes are matched by name; an absent
        one has no column (a column of zeros is counts of zero). Proteins may be missing.
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
        If the fit knows no batches or is of a query that lacks genes, or the data have no batch that is new
        or no gene of the fit.

    References
    ----------
    Lotfollahi et al., Mapping single-cell data to reference atlases by transfer learning, 2022.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(90, 30, n_batches=3, seed=0)
    >>> is_new = adata.obs["batch"] == "batch_2"
    >>> reference = pyrosc.from_anndata(adata[~is_new], batch_key="batch")
    >>> vae = pyrosc.VAE.for_data(reference, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, reference, epochs=2, progress=False)
    >>> query = pyrosc.fit_query(fit, adata[is_new], epochs=2, progress=False)
    >>> query.schema.batches, pyrosc.latent(query, adata).shape
    (('batch_0', 'batch_1', 'batch_2'), (90, 2))
    """
    check_fit(fit)
    schema, counts = _extended(fit.schema, data)
    if recipe_of(fit) is None:
        msg = f"{type(fit.program).__name__} was not made by for_data alone: it can't be made again"
        raise TypeError(msg)
    program, grown = _grown(fit, counts)
    if not grown:
        msg = (
            f"this {type(program).__name__} has no parameters of batches: ask the fit about these cells "
            f"as of a batch that it knows, such as {fit.schema.batches[0]!r}, which changes nothing"
        )
        raise TypeError(msg)
    if schema.absent:
        counts = completed(replace(fit, program=program, schema=schema), counts)
        # What is read off the data, such as totals, is of whole cells now.
        program, grown = _grown(fit, counts)
    query = fit_svi(program, counts, **settings)
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


def _grown(fit: Fit, data: Counts) -> tuple[Any, list[tuple[str, str]]]:
    """Return the fit's model for the data's batches, frozen but for what is of the new ones.

    Where a tensor has grown, what was there stands first and what belongs to the new batches last.

    Returns
    -------
    program
        The model.
    list of (str, str)
        Names of the modules and of their tensors of which a part is to be trained.
    """
    program = type(fit.program).for_data(data, **fit.program.recipe).to(fit.device)
    n_old = len(fit.schema.batches)
    n_new = len(data.schema.batches) - n_old
    old, parameters, grown = fit.program.state_dict(), dict(program.named_parameters()), []
    program.requires_grad_(requires_grad=False)
    for name, tensor in program.state_dict().items():
        # A single batch has no columns, so that there may be no such tensor.
        before = old[name] if name in old else tensor[..., :0]
        if tensor.shape == before.shape:
            tensor.copy_(before)
            continue
        (axis,) = (i for i, n in enumerate(tensor.shape) if n != before.shape[i])
        size, place = before.shape[axis], tensor.shape[axis] - n_new
        new = tensor.narrow(axis, place, n_new)
        # Two batches have a column each; that of one that was alone is 0.
        own = before.narrow(axis, size - n_old, n_old) if size == place else torch.zeros_like(new)
        mean = own.mean(axis, keepdim=True).expand_as(new)
        new.copy_(mean if name in parameters else torch.where(new.isnan(), mean, new))
        tensor.narrow(axis, 0, place).zero_().narrow(axis, 0, size).copy_(before)
        if name in parameters:
            grown.append(_partly(program, name, axis, place))
    return program, grown


def _partly(program: nn.Module, name: str, axis: int, place: int) -> tuple[str, str]:
    """Let a parameter be trained from a place on; return the names of its module and of itself."""
    owner, _, leaf = name.rpartition(".")
    module = program.get_submodule(owner)
    trained, start = getattr(module, leaf).detach().tensor_split([place], axis)
    setattr(module, leaf, nn.Parameter(torch.zeros_like(start)))
    register_parametrization(module, leaf, _Behind(trained.clone(), start.clone(), axis), unsafe=True)
    return owner, leaf


class _Behind(nn.Module):
    """A tensor whose first part is as trained before; the parameter is what changes in the part behind it."""

    trained: Tensor
    start: Tensor

    def __init__(self, trained: Tensor, start: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("trained", trained)
        self.register_buffer("start", start)
        self.axis = axis

    def forward(self, change: Tensor) -> Tensor:
        """Return the whole."""
        return torch.cat([self.trained, self.start + change], self.axis)
