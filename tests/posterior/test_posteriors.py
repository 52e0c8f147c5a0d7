"""What every kind of posterior can do: draws, units, consistency, summary, and what is left without the model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError, MethodError, ModelRequired
from bayesdl.posterior import DrawsPosterior, GaussianPosterior, prepare
from bayesdl.posterior import summary as summaries
from bayesdl.posterior.convergence import ess_bulk, ess_tail, rhat
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.normal import Normal
from tests.cases import conjugate, dataset, network, untouched

DOUBLE = torch.float64


def program(x: Tensor, y: Tensor | None = None) -> None:
    """Latents on the reals, the positive numbers, and the simplex."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0, dtype=DOUBLE)))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2, dtype=DOUBLE)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (w * share), sigma), obs=y)


X = torch.randn(8, 2, generator=generator(0, "x"), dtype=DOUBLE)
Y = torch.randn(8, generator=generator(0, "y"), dtype=DOUBLE)


def chains(c: int = 2, s: int = 6) -> DrawsPosterior:
    problem = prepare(program, (X, Y))
    z = torch.randn(c, s, problem.density.dim, generator=generator(1, "z"), dtype=DOUBLE)
    return DrawsPosterior(problem, z, {"energy": z[..., 0] ** 2}, {"method": "test"})


def gaussian() -> GaussianPosterior:
    problem = prepare(program, (X, Y))
    mean = torch.tensor([0.5, -1.0, 0.2, 0.3], dtype=DOUBLE)
    sd = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
    return GaussianPosterior(problem, Normal(mean, Diagonal(sd)), {"method": "test"})


# -- draws -----------------------------------------------------------------------------------------------------------


def test_stored_draws_are_constrained_by_hand() -> None:
    posterior = chains()
    draws, z = posterior.draws(), posterior.z.flatten(0, 1)
    assert torch.equal(draws["w"], z[:, :2])
    torch.testing.assert_close(draws["sigma"], z[:, 2].exp())
    first = torch.sigmoid(z[:, 3])  # stick-breaking of two shares
    torch.testing.assert_close(draws["share"], torch.stack([first, 1 - first], 1))
    by_chain = posterior.draws_by_chain()
    assert {name: tuple(value.shape) for name, value in by_chain.items()} == {
        "w": (2, 6, 2),
        "sigma": (2, 6),
        "share": (2, 6, 2),
    }
    assert torch.equal(by_chain["sigma"].flatten(), draws["sigma"])


@pytest.mark.parametrize(("n", "places"), [(1, [0]), (2, [0, 11]), (3, [0, 6, 11]), (12, list(range(12)))])
def test_fewer_draws_are_evenly_thinned(n: int, places: list[int]) -> None:
    posterior = chains()
    assert torch.equal(posterior.unconstrained_draws(n), posterior.z.flatten(0, 1)[places])
    assert torch.equal(posterior.unconstrained_draws(n, seed=1), posterior.unconstrained_draws(n, seed=2))


def test_more_draws_are_resampled_by_the_seed() -> None:
    posterior = chains()
    with untouched():
        more = posterior.unconstrained_draws(12_000, seed=1)
    assert torch.equal(more, posterior.unconstrained_draws(12_000, seed=1))
    assert not torch.equal(more, posterior.unconstrained_draws(12_000, seed=2))
    stored = posterior.z.flatten(0, 1)
    counts = (more[:, None] == stored).all(-1).sum(0)
    assert int(counts.sum()) == 12_000, "nothing but stored draws"
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 31.3  # chi-squared with 11 degrees of freedom, p = 0.001


def test_draws_of_a_gaussian_have_its_moments() -> None:
    posterior = gaussian()
    with untouched():
        z = posterior.unconstrained_draws(40_000, seed=5)
    errors = (z.mean(0) - posterior.mean) / posterior.sd * math.sqrt(40_000)
    assert errors.abs().max() < 4
    assert (z.std(0) / posterior.sd - 1).abs().max() < 4 / math.sqrt(80_000)
    assert (torch.corrcoef(z.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(40_000)
    assert posterior.unconstrained_draws().shape == (1000, 4)
    assert not torch.equal(posterior.unconstrained_draws(9, 1), posterior.unconstrained_draws(9, 2))
    density = dist.Normal(posterior.mean, posterior.sd).log_prob(z[:3]).sum(1)
    torch.testing.assert_close(posterior.log_prob(z[:3]), density)


@pytest.mark.parametrize("make", [chains, gaussian])
@pytest.mark.parametrize("n", [0, -3])
def test_no_draws_are_refused(make: Any, n: int) -> None:
    with pytest.raises(MethodError, match=f"n={n}"):
        make().draws(n)


def test_max_draws() -> None:
    for posterior in (chains(), gaussian()):
        with pytest.raises(MethodError, match="max_draws=0"):
            posterior.predict(X, max_draws=0)
    assert gaussian().predict(X, max_draws=17).draws == 17
    assert torch.equal(gaussian().predict(X, seed=1).mean, gaussian().predict(X, seed=1).mean)
    assert not torch.equal(gaussian().predict(X, seed=1).mean, gaussian().predict(X, seed=2).mean)
    assert torch.equal(chains().predict(X, seed=1).mean, chains().predict(X, seed=2).mean)


# -- the Kullback-Leibler divergence ---------------------------------------------------------------------------------


def test_divergence_from_the_prior() -> None:
    exact = conjugate()
    problem = prepare(exact.program, exact.data)
    mean, sd = torch.tensor([0.1, 0.2, -0.3], dtype=DOUBLE), torch.tensor([0.1, 0.3, 0.4], dtype=DOUBLE)
    posterior = GaussianPosterior(problem, Normal(mean, Diagonal(sd)), {})
    kl = posterior.kl()
    law, prior = dist.Normal(mean, sd), dist.Normal(torch.zeros(3, dtype=DOUBLE), exact.prior)
    assert kl == pytest.approx(float(torch.distributions.kl_divergence(law, prior).sum()), rel=1e-12)
    z = posterior.unconstrained_draws(50_000)
    sampled = law.log_prob(z).sum(1) - prior.log_prob(z).sum(1)
    assert abs(float(sampled.mean()) - kl) < 4 * float(sampled.std()) / math.sqrt(50_000)
    same = Normal(torch.zeros(3, dtype=DOUBLE), Diagonal(torch.full((3,), exact.prior, dtype=DOUBLE)))
    at_prior = GaussianPosterior(problem, same, {})
    assert at_prior.kl() == pytest.approx(0.0, abs=1e-12)
    assert gaussian().kl() is None, "HalfNormal and Dirichlet are no Gaussians"
    assert chains().kl() is None


# -- one number in raw units, by every road --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regression", "binary", "classes"])
@pytest.mark.parametrize("make", ["draws", "gaussian"])
def test_likelihoods_agree_by_every_road(kind: str, make: str) -> None:
    data = dataset(kind)
    problem = prepare(network(kind), data)
    z = problem.density.prior_draws(40, 1)
    posterior: Any = (
        DrawsPosterior(problem, z.reshape(2, 20, -1), {}, {"method": "test"})
        if make == "draws"
        else GaussianPosterior(problem, Normal(z.mean(0), Diagonal(0.1 * z.std(0))), {"method": "test"})
    )
    rows = posterior.log_likelihood(data.x, data.y, max_draws=30)
    prediction = posterior.predict(data.x, max_draws=30)
    torch.testing.assert_close(prediction.log_prob_by_draw(data.y), rows, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.log_prob(data.y), rows.logsumexp(0) - math.log(30), rtol=1e-9, atol=1e-9)
    # By the density of the scaled targets: log p(y) = log p~ - log s.
    scaled = problem.density.log_likelihood(posterior.unconstrained_draws(30, 0))
    log_scale = float(data.y.std(correction=0).log()) if kind == "regression" else 0.0
    torch.testing.assert_close(rows, scaled - log_scale, rtol=1e-9, atol=1e-9)
    assert prediction.kind == {"regression": "real", "binary": "binary", "classes": "categorical"}[kind]
    assert posterior.units == "scaled"


# -- summary ---------------------------------------------------------------------------------------------------------


def test_summary_against_numpy() -> None:
    posterior = chains(3, 50)
    table = posterior.summary()
    assert list(table.entries) == ["w[0]", "w[1]", "sigma", "share[0]", "share[1]"]
    for name, site in {"w[1]": ("w", 1), "sigma": ("sigma", None), "share[0]": ("share", 0)}.items():
        draws = posterior.draws_by_chain()[site[0]]
        column = draws if site[1] is None else draws[..., site[1]]
        pooled, row = column.flatten().numpy(), table[name]
        assert row["mean"] == pytest.approx(pooled.mean(), rel=1e-12)
        assert row["sd"] == pytest.approx(pooled.std(ddof=1), rel=1e-12)
        for level in (5, 50, 95):
            assert row[f"{level}%"] == pytest.approx(np.percentile(pooled, level), rel=1e-12)
        for statistic, function in {"rhat": rhat, "ess_bulk": ess_bulk, "ess_tail": ess_tail}.items():
            assert row[statistic] == float(function(column))
    text = str(table)
    assert all(word in text for word in (*summaries.COLUMNS, "sigma", "share[1]"))
    assert f"{table['sigma']['rhat']:.3f}" in text


def test_summary_of_independent_draws_and_of_few() -> None:
    row = gaussian().summary()["w[1]"]
    assert row["mean"] == pytest.approx(-1.0, abs=4 * 0.2 / math.sqrt(1000))
    assert row["sd"] == pytest.approx(0.2, rel=4 / math.sqrt(2000))
    assert row["rhat"] == pytest.approx(1.0, abs=0.02)
    assert row["ess_bulk"] > 600
    few = chains(2, 3).summary()["sigma"]
    assert math.isnan(few["rhat"])
    assert math.isnan(few["ess_bulk"])
    one = chains(1, 1).summary()["sigma"]
    assert (one["sd"], one["5%"]) == (0.0, one["95%"])


def test_summary_of_more_numbers_than_one_quantile_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chains(2, 50).summary()
    monkeypatch.setattr(summaries, "QUANTILE_CELLS", 100)
    assert chains(2, 50).summary().entries == whole.entries
    draws = {"big": torch.randn(1, 4, 90, dtype=DOUBLE, generator=generator(0, "big"))}
    text = str(summaries.summarise(draws))
    assert f"big: {90 - summaries.SHOWN} more" in text
    assert "big[41]" not in text


# -- without a model, and kinds without chains -----------------------------------------------------------------------


def test_without_its_model_a_posterior_says_what_is_missing() -> None:
    bare = DrawsPosterior(None, torch.zeros(1, 4, 2, dtype=DOUBLE), {}, {"method": "test"})
    for call in (
        bare.draws,
        bare.summary,
        bare.loo,
        lambda: bare.units,
        lambda: bare.predict(X),
        lambda: bare.save("x"),
    ):
        with pytest.raises(ModelRequired, match="model="):
            call()
    assert bare.unconstrained_draws().shape == (4, 2)


def test_diagnostics_need_chains() -> None:
    with pytest.raises(DataError, match="independent"):
        gaussian().diagnostics()
    with pytest.raises(DataError, match="at least 4 draws"):
        chains(5, 1).diagnostics()


def test_text_of_posteriors() -> None:
    assert repr(chains()) == "DrawsPosterior(test, 2 chains x 6 draws, 4 coordinates)"
    assert repr(gaussian()) == "GaussianPosterior(test, 4 coordinates, Diagonal)"


def test_nothing_global_changes() -> None:
    data = dataset("classes")
    posterior = bdl.fit(network("classes"), data, bdl.MeanFieldVI(steps=3))
    with untouched():
        posterior.predict(data.x).sample(3)
        posterior.log_likelihood(data.x, data.y)
        posterior.summary()
        bdl.prior_predictive(network("classes"), data, 20)
