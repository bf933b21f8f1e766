"""Tables of differential expression as scanpy's plots and getters read them."""

import anndata
import numpy as np
import pandas as pd

_COLUMNS = [
    "gene",
    "group",
    "reference",
    "lfc_mean",
    "lfc_sd",
    "p_up",
    "p_down",
    "expected_fdr",
    "expressing",
    "expressing_reference",
]


def to_scanpy(table: pd.DataFrame, adata: anndata.AnnData, key_added: str = "rank_genes_groups") -> None:
    """Write a table into ``adata.uns``, for ``sc.pl.rank_genes_groups`` and ``sc.get.rank_genes_groups_df``.

    Scanpy's fields are filled so: ``scores`` lfc_mean / lfc_sd, by which each group's genes are sorted, the
    most clearly raised first; ``logfoldchanges`` lfc_mean, in log2; ``pvals`` the posterior probability that
    a call in the likelier direction is wrong, 1 - max(p_up, p_down); ``pvals_adj`` expected_fdr; ``pts`` and
    ``pts_rest`` the shares of expressing cells. No p-value is among them.

    Parameters
    ----------
    table
        Of :func:`~pyrosc.differential_expression`.
    adata
        That the table is of: it has its genes, and its groups in a column of ``obs``.
    key_added
        Name in ``adata.uns``; what is there is replaced.

    Raises
    ------
    KeyError
        If columns are missing in the table, or genes in `adata`.
    ValueError
        If the groups have not the same genes, or not one reference.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(300, 40, n_types=2, seed=0)
    >>> pyrosc.to_scanpy(pyrosc.differential_expression(adata, groupby="cell_type"), adata)
    >>> adata.uns["rank_genes_groups"]["names"].dtype.names
    ('type_0', 'type_1')
    """
    _check(table, adata)
    genes, groups = table.gene.unique(), list(table.group.unique())
    wrong = 1 - table[["p_up", "p_down"]].max(axis=1)
    table = table.assign(score=table.lfc_mean / table.lfc_sd, wrong=wrong)
    of = {name: table[table.group == name].sort_values("score", ascending=False) for name in groups}

    def fields(column: str, dtype: str) -> np.ndarray:
        rows = zip(*(part[column] for part in of.values()), strict=True)
        return np.array(list(rows), dtype=[(name, dtype) for name in groups])

    def by_gene(column: str) -> pd.DataFrame:
        shares = {name: part.set_index("gene")[column] for name, part in of.items()}
        return pd.DataFrame(shares).reindex(genes)

    adata.uns[key_added] = {
        "params": {
            "groupby": table.attrs.get("groupby", ""),
            "reference": str(table.reference.iloc[0]),
            "method": "pyrosc",
            "use_raw": False,
            "layer": None,
            "corr_method": "expected FDR",
        },
        "names": fields("gene", "O"),
        "scores": fields("score", "float32"),
        "logfoldchanges": fields("lfc_mean", "float32"),
        "pvals": fields("wrong", "float64"),
        "pvals_adj": fields("expected_fdr", "float64"),
        "pts": by_gene("expressing"),
        "pts_rest": by_gene("expressing_reference"),
    }


def _check(table: pd.DataFrame, adata: anndata.AnnData) -> None:
    if not isinstance(table, pd.DataFrame) or table.empty:
        what = "an empty table" if isinstance(table, pd.DataFrame) else type(table).__name__
        msg = f"the table of differential_expression stands first, then adata; {what} has no rows to write"
        raise ValueError(msg)
    if missing := [name for name in _COLUMNS if name not in table]:
        msg = f"the table has no column {', '.join(missing)}: give one of pyrosc.differential_expression"
        raise KeyError(msg)
    if unknown := set(table.gene) - set(adata.var_names):
        msg = (
            f"{len(unknown)} genes of the table are not in adata, such as {min(unknown)!r}: give its own data"
        )
        raise KeyError(msg)
    if (
        len(table) != table.gene.nunique() * table.group.nunique()
        or table.duplicated(["group", "gene"]).any()
    ):
        msg = "each group must have a row for each gene: give the whole table, not a part or several together"
        raise ValueError(msg)
    if table.reference.nunique() != 1:
        msg = (
            f"one reference is wanted, not {', '.join(table.reference.unique())}: give each its own key_added"
        )
        raise ValueError(msg)
