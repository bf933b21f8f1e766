"""Fit: a trained model and guide, the record that every question is put to."""

import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from pyrosc.data.schema import Schema
from pyrosc.inference.contract import Program, pair
from pyrosc.inference.handlers import leaving_out
from pyrosc.inference.isolation import isolated, modules_of


@dataclass(frozen=True)
class Found:
    """What a training run found, beside the parameters.

    Attributes
    ----------
    n_cells, n_train : int
        Cells in the data, and those of them that were trained on.
    best_epoch : int
        Epoch whose parameters were kept: a row of the history.
    plate_nesting : int
        How many plates of the programs stand inside each other.
    parameters_of_each_cell : bool
        Whether there are any: then questions are about the cells of the fit only.
    replayed : bool or str
        True if steps were recorded and replayed; else why not.
    threads : int
        Threads that torch had on the CPU: last digits depend on it.
    data : str
        Fingerprint of the counts: data of another one are other data.
    versions : dict of str to str
        Of Python, pyrosc, torch, pyro-ppl, numpy and anndata.
    """

    n_cells: int
    n_train: int
    best_epoch: int
    plate_nesting: int
    parameters_of_each_cell: bool
    replayed: bool | str
    threads: int
    data: str
    versions: Mapping[str, str]


def versions() -> dict[str, str]:
    """Return the versions that a fit's last digits depend on."""
    names = ("pyrosc", "torch", "pyro-ppl", "numpy", "anndata")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained model and guide: the record that every question is put to.

    Attributes
    ----------
    program
        What was fitted, trained: an object with the methods ``model`` and ``guide``, or the model alone.
        A copy: what the caller passed to :func:`fit_svi` is left as it was.
    separate_guide
        The guide, where it is not a method of `program`.
    params
        State of the param store: what programs made with ``pyro.param``, and the parameters of autoguides.
    schema
        Names of genes, batches, labels and covariates.
    history : DataFrame
        One row an epoch: ``train`` and ``validation`` (loss in nats per cell, lower is better; train has the
        dropout and the KL weight of the time), ``kl_<site>`` (nats per cell, on the
        validation cells), ``kl_weight``, ``learning_rate``, ``seconds`` since the start.
    settings
        What was asked for: the arguments of :func:`fit_svi`, with the values that None stood for.
    found
        What the run found.
    device
        Where the parameters are.
    """

    program: Any
    separate_guide: Any
    params: dict[str, Any]
    schema: Schema
    history: pd.DataFrame
    settings: dict[str, Any]
    found: Found
    device: torch.device

    @property
    def model(self) -> Program:
        """The generative program, of :class:`~pyrosc.Cells`."""
        return leaving_out(pair(self.program, self.separate_guide)[0], self.schema)

    @property
    def guide(self) -> Program:
        """The variational program, of :class:`~pyrosc.Cells`."""
        return pair(self.program, self.separate_guide)[1]

    @contextmanager
    def asking(self, seed: int) -> Iterator[None]:
        """Run programs as trained: evaluation mode, no gradients, own parameters, own random numbers."""
        for module in modules_of(self.program, self.separate_guide):
            module.eval()
        with torch.no_grad(), isolated(self.device, seed, self.params):
            yield

    def save(self, directory: str | Path) -> None:
        """Write the fit into a directory: safetensors and JSON, no pickle.

        A crash leaves what was there before, or the whole fit. Read it back with :func:`pyrosc.load`.

        Parameters
        ----------
        directory
            Made if it is not there; an earlier fit in it is replaced.

        Raises
        ------
        FileExistsError
            If the directory holds something that is no saved fit.
        """
        from pyrosc.inference.storage import save

        save(self, directory)

    def __repr__(self) -> str:
        name = type(self.program).__name__ if isinstance(self.program, nn.Module) else "program"
        last = self.history.iloc[self.found.best_epoch]
        loss = last.validation if math.isfinite(last.validation) else last.train
        how = "replayed" if self.found.replayed is True else f"run: {self.found.replayed}"
        return (
            f"Fit({name}, {len(self.schema.genes)} genes, {len(self.history)} epochs, "
            f"{loss:.1f} nats per cell, {self.device}, steps {how})"
        )
