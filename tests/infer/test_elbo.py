"""The ELBO itself: against Pyro's own, its gradient estimators' known moments, and what its optima are."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.problem import prepare

DOUBLE = torch.float64


def objective(model: Any, data: Any, estimator: str, **settings: Any) -> Any:
    method = bdl.MeanFieldVI(estimator=estimator, **settings)
    problem = prepare(model, data, temperature=method.temperature)
    return method.engine(problem, 0, lambda: None).objective  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("estimator", ["sticking", "reparameterisation", "score"])
def test_elbo_and_gradient_agree_with_pyros(linear: Any, estimator: str) -> None:
    """Pyro's Trace_ELBO of the same model and guide, both averaged over thousands of draws."""
    mean, log_sd = torch.tensor([0.8, -1.5, 0.4], dtype=DOUBLE), torch.tensor([-1.0, -2.0, -1.5], dtype=DOUBLE)
    leaf = torch.cat([mean, log_sd]).requires_grad_()

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(leaf[:3], leaf[3:].exp()).to_event(1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 0.4).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)  # works for many draws at once

    repeats, draws = 10, 1000
    loss = Trace_ELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=1).differentiable_loss
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = []
        for _ in range(repeats):
            value = -loss(model, guide, *linear.data)
            theirs.append(torch.cat([value.detach()[None], torch.autograd.grad(value, leaf)[0]]))
    other = torch.stack(theirs)
    work = objective(linear.model, linear.data, estimator)
    stream = torch.Generator().manual_seed(1)
    found = [work.estimate(leaf.detach(), work.normals(draws, stream), None) for _ in range(repeats)]
    ours = torch.stack([torch.cat([value.mean()[None], gradient]) for value, gradient in found])
    error = ((ours.var(0) + other.var(0)) / repeats).sqrt()
    assert ((ours.mean(0) - other.mean(0)).abs() < 5 * error + 1e-9).all()  # of ten repeats: Student's t
    assert (error < 0.05 * other.mean(0).abs()).any()


def test_the_two_estimators_have_their_textbook_moments() -> None:
    """Of d/dm E[phi(z)], phi = z^2, z ~ N(1, 1): paths have mean 2 and variance 4, the score function 2 and 30.

    Half the temperature makes the standard normal's log density -z^2, up to a constant.
    """

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))

    parameters = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    count = 20_000
    noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    path = objective(model, {}, "reparameterisation", temperature=0.5)
    slopes = path.density.value_and_grad(1.0 + noise)[1][:, 0]
    assert float(slopes.mean()) == pytest.approx(-2.0, abs=4 * 2 / math.sqrt(count))
    assert float(slopes.var()) == pytest.approx(4.0, rel=0.06)
    constant = float(path.density.log_density(torch.zeros(1, 1, dtype=DOUBLE)))
    phi = path.density.log_density(1.0 + noise) - constant
    assert float((phi * noise[:, 0]).var()) == pytest.approx(30.0, rel=0.15)
    # With the baselines of the other draws, and log q in the integrand, far less is left.
    score = objective(model, {}, "score", temperature=0.5)
    found = torch.stack([score.estimate(parameters, part, None)[1] for part in noise[:4000].split(4)])
    assert float(found[:, 0].mean()) == pytest.approx(-2.0, abs=4 * float(found[:, 0].std()) / math.sqrt(1000))
    assert 4 * float(found[:, 0].var()) < 15.0
    # d/d log sd of E[-z^2] + entropy is -2 s^2 + 1.
    assert float(found[:, 1].mean()) == pytest.approx(-1.0, abs=4 * float(found[:, 1].std()) / math.sqrt(1000))


def test_independent_coordinates_on_a_correlated_gaussian_under_both_divergences() -> None:
    """Correlation 0.9: KL(q || p) has variances 1 / precision = 0.19, KL(p || q) the marginal ones, 1."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), covariance))

    posterior = bdl.MeanFieldVI(steps=700, learning_rate=0.05).fit(model, {}, progress=False)
    torch.testing.assert_close(posterior.sd.square(), torch.full((2,), 0.19, dtype=DOUBLE), rtol=0.06, atol=0)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), covariance)

    def inclusive(sd: float) -> float:
        q = torch.distributions.MultivariateNormal(exact.loc, torch.eye(2, dtype=DOUBLE) * sd**2)
        return float(torch.distributions.kl_divergence(exact, q))

    assert inclusive(1.0) < min(inclusive(0.97), inclusive(1.03))
    assert inclusive(1.0) < inclusive(0.19**0.5) - 1.0
    # The gap of the ELBO is KL(q || p) = -1/2 log det of the correlations.
    assert posterior.info["elbo"] == pytest.approx(0.5 * math.log(0.19), abs=0.01 + 4 * posterior.info["elbo_error"])
