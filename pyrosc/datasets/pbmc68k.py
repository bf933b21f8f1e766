"""700 real blood cells, offline: the counts behind a file of scanpy's."""

from importlib import metadata

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float
from scipy.sparse import csr_matrix


def pbmc68k_reduced() -> AnnData:
    """Real counts, offline: 700 blood cells and 765 genes, from the file inside scanpy's wheel.

    The cells are some of the 68 579 peripheral blood mononuclear cells of one donor (Zheng et al. 2017,
    doi:10.1038/ncomms14049), picked so that a third are labelled dendritic. scanpy keeps their log1p(1e4 x /
    n_counts), rounded to three decimals, and n_counts; with counts this small only one whole x fits each
    value, and this function gives it back.

    A cell has 11 to 28 % of its counts on these genes (342 to 1654 of 2141 to 9497): the row sums of X are
    far below "n_counts", which went over all genes of the experiment. No cell is empty, and each gene is seen
    in at least 3 cells. 67 % of the entries are 0; the largest count is 259. There is one batch.

    Returns
    -------
    AnnData
        X
            Counts, float32 CSR (700, 765). var_names are gene symbols.
        obs
            "cell_type": scanpy's "bulk_labels", 10 categories, the bulk-sorted population most like the cell,
            so noisy among T cells; "n_counts", "n_genes": the cell's counts and genes seen, over all genes;
            "percent_mito": share of its counts that is mitochondrial (a share, in spite of its name);
            "S_score", "G2M_score", "phase": cell cycle; "louvain": scanpy's clusters.
        obsm
            "X_pca" (700, 50), "X_umap" (700, 2): scanpy's.

    Raises
    ------
    ImportError
        If scanpy is not installed.
    RuntimeError
        If the installed scanpy's values are not those of whole counts.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.pbmc68k_reduced()
    >>> adata.shape, float(adata.X.max())
    ((700, 765), 259.0)
    >>> adata.obs["cell_type"].cat.categories[:3].tolist()
    ['CD4+/CD25 T Reg', 'CD4+/CD45RA+/CD25- Naive T', 'CD4+/CD45RO+ Memory']
    """
    try:
        import scanpy
    except ImportError as error:
        msg = 'pbmc68k_reduced reads a file of scanpy\'s: pip install "pyrosc[demo]"'
        raise ImportError(msg) from error
    source = scanpy.datasets.pbmc68k_reduced()
    return AnnData(
        X=_whole_counts(csr_matrix(source.raw.X), source.obs["n_counts"].to_numpy(dtype=float)),
        obs=source.obs.rename(columns={"bulk_labels": "cell_type"}).rename_axis(index=None),
        var=pd.DataFrame(index=source.raw.var_names.rename(None)),
        obsm={name: np.array(source.obsm[name]) for name in ("X_pca", "X_umap")},
    )


def _whole_counts(logged: csr_matrix, totals: Float[np.ndarray, "cells"]) -> csr_matrix:
    """Return the whole x of log1p(1e4 x / total), which may have been rounded to three decimals."""
    scale = np.repeat(totals / 1e4, np.diff(logged.indptr))  # of each stored entry's cell
    counts = np.maximum(np.rint(np.expm1(logged.data.astype(float)) * scale), 0)
    off = np.abs(np.log1p(counts / scale) - logged.data)
    # Half a unit of the third decimal, and float32. log1p of x and x + 1 are 1 / (x + scale) apart: far more
    # than the rounding for one x only to fit. A NaN fails both.
    right = (off < 5e-4 + 2e-6) & (counts + scale < 500)
    if not right.all():
        bad = np.unique(np.repeat(np.arange(len(totals)), np.diff(logged.indptr))[~right]).size
        msg = (
            f"pbmc68k_reduced: {bad} of {len(totals)} cells do not hold whole counts in scanpy "
            f"{metadata.version('scanpy')}, whose file has changed; scanpy 1.11.5 is known to work"
        )
        raise RuntimeError(msg)
    whole = csr_matrix((counts.astype(np.float32), logged.indices, logged.indptr), shape=logged.shape)
    whole.sort_indices()
    return whole
