"""The way to ArviZ: groups, names and units; leave-one-out against an InferenceData made by hand."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError, MethodError, MissingExtra, NotFactorised
from bayesdl.posterior import DrawsPosterior, GaussianPosterior, prepare
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.normal import Normal
from tests.cases import conjugate, dataset, network, untouched

az = pytest.importorskip("arviz")
DOUBLE = torch.float64


def exact_draws(chains: int = 4, draws: int = 250, **options: Any) -> DrawsPosterior:
    """Independent draws of the conjugate posterior."""
    case = conjugate()
    law = dist.MultivariateNormal(case.mean(), covariance_matrix=case.covariance())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        z = law.sample((chains, draws))
    stats = {"energy": z[..., 0], "divergent": z[..., 0] > 9, "acceptance": z[..., 1] * 0 + 0.8, "depth": z[..., 0]}
    return DrawsPosterior(prepare(case.program, case.data, **options), z, stats, {"method": "test"})


def scaled(kind: str = "regression", chains: int = 2, draws: int = 100) -> DrawsPosterior:
    problem = prepare(network(kind), dataset(kind), seed=7)
    point = problem.density.prior_draws(1, 5)
    spread = torch.randn(chains, draws, problem.density.dim, generator=generator(0, "z"), dtype=DOUBLE)
    return DrawsPosterior(problem, point + 0.1 * spread, {}, {"method": "test"})


def quiet_loo(posterior: DrawsPosterior) -> Any:
    """Without ArviZ's warning of a high k-hat, which draws that are not from the posterior earn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return posterior.loo()


def test_groups_names_and_shapes() -> None:
    posterior, case = exact_draws(), conjugate()
    with untouched():
        data = posterior.to_arviz()
    assert set(data.groups()) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
    }
    assert data.posterior["w"].dims[:2] == ("chain", "draw")
    assert data.posterior["w"].shape == (4, 250, 3)
    np.testing.assert_array_equal(data.posterior["w"].values, posterior.z.numpy())
    assert set(data.sample_stats) == {"energy", "diverging", "acceptance_rate", "tree_depth"}
    assert data.log_likelihood["y"].shape == data.posterior_predictive["y"].shape == (4, 250, 60)
    np.testing.assert_array_equal(data.observed_data["y"].values, case.y.numpy())
    mean = (posterior.z @ case.x.T).numpy()
    np.testing.assert_allclose(
        data.log_likelihood["y"].values, stats.norm.logpdf(case.y.numpy(), mean, case.sigma), rtol=1e-10
    )
    # A replication belongs to the draw in its place.
    residual = (data.posterior_predictive["y"].values - mean) / case.sigma
    assert abs(residual.std() - 1) < 4 / math.sqrt(2 * residual.size)
    assert abs(residual.mean()) < 4 / math.sqrt(residual.size)


def test_units_of_the_groups_are_raw() -> None:
    posterior, data = scaled(), dataset("regression")
    found = posterior.to_arviz()
    np.testing.assert_allclose(found.observed_data["y"].values, data.y.numpy(), rtol=1e-12)
    rows = posterior.log_likelihood(data.x, data.y).numpy()
    np.testing.assert_allclose(found.log_likelihood["y"].values.reshape(200, -1), rows, rtol=1e-9, atol=1e-9)
    noise = posterior.draws_by_chain()["noise"][..., None] * data.y.std(correction=0)
    away = (found.posterior_predictive["y"].values - posterior.function_draws(data.x).numpy()) / noise.numpy()
    assert abs(away.std() - 1) < 4 / math.sqrt(2 * away.size)
    assert abs(away.mean()) < 4 / math.sqrt(away.size)
    assert set(found.posterior) == {site.name for site in posterior.problem.density.sites}


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_classes_stay_whole_numbers(kind: str) -> None:
    found = scaled(kind).to_arviz()
    assert np.array_equal(found.observed_data["y"].values, dataset(kind).y.numpy())
    assert found.posterior_predictive["y"].dtype == np.int64
    assert set(np.unique(found.posterior_predictive["y"])) <= {0, 1, 2}


def test_leave_one_out_is_arvizs_own() -> None:
    posterior, case = exact_draws(), conjugate()
    mean = (posterior.z @ case.x.T).numpy()
    by_hand = az.from_dict(
        posterior={"w": posterior.z.numpy()},
        log_likelihood={"y": stats.norm.logpdf(case.y.numpy(), mean, case.sigma)},
    )
    with untouched():
        found, expected = posterior.loo(), az.loo(by_hand, pointwise=True)
    assert found.elpd_loo == pytest.approx(expected.elpd_loo, rel=1e-10)
    np.testing.assert_allclose(found.loo_i, expected.loo_i, rtol=1e-9)
    np.testing.assert_allclose(found.pareto_k, expected.pareto_k, rtol=1e-6, atol=1e-9)
    assert found.pareto_k.shape == (60,)
    assert float(found.pareto_k.max()) < 0.7
    # The exact leave-one-out densities of the conjugate model.
    precision, right = case.precision(), case.x.T @ case.y / case.sigma**2
    exact = 0.0
    for i in range(60):
        x = case.x[i]
        without = torch.linalg.inv(precision - torch.outer(x, x) / case.sigma**2)
        centre = without @ (right - x * case.y[i] / case.sigma**2)
        exact += float(dist.Normal(x @ centre, (case.sigma**2 + x @ without @ x).sqrt()).log_prob(case.y[i]))
    assert found.elpd_loo == pytest.approx(exact, abs=0.3)


def test_leave_one_out_in_raw_units() -> None:
    """The same model on targets in other units: the log densities shift by the log of the unit."""
    posterior, data = scaled(), dataset("regression")
    found = quiet_loo(posterior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = posterior.log_likelihood(data.x, data.y)
        by_hand = az.from_dict(
            posterior={"w": np.zeros((2, 100))}, log_likelihood={"y": rows.reshape(2, 100, -1).numpy()}
        )
        reference = az.loo(by_hand, pointwise=True, reff=1.0)
    np.testing.assert_allclose(found.loo_i, reference.loo_i, rtol=0.02, atol=0.05)
    assert found.elpd_loo < -100, "densities of a target in hundreds"


def test_other_kinds_and_ensembles(recwarn: pytest.WarningsRecorder) -> None:
    case = conjugate()
    problem = prepare(case.program, case.data)
    gaussian = GaussianPosterior(
        problem, Normal(case.mean(), Diagonal(case.precision().diag().rsqrt())), {"method": "test"}
    )
    found = gaussian.to_arviz()
    assert found.posterior["w"].shape == (1, 1000, 3)
    assert "sample_stats" not in found.groups()
    assert gaussian.loo().pareto_k.shape == (60,)
    ensemble = DrawsPosterior(problem, case.mean().repeat(5, 1, 1), {}, {"method": "test"})
    assert ensemble.to_arviz().posterior["w"].shape == (5, 1, 3)
    assert not [warning for warning in recwarn if "chains" in str(warning.message)]


def test_tempered_posteriors_have_no_leave_one_out() -> None:
    for options in ({"temperature": 2.0}, {"likelihood_temperature": 0.5}):
        with pytest.raises(MethodError, match="another temperature"):
            exact_draws(**options).loo()
        assert "log_likelihood" in exact_draws(**options).to_arviz().groups()


def test_loaded_posteriors_take_the_rows_again(tmp_path: Path) -> None:
    posterior, case = exact_draws(), conjugate()
    whole = posterior.loo()
    posterior.save(tmp_path)
    bare, loaded = bdl.load(tmp_path), bdl.load(tmp_path, case.program)
    for one in (bare, loaded):
        assert set(one.to_arviz().groups()) == {"posterior", "sample_stats"}
        np.testing.assert_array_equal(one.to_arviz().posterior["w"], posterior.z)
    with pytest.raises(DataError, match=r"loo\(x, y\)"):
        loaded.loo()
    assert loaded.loo(case.x, case.y).elpd_loo == pytest.approx(whole.elpd_loo, rel=1e-12)
    assert loaded.loo({"x": case.x, "y": case.y}).elpd_loo == pytest.approx(whole.elpd_loo, rel=1e-12)
    assert loaded.to_arviz(case.x[:7], case.y[:7]).log_likelihood["y"].shape == (4, 250, 7)


# -- programs --------------------------------------------------------------------------------------------------------

Y = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.7], dtype=DOUBLE)


def from_prior(model: Any, data: Any) -> DrawsPosterior:
    problem = prepare(model, data)
    return DrawsPosterior(problem, problem.density.prior_draws(80, 1).reshape(2, 40, -1), {}, {})


def test_closed_over_data_and_latents_of_rows() -> None:
    """Eight schools and its like: no arguments, latents of each row; leave-one-out is conditional on them."""

    def schools() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", 5):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 2.0), obs=Y)

    posterior = from_prior(schools, {})
    found = posterior.to_arviz()
    theta = posterior.draws_by_chain()["theta"].numpy()
    np.testing.assert_allclose(found.log_likelihood["y"].values, stats.norm.logpdf(Y.numpy(), theta, 2.0), rtol=1e-10)
    np.testing.assert_array_equal(found.observed_data["y"].values, Y.numpy())
    assert found.posterior_predictive["y"].shape == (2, 40, 5)
    assert quiet_loo(posterior).pareto_k.shape == (5,)


def test_several_sites_have_one_likelihood_of_their_rows() -> None:
    def program(x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            first = pyro.sample("a", dist.Normal(mu * x, 1.0), obs=a)
            pyro.sample("b", dist.Normal(first, 0.5), obs=b)

    x = torch.ones(5, dtype=DOUBLE)
    posterior = from_prior(program, {"x": x, "a": Y, "b": Y + 1})
    found = posterior.to_arviz()
    mu = posterior.draws_by_chain()["mu"].numpy()[..., None]
    both = stats.norm.logpdf(Y.numpy(), mu, 1.0) + stats.norm.logpdf(1.0, 0.0, 0.5)
    np.testing.assert_allclose(found.log_likelihood["rows"].values, both, rtol=1e-10)
    assert set(found.observed_data) == {"a", "b"}
    assert quiet_loo(posterior).pareto_k.shape == (5,)


def test_without_rows_there_is_no_likelihood() -> None:
    def program(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)

    posterior = from_prior(program, {"y": Y})
    assert set(posterior.to_arviz().groups()) == {"posterior"}
    with pytest.raises(NotFactorised, match="plate"):
        posterior.loo()


def test_without_arviz_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = exact_draws(1, 4)
    monkeypatch.setitem(sys.modules, "arviz", None)
    for call in (posterior.to_arviz, posterior.loo):
        with pytest.raises(MissingExtra, match=r"pip install 'bayesdl\[arviz\]'"):
            call()
    assert posterior.summary()["w[0]"]["mean"] == pytest.approx(float(posterior.z[..., 0].mean()))
