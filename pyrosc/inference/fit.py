"""Fit: a trained model and guide, the record that every question is put to."""

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
from pyrosc.inference import storage
from pyrosc.inference.contract import Program, pair
from pyrosc.inference.found import Found
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
        What was asked for: the arguments of :func:`fit_svi`, with the values that None stood for.
    found
        What the run found.
    device
        Where the parameters are.

    Examples
    --------
    >>> import pyrosc
    >>> data = pyrosc.from_anndata(pyrosc.datasets.simulate(60, 30, seed=1))
    >>> vae = pyrosc.VAE.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, data, epochs=2, progress=False)
    >>> pyrosc.latent(fit, data).shape
    (60, 2)

    Saved and read again, it answers with the same bits:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit.save(f"{folder}/fit")
    ...     again = pyrosc.load(f"{folder}/fit")
    >>> bool((pyrosc.latent(again, data) == pyrosc.latent(fit, data)).all())
    True
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
        storage.save(self, directory)

    def __repr__(self) -> str:
        name = type(self.program).__name__ if isinstance(self.program, nn.Module) else "program"
        last = self.history.iloc[self.found.best_epoch]
        loss = last.validation if math.isfinite(last.validation) else last.train
        how = "replayed" if self.found.replayed is True else f"run: {self.found.replayed}"
        return (
            f"Fit({name}, {len(self.schema.genes)} genes, {len(self.history)} epochs, "
            f"{loss:.1f} nats per cell, {self.device}, steps {how})"
        )


def load(directory: str | Path, model: Any = None, guide: Any = None, *, device: str = "auto") -> Fit:
    """Read a saved fit. Nothing is trained, and no code in the files is run.

    Parameters
    ----------
    directory
        Of :meth:`pyrosc.Fit.save`.
    model, guide
        For programs that ``for_data`` of one of pyrosc's models did not make, or whose attributes were
        changed afterwards: the model and the guide, built as for :func:`~pyrosc.fit_svi`; their parameters
        are overwritten in copies of them.
    device
        ``"auto"`` takes CUDA where there is one.

    Returns
    -------
    Fit
        It answers every question with the same bits as the fit that was saved, on the same kind of device.

    Raises
    ------
    FileNotFoundError
        If there is no saved fit.
    ValueError
        If the fit was written by a newer pyrosc, needs a model and got none, or the model is another one.

    Examples
    --------
    >>> import tempfile
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 20)
    >>> fit = pyrosc.fit_svi(pyrosc.VAE.for_data(adata), adata, epochs=1, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit.save(folder)
    ...     again = pyrosc.load(folder)
    >>> (pyrosc.latent(again, adata) == pyrosc.latent(fit, adata)).all()
    np.True_
    """
    return Fit(**storage.read(directory, model, guide, device))
