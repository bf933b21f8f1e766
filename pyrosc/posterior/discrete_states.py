"""What is discrete in a cell's state: clusters, labels (predict), and which numbers of its code are not 0."""

from dataclasses import dataclass, replace

import anndata
import numpy as np
import pandas as pd

from pyrosc.data.counts import Counts
from pyrosc.data.minibatch import Cells
from pyrosc.distributions.spike_slab import SpikeSlab
from pyrosc.inference.fit import Fit
from pyrosc.posterior.checks import counts_of
from pyrosc.posterior.draws import draws, mean_over_draws
from pyrosc.posterior.missing_genes import asked
from pyrosc.posterior.sampling import Run, innermost, map_runs


@dataclass(frozen=True, eq=False)
class Clusters:
    """Probabilities of each cell's cluster.

    Attributes
    ----------
    probability : DataFrame of shape (cells, components)
        Rows sum to 1.
    entropy : Series of shape (cells,)
        Of each row, in nats: 0 is certainty, log(components) none at all.

    Examples
    --------
    >>> import pandas as pd
    >>> import pyrosc
    >>> probability = pd.DataFrame([[0.9, 0.1], [0.5, 0.5]], ["cell_0", "cell_1"], ["0", "1"])
    >>> entropy = pd.Series([0.33, 0.69], probability.index)
    >>> pyrosc.Clusters(probability, entropy).most_probable.to_dict()
    {'cell_0': '0', 'cell_1': '0'}
    """

    probability: pd.DataFrame
    entropy: pd.Series

    @property
    def most_probable(self) -> pd.Series:
        """Name of each cell's most probable cluster, a categorical Series."""
        names = self.probability.columns
        codes = self.probability.to_numpy().argmax(1)
        return pd.Series(pd.Categorical.from_codes(codes, categories=names), self.probability.index)

    def __repr__(self) -> str:
        cells, components = self.probability.shape
        used = self.most_probable.nunique()
        return (
            f"Clusters of {cells} cells: {used} of {components} are the most probable of a cell, "
            f"mean entropy {self.entropy.mean():.2f} nats"
        )


def clusters(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 25,
    *,
    site: str = "p_y",
    parallel: bool = True,
    seed: int = 0,
) -> Clusters:
    """Return the posterior probabilities of each cell's cluster y, averaged over draws of its state.

    Parameters
    ----------
    fit
        Of a model with clusters: :class:`~pyrosc.GMVAE`.
    data, n_draws, parallel, seed
        See :func:`draws`.
    site
        Name of the site of probabilities, (cells, components).

    Raises
    ------
    KeyError
        If the model has no clusters.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.GMVAE.for_data(adata, n_latent=2, hidden=(8,), n_components=3)
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, progress=False)
    >>> pyrosc.clusters(fit, adata).probability.shape
    (60, 3)
    """
    data = counts_of(fit, data)
    try:
        drawn = draws(fit, data, site, n_draws=n_draws, parallel=parallel, seed=seed)
        probability = mean_over_draws(drawn, site)
    except KeyError as error:
        models = "pyrosc.GMVAE has clusters, pyrosc.SCANVI labels"
        msg = f"{error.args[0]}: {models}; name the site of probabilities of a program of your own"
        raise KeyError(msg) from error
    probability /= probability.sum(1, keepdims=True)
    names = data.cell_names
    columns = [str(i) for i in range(probability.shape[1])]
    entropy = -np.where(probability > 0, probability * np.log(np.maximum(probability, 1e-300)), 0.0).sum(1)
    return Clusters(pd.DataFrame(probability, names, columns), pd.Series(entropy, names, name="entropy"))


def predict(
    fit: Fit,
    data: Counts | anndata.AnnData,
    n_draws: int = 25,
    *,
    site: str = "p_y",
    parallel: bool = True,
    seed: int = 0,
) -> Clusters:
    """Return the probabilities of each cell's label, from its counts alone: a label it has is not looked at.

    Parameters
    ----------
    fit
        Of a model that knows labels: :class:`~pyrosc.SCANVI`.
    data, n_draws, site, parallel, seed
        See :func:`clusters`.

    Raises
    ------
    KeyError
        If the model has no such site.
    ValueError
        If the program knows no labels.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> data = pyrosc.from_anndata(adata, labels_key="cell_type")
    >>> model = pyrosc.SCANVI.for_data(data, n_latent=2, hidden=(8,))
    >>> fit = pyrosc.fit_svi(model, data, epochs=2, progress=False)
    >>> list(pyrosc.predict(fit, data).probability.columns)
    ['type_0', 'type_1', 'type_2', 'type_3']
    """
    data = counts_of(fit, data)
    unlabelled = replace(data, labels=np.full(data.n_cells, -1))
    found = clusters(fit, unlabelled, n_draws, site=site, parallel=parallel, seed=seed)
    if getattr(fit.program, "n_labels", None) != len(found.probability.columns):
        msg = (
            f"{site!r} has probabilities of clusters, not of labels: ask with pyrosc.clusters (a program of "
            "your own that knows labels says how many by its attribute `n_labels`)"
        )
        raise ValueError(msg)
    return replace(found, probability=found.probability.set_axis(list(fit.schema.labels), axis=1))


def inclusion(
    fit: Fit, data: Counts | anndata.AnnData, *, site: str = "z", parallel: bool = True, seed: int = 0
) -> np.ndarray:
    """Return the posterior probability that each number of a cell's code is not 0.

    Parameters
    ----------
    fit
        Of a model with a sparse code: :class:`~pyrosc.VSC`.
    data, parallel, seed
        See :func:`draws`.
    site
        Name of the code's site.

    Returns
    -------
    ndarray of shape (cells, latent)
        float32.

    Raises
    ------
    KeyError
        If the guide has no such site.
    TypeError
        If the guide's distribution of the site is not spike-and-slab.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(60, 30, seed=0)
    >>> model = pyrosc.VSC.for_data(adata, n_latent=2, hidden=(8,), branch=4)
    >>> fit = pyrosc.fit_svi(model, adata, epochs=2, progress=False)
    >>> pyrosc.inclusion(fit, adata).shape
    (60, 2)
    """

    def probability(_: Cells, runs: list[Run]) -> np.ndarray:
        guide = runs[0].guide
        if site not in guide.nodes:
            msg = f"the guide samples no site {site!r}: name that of the code"
            raise KeyError(msg)
        q = innermost(guide.nodes[site]["fn"])
        if not isinstance(q, SpikeSlab):
            msg = f"the guide's {site!r} is {type(q).__name__}, whose draws are never 0: fit a VSC"
            raise TypeError(msg)
        return q.inclusion[0].cpu().numpy()

    parts = map_runs(fit, asked(fit, data), probability, n_draws=1, codes=(), parallel=parallel, seed=seed)
    return np.concatenate([*parts])
