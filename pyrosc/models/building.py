"""What the recipes of all models share: how `for_data` is called, and the parts of a model of counts."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from anndata import AnnData

from pyrosc.data.counts import Counts
from pyrosc.data.read import as_counts
from pyrosc.engine.rng import seeded
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Decoder
from pyrosc.nn.layers import check_sizes
from pyrosc.nn.likelihoods import Likelihood, likelihood_of

Numbers = ParamSpec("Numbers")
Model = TypeVar("Model")


def recipe(
    build: Callable[Concatenate[type[Model], Counts, Numbers], Model],
) -> Callable[Concatenate[type[Model], Counts | AnnData, Numbers], Model]:
    """Make of ``build(cls, data, *, ..., seed)``, which returns a model, the class method `for_data`.

    Sizes are checked, an AnnData is read, and `build` runs with random numbers of its own, started by `seed`.
    The model then has the attributes ``recipe``, the plain numbers that make it again, and ``schema``, the
    names that it was made for.
    """
    signature = inspect.signature(build)
    cls_, data_, *told = signature.parameters.values()
    defaults = {p.name: p.default for p in told if p.default is not p.empty}

    @functools.wraps(build)
    def for_data(
        cls: type[Model], data: Counts | AnnData, *args: Numbers.args, **given: Numbers.kwargs
    ) -> Model:
        numbers = defaults | given
        check_sizes(**{n: v for n, v in numbers.items() if n.startswith("n_") or n in ("hidden", "branch")})
        counts = as_counts(data)
        with seeded(torch.device("cpu"), numbers["seed"]):
            made = build(cls, counts, *args, **given)
        vars(made).update(recipe=numbers, schema=counts.schema)
        return made

    either = data_.replace(annotation=Counts | AnnData)
    vars(for_data)["__signature__"] = signature.replace(parameters=[cls_, either, *told])
    return for_data


def require(fine: Any, message: str) -> None:
    """Raise a ValueError with this message unless it is fine."""
    if not fine:
        raise ValueError(message)


def decoder_for(
    data: Counts, n_latent: int, hidden: Sequence[int], *, norm: str | None, dropout: float
) -> Decoder:
    """Return a decoder that sees all covariates and starts at each gene's share of the data's counts.

    Parameters
    ----------
    data
        Counts.
    n_latent
        Width of z.
    hidden, norm, dropout
        Of its layers, in order from z on; see :class:`~pyrosc.nn.layers.MLP`.
    """
    decoder = Decoder(n_latent, data.n_genes, Covariates.for_data(data), hidden, norm=norm, dropout=dropout)
    decoder.start_at(torch.as_tensor(data.share))
    return decoder


def likelihood_for(data: Counts, name: str, dispersion: str, n_hidden: int) -> Likelihood:
    """Return the likelihood of a name for the data's genes and batches.

    Parameters
    ----------
    data
        Counts.
    name, dispersion
        See :func:`~pyrosc.nn.likelihoods.likelihood_of`.
    n_hidden
        Width of the features that dispersion and zero inflation may be read off.
    """
    return likelihood_of(
        name,
        n_genes=data.n_genes,
        n_hidden=n_hidden,
        n_batches=len(data.schema.batches),
        dispersion=dispersion,
    )
