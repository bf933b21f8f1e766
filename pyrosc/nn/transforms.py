"""Transforms of counts for models of real numbers: modules from Cells to values, and back to shares."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells


@runtime_checkable
class Transform(Protocol):
    """From cells to values of each gene, and from values to each gene's share of the counts."""

    def __call__(self, cells: Cells) -> Float[Tensor, "cells genes"]:
        """Return the transformed counts."""
        ...

    def share(self, values: Float[Tensor, "*draws cells genes"], cells: Cells) -> Any:
        """Return the shares that such values stand for; rows sum to one."""
        ...


class LogNormalised(nn.Module):
    r"""(log(1 + c x / l) - m_g) / s_g: log counts at a common library size c, standardised gene by gene.

    Parameters
    ----------
    target
        c, in counts.
    mean, sd
        m and s, of the data that the model was made for, (genes,); s > 0.
    """

    target: Tensor
    mean: Tensor
    sd: Tensor

    def __init__(self, target: float, mean: Float[Tensor, "genes"], sd: Float[Tensor, "genes"]) -> None:
        super().__init__()
        self.register_buffer("target", torch.tensor(target))
        self.register_buffer("mean", mean)
        self.register_buffer("sd", sd)

    @classmethod
    def for_data(cls, data: Counts) -> "LogNormalised":
        """Read off the data: c, the median total, and moments. A gene that does not vary has s = 1."""
        target = float(np.median(data.library))
        size = target / np.maximum(data.library, 1)
        log = data.x.astype(np.float64).multiply(size[:, None]).log1p().tocsr()
        mean = np.asarray(log.mean(0)).ravel()
        sd = np.sqrt(np.maximum(np.asarray(log.power(2).mean(0)).ravel() - mean**2, 0))
        sd[sd < 1e-4 * np.maximum(1, mean)] = 1.0
        return cls(target, torch.as_tensor(mean).float(), torch.as_tensor(sd).float())

    def forward(self, cells: Cells) -> Float[Tensor, "cells genes"]:
        """Return the standardised log counts."""
        return (torch.log1p(cells.x * (self.target / cells.library.clamp_min(1))) - self.mean) / self.sd

    def share(
        self,
        values: Float[Tensor, "*draws cells genes"],
        cells: Cells,  # noqa: ARG002
    ) -> Float[Tensor, "*draws cells genes"]:
        """Undo the standardisation and the logarithm, and divide by the sum."""
        return _share(torch.expm1((values * self.sd + self.mean).clamp(0, 20)))


class PearsonResiduals(nn.Module):
    r"""(x - mu) / sqrt(mu + mu^2 / theta), mu = l p_g: how far a count is from one of its gene's share p.

    Clipped at sqrt(number of cells), as the source does.

    Parameters
    ----------
    share_of_gene
        p, (genes,), above 0.
    limit
        Largest absolute residual.
    inverse_dispersion
        theta.

    References
    ----------
    Lause, Berens and Kobak, Analytic Pearson residuals for normalization of single-cell RNA-seq UMI data,
    2021.
    """

    share_of_gene: Tensor
    limit: Tensor

    def __init__(
        self, share_of_gene: Float[Tensor, "genes"], limit: float, inverse_dispersion: float = 100.0
    ) -> None:
        super().__init__()
        self.register_buffer("share_of_gene", share_of_gene)
        self.register_buffer("limit", torch.tensor(limit))
        self.inverse_dispersion = inverse_dispersion

    @classmethod
    def for_data(cls, data: Counts) -> "PearsonResiduals":
        """Read the shares off the data."""
        return cls(torch.as_tensor(data.share).float(), float(np.sqrt(data.n_cells)))

    def _moments(self, cells: Cells) -> tuple[Tensor, Tensor]:
        mu = cells.library.clamp_min(1) * self.share_of_gene
        return mu, (mu + mu**2 / self.inverse_dispersion).sqrt()

    def forward(self, cells: Cells) -> Float[Tensor, "cells genes"]:
        """Return the residuals."""
        mu, sd = self._moments(cells)
        return ((cells.x - mu) / sd).clamp(-self.limit, self.limit)

    def share(
        self, values: Float[Tensor, "*draws cells genes"], cells: Cells
    ) -> Float[Tensor, "*draws cells genes"]:
        """Return mu + r sd, divided by the sum."""
        mu, sd = self._moments(cells)
        return _share(mu + values * sd)


class RawCounts(nn.Module):
    """x itself."""

    def forward(self, cells: Cells) -> Float[Tensor, "cells genes"]:
        """Return the counts."""
        return cells.x

    def share(
        self,
        values: Float[Tensor, "*draws cells genes"],
        cells: Cells,  # noqa: ARG002
    ) -> Float[Tensor, "*draws cells genes"]:
        """Divide by the sum."""
        return _share(values)


def _share(expected: Float[Tensor, "*draws cells genes"]) -> Float[Tensor, "*draws cells genes"]:
    """Divide by the sum over genes; what is below 0 counts as a millionth of the row's mean size."""
    expected = torch.maximum(expected, 1e-6 * expected.abs().mean(-1, keepdim=True) + 1e-12)
    return expected / expected.sum(-1, keepdim=True)


def scaled_log(cells: Cells) -> tuple[Float[Tensor, "cells genes"], Float[Tensor, "cells 1"]]:
    """Return log(1 + x), each cell's divided by its largest, and these largest; 1 of an empty cell."""
    log = torch.log1p(cells.x)
    largest = log.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return log / largest, largest


def transform_of(name: str, data: Counts) -> Any:
    """Return the transform called ``"log"``, ``"pearson"`` or ``"raw"``.

    Parameters
    ----------
    name
        See :class:`LogNormalised`, :class:`PearsonResiduals` and :class:`RawCounts`.
    data
        What they need is read off it.

    Raises
    ------
    ValueError
        If the name is another one.
    """
    transforms = {
        "log": LogNormalised.for_data,
        "pearson": PearsonResiduals.for_data,
        "raw": lambda data: RawCounts(),  # noqa: ARG005
    }
    if name not in transforms:
        msg = f'transform must be "log", "pearson" or "raw", not {name!r}'
        raise ValueError(msg)
    return transforms[name](data)


def moments_of(transform: Any, data: Counts, n_cells: int = 1000) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each gene's transformed counts, over evenly spaced cells.

    Parameters
    ----------
    transform
        From cells to values.
    data
        Counts.
    n_cells
        Cells to take, at most.

    Returns
    -------
    tuple of Tensor
        Each (genes,); a gene that does not vary has sd 1.
    """
    some = data[np.linspace(0, data.n_cells - 1, min(n_cells, data.n_cells)).astype(int)]
    values = transform(some.on("cpu").cells(torch.arange(some.n_cells)))
    sd = values.std(0, correction=0)
    return values.mean(0), torch.where(sd > 1e-3, sd, torch.ones_like(sd))
