"""Handlers around programs, which know nothing of them: a weight on the KL, genes left out."""

import functools
from typing import Any

import torch
from jaxtyping import Bool
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrosc.data.minibatch import Cells
from pyrosc.data.schema import Schema
from pyrosc.distributions.cell import without
from pyrosc.inference.contract import Program


class _LeaveOut(Messenger):
    """Leaves genes out of the density of the counts, of whatever site observes them.

    Parameters
    ----------
    kept : Tensor of shape (genes,)
        True for the genes that stay.
    x : Tensor of shape (cells, genes)
        The counts.
    """

    def __init__(self, kept: Bool[Tensor, "genes"], x: Tensor) -> None:
        super().__init__()
        self.kept, self.x = kept, x

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["value"] is self.x:
            kept = self.kept.to(msg["value"].device)
            msg["fn"] = without(msg["fn"], kept)
            msg["value"] = torch.where(kept, msg["value"], 0.0)


def leaving_out(model: Program, schema: Schema) -> Program:
    """Return the model without a density of the genes that are absent in the schema."""
    if not schema.absent:
        return model
    kept = torch.as_tensor(schema.present)

    @functools.wraps(model)
    def run(cells: Cells) -> Any:
        with _LeaveOut(kept, cells.x):
            return model(cells)

    run.__self__ = getattr(model, "__self__", model)  # type: ignore[attr-defined]  # whose parts it runs
    return run


class ScaleKL(Messenger):
    """Scales the log density of every unobserved site, in the model and in the guide: a weight on the KL.

    Parameters
    ----------
    weight : float or scalar Tensor
        More than zero.
    """

    def __init__(self, weight: float | Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
