"""A model without structure to compare with: all cells are alike."""

from typing import Any

import numpy as np
import pyro
import torch
from anndata import AnnData
from torch import nn

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.data.read import as_counts
from pyrosc.distributions.counts import NegativeBinomial
from pyrosc.inference.fit import Fit
from pyrosc.inference.svi import fit_svi


class NoStructure(nn.Module):
    r"""A baseline: all cells are alike, but for their totals.

    For cell n and gene g::

        x_ng ~ NB(l_n rho_g, theta_g),    l_n = sum_g x_ng,    rho = softmax(log_share)

    Nothing is latent, so the ELBO is the log likelihood and a fit is of maximum likelihood. What another
    model gains on it in held-out nats per cell is what that model found out about differences between cells.

    Parameters
    ----------
    log_share
        Start of the log of the genes' shares, up to a constant, (genes,).
    log_inverse_dispersion
        Start of the natural log of theta, (genes,).

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.criticism.NoStructure.for_data(adata)
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, validation=0.0, progress=False)
    >>> [drawn] = pyrosc.draws(fit, adata, "rho", n_draws=1)
    >>> bool((drawn["rho"][0, 0] == drawn["rho"][0, 59]).all())  # all cells are alike
    True
    """

    def __init__(self, log_share: torch.Tensor, log_inverse_dispersion: torch.Tensor) -> None:
        super().__init__()
        self.log_share = nn.Parameter(log_share)
        self.log_inverse_dispersion = nn.Parameter(log_inverse_dispersion)

    @classmethod
    def for_data(cls, data: Counts | AnnData) -> "NoStructure":
        """Start at the data's shares, and at the theta of the counts' second moments.

        Parameters
        ----------
        data
            Counts, or an AnnData with counts in X.
        """
        data = as_counts(data)
        # E (x - mu)^2 = mu + mu^2 / theta, summed over cells, with mu = l rho.
        x, l, rho = data.x, data.library.astype(np.float64), data.share
        mean_squared = (l**2).sum() * rho**2
        squared_error = np.asarray(x.power(2).sum(0)) - 2 * rho * (x.T @ l) + mean_squared
        theta = mean_squared / np.maximum(squared_error - l.sum() * rho, 1e-2 * mean_squared)
        return cls(
            torch.as_tensor(np.log(rho), dtype=torch.float32),
            torch.as_tensor(np.log(np.clip(theta, 1e-2, 1e2)), dtype=torch.float32),
        )

    def model(self, cells: Cells) -> None:
        """Sample the counts."""
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            l = pyro.deterministic("l", cells.library, event_dim=1)
            pyro.deterministic("rho", self.log_share.softmax(-1).expand_as(cells.x), event_dim=1)
            theta = self.log_inverse_dispersion.exp()
            x = NegativeBinomial(logits=self.log_share, total=l, inverse_dispersion=theta)
            pyro.sample("x", x.to_event(1), obs=cells.x)

    def guide(self, cells: Cells) -> None:
        """Sample nothing."""


def baseline(data: Counts | AnnData, **settings: Any) -> Fit:
    """Fit :class:`NoStructure`, the model in which all cells are alike, by maximum likelihood.

    Parameters
    ----------
    data
        Counts, or an AnnData with counts in X: the cells that the model to be judged was fitted to.
    settings
        Of :func:`~pyrosc.fit_svi`. By default some 100 steps with a learning rate of 0.05, up to 4096 cells
        in each, and no cell kept out (``validation=0``): within 0.01 nats per cell of the maximum.

    Returns
    -------
    Fit
        It takes the same questions as any other, except for a latent space.

    Examples
    --------
    The gain of a fit on cells that it was not fitted to, in nats per cell; nothing is latent in the baseline,
    so one draw is exact.

    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(90, 30, seed=0)
    >>> train, test = adata[:60], adata[60:]
    >>> vae = pyrosc.VAE.for_data(train, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(vae, train, epochs=2, progress=False)
    >>> alike = pyrosc.criticism.baseline(train, progress=False)
    >>> answers = pyrosc.log_likelihood(fit, test), pyrosc.log_likelihood(alike, test, n_draws=1)
    >>> gain = answers[0].nats - answers[1].nats
    >>> gain.shape
    (30,)
    """
    data = as_counts(data)
    size = 4096
    epochs = max(1, round(100 / -(-data.n_cells // size)))
    chosen = {"epochs": epochs, "validation": 0.0, "minibatch_size": size, "learning_rate": 0.05}
    return fit_svi(NoStructure.for_data(data), data, **chosen | settings)
