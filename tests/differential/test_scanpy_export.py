import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pyrosc import datasets, differential_expression, to_scanpy


@pytest.fixture(scope="module")
def asked():
    adata = datasets.simulate(300, 40, n_types=3, log2_fold_change=1.5, seed=0)
    return adata, differential_expression(adata, groupby="cell_type")


def test_scanpy_reads_what_the_table_says(asked):
    adata, table = asked
    adata = adata.copy()
    to_scanpy(table, adata)
    for name, part in table.groupby("group"):
        found = sc.get.rank_genes_groups_df(adata, group=name)
        part = part.set_index("gene").loc[found.names]
        np.testing.assert_allclose(found.scores, part.lfc_mean / part.lfc_sd, rtol=1e-5)
        assert (np.diff(found.scores) <= 0).all()
        np.testing.assert_allclose(found.logfoldchanges, part.lfc_mean, rtol=1e-5)
        np.testing.assert_allclose(found.pvals, 1 - np.maximum(part.p_up, part.p_down), atol=1e-12)
        np.testing.assert_array_equal(found.pvals_adj, part.expected_fdr)
        np.testing.assert_array_equal(found.pct_nz_group, part.expressing)
        np.testing.assert_array_equal(found.pct_nz_reference, part.expressing_reference)
    both = sc.get.rank_genes_groups_df(adata, group=None, pval_cutoff=0.05, log2fc_min=0.25)
    assert len(both) == (table.is_de & (table.lfc_mean > 0.25) & (table.expected_fdr < 0.05)).sum()


def test_scanpy_draws_it(asked):
    adata = asked[0].copy()
    to_scanpy(asked[1], adata, key_added="bayes")
    assert adata.uns["bayes"]["params"]["groupby"] == "cell_type"
    axes = sc.pl.rank_genes_groups(adata, key="bayes", n_genes=5, show=False)
    assert len(axes) == 3
    sc.pp.log1p(adata)
    sc.pl.rank_genes_groups_dotplot(adata, key="bayes", n_genes=3, show=False, dendrogram=False)


def test_it_survives_a_file(asked, tmp_path):
    adata = asked[0].copy()
    to_scanpy(asked[1], adata)
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_frame_equal(
        sc.get.rank_genes_groups_df(again, group=None), sc.get.rank_genes_groups_df(adata, group=None)
    )


@pytest.mark.parametrize(
    ("spoilt", "error", "says"),
    [
        (lambda t: t.drop(columns="lfc_sd"), KeyError, "no column lfc_sd"),
        (lambda t: t.iloc[1:], ValueError, "a row for each gene"),
        (lambda t: pd.concat([t, t]), ValueError, "a row for each gene"),
        (lambda t: t.assign(gene="x" + t.gene), KeyError, "40 genes of the table are not in adata"),
        (lambda t: t.assign(reference=t.group), ValueError, "one reference is wanted"),
    ],
)
def test_other_tables_are_refused_and_nothing_is_written(asked, spoilt, error, says):
    adata = asked[0].copy()
    before = list(adata.uns)
    with pytest.raises(error, match=says):
        to_scanpy(spoilt(asked[1]), adata)
    assert list(adata.uns) == before
