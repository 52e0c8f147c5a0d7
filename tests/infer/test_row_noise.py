"""Local reparameterisation and Flipout as estimators of the gradient: unbiased, and less noise in large batches."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import MethodError
from bayesdl.infer.row_noise import RowDraws
from bayesdl.posterior.problem import prepare

DOUBLE = torch.float64
KINDS = ("local", "flipout")
SIGMA, PRIOR = 0.5, 0.4


def regression() -> bdl.BayesianNetwork:
    """Linear regression with a known noise: everything about it is in closed form."""
    likelihood = bdl.likelihoods.Gaussian(noise=SIGMA)
    return bdl.BayesianNetwork(nn.Linear(3, 1).to(DOUBLE), bdl.priors.Normal(PRIOR), likelihood)


def data(linear: Any, n: int = 100) -> tuple[Tensor, Tensor]:
    return linear.x[:n], linear.y[:n, None]


def objective(model: Any, pair: Any, estimator: str, **settings: Any) -> Any:
    method = bdl.MeanFieldVI(estimator=estimator, samples=settings.pop("samples", 1), **settings)
    keys = ("temperature", "likelihood_temperature")
    problem = prepare(model, pair, **{key: settings[key] for key in keys if key in settings})
    return method.engine(problem, 0, lambda: None).objective  # type: ignore[arg-type,return-value]


def gradients(target: Any, parameters: Tensor, count: int, kl_weight: float = 1.0) -> Tensor:
    stream = torch.Generator().manual_seed(4)
    samples = target.method.samples
    found = [target.estimate(parameters, target.noise(samples, stream), None, kl_weight) for _ in range(count)]
    return torch.stack([torch.cat([value.mean()[None], gradient]) for value, gradient in found])


def agrees(found: Tensor, expected: Tensor, errors: float = 4.0) -> None:
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() <= errors * error + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_gradient_is_that_of_the_elbo_in_closed_form(linear: Any, kind: str) -> None:
    target = objective(regression(), data(linear), kind)
    mean, log_sd = torch.tensor([0.3, -1.0, 0.5, 0.2], dtype=DOUBLE), torch.tensor([-1.0, -0.5, -2.0, -1.5]).double()
    x, y = torch.cat([linear.x, torch.ones(100, 1, dtype=DOUBLE)], 1), linear.y  # the bias is the last coordinate
    variance, curvature = (2 * log_sd).exp(), x.square().sum(0) / SIGMA**2 + PRIOR**-2
    by_mean = x.T @ (y - x @ mean) / SIGMA**2 - mean / PRIOR**2
    by_log_sd = 1.0 - variance * curvature
    residual = (y - x @ mean).square().sum() + (x.square() @ variance).sum()
    prior = torch.distributions.Normal(0.0, PRIOR)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, log_sd.exp()), prior).sum()
    elbo = -residual / (2 * SIGMA**2) - 100 * math.log(SIGMA * math.sqrt(2 * math.pi)) - kl
    found = gradients(target, torch.cat([mean, log_sd]), 1500)
    agrees(found, torch.cat([elbo[None], by_mean, by_log_sd]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [SIGMA, dist.HalfNormal(1.0)], ids=["all normal", "a latent that is not"])
def test_entropy_and_normal_priors_are_in_closed_form(linear: Any, kind: str, noise: Any, monkeypatch: Any) -> None:
    """What is added to the density's value and gradient, exactly; the prior of a noise level stays in the density."""
    model = bdl.BayesianNetwork(
        nn.Linear(3, 1).to(DOUBLE), bdl.priors.Normal(PRIOR), bdl.likelihoods.Gaussian(noise=noise)
    )
    target = objective(model, data(linear), kind)
    dim, seen = len(target.random), {}
    evaluate = target.density.value_and_grad

    def spy(*given: Any, **more: Any) -> Any:
        value, slopes = evaluate(*given, **more)
        seen["value"] = value.clone()
        return value, torch.zeros_like(slopes)

    monkeypatch.setattr(target.density, "value_and_grad", spy)
    mean, log_sd = torch.linspace(-0.5, 0.5, dim, dtype=DOUBLE), torch.linspace(-2.0, -0.5, dim, dtype=DOUBLE)
    value, gradient = target.estimate(torch.cat([mean, log_sd]), target.noise(1, torch.Generator()), None)
    q, prior = (torch.distributions.Normal(*law) for law in ((mean, log_sd.exp()), (0 * mean, 0 * mean + PRIOR)))
    precision = torch.full((dim,), PRIOR**-2, dtype=DOUBLE)
    if dim == 4:
        expected = -torch.distributions.kl_divergence(q, prior).sum()
        by_mean = -mean * precision
    else:
        precision[-1] = 0.0
        expected = q.entropy().sum() - 0.5 * (precision * (2 * log_sd).exp()).sum()
        by_mean = torch.zeros_like(mean)
    torch.testing.assert_close(value - seen["value"], expected[None], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, torch.cat([by_mean, 1.0 - precision * (2 * log_sd).exp()]))


@pytest.mark.parametrize(("kind", "falls"), [("local", True), ("flipout", True), ("reparameterisation", False)])
def test_the_variance_falls_with_the_batch_where_rows_have_weights_of_their_own(
    linear: Any, kind: str, falls: bool
) -> None:
    """Of the mean's gradient a row, with each of ten rows standing once or sixteen times: 1/B, or no change at all."""
    x, y = data(linear, 10)
    parameters = torch.tensor([0.3, -1.0, 0.5, 0.2, -1.0, -1.0, -1.0, -1.0], dtype=DOUBLE)
    total = []
    for times in (1, 16):
        found = gradients(objective(regression(), (x.repeat(times, 1), y.repeat(times, 1)), kind), parameters, 600)
        total.append(float((found[:, 1:5] / (10 * times)).var(0).sum()))
    # 600 draws of four entries: a relative standard error of about 4% each.
    assert total[0] / total[1] == pytest.approx(16.0 if falls else 1.0, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_mini_batches_average_to_all_rows_and_the_kl_counts_once(linear: Any, kind: str) -> None:
    x, y = data(linear)
    target = objective(regression(), (x, y), kind)
    parameters = 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    noise = target.noise(1, torch.Generator().manual_seed(2))
    whole = target.estimate(parameters, noise, None)
    parts = [
        target.estimate(parameters, RowDraws(noise.rows[rows], noise.shared), target.problem.minibatch(rows))
        for rows in torch.arange(100).split(20)
    ]
    for k in range(2):
        torch.testing.assert_close(torch.stack([part[k] for part in parts]).mean(0), whole[k], rtol=1e-9, atol=1e-9)
    twice = objective(regression(), (torch.cat([x, x]), torch.cat([y, y])), kind)
    double = twice.estimate(parameters, RowDraws(noise.rows.repeat(2, 1), noise.shared), None)
    half = objective(regression(), (x, y), kind, likelihood_temperature=0.5).estimate(parameters, noise, None)
    for k in range(2):
        torch.testing.assert_close(double[k], half[k], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(double[1], whole[1], rtol=0.1)
    # Two draws are every row twice.
    pair = target.noise(2, torch.Generator().manual_seed(5))
    each = [target.estimate(parameters, RowDraws(part, pair.shared), None) for part in pair.rows.split(100)]
    both = target.estimate(parameters, pair, None)
    for k in range(2):
        torch.testing.assert_close((each[0][k] + each[1][k]) / 2, both[k], rtol=1e-9, atol=1e-9)


class Scaled(nn.Module):
    """A network with a convolution, a parameter that no layer holds, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.twice, self.last = nn.Conv1d(1, 2, 2), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x[:, None]).flatten(1).tanh() * self.scale
        return self.last(self.twice(self.twice(hidden)).tanh())


NOISY: dict[str, tuple[Any, dict[str, Any]]] = {
    "noise level with a normal prior": (bdl.likelihoods.Gaussian(), {}),
    "noise level without": (bdl.likelihoods.Gaussian(noise=dist.HalfNormal(1.0)), {}),
    "tempered": (bdl.likelihoods.Gaussian(), {"temperature": 2.0}),
    "points": (bdl.likelihoods.Gaussian(noise=dist.HalfNormal(1.0)), {"random": ("last.*", "first.weight", "scale")}),
    "weighted KL": (bdl.likelihoods.Gaussian(), {"kl_weight": 0.3}),
}


@pytest.mark.parametrize("name", NOISY)
def test_flipout_through_any_network_has_the_gradient_of_shared_noise(linear: Any, name: str) -> None:
    """Expected values and gradients against the plain estimator's, with what no layer holds drawn once for all rows."""
    likelihood, settings = NOISY[name]
    model = bdl.BayesianNetwork(Scaled().to(DOUBLE), bdl.priors.Normal(0.7), likelihood)
    pair = data(linear, 12)
    target = objective(model, pair, "flipout", **settings)
    assert set(target.rows.sites) <= {"first.weight", "first.bias", "last.weight", "last.bias"}
    dim, random = len(target.random), int(target.random.sum())
    stream = torch.Generator().manual_seed(6)
    mean = 0.4 * torch.randn(dim, generator=stream, dtype=DOUBLE)
    parameters = torch.cat([mean, torch.full((random,), -1.5, dtype=DOUBLE)])
    weight = settings.get("kl_weight", 1.0)
    found = gradients(target, parameters, 500, weight)
    plain = gradients(objective(model, pair, "reparameterisation", samples=200, **settings), parameters, 25, weight)
    gap = found.mean(0) - plain.mean(0)
    error = (found.var(0) / len(found) + plain.var(0) / len(plain)).sqrt()
    assert (gap.abs() < 4.3 * error + 1e-9).all()  # 4 standard errors are often exceeded by one of 70 entries


def test_local_noise_is_exact_behind_hidden_layers(linear: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE)
    model = bdl.BayesianNetwork(net, bdl.priors.Normal(0.7), bdl.likelihoods.Gaussian(noise=dist.HalfNormal(1.0)))
    pair = data(linear, 12)
    target = objective(model, pair, "local")
    mean = 0.5 * torch.randn(22, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    parameters = torch.cat([mean, torch.full((22,), -1.2, dtype=DOUBLE)])
    found = gradients(target, parameters, 600)
    plain = gradients(objective(model, pair, "reparameterisation", samples=200), parameters, 30)
    error = (found.var(0) / len(found) + plain.var(0) / len(plain)).sqrt()
    assert ((found.mean(0) - plain.mean(0)).abs() < 4.3 * error).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [bdl.MeanFieldVI, bdl.IVON], ids=lambda method: method.name)
def test_fits_find_the_mean_field_optimum(linear: Any, method: Any, kind: str) -> None:
    settings = (
        {"learning_rate": 0.3, "curvature_rate": 0.01, "initial_scale": 0.1}
        if method is bdl.IVON
        else {"learning_rate": 0.05}
    )
    posterior = method(steps=500, samples=2, estimator=kind, **settings).fit(
        regression(), data(linear), init={"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, progress=False
    )
    x = torch.cat([linear.x, torch.ones(100, 1, dtype=DOUBLE)], 1)
    precision = x.T @ x / SIGMA**2 + torch.eye(4, dtype=DOUBLE) / PRIOR**2
    mean, sd = torch.linalg.solve(precision, x.T @ linear.y / SIGMA**2), precision.diag().rsqrt()
    assert ((posterior.mean - mean) / sd).abs().max() < 0.15
    torch.testing.assert_close(posterior.sd, sd, rtol=0.08, atol=0)
    assert posterior.info["gradient"]["draws"] > 1.0
    assert posterior.info["gradients"] > 500


def test_an_earlier_posterior_and_learnt_priors_are_priors_like_any_other(linear: Any) -> None:
    x, y = data(linear)
    method = bdl.MeanFieldVI(steps=300, learning_rate=0.05, estimator="local", samples=2, batch_size=25)
    first = method.fit(regression(), (x[:50], y[:50]), progress=False)
    second = method.fit(regression(), (x[50:], y[50:]), prior=first, progress=False)
    late = torch.cat([x[50:], torch.ones(50, 1, dtype=DOUBLE)], 1)
    precision = late.T @ late / SIGMA**2 + torch.diag(first.sd**-2)
    mean = torch.linalg.solve(precision, late.T @ y[50:, 0] / SIGMA**2 + first.mean / first.sd**2)
    sd = precision.diag().rsqrt()
    assert ((second.mean - mean) / sd).abs().max() < 0.3
    torch.testing.assert_close(second.sd, sd, rtol=0.1, atol=0)
    joint = bdl.FullRankVI(steps=20).fit(regression(), (x[:50], y[:50]), progress=False)
    with pytest.raises(MethodError, match="prior with independent coordinates"):
        method.fit(regression(), (x[50:], y[50:]), prior=joint)
    assert method.fit(regression(), (x, y), prior_rows=0.5, progress=False).kl() is not None


def test_refusals(linear: Any) -> None:
    with pytest.raises(MethodError, match=r"program of your own.*BayesianNetwork"):
        bdl.MeanFieldVI(estimator="local").fit(linear.model, linear.data)
    with pytest.raises(MethodError, match="estimator='local'"):
        bdl.FullRankVI(estimator="local")
    with pytest.raises(MethodError, match="doubly reparameterised"):
        bdl.MeanFieldVI(estimator="local", alpha=0.0)
    twice = nn.Linear(3, 3)
    nets = {
        "runs once a row": bdl.BayesianNetwork(nn.Sequential(twice, nn.Tanh(), twice)),
        "independent Gaussian prior": bdl.BayesianNetwork(nn.Linear(3, 3), bdl.priors.Laplace(1.0)),
    }
    for words, model in nets.items():
        with pytest.raises(MethodError, match=words):
            bdl.MeanFieldVI(estimator="flipout").fit(model, (torch.zeros(5, 3), torch.zeros(5, 3)))
