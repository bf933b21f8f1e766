"""Multiple imputation."""

import numpy as np
import pandas as pd
import pytest
from known_rates import MEAN, THETA, X, drawn_rates, known

from pyrosc import from_anndata, multiple_imputation
from pyrosc.posterior.impute import impute

# --- multiple imputation


def test_multiple_imputations_are_draws_of_rates():
    fit, adata = known(X, MEAN, THETA, batches=["a", "b", "a", "b"])
    adata.layers["raw"] = adata.X.copy()
    drawn = multiple_imputation(fit, adata, 3, seed=2)
    assert [part.shape for part in drawn] == [(4, 5)] * 3
    assert len({part.X.tobytes() for part in drawn}) == 3
    for part in drawn:
        assert part.X.dtype == np.float32
        pd.testing.assert_frame_equal(part.obs, adata.obs)
        pd.testing.assert_frame_equal(part.var, adata.var)
        with pytest.raises(ValueError, match=r"X has imputed values .*posterior draw"):
            from_anndata(part)
        with pytest.raises(ValueError, match="fit and test the raw counts"):
            impute(fit, part)
    assert "draw 3 of 3" in drawn[2].uns["pyrosc_imputed"]["X"]
    again, other = (multiple_imputation(fit, adata, 3, seed=s) for s in (2, 3))
    np.testing.assert_array_equal(again[1].X, drawn[1].X)
    assert not np.array_equal(other[1].X, drawn[1].X)
    drawn[0].obs["batch"] = "changed"
    assert adata.obs["batch"].iloc[0] == "a"


def test_pooled_by_rubins_rules_the_mean_is_that_of_rates():
    fit, adata = known(X, MEAN, THETA, sd=0.2)
    w, imputed = drawn_rates(fit, adata, 500), impute(fit, adata, "rate", n_draws=500)
    assert np.max(np.abs(w.mean(0) - imputed.mean) / (imputed.sd * np.sqrt(1.5 / 500))) < 5
    for library in (100.0, np.array([100.0, 3.0, 20.0, 1e4])):
        at = drawn_rates(fit, adata, 500, library=library)
        scale = (np.broadcast_to(library, 4) / X.sum(1))[:, None]
        np.testing.assert_allclose(at, w * scale, rtol=1e-4)
