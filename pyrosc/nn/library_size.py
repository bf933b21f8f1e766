"""Library size l: its prior, and what the guide makes of a total. Modules from Cells to distributions."""

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.nn.covariates import Covariates
from pyrosc.nn.encoder_decoder import Encoder


class ObservedLibrary(nn.Module):
    """l = the cell's observed total: a point mass, in the model and in the guide."""

    def forward(self, cells: Cells) -> dist.Delta:
        """Return the point mass at the total, (cells, 1); a total of zero counts as one."""
        return dist.Delta(cells.library.clamp_min(1.0))


class LatentLibrary(nn.Module):
    """p(l) = LogNormal(m_b, s_b), with each batch's mean and sd of the log totals.

    Parameters
    ----------
    log_mean, log_sd
        Of the natural logarithm of the totals, shape (batches,).
    """

    log_mean: Tensor
    log_sd: Tensor

    def __init__(self, log_mean: Tensor, log_sd: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_mean", log_mean)
        self.register_buffer("log_sd", log_sd)

    @classmethod
    def for_data(cls, data: Counts) -> "LatentLibrary":
        """Read the moments off the data."""
        log_total = torch.as_tensor(data.library).log()
        masks = [torch.as_tensor(data.batch == b) for b in range(len(data.schema.batches))]
        # A batch without cells (the data may be a selection) has the moments of all.
        logs = [log_total[mask] if mask.any() else log_total for mask in masks]
        return cls(
            torch.stack([log.mean() for log in logs]).float(),
            torch.stack([log.std(correction=0).clamp_min(0.01) for log in logs]).float(),
        )

    def forward(self, cells: Cells) -> dist.LogNormal:
        """Return LogNormal, (cells, 1)."""
        return dist.LogNormal(self.log_mean[cells.batch, None], self.log_sd[cells.batch, None])


class LibraryEncoder(nn.Module):
    """q(l given x) = LogNormal(log total + a(x), b(x)): a network corrects the observed total.

    Parameters
    ----------
    encoder
        From cells to a normal distribution, (cells, 1).
    """

    def __init__(self, encoder: Callable[[Cells], dist.Normal]) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, cells: Cells) -> dist.LogNormal:
        """Return LogNormal, (cells, 1)."""
        q = self.encoder(cells)
        return dist.LogNormal(cells.library.clamp_min(1.0).log() + q.loc, q.scale)


def library_of(
    name: str,
    data: Counts,
    covariates: Covariates,
    hidden: Sequence[int],
    *,
    norm: str | None,
    dropout: float,
) -> tuple[nn.Module, nn.Module]:
    """Return the prior and the guide of the library size called ``"observed"`` or ``"latent"``.

    Parameters
    ----------
    name
        ``"observed"``: the total, in both. ``"latent"``: a log-normal prior for each batch, and an encoder.
    data
        Moments of the totals are read off it.
    covariates, hidden, norm, dropout
        Of the encoder.

    Raises
    ------
    ValueError
        If the name is another one.
    """
    if name == "observed":
        return ObservedLibrary(), ObservedLibrary()
    if name == "latent":
        encoder = Encoder(data.n_genes, 1, covariates, hidden, norm=norm, dropout=dropout)
        # A library size that is off by a factor of e^5, once, has a gradient that Adam remembers for long.
        encoder.start_at(0.0, 0.1)
        return LatentLibrary.for_data(data), LibraryEncoder(encoder)
    msg = f'library must be "observed" or "latent", not {name!r}'
    raise ValueError(msg)
