"""Mean-field VI against the known optimum of Gaussian targets; gradients; learnt priors; resume."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.loop import Run
from bayesdl.infer.schedules import Constant
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.infer.variational_engine import GaussianEngine
from bayesdl.posterior.problem import prepare


def optimum_elbo(linear: Any) -> float:
    """log p(y) - KL(q* || posterior), with KL = (sum log Lambda_ii - log det Lambda) / 2 for the diagonal optimum."""
    precision = linear.posterior()[1]
    return linear.log_evidence() - 0.5 * float(precision.diag().log().sum() - torch.logdet(precision))


@pytest.mark.parametrize(
    ("settings", "mean_tolerance", "sd_tolerance"),
    [
        ({}, 1e-6, 0.02),
        ({"batch_size": 10}, 0.05, 0.05),
        ({"temperature": 3.0}, 1e-6, 0.02),
        ({"likelihood_temperature": 3.0}, 1e-6, 0.02),
        ({"temperature": 0.5, "likelihood_temperature": 2.0}, 1e-6, 0.02),
    ],
)
def test_optimum_has_the_exact_mean_and_the_inverse_diagonal_precision(
    linear: Any, settings: dict[str, Any], mean_tolerance: float, sd_tolerance: float
) -> None:
    posterior = MeanFieldVI(steps=1200, **settings).fit(linear.model, linear.data)
    mean, precision = linear.posterior(settings.get("temperature", 1.0), settings.get("likelihood_temperature", 1.0))
    sd = precision.diag().rsqrt()
    marginal = torch.linalg.inv(precision).diag().sqrt()
    assert (marginal / sd - 1).abs().max() > 0.1  # the marginal sd would be told apart
    assert ((posterior.mean - mean) / sd).abs().max() < mean_tolerance
    assert (posterior.sd / sd - 1).abs().max() < sd_tolerance


def test_elbo_is_the_evidence_less_the_known_gap(linear: Any) -> None:
    posterior = MeanFieldVI(steps=1500).fit(linear.model, linear.data)
    error = posterior.info["elbo_error"]
    assert abs(posterior.info["elbo"] - optimum_elbo(linear)) < 4 * error
    assert posterior.info["elbo"] + 4 * error < linear.log_evidence()
    assert error < 0.25 * (linear.log_evidence() - optimum_elbo(linear))
    kl = posterior.kl()
    assert kl is not None
    prior = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), 0.4)
    q = torch.distributions.Normal(posterior.mean, posterior.sd)
    assert kl == pytest.approx(float(torch.distributions.kl_divergence(q, prior).sum()), rel=1e-10)


def test_elbo_equals_the_evidence_where_the_family_holds_the_posterior(orthogonal: Any) -> None:
    posterior = MeanFieldVI(steps=1500).fit(orthogonal.model, orthogonal.data)
    # The control variate takes all noise out of a target whose coordinates are independent Gaussians.
    assert posterior.info["elbo"] == pytest.approx(orthogonal.log_evidence(), abs=1e-6)
    assert posterior.info["elbo_error"] < 1e-6
    torch.testing.assert_close(posterior.sd, orthogonal.posterior()[1].diag().rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_prior_that_is_not_gaussian_and_a_temperature_on_a_constrained_site(temperature: float) -> None:
    """HalfNormal on the log scale, where the best Gaussian is known."""

    def model() -> None:
        pyro.sample("s", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))

    posterior = MeanFieldVI(steps=1200, samples=16, temperature=temperature).fit(model, {})
    # The log density of u = log s is u - exp(2 u) / (2 T) + c. The ELBO m - exp(2 m + 2 v) / (2 T) + log(v) / 2 has its
    # optimum at v = 1/2, 2 m + 2 v = log T. Were the Jacobian u tempered too, T would not move the mean so.
    assert float(posterior.sd[0]) == pytest.approx(math.sqrt(0.5), rel=0.03)
    assert float(posterior.mean[0]) == pytest.approx((math.log(temperature) - 1) / 2, abs=0.03)


def test_parameters_without_a_prior_get_a_point(linear: Any) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.param("sigma", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 0.4).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    posterior = MeanFieldVI(steps=1500).fit(model, linear.data)
    place = {site.name: slice(site.start, site.stop) for site in posterior.problem.density.sites}
    assert float(posterior.sd[place["sigma"]]) == 0.0
    w, sd = posterior.mean[place["w"]], posterior.sd[place["w"]]
    sigma = float(posterior.mean[place["sigma"]].exp())
    # At the optimum sigma^2 = E_q |y - x w|^2 / N, and q(w) is the mean-field solution given sigma.
    squares = (linear.y - linear.x @ w).square().sum() + (linear.x.square() @ sd.square()).sum()
    assert sigma == pytest.approx(float((squares / len(linear.y)).sqrt()), rel=1e-3)
    precision = linear.x.T @ linear.x / sigma**2 + torch.eye(3, dtype=torch.float64) / 0.4**2
    torch.testing.assert_close(sd, precision.diag().rsqrt(), rtol=0.02, atol=0)
    assert posterior.kl() is None


def engine(linear: Any, **settings: Any) -> GaussianEngine:
    problem = prepare(linear.model, linear.data, temperature=settings.get("temperature", 1.0))
    return MeanFieldVI(**settings).engine(problem, 0, lambda: torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["sticking", "reparameterisation"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_unbiased_with_and_without_mini_batches(linear: Any, temperature: float, estimator: str) -> None:
    """Against the exact gradient of the ELBO at a point that is not the optimum."""
    work = engine(linear, temperature=temperature, estimator=estimator)
    mean, precision = linear.posterior(temperature)
    sd = torch.full((3,), 0.1, dtype=torch.float64)
    parameters = torch.cat([mean + 0.1, sd.log()])
    exact = torch.cat([-precision @ (parameters[:3] - mean), 1 - precision.diag() * sd**2])
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    elbo, gradient = work.objective.estimate(parameters, noise, None)
    parts = torch.stack([work.objective.estimate(parameters, part, None)[1] for part in noise.split(500)])
    error = parts.std(0) / math.sqrt(len(parts))
    assert ((gradient - exact).abs() < 4.5 * error + 1e-9).all()
    if temperature == 1.0:
        q = torch.distributions.MultivariateNormal(parameters[:3], torch.diag(sd**2))
        p = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
        expected = linear.log_evidence() - float(torch.distributions.kl_divergence(q, p))
        assert abs(float(elbo.mean()) - expected) < 4.5 * float(elbo.std()) / math.sqrt(len(elbo))
    batches = torch.randperm(100, generator=torch.Generator().manual_seed(2)).split(10)
    split = [work.objective.estimate(parameters, noise[:100], work.problem.minibatch(rows)) for rows in batches]
    whole = work.objective.estimate(parameters, noise[:100], None)
    torch.testing.assert_close(torch.stack([value for value, _ in split]).mean(0), whole[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.stack([grad for _, grad in split]).mean(0), whole[1], rtol=1e-9, atol=1e-9)


def test_sticking_lowers_the_variance_near_the_optimum(linear: Any) -> None:
    mean, precision = linear.posterior()
    parameters = torch.cat([mean, precision.diag().rsqrt().log()])
    noise = torch.randn(4_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spread = {}
    for estimator in ("sticking", "reparameterisation"):
        work = engine(linear, estimator=estimator).objective
        values, gradients = zip(*[work.estimate(parameters, row, None) for row in noise.split(1)], strict=True)
        spread[estimator] = torch.stack(gradients).var(0), torch.cat(values).var()
    assert (spread["sticking"][0] < 0.6 * spread["reparameterisation"][0]).all()
    assert spread["sticking"][1] < 0.6 * spread["reparameterisation"][1]


def test_trace_and_its_error(linear: Any) -> None:
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    posterior = MeanFieldVI(steps=1600).fit(linear.model, linear.data, init=start)
    trace, error = posterior.info["elbo_trace"], posterior.info["elbo_trace_error"]
    assert len(trace) == len(error) == 200
    assert trace[-1] > trace[0] + 100
    # Noise is independent from step to step, so the standard errors of the last quarter add in squares.
    tail, spread = torch.tensor(trace[-50:]), torch.tensor(error[-50:])
    assert abs(float(tail.mean()) - optimum_elbo(linear)) < 4 * float(spread.square().sum().sqrt()) / 50


def test_learnt_prior_is_the_fit_on_its_rows_and_is_updated_with_the_rest(orthogonal: Any) -> None:
    posterior = MeanFieldVI(steps=1500).fit(orthogonal.model, orthogonal.data, prior_rows=0.5, seed=4)
    problem = posterior.problem
    early = problem.rows.isin(problem.prior_rows)
    assert int(early.sum()) == 50
    assert posterior.info["prior"]["rows"] == 50
    x, y = orthogonal.x[early], orthogonal.y[early]
    precision = x.T @ x / 0.5**2 + torch.eye(3, dtype=torch.float64) / 0.4**2
    prior_mean, prior_sd = problem.density.gaussian_prior()
    sd = precision.diag().rsqrt()
    torch.testing.assert_close(prior_sd, sd, rtol=0.02, atol=0)
    assert ((prior_mean - torch.linalg.solve(precision, x.T @ y / 0.5**2)) / sd).abs().max() < 1e-5
    # The update counts rows B alone: prior(A) x likelihood(B), with the prior as it was found.
    x, y = orthogonal.x[~early], orthogonal.y[~early]
    precision = x.T @ x / 0.5**2 + torch.diag(prior_sd**-2)
    mean = torch.linalg.solve(precision, x.T @ y / 0.5**2 + prior_mean / prior_sd**2)
    sd = precision.diag().rsqrt()
    assert ((posterior.mean - mean) / sd).abs().max() < 1e-5
    torch.testing.assert_close(posterior.sd, sd, rtol=0.02, atol=0)
    kl = posterior.kl()
    assert kl is not None
    q, p = torch.distributions.Normal(posterior.mean, posterior.sd), torch.distributions.Normal(prior_mean, prior_sd)
    assert kl == pytest.approx(float(torch.distributions.kl_divergence(q, p).sum()), rel=1e-9)


def test_learnt_prior_does_not_depend_on_the_other_rows(orthogonal: Any) -> None:
    method, (x, y) = MeanFieldVI(steps=50), orthogonal.data
    first = method.fit(orthogonal.model, (x, y), prior_rows=0.5)
    early = first.problem.rows.isin(first.problem.prior_rows)
    second = method.fit(orthogonal.model, (x, torch.where(early, y, y + 3.0)), prior_rows=0.5)
    assert torch.equal(second.problem.rows.isin(second.problem.prior_rows), early)
    for one, other in zip(first.problem.density.gaussian_prior(), second.problem.density.gaussian_prior(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.mean, second.mean)


@pytest.mark.parametrize("prior_rows", [None, 0.4])
@pytest.mark.parametrize("stop", [1, 77])
def test_resume_is_bit_for_bit(linear: Any, tmp_path: Any, prior_rows: float | None, stop: int) -> None:
    method = MeanFieldVI(steps=120, batch_size=8)
    whole = method.fit(linear.model, linear.data, prior_rows=prior_rows)
    first = method.fit(
        linear.model,
        linear.data,
        prior_rows=prior_rows,
        checkpoint=tmp_path / "vi",
        callback=lambda state: state["step"] == stop,
    )
    assert first.info["steps"] == stop
    resumed = method.fit(linear.model, linear.data, prior_rows=prior_rows, checkpoint=tmp_path / "vi")
    assert torch.equal(resumed.mean, whole.mean)
    assert torch.equal(resumed.sd, whole.sd)
    assert resumed.info["elbo"] == whole.info["elbo"]
    # Neither the mode at the start nor the prior is computed anew: one probe per stage, the steps that were left, and
    # at the end of each stage the gradient's quality, 20 estimates with all draws and with one.
    stages = 1 if prior_rows is None else 2
    quality = 20 * (8 + 1) * stages
    assert resumed.info["gradients_here"] == 8 * (120 - stop) + quality + stages
    # In all: each stage once, the mode's 500 steps, and a probe of every file that was opened, here and before.
    assert whole.info["gradients"] == 8 * 120 * stages + quality + 500
    assert resumed.info["gradients"] == whole.info["gradients"] + (stages + 1) + stages


def test_average_is_that_of_the_last_quarter(linear: Any) -> None:
    path: list[Tensor] = []
    posterior = MeanFieldVI(steps=40, learning_rate=Constant(0.05)).fit(
        linear.model, linear.data, callback=lambda state: bool(path.append(state["parameters"].reshape(2, 3)))
    )
    expected = torch.stack(path[30:]).mean(0)
    torch.testing.assert_close(posterior.mean, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(posterior.sd, expected[1].exp(), rtol=1e-10, atol=1e-12)


def test_stopped_before_the_first_update_is_an_error(linear: Any) -> None:
    run = Run()
    run.tally.interrupted = True
    method = MeanFieldVI(steps=10)
    problem = prepare(linear.model, linear.data)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt, match="first update"):
        method.approximate(problem, run, lambda: torch.zeros(6, dtype=torch.float64))


def test_refusals(linear: Any) -> None:
    with pytest.raises(MethodError, match="temper the learnt prior twice"):
        MeanFieldVI(temperature=2.0).fit(linear.model, linear.data, prior_rows=0.5)
    rows = prepare(linear.model, linear.data).rows
    with pytest.raises(MethodError, match="none are left"):
        MeanFieldVI().fit(linear.model, linear.data, prior_rows=rows)
    for settings, words in [({"samples": 0}, "samples=0"), ({"initial_scale": -1.0}, r"initial_scale=-1\.0")]:
        with pytest.raises(MethodError, match=words):
            MeanFieldVI(**settings)
    with pytest.raises(Divergence, match="learning_rate"):
        MeanFieldVI(learning_rate=Constant(1e6)).fit(linear.model, linear.data)
