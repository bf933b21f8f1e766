"""Calls at a Bayesian false discovery rate, from distributions of log2 fold changes.

It knows neither cells nor counts: posteriors or draws in, a table out. Probabilities are posterior; false
discoveries are counted over all rows of a table together.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from pyrosc.differential.adaptive_shrinkage import Posterior
from pyrosc.engine.cpu.threads import kept

Number = float | int  # beartype does not take 0 for a float


@dataclass(frozen=True)
class Draws:
    """Draws of log2 fold changes, read as a distribution: the verbs of `Posterior`.

    Attributes
    ----------
    lfc : ndarray of shape (draws, genes)
    """

    lfc: Float[ndarray, "draws genes"]

    @cached_property
    def _sorted(self) -> Float[ndarray, "genes draws"]:
        by_gene = self.lfc.T.copy(order="C")
        n_threads = torch.get_num_threads()
        # numpy sorts on one thread, and ten times as fast as torch
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(lambda some: some.sort(1), np.array_split(by_gene, n_threads)))
        return by_gene

    @property
    def mean(self) -> Float[ndarray, "genes"]:
        """Mean over the draws."""
        return torch.from_numpy(self._sorted).mean(1).double().numpy()

    @property
    def sd(self) -> Float[ndarray, "genes"]:
        """Standard deviation over the draws."""
        some = torch.from_numpy(self._sorted).split(64)
        norms = [torch.linalg.vector_norm(t - t.mean(1, keepdim=True), dim=1) for t in some]
        return torch.cat(norms).double().numpy() / math.sqrt(len(self.lfc))

    def above(self, t: Number) -> Float[ndarray, "genes"]:
        """Share of the draws above t."""
        return (len(self.lfc) - self._n_up_to(t, side="right")) / len(self.lfc)

    def below(self, t: Number) -> Float[ndarray, "genes"]:
        """Share of the draws below t."""
        return self._n_up_to(t, side="left") / len(self.lfc)

    def _n_up_to(self, t: Number, side: str) -> Int[ndarray, "genes"]:
        draws = torch.from_numpy(self._sorted)
        level = torch.full((len(draws), 1), t, dtype=draws.dtype)
        return torch.searchsorted(draws, level, side=side)[:, 0].numpy()

    def quantile(self, q: float) -> Float[ndarray, "genes"]:
        """Quantile of the draws, linearly interpolated."""
        place = q * (len(self.lfc) - 1)
        low, high = (self._sorted[:, i].astype(np.float64) for i in (math.floor(place), math.ceil(place)))
        return low + (high - low) * (place % 1)


@kept()
def compare(
    lfc: Float[ndarray, "draws genes"] | Posterior,
    *,
    delta: Number = 0.25,
    fdr: Number = 0.05,
    interval: Number = 0.9,
    prior_de: Number | None = None,
) -> pd.DataFrame:
    """Summarise distributions of log2 fold changes, and call genes at a false discovery rate.

    With t the log2 fold change of a gene::

        p_up = P(t > delta),  p_down = P(t < -delta),  p_de = p_up + p_down,  p_equivalent = 1 - p_de
        bayes_factor  = log p_de / (1 - p_de) - log prior_de / (1 - prior_de)             natural log
        lfsr          = 1 - max(p_up, p_down)
        expected_fdr  = mean of the lfsr over all rows of this lfsr or less
        is_de         = expected_fdr <= fdr

    lfsr is the local false sign rate, of a change by more than delta: the posterior probability that it is an
    error to call the gene *in a direction*, up or down. 1 - p_de is not: a posterior that is wide and centred
    on 0 has a p_de of .7 without a sign, and no counts behind it. expected_fdr is the Bayesian false
    discovery rate: the mean lfsr of the rows called if all with this much evidence are.

    Parameters
    ----------
    lfc
        Draws of log2 fold change, or posteriors of it.
    delta
        Smallest log2 fold change of interest, at least 0.
    fdr
        Target of the false discovery rate, between 0 and 1.
    interval
        Probability of the central interval between `lfc_lower` and `lfc_upper`.
    prior_de
        Prior probability that a gene differs by more than delta. None: that of the posteriors' fitted prior;
        of draws, 1/2, so that the Bayes factor is the posterior log odds.

    Returns
    -------
    DataFrame
        A row for each gene, in the order given: lfc_mean, lfc_sd, lfc_lower, lfc_upper, p_up, p_down,
        p_equivalent, p_de, p_de_se, bayes_factor, expected_fdr, is_de. Of independent draws p_de_se, the
        standard error of p_de, is sqrt(p_de (1 - p_de) / draws); of a posterior it is 0. Bayes factor and
        lfsr treat probabilities as at least half a draw, 1 / (2 draws), or 1e-9 of a posterior, from 0
        and 1: both are finite.

    Raises
    ------
    ValueError
        If a number is out of range, or a draw is not finite.

    References
    ----------
    Newton, Noueiry, Sarkar and Ahlquist, Detecting differential gene expression with a semiparametric
    hierarchical mixture method, 2004 (the Bayesian FDR). Stephens, False discovery rates: a new deal, 2017
    (the local false sign rate).

    Examples
    --------
    A thousand draws of each of three genes, of which one is up for certain and one down, perhaps:

    >>> import numpy as np
    >>> import pyrosc
    >>> draws = np.random.default_rng(0).normal([1.5, -0.6, 0.1], [0.3, 0.3, 0.05], (1000, 3))
    >>> table = pyrosc.compare(draws, delta=0.25)
    >>> table[["lfc_mean", "p_up", "p_down", "expected_fdr", "is_de"]].round(1)
       lfc_mean  p_up  p_down  expected_fdr  is_de
    0       1.5   1.0     0.0           0.0   True
    1      -0.6   0.0     0.9           0.1  False
    2       0.1   0.0     0.0           0.4  False
    """
    check_numbers(delta, fdr, interval)
    if prior_de is not None and not 0 < prior_de < 1:
        msg = f"prior_de is a probability between 0 and 1, not {prior_de!r}"
        raise ValueError(msg)
    return call_at_fdr(summarise(lfc, delta, interval, prior_de), fdr)


def summarise(
    lfc: Float[ndarray, "draws genes"] | Posterior,
    delta: Number = 0.25,
    interval: Number = 0.9,
    prior_de: Number | None = None,
) -> pd.DataFrame:
    """Return what :func:`compare` says of each gene by itself, lfsr last: tables to be put together.

    Parameters
    ----------
    lfc, delta, interval, prior_de
        See :func:`compare`.
    """
    if not isinstance(lfc, Posterior):
        lfc = np.asarray(lfc)
        if lfc.ndim != 2 or lfc.dtype.kind != "f":
            msg = f"draws of fold changes are floats, draws x genes, not {lfc.dtype} of shape {lfc.shape}"
            raise ValueError(msg)
        if not (lfc.size and np.isfinite(lfc).all()):
            msg = (
                "log2 fold changes must be finite, and of one draw at least: add a pseudo-share to the shares"
            )
            raise ValueError(msg)
        prior = 0.5 if prior_de is None else prior_de
        return _with_evidence(describe(Draws(lfc), delta, interval), len(lfc), prior)
    prior = lfc.prior_de(delta) if prior_de is None else prior_de
    return _with_evidence(describe(lfc, delta, interval), math.inf, prior)


def describe(t: Draws | Posterior, delta: Number, interval: Number) -> pd.DataFrame:
    """Return what is read off a distribution of fold changes: moments, an interval, P(up) and P(down)."""
    return pd.DataFrame(
        {
            "lfc_mean": t.mean,
            "lfc_sd": t.sd,
            "lfc_lower": t.quantile((1 - interval) / 2),
            "lfc_upper": t.quantile((1 + interval) / 2),
            "p_up": t.above(delta),
            "p_down": t.below(-delta),
        }
    )


def pooled(blocks: Sequence[pd.DataFrame], n_draws: Sequence[int]) -> pd.DataFrame:
    """Return what :func:`summarise` says of all draws, from :func:`describe` of blocks of them.

    Of the ends of the interval it is the blocks' mean; all else is exact.

    Parameters
    ----------
    blocks, n_draws
        A table for each block, and how many draws it is of.
    """
    squares = [block.lfc_sd**2 + block.lfc_mean**2 for block in blocks]
    table = pd.DataFrame(np.average(blocks, 0, n_draws), columns=blocks[0].columns)
    table["lfc_sd"] = np.sqrt(np.maximum(0, np.average(squares, 0, n_draws) - table.lfc_mean**2))
    return _with_evidence(table, sum(n_draws), 0.5)


def _with_evidence(described: pd.DataFrame, n_draws: Number, prior_de: Number) -> pd.DataFrame:
    """Add what follows from the probabilities of `n_draws` draws; a posterior is infinitely many."""
    up, down = described.p_up, described.p_down
    either, least = np.minimum(1, up + down), max(0.5 / n_draws, 1e-9)
    return described.assign(
        p_equivalent=np.maximum(0, 1 - up - down),
        p_de=either,
        p_de_se=np.sqrt(either * (1 - either) / n_draws),
        bayes_factor=_log_odds(either, least) - _log_odds(prior_de, 1e-9),
        lfsr=np.maximum(least, 1 - np.maximum(up, down)),
    )


def ranked(table: pd.DataFrame, absent: Sequence[str], *, known: bool) -> pd.DataFrame:
    """Leave out absent genes; order the others by lfsr, then by |lfc_mean| / lfc_sd.

    Where it is not `known` how far replicates differ, neither is the lfsr: it is NaN from here on.
    """
    table = table[~table.gene.isin(absent)]
    table = table.iloc[np.lexsort((-(table.lfc_mean / table.lfc_sd).abs(), table.lfsr))]
    return table if known else table.assign(lfsr=np.nan)


def call_at_fdr(table: pd.DataFrame, fdr: Number = 0.05) -> pd.DataFrame:
    """Turn the column `lfsr` into `expected_fdr` and `is_de`, jointly over all rows; see :func:`compare`.

    Rows whose lfsr is NaN are no calls, have the expected FDR NaN, and no part in that of others.
    """
    lfsr = np.sort(table["lfsr"].to_numpy())  # (NaN last)
    running = lfsr.cumsum() / np.arange(1, len(lfsr) + 1)
    # Rows of equal evidence are called together: all have the mean up to the last of them.
    expected = running[np.searchsorted(lfsr, table["lfsr"], side="right") - 1]
    table = table.assign(lfsr=expected).rename(columns={"lfsr": "expected_fdr"})
    table.insert(list(table).index("expected_fdr") + 1, "is_de", expected <= fdr)
    return table


def check_numbers(delta: Any, fdr: Any, interval: Any) -> None:
    """Raise where a number that every question takes is out of range."""
    if not (_is_number(delta) and 0 <= delta < math.inf):
        msg = f"delta is a log2 fold change of at least 0, not {delta!r}"
        raise ValueError(msg)
    for name, value in {"fdr": fdr, "interval": interval}.items():
        if not (_is_number(value) and 0 < value < 1):
            msg = f"{name} must be between 0 and 1, not {value!r}"
            raise ValueError(msg)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def _log_odds(p: Any, least: float) -> Any:
    p = np.clip(p, least, 1 - least)
    return np.log(p) - np.log1p(-p)
