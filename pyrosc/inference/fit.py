"""inference.fit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from pyrosc.data.schema import Schema
from pyrosc.engine.cpu.threads import kept
from pyrosc.inference.contract import Program, pair
from pyrosc.inference.handlers import leaving_out
from pyrosc.inference.isolation import isolated, modules_of


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
        What :func:`fit_svi` was given, and what it chose.
    device
        Where the parameters are.
    """

    program: Any
    separate_guide: Any
    params: dict[str, Any]
    schema: Schema
    history: pd.DataFrame
    settings: dict[str, Any]
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
        with torch.no_grad(), kept(), isolated(self.device, seed, self.params):
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
        last = self.history.iloc[self.settings["best_epoch"]]
        loss = last.validation if math.isfinite(last.validation) else last.train
        return (
            f"Fit({name}, {len(self.schema.genes)} genes, {len(self.history)} epochs, "
            f"{loss:.1f} nats per cell, {self.device})"
        )
