"""Priors p(z) of the cells' state: modules from Cells to a distribution of vectors, batch shape (cells,)."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells


class StandardNormal(nn.Module):
    """p(z) = N(0, I).

    Parameters
    ----------
    n_latent
        Width of z.
    """

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.n_latent = n_latent

    def forward(self, cells: Cells) -> dist.Independent:
        """Return N(0, I) of each cell."""
        zero = cells.x.new_zeros(len(cells), self.n_latent)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


class Flat(nn.Module):
    """No prior: the density of z is 1 everywhere, so that nothing draws its code to anywhere.

    Parameters
    ----------
    n_latent
        Width of z.
    """

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.n_latent = n_latent

    def forward(self, cells: Cells) -> dist.ImproperUniform:
        """Return the improper distribution, from which nothing can be drawn."""
        return dist.ImproperUniform(constraints.real_vector, (len(cells),), (self.n_latent,))


class Mixture(nn.Module):
    r"""p(z) = sum_y pi_y N(z; mu_y, diag sigma_y^2): a learned mixture, its component y summed out.

    The means start at draws from N(0, 1), far apart from each other for the sds of 1 they start with (in d
    dimensions by sqrt(2 d)): components that start in one place stay there. Or they start where
    :meth:`start_at` finds clusters. They are :attr:`PACE` times a parameter.

    Parameters
    ----------
    n_components, n_latent
        Sizes.
    proportions
        pi: ``"learned"``, ``"uniform"`` and fixed, or the fixed numbers, divided by their sum.

    Raises
    ------
    ValueError
        If there is no component, or the proportions are no such thing.
    """

    PACE = 10.0
    """Adam moves a parameter by about the learning rate a step. States move faster than that, and components
    that can't follow them end up empty, or one around two clusters."""

    logits: Tensor

    def __init__(
        self,
        n_components: int,
        n_latent: int,
        proportions: Any = "learned",
    ) -> None:
        super().__init__()
        if n_components < 1:
            msg = f"a mixture has a component at least, not {n_components}"
            raise ValueError(msg)
        self.paced_loc = nn.Parameter(torch.randn(n_components, n_latent) * (1 / self.PACE))
        self.log_scale = nn.Parameter(torch.zeros(n_components, n_latent))
        if isinstance(proportions, str) and proportions == "learned":
            self.logits = nn.Parameter(torch.zeros(n_components))
        else:
            uniform = np.ones(n_components)
            equal = isinstance(proportions, str) and proportions == "uniform"
            try:
                given = uniform if equal else np.asarray(proportions, dtype=np.float64)
                fine = given.shape == (n_components,) and bool((given > 0).all() and np.isfinite(given).all())
            except (TypeError, ValueError):
                fine = False
            if not fine:
                msg = (
                    f'proportions must be "uniform", "learned" or {n_components} numbers above 0, '
                    f"not {proportions!r}"
                )
                raise ValueError(msg)
            self.register_buffer("logits", torch.as_tensor(given / given.sum()).log().float())

    def start_at(self, codes: Float[Tensor, "cells latent"]) -> None:
        """Move the means to the centres of the codes' clusters, by k-means, on a scale where codes have sd 1.

        Codes of a network that has learned nothing yet will do: they are a random projection of the cells,
        which keeps most of what tells clusters apart. Codes that do not differ move nothing.
        """
        from sklearn.cluster import KMeans  # takes long to import

        z = codes.detach().double()
        z = z - z.mean(0)
        if not z.any():
            return
        k_means = KMeans(len(self.paced_loc), n_init=10, random_state=0)
        with warnings.catch_warnings(action="ignore"):  # (of fewer cells that differ than components)
            centres = k_means.fit((z / z.std()).numpy()).cluster_centers_
        with torch.no_grad():
            self.paced_loc.copy_(torch.as_tensor(centres) / self.PACE)

    def extra_repr(self) -> str:
        """Show the sizes."""
        learned = isinstance(self.logits, nn.Parameter)
        return "{}, {}, proportions {}".format(*self.paced_loc.shape, "learned" if learned else "fixed")

    @property
    def components(self) -> dist.Independent:
        """N(mu_y, diag sigma_y^2), batch shape (components,)."""
        return dist.Normal(self.PACE * self.paced_loc, self.log_scale.exp()).to_event(1)

    def forward(self, cells: Cells) -> dist.MixtureSameFamily:
        """Return the mixture, for each cell."""
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=self.logits), self.components)
        return mixture.expand([len(cells)])

    def responsibilities(
        self, z: Float[Tensor, "*draws cells latent"]
    ) -> Float[Tensor, "*draws cells components"]:
        """Return p(y given z) by Bayes' rule; each row sums to one."""
        log_joint = self.logits.log_softmax(-1) + self.components.log_prob(z.unsqueeze(-2))
        return log_joint.softmax(-1)


class PseudoCells(nn.Module):
    """Counts of made-up cells, learned: positive numbers, of no batch or covariate in particular.

    Parameters
    ----------
    start
        Counts to start with, (components, genes).
    encoder
        What is to read them. Without batch normalisation: they are no sample of the cells.

    Raises
    ------
    ValueError
        If the encoder has batch normalisation.
    """

    start: Tensor

    def __init__(self, start: Float[Tensor, "components genes"], encoder: nn.Module) -> None:
        super().__init__()
        if any(isinstance(part, nn.BatchNorm1d) for part in encoder.modules()):
            msg = 'a prior of pseudo-cells takes no batch normalisation: give norm="layer" or None'
            raise ValueError(msg)
        start = start + 0.01
        self.register_buffer("start", start + torch.log(-torch.expm1(-start)))  # softplus gives it back
        self.change = nn.Parameter(torch.zeros_like(start))  # 0 is where weight decay draws it to

    @classmethod
    def for_data(cls, data: Counts, n_components: int, encoder: nn.Module) -> "PseudoCells":
        """Start at cells of the data, chosen at random."""
        if n_components < 1:
            msg = f"a prior of pseudo-cells has one at least, not {n_components}"
            raise ValueError(msg)
        rows = torch.randint(data.n_cells, (n_components,))
        return cls(torch.as_tensor(data.x[rows.numpy()].toarray()), encoder)

    def forward(self, cells: Cells, weights: Float[Tensor, "cells components"] | None = None) -> Cells:
        """Return the pseudo-cells, or their weighted sums, in place of the cells."""
        x = softplus(self.start + self.change)
        x = x if weights is None else weights @ x
        none = cells.batch.new_zeros(len(x))
        return replace(
            cells,
            x=x,
            index=none,
            batch=none,
            labels=none - 1,
            categorical=cells.categorical.new_zeros(len(x), cells.categorical.shape[1]),
            continuous=cells.continuous.new_zeros(len(x), cells.continuous.shape[1]),
            proteins=cells.proteins.new_full((len(x), cells.proteins.shape[1]), -1.0),
        )


class VampPrior(nn.Module):
    r"""p(z) = 1/K sum_k q(z given u_k): the guide's own posteriors of K pseudo-cells u_k.

    Parameters
    ----------
    encoder
        The guide's, shared with it.
    pseudo
        The pseudo-cells.

    References
    ----------
    Tomczak and Welling, VAE with a VampPrior, 2018.
    """

    def __init__(self, encoder: nn.Module, pseudo: PseudoCells) -> None:
        super().__init__()
        self.encoder = encoder
        self.pseudo = pseudo

    def forward(self, cells: Cells) -> dist.MixtureSameFamily:
        """Return the mixture, for each cell."""
        q = self.encoder(self.pseudo(cells)).to_event(1)
        equal = dist.Categorical(logits=q.mean.new_zeros(q.batch_shape))
        return dist.MixtureSameFamily(equal, q).expand([len(cells)])


def prior_of(name: str, n_latent: int, encoder: nn.Module, data: Counts, n_components: int) -> nn.Module:
    """Return the prior called ``"normal"``, ``"mixture"`` or ``"vamp"``.

    Parameters
    ----------
    name
        N(0, I), a learned :class:`Mixture`, or a :class:`VampPrior` whose pseudo-cells start at cells drawn
        from `data`.
    n_latent
        Width of z.
    encoder
        The guide's.
    data
        Counts.
    n_components
        Of the latter two.

    Raises
    ------
    ValueError
        If the name is another one, or the encoder does not suit.
    """
    if name == "normal":
        return StandardNormal(n_latent)
    if name == "mixture":
        return Mixture(n_components, n_latent)
    if name == "vamp":
        return VampPrior(encoder, PseudoCells.for_data(data, n_components, encoder))
    msg = f'prior must be "normal", "mixture" or "vamp", not {name!r}'
    raise ValueError(msg)
