"""New counts of the same cells, against known answers."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from pyrosc.distributions import Poisson, ZeroInflated
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute
from pyrosc.posterior.log_likelihood import log_likelihood
from pyrosc.posterior.predictive import dropout_probability, posterior_predictive


def test_predictive_counts_are_whole_sparse_and_one_matrix_a_draw(rich_fit, rich):
    drawn = posterior_predictive(rich_fit, rich, 3)
    assert len(drawn) == 3
    for x in drawn:
        assert sp.issparse(x)
        assert x.format == "csr"
        assert x.shape == (200, 40)
        assert x.dtype == np.float32
        assert (x.data == np.rint(x.data)).all()
        assert (x.data > 0).all()
    assert (drawn[0] != drawn[1]).nnz > 0


def test_predictive_mean_and_zeros_are_the_analytic_ones(data, few):
    """x' ~ Poisson(w), w ~ Gamma(2 + x, 1 + 2 / m): negative binomial."""
    mean = np.linspace(0.5, 8, 40)
    fit = pairs.untrained(pairs.GenesPlate(mean), data, plates=2)
    n = 1500
    drawn = np.stack([x.toarray() for x in posterior_predictive(fit, few, n)])
    shape, rate = 2 + few.x.toarray(), 1 + 2 / mean
    known = stats.nbinom(shape, rate / (1 + rate))
    error = known.std() / np.sqrt(n)
    assert np.max(np.abs(drawn.mean(0) - known.mean()) / error) < 5
    p0 = known.pmf(0)
    error = np.sqrt(p0 * (1 - p0) / n) + 1 / n
    assert np.max(np.abs((drawn == 0).mean(0) - p0) / error) < 5


def test_predictive_counts_in_another_batch(data, few):
    fit = pairs.untrained(pairs.Watching(data.n_genes), data)
    low, high = (
        sum(posterior_predictive(fit, few, 30, batch=b)).toarray()[:, -1].sum()
        for b in ("batch_0", "batch_1")
    )
    assert high > 1.5 * low


# --- dropouts


@pytest.mark.parametrize("transposed", [False, True], ids=["cells x genes", "genes x cells"])
def test_a_zero_is_a_dropout_by_bayes_rule_wherever_the_axis_of_cells_stands(data, few, transposed):
    pi, mean = 0.3, torch.linspace(0.5, 8, 40)

    def model(cells):
        dims = (-1, -2) if transposed else (-2, -1)
        over_cells = pyro.plate("cells", cells.n_total, subsample=cells.index, dim=dims[0])
        with over_cells, pyro.plate("genes", 40, dim=dims[1]):
            counts = Poisson(mean[:, None] if transposed else mean)
            x = cells.x.mT if transposed else cells.x
            pyro.sample("x", ZeroInflated(counts, torch.tensor(pi).logit()), obs=x)

    fit = pairs.untrained(model, data, guide=lambda cells: None, plates=2)
    probability = dropout_probability(fit, few, 2)
    p0 = np.exp(-mean.numpy())
    expected = np.where(few.x.toarray() == 0, pi / (pi + (1 - pi) * p0), 0)
    assert (expected > 0).any()
    np.testing.assert_allclose(probability, expected, rtol=1e-5)


def test_what_hangs_on_a_site_that_was_summed_out_is_refused(data, few):
    """Its draws are the prior's."""

    def model(cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            mean = (1 + y[..., None]).expand(*y.shape, 40)
            pyro.deterministic("rho", mean / mean.sum(-1, keepdim=True), event_dim=1)
            pyro.sample("x", ZeroInflated(Poisson(mean), torch.zeros(40)).to_event(1), obs=cells.x)

    fit = pairs.untrained(model, data, guide=lambda cells: None)
    for ask in (
        lambda: dropout_probability(fit, few),
        lambda: list(draws(fit, few, "rho")),
        lambda: impute(fit, few),
        lambda: impute(fit, few, "rate"),
    ):
        with pytest.raises(ValueError, match=r"the guide samples no \['y'\], so there are no"):
            ask()
    assert np.isfinite(log_likelihood(fit, few).nats).all()  # whose proposal may be the prior
