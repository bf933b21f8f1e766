"""How many genes a question of differential expression calls where there is nothing to find."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from pyrosc.data.alignment import categories_of
from pyrosc.data.counts import Counts
from pyrosc.differential.calls import Number
from pyrosc.differential.design import pairs_of, replicates_of
from pyrosc.differential.expression import differential_expression
from pyrosc.differential.fit_or_counts import fit_and_counts
from pyrosc.inference.fit import Fit


@dataclass(frozen=True)
class NullCalibration:
    """Calls of a question under permuted labels, all of them false.

    Attributes
    ----------
    nominal : ndarray of shape (levels,)
        False discovery rates asked for.
    calls : ndarray of shape (permutations, levels)
        Genes called at each, in each permutation, over all comparisons of the question.
    n_rows : int
        Genes of all comparisons.

    Examples
    --------
    Of four permutations none has a call at a nominal rate of .05, and one has two at .2:

    >>> import numpy as np
    >>> import pyrosc
    >>> null = pyrosc.NullCalibration(np.array([0.05, 0.2]), np.array([[0, 0], [0, 2], [0, 0], [0, 0]]), 40)
    >>> null.table()[["nominal", "realised", "mean_calls"]]
       nominal  realised  mean_calls
    0     0.05      0.00         0.0
    1     0.20      0.25         0.5
    """

    nominal: Float[ndarray, "levels"]
    calls: Int[ndarray, "permutations levels"]
    n_rows: int

    def table(self, interval: float = 0.9) -> pd.DataFrame:
        """Return a row for each nominal rate: nominal, realised, lower, upper, mean_calls, max_calls.

        Every call is false, so the false discovery proportion is 1 with a call and 0 without; the realised
        rate is the share of permutations with a call. `lower` and `upper` are the quantiles of its posterior
        from Jeffreys' prior, Beta(1/2, 1/2); 0 and 1 where no permutation, or each, has a call.

        Parameters
        ----------
        interval
            Probability of the interval.
        """
        from scipy.stats import beta  # takes long to import

        n, hits = len(self.calls), (self.calls > 0).sum(0)
        low, high = (
            beta.ppf(q, hits + 0.5, n - hits + 0.5) for q in ((1 - interval) / 2, (1 + interval) / 2)
        )
        return pd.DataFrame(
            {
                "nominal": self.nominal,
                "realised": hits / n,
                "lower": np.where(hits == 0, 0, low),
                "upper": np.where(hits == n, 1, high),
                "mean_calls": self.calls.mean(0),
                "max_calls": self.calls.max(0),
            }
        )

    def __repr__(self) -> str:
        head = f"NullCalibration({len(self.calls)} permutations, {self.n_rows} genes)"
        return f"{head}\n{self.table().round(3).to_string(index=False)}"


def null_calibration(
    fit: Fit | Counts | anndata.AnnData | None = None,
    data: Counts | anndata.AnnData | None = None,
    *,
    groupby: Any,
    group: Any = None,
    reference: Any = "rest",
    estimand: str = "mean",
    delta: Number = 0.25,
    replicate_key: Any = None,
    batch: str | None = "average",
    n_draws: int = 2000,
    site: str = "rho",
    parallel: bool = True,
    nominal: float | Sequence[float] = (0.01, 0.05, 0.1, 0.2),
    n_permutations: int = 50,
    seed: int = 0,
) -> NullCalibration:
    """Ask a question of differential expression again and again, with the groups' labels permuted.

    Cells change labels within their batch (anywhere with ``batch=None``). With a `replicate_key` replicates
    do, for it is they that are independent: those with cells of one group, among others like them in the same
    batches; in those with cells of several groups the groups' names change places. Labels as they are, or
    with whole groups renamed, are left out, and so are repetitions: three replicates against three have nine
    other labellings. Of means it needs no fit: ``null_calibration(adata, groupby=...)``.

    Where the groups do differ, permuted ones are mixtures of them, wider than either, and in replicates the
    difference is taken for one between replicates. To see a question's calibration under a true null, ask it
    of cells that are alike: controls, or one type of one condition.

    Parameters
    ----------
    fit, data, groupby, group, reference, estimand, delta, replicate_key, batch, n_draws, site, parallel
        As of :func:`~pyrosc.differential_expression`.
    nominal
        A false discovery rate between 0 and 1, or several.
    n_permutations
        How many, at most: of few replicates there are not as many.
    seed
        Of the permutations, and of the draws.

    Returns
    -------
    NullCalibration
        :func:`pyrosc.plots.calibration` draws it.

    Raises
    ------
    ValueError
        If a nominal rate or `n_permutations` is out of range, no other labelling exists, or the question
        can't be asked.

    Examples
    --------
    Cells that are alike, of six donors who are divided at random:

    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(200, 40, n_types=1, n_donors=6, seed=0)
    >>> half = adata.obs.donor.isin(["donor_0", "donor_1", "donor_2"])
    >>> asked = {"groupby": half, "group": True, "replicate_key": "donor"}
    >>> null = pyrosc.null_calibration(adata, **asked, nominal=(0.05, 0.2), n_permutations=3)
    >>> null.table()[["nominal", "realised", "max_calls"]]
       nominal  realised  max_calls
    0     0.05       0.0          0
    1     0.20       0.0          0
    """
    levels = np.atleast_1d(np.asarray(nominal, dtype=np.float64))
    if not (levels.ndim == 1 and levels.size and ((levels > 0) & (levels < 1)).all()):
        msg = f"nominal names false discovery rates between 0 and 1, not {nominal!r}"
        raise ValueError(msg)
    if n_permutations < 1:
        msg = f"n_permutations must be at least 1, not {n_permutations}"
        raise ValueError(msg)
    fit, data = fit_and_counts(fit, data)
    codes, names = categories_of(data, groupby, "groupby")
    contrasted = {code for pair in pairs_of(codes, names, group, reference) for code in pair}
    if -1 not in contrasted:  # with the rest all groups are
        codes = np.where(np.isin(codes, list(contrasted)), codes, -1)
    where = np.zeros(data.n_cells, np.int64) if batch is None else data.batch.astype(np.int64)
    replicate = replicates_of(data, replicate_key)
    calls = []
    for labels in _permuted(codes, replicate, where, n_permutations, np.random.default_rng(seed)):
        table = differential_expression(
            fit,
            data,
            groupby=pd.Categorical.from_codes(labels, pd.Index(names)),
            group=group,
            reference=reference,
            estimand=estimand,
            delta=delta,
            replicate_key=replicate_key,
            batch=batch,
            n_draws=n_draws,
            site=site,
            parallel=parallel,
            seed=seed,
        )
        expected = table["expected_fdr"].dropna().to_numpy()
        if not len(expected):
            msg = (
                "with fewer than two replicates on a side nothing is called, and there are no false calls "
                "to count: ask without replicate_key, or of groups with more replicates"
            )
            raise ValueError(msg)
        calls.append((expected[:, None] <= levels).sum(0))
    return NullCalibration(levels, np.array(calls), len(expected))


def _permuted(
    codes: Int[ndarray, "cells"], replicate: ndarray | None, where: ndarray, n: int, rng: np.random.Generator
) -> list[Int[ndarray, "cells"]]:
    """Return up to `n` arrays of codes in which cells, or replicates, have changed theirs where they are."""
    if replicate is None:
        return [_shuffled(codes, where, rng) for _ in range(n)]
    return _relabelled(np.where(replicate < 0, -1, codes), replicate, where, n, rng)


def _shuffled(codes: Int[ndarray, "n"], block: ndarray, rng: np.random.Generator) -> Int[ndarray, "n"]:
    """Return the codes in another order within each block; -1 stays where it is."""
    shuffled = codes.copy()
    for name in np.unique(block):
        places = np.flatnonzero((block == name) & (codes >= 0))
        shuffled[places] = codes[rng.permutation(places)]
    return shuffled


def _relabelled(
    codes: Int[ndarray, "cells"], replicate: ndarray, where: ndarray, n: int, rng: np.random.Generator
) -> list[Int[ndarray, "cells"]]:
    """Return up to `n` arrays of codes in which replicates have changed theirs, no two of them alike."""
    known = codes >= 0
    pairs, of_cell = np.unique(np.stack([replicate, codes], 1)[known], axis=0, return_inverse=True)
    owner, code = pairs.T
    several = np.isin(owner, owner[np.r_[False, owner[1:] == owner[:-1]]])
    sites = [tuple(np.unique(where[known & (replicate == r)])) for r in owner]
    block = pd.factorize(pd.Series(sites))[0]
    # One replicate against one is not compared beside those of both groups: its labels make no difference.
    others = np.bincount(block[~several], minlength=1)
    lone = len(np.unique(owner[several])) > 1 and others.max() <= 2 and (others == 2).sum() <= 1
    told = several if lone else np.full(len(several), fill_value=True)
    seen = {_up_to_names(code[told])}
    found = []
    for _ in range(20 * n):  # of few labellings most are soon repetitions
        new = np.where(several, code, _shuffled(np.where(several, -1, code), block, rng))
        for r in np.unique(owner[several]):
            places = np.flatnonzero(owner == r)
            new[places] = code[rng.permutation(places)]
        if (key := _up_to_names(new[told])) in seen:
            continue
        seen.add(key)
        labels = codes.copy()
        labels[known] = new[of_cell]
        found.append(labels)
        if len(found) == n:
            break
    if not found:
        msg = (
            "the replicates can be labelled in no other way: two of each group in one batch are needed, "
            "or two with cells of both groups"
        )
        raise ValueError(msg)
    return found


def _up_to_names(codes: Int[ndarray, "n"]) -> bytes:
    """Return what two labellings have in common whose groups differ in their names only."""
    return pd.factorize(codes)[0].tobytes()
