"""The loop behind all questions, and draws of an exact posterior."""

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyrosc
from pyrosc.posterior import sampling
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import log_likelihood
from pyrosc.posterior.predictive import posterior_predictive


def stacked(stream, site):
    return torch.cat([drawn[site] for drawn in stream], 1)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("n_draws", [1, 3])
def test_draws_have_draws_then_cells(vae_fit, data, n_draws, parallel):
    options = {"n_draws": n_draws, "parallel": parallel}
    (drawn,) = draws(vae_fit, data, "z", "rho", "l", "x", **options)
    assert list(drawn) == ["z", "rho", "l", "x"]
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    assert shapes == {
        "z": (n_draws, 200, 4),
        "rho": (n_draws, 200, 40),
        "l": (n_draws, 200, 1),
        "x": (n_draws, 200, 40),
    }
    assert not any(value.requires_grad for value in drawn.values())
    torch.testing.assert_close(drawn["rho"].sum(-1), torch.ones(n_draws, 200))
    np.testing.assert_allclose(drawn["l"][0, :, 0], data.library)
    assert (drawn["x"] == drawn["x"].round()).all()


def test_draws_of_one_call_go_together(rich_fit, rich):
    (drawn,) = draws(rich_fit, rich, "z", "rho", n_draws=3)
    cells = rich.on("cpu").cells(torch.arange(200))
    with rich_fit.asking(0):
        _, logits = rich_fit.program.decoder(drawn["z"], cells)
    torch.testing.assert_close(logits.softmax(-1), drawn["rho"])


def test_draws_are_the_same_for_the_same_seed_only(rich_fit, rich, untouched):
    with untouched():
        one, again, other = (stacked(draws(rich_fit, rich, "z", seed=s), "z") for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_parallel_draws_have_the_distribution_of_serial_ones(rich_fit, rich):
    few = rich[np.arange(6)]
    n = 200
    for site in ("z", "l", "rho"):
        a, b = (
            stacked(draws(rich_fit, few, site, n_draws=n, parallel=p, seed=3), site).double()
            for p in (True, False)
        )
        error = ((a.var(0) + b.var(0)) / n).sqrt().clamp_min(1e-12)
        assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 6, site
        ratio = (a.var(0) / b.var(0)).log().abs()
        assert float(ratio.max()) < 6 * np.sqrt(4 / n) * 2, site


def test_parallel_draws_of_a_guide_without_chance_equal_serial_ones(data, few):
    class Fixed(pairs.TwoMethods):
        def guide(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                at = self.loc(self.encoder(torch.log1p(cells.x)))
                pyro.sample("z", dist.Delta(at, event_dim=1))

    fit = pairs.untrained(Fixed(data.n_genes), data)
    a, b = (stacked(draws(fit, few, "rho", n_draws=3, parallel=p), "rho") for p in (True, False))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a[0], a[2])


def test_parallel_draws_of_an_exact_posterior(exact, few):
    z = stacked(draws(exact, few, "z", n_draws=4000), "z")[..., 0].numpy()
    for i in range(0, 12, 3):
        known = stats.gamma(3 + few.library[i], scale=1 / 1.01)
        assert stats.kstest(z[:, i], known.cdf).pvalue > 1e-4


def test_a_program_that_can_not_broadcast_is_asked_one_draw_at_a_time(data, few):
    class Stubborn(pairs.TwoMethods):
        def model(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                zero = cells.x.new_zeros(len(cells), 2)
                z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                rho = torch.softmax(self.decoder(z.reshape(len(cells), 2)), -1)
                rho = pyro.deterministic("rho", rho, event_dim=1)
                pyro.sample("x", dist.Poisson(cells.library * rho).to_event(1), obs=cells.x)

    fit = pairs.untrained(Stubborn(data.n_genes), data)
    with pytest.raises(RuntimeError):
        list(draws(fit, few, "rho", n_draws=3))
    (drawn,) = draws(fit, few, "rho", n_draws=3, parallel=False)
    assert drawn["rho"].shape == (3, 12, 40)
    assert impute(fit, few, n_draws=3, parallel=False).mean.shape == (12, 40)
    assert posterior_predictive(fit, few, 2, parallel=False)[1].shape == (12, 40)
    assert log_likelihood(fit, few, 2, parallel=False).nats.shape == (12,)
    assert latent(fit, few, parallel=False).shape == (12, 2)


def test_two_fits_are_asked_in_turns(vae_fit, rich_fit, data, rich, monkeypatch, untouched):
    monkeypatch.setattr(sampling, "_ELEMENTS", 40 * 40 * 2)  # forty cells at a time
    alone = [
        stacked(draws(fit, d, "rho", n_draws=2), "rho") for fit, d in ((vae_fit, data), (rich_fit, rich))
    ]
    with untouched():
        turns = list(
            zip(draws(vae_fit, data, "rho", n_draws=2), draws(rich_fit, rich, "rho", n_draws=2), strict=True)
        )
    assert len(turns) == 5
    for i in range(2):
        assert torch.equal(torch.cat([turn[i]["rho"] for turn in turns], 1), alone[i])


def test_the_consumer_of_a_stream_runs_with_its_own_random_numbers_and_store(data, monkeypatch):
    monkeypatch.setattr(sampling, "_ELEMENTS", 40 * 40)
    model, guide = pairs.two_functions(data.n_genes)
    fit = pyrosc.fit_svi(model, data, guide=guide, epochs=1, progress=False)
    torch.manual_seed(3)
    expected = torch.randn(5, 2)
    torch.manual_seed(3)
    for row, _ in zip(expected, draws(fit, data, "rho", n_draws=1), strict=True):
        assert not list(pyro.get_param_store())
        assert torch.equal(torch.randn(2), row)


def test_nothing_of_the_size_of_draws_cells_and_genes_is_held(vae_fit, data, monkeypatch):
    sizes = []
    original = sampling.run

    def watched(fit, cells, n_draws, *args, **kwargs):
        sizes.append((len(cells), n_draws))
        return original(fit, cells, n_draws, *args, **kwargs)

    monkeypatch.setattr(sampling, "run", watched)
    monkeypatch.setattr(sampling, "_ELEMENTS", 5 * 40 * 10)
    asked = {
        "impute": lambda: impute(vae_fit, data, n_draws=10),
        "average": lambda: impute(vae_fit, data, n_draws=10, batch="average"),
        "predictive": lambda: posterior_predictive(vae_fit, data, 10),
        "likelihood": lambda: log_likelihood(vae_fit, data, 10),
        "draws": lambda: list(draws(vae_fit, data, "z", n_draws=10)),
    }
    for name, ask in asked.items():
        sizes.clear()
        ask()
        n_batches = 2 if name == "average" else 1
        assert sum(n for n, _ in sizes) == 200
        assert all(n * k * 40 * n_batches <= 5 * 40 * 10 for n, k in sizes), (name, sizes)


def test_streaming_in_small_pieces_changes_no_answer(vae_fit, data, monkeypatch):
    whole = impute(vae_fit, data, n_draws=300)
    nats = log_likelihood(vae_fit, data, 300)
    mean = latent(vae_fit, data)
    monkeypatch.setattr(sampling, "_ELEMENTS", 40 * 300 * 7)
    pieces = impute(vae_fit, data, n_draws=300)
    error = np.sqrt(whole.sd**2 / 300 * 2) + 1e-9
    assert np.max(np.abs(whole.mean - pieces.mean) / error) < 6
    assert abs(nats.mean - log_likelihood(vae_fit, data, 300).mean) < 0.5
    # Sums over forty genes, then sixteen units, in matrices of another shape: some ulps of float32.
    np.testing.assert_allclose(latent(vae_fit, data), mean, rtol=1e-5, atol=1e-5)
