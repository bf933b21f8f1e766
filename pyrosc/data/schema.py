"""Schema: the names of genes, batches, labels, covariates and proteins that a fit keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Schema:
    """What a model was fitted to: the names that new data must bring, and where they were found.

    Attributes
    ----------
    genes : tuple of str
        Gene names, in the order of the fit.
    layer, batch_key, labels_key : str or None
        Where :func:`from_anndata` found the counts, the experimental batch and the labels.
    batches, labels : tuple of str
        Names of the batches (one, ``"all"``, where there is no key) and of the labels (none without a key).
    categorical : dict of str to tuple of str
        Categories of each categorical covariate.
    continuous : tuple of str
        Names of the continuous covariates.
    protein_key : str or None
        Where in ``obsm`` the counts of proteins were found.
    proteins : tuple of str
        Names of the proteins (none without a key).
    absent : tuple of str
        Genes of the fit that the data of a query lack: see :func:`pyrosc.fit_query`.
    """

    genes: tuple[str, ...]
    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    batches: tuple[str, ...] = ("all",)
    labels: tuple[str, ...] = ()
    categorical: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous: tuple[str, ...] = ()
    protein_key: str | None = None
    proteins: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @cached_property
    def present(self) -> np.ndarray:
        """Which genes are not absent, boolean, (genes,)."""
        return ~np.isin(self.genes, self.absent)
