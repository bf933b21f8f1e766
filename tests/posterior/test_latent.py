"""Questions to a fit, against known answers."""

import subprocess
import sys

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

import pyrosc
from pyrosc.posterior import log_likelihood as evidence
from pyrosc.posterior import sampling as asking
from pyrosc.posterior.draws import draws
from pyrosc.posterior.impute import impute
from pyrosc.posterior.latent import latent
from pyrosc.posterior.log_likelihood import log_likelihood
from pyrosc.posterior.predictive import posterior_predictive


@pytest.fixture
def few(data):
    return data[np.arange(12)]


@pytest.fixture
def exact(data):
    return pairs.untrained(pairs.Conjugate(data.share), data)


def stacked(stream, site):
    return torch.cat([drawn[site] for drawn in stream], 1)


# --- draws


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
        _, rho = rich_fit.program.decoder(drawn["z"], cells)
    torch.testing.assert_close(rho, drawn["rho"])


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
    monkeypatch.setattr(asking, "ELEMENTS", 40 * 40 * 2)  # forty cells at a time
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
    monkeypatch.setattr(asking, "ELEMENTS", 40 * 40)
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
    original = asking.run

    def watched(fit, cells, n_draws, *args, **kwargs):
        sizes.append((len(cells), n_draws))
        return original(fit, cells, n_draws, *args, **kwargs)

    for module in (asking, evidence):
        monkeypatch.setattr(module, "run", watched)
    monkeypatch.setattr(asking, "ELEMENTS", 5 * 40 * 10)
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
    monkeypatch.setattr(asking, "ELEMENTS", 40 * 300 * 7)
    pieces = impute(vae_fit, data, n_draws=300)
    error = np.sqrt(whole.sd**2 / 300 * 2) + 1e-9
    assert np.max(np.abs(whole.mean - pieces.mean) / error) < 6
    assert abs(nats.mean - log_likelihood(vae_fit, data, 300).mean) < 0.5
    np.testing.assert_allclose(latent(vae_fit, data), mean, atol=1e-6)


# --- latent


@pytest.mark.parametrize("site", ["z", "l"])
def test_the_latent_mean_is_the_mean_of_many_draws(rich_fit, rich, site):
    few = rich[np.arange(10)]
    mean = latent(rich_fit, few, site=site)
    many = latent(rich_fit, few, 3000, site=site)
    assert mean.dtype == many.dtype == np.float32
    assert many.shape == (3000, *mean.shape)
    assert np.max(np.abs(many.mean(0) - mean) / (many.std(0) / np.sqrt(3000))) < 5


def test_the_latent_mean_is_exact_where_the_guide_says_so(exact, few):
    np.testing.assert_allclose(latent(exact, few)[:, 0], (3 + few.library) / 1.01, rtol=1e-5)


def test_the_latent_mean_of_a_site_that_hangs_on_another(data, few):
    class Chain(pairs.Conjugate):
        def guide(self, cells):
            with pyro.plate("cells", cells.n_total, subsample=cells.index):
                u = pyro.sample("u", dist.Normal(torch.zeros(len(cells), 1), 1.0).to_event(1))
                pyro.sample("z", dist.Gamma(3 + cells.library, 1.01 * torch.exp(u * 0.01)).to_event(1))

    mean = latent(pairs.untrained(Chain(data.share), data), few)[:, 0]
    np.testing.assert_allclose(mean, (3 + few.library) / 1.01, rtol=0.02)


def test_an_anndata_is_asked_like_counts(vae_fit, data, adata):
    a, b = impute(vae_fit, data, n_draws=2).mean, impute(vae_fit, adata, n_draws=2).mean
    np.testing.assert_array_equal(a, b)
    shuffled = adata[:, ::-1].copy()
    turned = impute(vae_fit, shuffled, n_draws=2)
    assert turned.gene_names.tolist() == shuffled.var_names.tolist()
    np.testing.assert_array_equal(turned.mean, a[:, ::-1])  # a layer of the AnnData that was asked about
    new, layer = posterior_predictive(vae_fit, data)[0], posterior_predictive(vae_fit, shuffled)[0]
    np.testing.assert_array_equal(layer.toarray(), new.toarray()[:, ::-1])
    assert np.array_equal(latent(vae_fit, shuffled), latent(vae_fit, data))


# --- posterior predictive


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


# --- log likelihood


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("n_draws", [1, 7])
def test_every_weight_of_the_exact_posterior_is_the_evidence(exact, data, n_draws, parallel):
    answer = log_likelihood(exact, data, n_draws, parallel=parallel)
    np.testing.assert_allclose(answer.nats, pairs.Conjugate(data.share).evidence(data.x.toarray()), rtol=2e-5)
    np.testing.assert_allclose(answer.ess, n_draws, rtol=1e-3)
    assert answer.mean == pytest.approx(answer.nats.mean())
    assert answer.n_draws == n_draws
    assert f"{answer.mean:.2f} nats per cell" in repr(answer)


def test_a_guide_that_is_off_gives_a_lower_bound_that_tightens(data):
    program = pairs.Conjugate(data.share, shift=0.05)
    fit = pairs.untrained(program, data)
    evidence = program.evidence(data.x.toarray()).mean()
    few_draws, many = log_likelihood(fit, data, 1), log_likelihood(fit, data, 3000)
    assert few_draws.mean < evidence - 0.1
    assert few_draws.mean < many.mean
    assert many.mean == pytest.approx(evidence, abs=0.1)
    assert (many.ess < 3000).all()
    assert (many.ess >= 1).all()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["cells x genes", "genes x cells"])
def test_a_plate_of_genes_beside_that_of_cells(data, transposed, parallel):
    program = pairs.GenesPlate(np.linspace(0.5, 8, 40), transposed=transposed)
    fit = pairs.untrained(program, data, plates=2)
    few = data[np.arange(9)]
    x = few.x.toarray()
    options = {"parallel": parallel}
    answer = log_likelihood(fit, few, 5, **options)
    np.testing.assert_allclose(answer.nats, program.evidence(x), rtol=2e-5)
    np.testing.assert_allclose(answer.ess, 5, rtol=1e-3)
    (drawn,) = draws(fit, few, "w", "x", n_draws=4, **options)
    assert drawn["w"].shape == drawn["x"].shape == (4, 9, 40)
    np.testing.assert_allclose(latent(fit, few, site="w", **options), program.posterior_mean(x), rtol=1e-4)
    assert posterior_predictive(fit, few, 2, **options)[0].shape == (9, 40)
    assert impute(fit, few, site="w", n_draws=2, **options).mean.shape == (9, 40)


def test_a_sequential_plate_beside_that_of_cells(data):
    shares = torch.as_tensor(data.share).float()

    def model(cells):
        over_cells = pyro.plate("cells", cells.n_total, subsample=cells.index)
        for g in pyro.plate("genes", 40):
            with over_cells:
                mean = cells.library[:, 0] * shares[g]
                pyro.sample(f"x{g}", dist.Poisson(mean), obs=cells.x[:, g])

    fit = pairs.untrained(model, data, guide=lambda cells: None)
    few = data[np.arange(5)]
    expected = stats.poisson.logpmf(few.x.toarray(), few.library[:, None] * data.share).sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 2).nats, expected, rtol=1e-4)


def test_global_latent_sites_are_averaged_over(data):
    """The weight of a cell is the density of its counts, whatever the global draw's own density."""

    def model(cells):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            rate = (cells.library + 0 * w[..., None]) / 40
            rate = rate.expand(*rate.shape[:-1], 40)
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=cells.x)

    fit = pairs.untrained(model, data, guide=lambda cells: pyro.sample("w", dist.Normal(5.0, 0.1)))
    few = data[np.arange(5)]
    expected = stats.poisson.logpmf(few.x.toarray(), few.library[:, None] / 40).sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 3).nats, expected, rtol=1e-4)


def test_a_site_is_scored_with_its_mask(data):
    keep = torch.arange(40) < 30

    class Masked(pairs.GenesPlate):
        def model(self, cells):
            with pyro.poutine.mask(mask=keep):
                super().model(cells)

        def guide(self, cells):
            with pyro.poutine.mask(mask=keep):
                super().guide(cells)

    mean = np.linspace(0.5, 8, 40)
    fit = pairs.untrained(Masked(mean), data, plates=2)
    few = data[np.arange(5)]
    expected = stats.nbinom.logpmf(few.x.toarray(), 2, 2 / (2 + mean))[:, :30].sum(1)
    np.testing.assert_allclose(log_likelihood(fit, few, 3).nats, expected, rtol=1e-4)


# --- what is refused


def test_wrong_questions_are_told_why(vae_fit, data, adata):
    few = data[np.arange(3)]
    with pytest.raises(ValueError, match=r"share.*count.*rate.*log1p.*repaired.*'mean'"):
        impute(vae_fit, few, "mean")
    with pytest.raises(ValueError, match=r"library.*count"):
        impute(vae_fit, few, library=100.0)
    with pytest.raises(ValueError, match="library"):
        impute(vae_fit, few, "count", library=-1.0)
    for interval in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="interval"):
            impute(vae_fit, few, interval=interval)
    with pytest.raises(ValueError, match="no gene nope"):
        impute(vae_fit, few, genes=["gene_1", "nope"])
    for ask in (impute, posterior_predictive, lambda *a, **k: list(draws(*a, "z", **k))):
        with pytest.raises(ValueError, match=r"no batch 'moon'.*batch_0, batch_1"):
            ask(vae_fit, few, batch="moon")
    for ask in (
        lambda n: latent(vae_fit, few, n),
        lambda n: impute(vae_fit, few, n_draws=n),
        lambda n: posterior_predictive(vae_fit, few, n),
        lambda n: log_likelihood(vae_fit, few, n),
        lambda n: list(draws(vae_fit, few, "z", n_draws=n)),
    ):
        for n in (0, -1):
            with pytest.raises(ValueError, match="n_draws"):
                ask(n)
    for ask in (
        lambda: latent(vae_fit, few, site="w"),
        lambda: latent(vae_fit, few, 3, site="w"),
        lambda: impute(vae_fit, few, site="w"),
    ):
        with pytest.raises(KeyError, match=r"no site 'w'.*z"):
            ask()
    with pytest.raises(ValueError, match=r"1 of the fit's 40 genes are missing .* gene_0; .*fit_query"):
        latent(vae_fit, adata[:, 1:].copy())
    elsewhere = adata.copy()
    elsewhere.obs["batch"] = "moon"
    with pytest.raises(ValueError, match=r"does not know moon; it knows batch_0, batch_1; .*fit_query"):
        latent(vae_fit, elsewhere)
    with pytest.raises(ValueError, match="no cells"):
        latent(vae_fit, few[:0])
    del adata.obs["batch"]
    with pytest.raises(KeyError, match="batch"):
        latent(vae_fit, adata)


WRONG = {
    **{
        f"pyrosc.{verb}": "TypeError: a question is put to a Fit, not to VAE: pyrosc.fit_svi(model, data)"
        for verb in (
            "latent(model, adata)",
            "impute(model, adata)",
            "posterior_predictive(model, adata)",
            "dropout_probability(model, adata)",
            "log_likelihood(model, adata)",
            "elbo(model, adata)",
            "draws(model, adata, 'z')",
            "clusters(model, adata)",
            "loadings(model)",
            "fit_query(model, adata)",
            "multiple_imputation(model, adata, 2)",
            "differential_expression(model, adata, groupby='side')",
            "gene_sets(model, adata, {'a': ['0']}, groupby='side')",
            "interaction(model, adata, groupby='side', group='a', reference='b', by='side', baseline='a')",
            "null_calibration(model, adata, groupby='side')",
        )
    },
    "pyrosc.latent(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.impute(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.clusters(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.predict(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.foreground(adata, fit)": "TypeError: a question is put to a Fit, not to AnnData",
    "pyrosc.from_anndata('cells.h5ad')": "TypeError: from_anndata reads an AnnData, not str",
    "pyrosc.VAE.for_data(adata, hidden=128)": "ValueError: hidden must be a tuple of whole numbers",
    "pyrosc.DCA.for_data(adata, hidden='128')": "ValueError: hidden must be a tuple of whole numbers",
    "pyrosc.VAE.for_data(adata, n_latent=10.0)": "ValueError: n_latent must be a whole number of at least 1",
    "pyrosc.fit_svi(model, adata, learning_rate='.1')": "ValueError: learning_rate must be more than 0, not",
    "pyrosc.fit_svi(model, adata, weight_decay='5')": "ValueError: weight_decay must be at least 0, not '5'",
    "pyrosc.fit_svi(model, adata, validation='.1')": "ValueError: validation is a share of the cells",
    "pyrosc.latent(fit, fit)": "TypeError: data must be an AnnData or pyrosc.Counts, not Fit",
    "pyrosc.latent(fit, adata.X)": "not ndarray; of an array or a table, cells x genes, anndata.AnnData(",
    "pyrosc.latent(fit, adata, 2.5)": "TypeError: n_draws must be a whole number, not 2.5",
    "pyrosc.compare(adata.X[0])": "ValueError: draws of fold changes are floats, draws x genes, not float32",
    "pyrosc.compare(adata.X.astype(int))": "draws of fold changes are floats, draws x genes, not int64",
    "pyrosc.gene_sets(fit, adata, ['0'], groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.gene_sets(fit, adata, {'a': 0}, groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.differential_expression(fit, adata, groupby=None)": "ValueError: groupby names a column of obs",
    "pyrosc.differential_expression(fit, groupby='side')": "TypeError: the data is missing: it stands second",
    "pyrosc.differential_expression(adata, fit, groupby='side')": "put to a Fit, not to AnnData",
    "pyrosc.differential_expression(model, groupby='side')": "must be an AnnData or pyrosc.Counts, not VAE",
    "pyrosc.differential_expression(adata)": "differential_expression() missing 1 required keyword-only",
    "pyrosc.gene_sets(adata, fit, {'a': ['0']}, groupby='side')": "put to a Fit, not to AnnData",
    "pyrosc.gene_sets(adata, groupby='side')": "ValueError: sets is a dict of lists",
    "pyrosc.gene_sets(fit, {'a': ['0']}, groupby='side')": "must be an AnnData or pyrosc.Counts, not dict",
    "pyrosc.gene_sets({'a': ['0']}, adata, groupby='side')": "must be an AnnData or pyrosc.Counts, not dict",
    "pyrosc.to_scanpy(adata, None)": "the table of differential_expression stands first, then adata",
}
"""What is said of them, where nothing checks types: in a process without the tests' hook."""


def test_what_stands_in_the_wrong_place_is_named():
    program = f"""
import warnings, anndata, numpy, pyrosc
warnings.simplefilter("ignore")
adata = anndata.AnnData(numpy.ones((6, 3), "float32"))
adata.obs["side"] = ["a", "b"] * 3
before = adata.copy()
model = pyrosc.VAE.for_data(adata, n_latent=2, hidden=(4,))
fit = pyrosc.fit_svi(model, adata, epochs=1, progress=False, device="cpu")
for use in {list(WRONG)}:
    try:
        print("answered:", eval(use))
    except Exception as error:
        print(type(error).__name__ + ":", error)
assert adata.obs.equals(before.obs) and not (adata.uns or adata.obsm or adata.layers)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said, (use, what) in zip(done.stdout.splitlines(), WRONG.items(), strict=True):
        assert what in said, use


def test_a_single_cell_is_asked_like_others(vae_fit, rich_fit, data, rich):
    for fit, d in ((vae_fit, data), (rich_fit, rich)):
        one = d[np.array([7])]
        np.testing.assert_allclose(latent(fit, one)[0], latent(fit, d)[7], rtol=1e-4, atol=1e-5)
        assert impute(fit, one).mean.shape == (1, 40)
        assert log_likelihood(fit, one).nats.shape == (1,)
