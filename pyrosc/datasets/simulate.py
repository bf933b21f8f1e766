"""Counts to try a model on, drawn from a known truth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from scipy.special import expit, logit, softmax

# One random stream per idea, so that asking for a second batch changes neither types nor libraries. Append
# only: a stream's bits follow from its place.
_STREAMS = ("base", "types", "conditions", "batches", "donors", "cells", "libraries", "counts")

_Number = float | int  # beartype does not take 0 for a float
_Matrix = Float[np.ndarray, "cells genes"]


def simulate(
    n_cells: int = 1000,
    n_genes: int = 500,
    *,
    n_types: int = 4,
    n_batches: int = 1,
    n_donors: int = 1,
    n_conditions: int = 1,
    type_proportions: Sequence[_Number] | np.ndarray | None = None,
    base_shape: _Number = 1.0,
    de_fraction: _Number = 0.1,
    log2_fold_change: _Number = 1.0,
    log2_fold_change_sd: _Number = 0.0,
    condition_de_fraction: _Number = 0.1,
    condition_log2_fold_change: _Number = 1.0,
    batch_sd: _Number = 0.2,
    donor_sd: _Number = 0.1,
    library_mean: _Number = 1000.0,
    library_sd: _Number = 0.4,
    inverse_dispersion: _Number | Sequence[_Number] | np.ndarray = 5.0,
    dropout: _Number = 0.0,
    dropout_slope: _Number = 0.0,
    seed: int = 0,
) -> AnnData:
    r"""Draw counts from a known truth: types, conditions, donors, batches, libraries, dropouts.

    For cell n of type k, batch b, and donor d of condition c, and for gene g::

        base_g  ~ Gamma(base_shape, 1), divided by its sum over the genes
        f_kg    = 0, but on a random de_fraction of genes +-|Normal(log2_fold_change, log2_fold_change_sd^2)|
        h_cg    = the same with condition_de_fraction and condition_log2_fold_change, but 0 in condition_0
        e_bg    ~ Normal(0, batch_sd^2), or 0 if there is one batch
        u_dg    ~ Normal(0, donor_sd^2), or 0 if there is one donor
        rho_ng  = base_g 2^(f_kg + h_cg) exp(e_bg + u_dg), divided by its sum over the genes
        l_n     ~ LogNormal(log(library_mean) - library_sd^2 / 2, library_sd^2)
        w_ng    ~ Gamma(theta_g, theta_g / (l_n rho_ng))            mean l rho
        x*_ng   ~ Poisson(w_ng)                                     so x* is negative binomial
        p_ng    = sigmoid(a - dropout_slope log(l_n rho_ng))        a: `dropout` is the mean of p over entries
        m_ng    ~ Bernoulli(p_ng)
        x_ng    = x*_ng (1 - m_ng)

    Each type, and each condition but the first, has its own round(de_fraction n_genes) genes, each up or down
    with probability 1/2. A condition's effect is the same in every type. A cell's type is drawn from
    Categorical(type_proportions), so a rare type may have no cell. Batches and donors are dealt out evenly at
    random, independently of each other and of the type (so all cross), and donor d belongs to condition d mod
    n_conditions (donors are its replicates). A cell left without a count is given w, x* and m anew until it
    has one; where libraries are of a few counts this lifts mean counts above l rho. The layers are dense: for
    many cells and genes, 8 bytes per entry stay and some 60 are needed on the way.

    Parameters
    ----------
    n_cells, n_genes, n_types, n_batches, n_donors, n_conditions
        Sizes, at least 1; at least as many donors as conditions.
    type_proportions
        Expected proportions of the types, (n_types,), divided by their sum; None is equal ones.
    base_shape
        Shape of the gamma distribution of base expression, > 0. Smaller: a few genes have most of the counts.
    de_fraction, condition_de_fraction
        Share of the genes with an effect, per type and per condition, in [0, 1].
    log2_fold_change, condition_log2_fold_change
        Size of the effects against base expression, log2 fold change, >= 0.
    log2_fold_change_sd
        Spread of both sizes from gene to gene, log2 fold change, >= 0.
    batch_sd, donor_sd
        Standard deviation of a gene's batch and donor effects, natural log, >= 0.
    library_mean, library_sd
        Mean of the libraries, counts per cell, > 0, and the standard deviation of their natural log, >= 0.
    inverse_dispersion
        theta, > 0, one for all genes or one per gene, (n_genes,): the variance of x* is mu + mu^2 / theta at
        mean mu. Infinity is Poisson.
    dropout
        Expected share of the entries that technical dropout hits, in [0, 1).
    dropout_slope
        How fast the log-odds of dropout fall with log(l rho), >= 0. 0, all entries alike, is zero inflation.
    seed
        At least 0. Same seed, same arguments, same bits. numpy's global state is neither read nor changed.

    Returns
    -------
    AnnData
        X
            x, float32 CSR (cells, genes). No cell is empty; a gene may be.
        layers
            "rate": l rho, the mean before dropout, counts; "share": rho; "counts_before_dropout": x*, CSR;
            "dropped": m, boolean CSR, every dropout, also where x* was 0 already. The counts that were lost
            are where x* and x differ.
        obs
            "cell_type", "batch", "donor", "condition" (categories "type_0", ...); "library": l, counts.
        var
            "base_share": base; "inverse_dispersion": theta; "is_de": f is not 0 in some type;
            "log2_fold_change_type_0", ...: f; "share_type_0", ...: the share in a cell of that type without
            effect of batch, donor or condition. With several conditions also "is_de_condition" and
            "log2_fold_change_condition_1", ...: h. As shares sum to 1, one gene's effect moves the shares of
            all: f is the ratio to base up to a factor common to the genes, and log2(share_type_0 /
            share_type_1) is what a comparison of shares should find between the two.
        varm
            "log_batch_effect": e, (genes, batches); "log_donor_effect": u, (genes, donors); natural log.
        uns
            "simulate": the arguments, type_proportions (summing to 1) and inverse_dispersion as arrays.

    Raises
    ------
    ValueError
        If an argument is out of its range, or if 1000 rounds leave a cell without counts.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(100, 20, n_types=2, n_donors=4, n_conditions=2)
    >>> adata.shape, adata.layers["share"].shape
    ((100, 20), (100, 20))
    >>> sorted(adata.obs["cell_type"].unique())
    ['type_0', 'type_1']

    The truth of a comparison of the two types, log2 fold changes of shares:

    >>> import numpy as np
    >>> true = np.log2(adata.var["share_type_0"] / adata.var["share_type_1"])
    >>> true.shape
    (20,)
    """
    arguments = dict(locals())  # first, while the arguments are all there is
    _check_arguments(arguments)
    if type_proportions is None:
        type_proportions = np.ones(n_types)
    proportions = np.divide(type_proportions, np.sum(type_proportions), dtype=float)
    theta = np.full(n_genes, inverse_dispersion, dtype=float)
    arguments |= {"type_proportions": proportions, "inverse_dispersion": theta}

    rng = _streams(seed)
    sd = log2_fold_change_sd
    base = _base_shares(rng["base"], n_genes, base_shape)
    f = _fold_changes(rng["types"], (n_types, n_genes), de_fraction, log2_fold_change, sd)
    shape = (n_conditions - 1, n_genes)
    h = _fold_changes(rng["conditions"], shape, condition_de_fraction, condition_log2_fold_change, sd)
    h = np.vstack([np.zeros(n_genes), h])
    e = _log_effects(rng["batches"], (n_batches, n_genes), batch_sd)
    u = _log_effects(rng["donors"], (n_donors, n_genes), donor_sd)

    obs = _cell_table(rng["cells"], n_cells, proportions, n_batches, n_donors, n_conditions)
    k, b, d, c = (obs[name].cat.codes.to_numpy() for name in ("cell_type", "batch", "donor", "condition"))
    rho = softmax(np.log(base) + np.log(2) * (f[k] + h[c]) + e[b] + u[d], axis=1)
    library = rng["libraries"].lognormal(np.log(library_mean) - library_sd**2 / 2, library_sd, n_cells)
    rate = library[:, None] * rho
    dropout_probability = _dropout_probability(rate, dropout, dropout_slope)
    before, dropped = _draw_until_counted(rng["counts"], rate, theta, dropout_probability)

    return AnnData(
        X=csr_matrix(np.where(dropped, 0, before).astype(np.float32)),
        obs=obs.assign(library=library),
        var=_gene_table(base, theta, f, h),
        varm={"log_batch_effect": e.T, "log_donor_effect": u.T},
        layers={
            "rate": rate.astype(np.float32),
            "share": rho.astype(np.float32),
            "counts_before_dropout": csr_matrix(before.astype(np.float32)),
            "dropped": csr_matrix(dropped),
        },
        uns={"simulate": arguments},
    )


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError, with the remedy, at the first argument out of its range."""

    def need(name: str, remedy: str, *, ok: bool | np.bool_) -> None:
        if not ok:
            msg = f"simulate: {name}={arguments[name]!r}, but {remedy}"
            raise ValueError(msg)

    for name, value in arguments.items():
        if name.startswith("n_"):
            need(name, "it must be at least 1", ok=value >= 1)
        elif name.endswith("de_fraction"):
            need(name, "it is a share of the genes: choose from 0 to 1", ok=0 <= value <= 1)
        elif name.endswith(("_sd", "fold_change", "_slope")):
            need(name, "it must be finite and at least 0", ok=np.isfinite(value) and value >= 0)
        elif name in {"library_mean", "base_shape"}:
            need(name, "it must be finite and above 0", ok=np.isfinite(value) and value > 0)
    n_types, n_genes, n_conditions = (arguments[name] for name in ("n_types", "n_genes", "n_conditions"))
    need("dropout", "it is a share of entries: at least 0 and below 1", ok=0 <= arguments["dropout"] < 1)
    need("seed", "it must be at least 0", ok=arguments["seed"] >= 0)
    remedy = f"each of the {n_conditions} conditions needs a donor of its own: raise n_donors"
    need("n_donors", remedy, ok=arguments["n_donors"] >= n_conditions)
    theta = np.asarray(arguments["inverse_dispersion"], dtype=float)
    fine = theta.shape in {(), (n_genes,)} and (theta > 0).all()
    need("inverse_dispersion", f"give one value above 0, or one for each of {n_genes} genes", ok=fine)
    if arguments["type_proportions"] is not None:
        shares = np.asarray(arguments["type_proportions"], dtype=float)
        fine = shares.shape == (n_types,) and (shares >= 0).all() and 0 < shares.sum() < np.inf
        need("type_proportions", f"give {n_types}, one per type, none below 0 and not all 0", ok=fine)


def _streams(seed: int) -> dict[str, np.random.Generator]:
    children = np.random.SeedSequence(seed).spawn(len(_STREAMS))
    return {name: np.random.default_rng(child) for name, child in zip(_STREAMS, children, strict=True)}


def _base_shares(rng: np.random.Generator, n_genes: int, shape: _Number) -> Float[np.ndarray, "genes"]:
    # A small shape underflows to 0, which has no log.
    base = np.maximum(rng.gamma(shape, size=n_genes), np.finfo(float).tiny)
    return base / base.sum()


def _fold_changes(
    rng: np.random.Generator, shape: tuple[int, int], fraction: _Number, mean: _Number, sd: _Number
) -> Float[np.ndarray, "groups genes"]:
    """Log2 fold changes: 0 but on a fraction of each group's genes, where they go up or down."""
    effects = np.zeros(shape)
    n_changed = round(fraction * shape[1])
    for row in effects:
        genes = rng.choice(shape[1], size=n_changed, replace=False)
        row[genes] = rng.choice([-1.0, 1.0], size=n_changed) * np.abs(rng.normal(mean, sd, size=n_changed))
    return effects


def _log_effects(
    rng: np.random.Generator, shape: tuple[int, int], sd: _Number
) -> Float[np.ndarray, "groups genes"]:
    """Natural log of each batch's or donor's effect on each gene; none if it has no other to differ from."""
    effects = rng.normal(0, sd, size=shape)
    return effects if shape[0] > 1 else np.zeros(shape)


def _cell_table(
    rng: np.random.Generator,
    n_cells: int,
    proportions: Float[np.ndarray, "types"],
    n_batches: int,
    n_donors: int,
    n_conditions: int,
) -> pd.DataFrame:
    """Each cell's type, batch, donor and condition."""
    k = rng.choice(len(proportions), size=n_cells, p=proportions)
    b, d = (rng.permutation(np.arange(n_cells) % n) for n in (n_batches, n_donors))  # dealt out evenly
    columns: dict[str, Any] = {}
    for name, codes, n in (
        ("cell_type", k, len(proportions)),
        ("batch", b, n_batches),
        ("donor", d, n_donors),
        ("condition", d % n_conditions, n_conditions),
    ):
        names = pd.Index([f"{name.removeprefix('cell_')}_{i}" for i in range(n)])
        columns[name] = pd.Categorical.from_codes(codes, categories=names)
    return pd.DataFrame(columns, index=[f"cell_{i}" for i in range(n_cells)])


def _dropout_probability(rate: _Matrix, dropout: _Number, slope: _Number) -> _Matrix:
    """sigmoid(a - slope log(rate)), with a such that its mean over all entries is `dropout`."""
    if dropout == 0 or slope == 0:
        return np.full_like(rate, dropout)
    fall = slope * np.log(np.maximum(rate, np.finfo(float).tiny))
    # Between these all entries pass from at most to at least `dropout`, so the mean does.
    low, high = logit(dropout) + fall.min(), logit(dropout) + fall.max()
    from scipy.optimize import brentq  # takes long to import, for one use

    return expit(brentq(lambda a: expit(a - fall).mean() - dropout, low - 1e-9, high + 1e-9) - fall)


def _draw_counts(
    rng: np.random.Generator, rate: _Matrix, theta: Float[np.ndarray, "genes"], dropout_probability: _Matrix
) -> tuple[Int[np.ndarray, "cells genes"], Bool[np.ndarray, "cells genes"]]:
    """x* and m."""
    poisson = np.isinf(theta)
    shape = np.where(poisson, 1.0, theta)
    w = np.where(poisson, rate, rng.gamma(shape, rate / shape))
    return rng.poisson(w), rng.random(rate.shape) < dropout_probability


def _draw_until_counted(
    rng: np.random.Generator, rate: _Matrix, theta: Float[np.ndarray, "genes"], dropout_probability: _Matrix
) -> tuple[Int[np.ndarray, "cells genes"], Bool[np.ndarray, "cells genes"]]:
    """x* and m, given that each cell keeps a count."""
    before, dropped = _draw_counts(rng, rate, theta, dropout_probability)
    for _ in range(1000):
        empty = np.flatnonzero(~np.any((before > 0) & ~dropped, axis=1))
        if empty.size == 0:
            return before, dropped
        before[empty], dropped[empty] = _draw_counts(rng, rate[empty], theta, dropout_probability[empty])
    msg = f"simulate: {empty.size} cells got no count in 1000 draws: raise library_mean or lower dropout"
    raise ValueError(msg)


def _gene_table(
    base: Float[np.ndarray, "genes"],
    theta: Float[np.ndarray, "genes"],
    f: Float[np.ndarray, "types genes"],
    h: Float[np.ndarray, "conditions genes"],
) -> pd.DataFrame:
    columns: dict[str, Any] = {"base_share": base, "inverse_dispersion": theta, "is_de": (f != 0).any(axis=0)}
    columns |= {f"log2_fold_change_type_{i}": row for i, row in enumerate(f)}
    columns |= {f"share_type_{i}": softmax(np.log(base) + np.log(2) * row) for i, row in enumerate(f)}
    if len(h) > 1:
        columns["is_de_condition"] = (h != 0).any(axis=0)
        columns |= {f"log2_fold_change_condition_{i}": row for i, row in enumerate(h) if i > 0}
    return pd.DataFrame(columns, index=[f"gene_{i}" for i in range(len(base))])


def simulate_proteins(
    adata: AnnData,
    n_proteins: int = 12,
    *,
    background_mean: _Number = 10.0,
    background_sd: _Number = 0.5,
    fold_change: _Number = 20.0,
    inverse_dispersion: _Number = 10.0,
    unmeasured_batches: Sequence[str] = (),
    seed: int = 0,
) -> AnnData:
    r"""Give simulated cells counts of surface proteins, of a known truth.

    For cell n of type k, and protein t::

        v_kt    ~ Bernoulli(1/2), but each protein is in some type and not in another
        beta_nt ~ LogNormal(log(background_mean), background_sd^2)
        y_nt    ~ NB(beta_nt fold_change^v_kt, inverse_dispersion)

    Parameters
    ----------
    adata
        Of :func:`simulate`, with two or more types. It is left as it was.
    n_proteins
        At least 1.
    background_mean, background_sd
        Median of the background, in counts, and the sd of its natural log.
    fold_change
        Mean of the foreground over the background.
    inverse_dispersion
        See :func:`simulate`.
    unmeasured_batches
        Names of batches in which no protein was measured.
    seed
        At least 0.

    Returns
    -------
    AnnData
        A copy, with DataFrames (cells, proteins) in ``obsm``: "protein_expression", counts, -1 where not
        measured; "protein_foreground", v, boolean; "protein_background", beta, counts.

    Raises
    ------
    ValueError
        If there is one type only, or no batch of a name.

    Examples
    --------
    >>> import pyrosc
    >>> adata = pyrosc.datasets.simulate(100, 20, n_batches=2)
    >>> adata = pyrosc.datasets.simulate_proteins(adata, 3, unmeasured_batches=["batch_1"])
    >>> adata.obsm["protein_expression"].columns.tolist()
    ['protein_0', 'protein_1', 'protein_2']
    >>> int((adata.obsm["protein_expression"] == -1).all(axis=1).sum())
    50
    """
    types, batches = adata.obs["cell_type"].cat, adata.obs["batch"].cat
    if len(types.categories) < 2 or set(unmeasured_batches) - set(batches.categories):
        msg = (
            f"simulate_proteins needs two types, not {len(types.categories)}, and names of batches among "
            f"{list(batches.categories)}, not {list(unmeasured_batches)}"
        )
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    v = rng.random((len(types.categories), n_proteins)) < 0.5
    order = rng.permuted(np.tile(np.arange(len(v)), (n_proteins, 1)), axis=1)
    v[order[:, 0], np.arange(n_proteins)], v[order[:, 1], np.arange(n_proteins)] = True, False
    v = v[types.codes]
    beta = rng.lognormal(np.log(background_mean), background_sd, v.shape)
    mean = beta * np.where(v, fold_change, 1.0)
    y = rng.poisson(rng.gamma(inverse_dispersion, mean / inverse_dispersion)).astype(np.float32)
    y[adata.obs["batch"].isin(unmeasured_batches)] = -1
    names = [f"protein_{i}" for i in range(n_proteins)]
    copy = adata.copy()
    for key, values in (("expression", y), ("foreground", v), ("background", beta)):
        copy.obsm[f"protein_{key}"] = pd.DataFrame(values, adata.obs_names, names)
    return copy
