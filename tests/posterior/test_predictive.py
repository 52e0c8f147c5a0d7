"""Predictions against a slow oracle: a loop over draws, with formulas of its own; and against analytic mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import DataError, ModelError, NotFactorised
from bayesdl.posterior import DrawsPosterior, predictive, prepare
from tests.cases import untouched

DOUBLE = torch.float64
Array = np.ndarray[Any, np.dtype[Any]]
S, N, H = 7, 9, 4
likelihoods = bdl.likelihoods


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_prior(model: Any, data: Any, draws: int = S, **options: Any) -> DrawsPosterior:
    """Prior draws in the place of posterior ones: any draws will do."""
    problem = prepare(model, data, **options)
    return DrawsPosterior(problem, problem.density.prior_draws(draws, 3)[None], {}, {"method": "prior"})


# -- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A likelihood, its targets, and by hand the mean, variance and log density of one draw.

    ``by_hand(f, noise, y)`` takes outputs ``[N, K]``, the noise, and targets in the model's units.
    """

    likelihood: Any
    outputs: int
    target: Callable[[Array], Array]
    by_hand: Callable[[Array, float, Array], tuple[Array, Array, Array]]
    scaled: bool = True


def gaussian(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    f, sd = f[:, 0], np.full(len(f), noise)
    return f, sd**2, -0.5 * ((y - f) / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


def two_targets(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    each = -0.5 * ((y - f) / noise) ** 2 - math.log(noise) - 0.5 * math.log(2 * math.pi)
    return f, np.full_like(f, noise**2), each.sum(1)


def heteroscedastic(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    sd = np.log1p(np.exp(f[:, 1])) + 1e-3
    return f[:, 0], sd**2, stats.norm.logpdf(y, f[:, 0], sd)


def student(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    return f[:, 0], np.full(len(f), noise**2 * 5 / 3), stats.t.logpdf(y, 5.0, f[:, 0], noise)


def quantile(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    tau, r = 0.2, y - f[:, 0]
    mean = f[:, 0] + noise * (1 - 2 * tau) / (tau * (1 - tau))
    variance = np.full(len(f), noise**2 * (1 - 2 * tau + 2 * tau**2) / (tau * (1 - tau)) ** 2)
    return mean, variance, math.log(tau * (1 - tau) / noise) - np.where(r > 0, tau * r, (tau - 1) * r) / noise


def bernoulli(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    p = special.expit(f[:, 0])
    both = np.stack([1 - p, p], 1)
    return both, both * (1 - both), np.log(np.where(y == 1, p, 1 - p))


def heads(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    p = special.expit(f)
    return p, p * (1 - p), np.log(np.where(y == 1, p, 1 - p)).sum(1)


def categorical(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    return p, p * (1 - p), np.log(p[np.arange(len(y)), y.astype(int)])


def poisson(f: Array, noise: float, y: Array) -> tuple[Array, Array, Array]:
    rate = np.exp(f[:, 0])
    return rate, rate, y * np.log(rate) - rate - special.gammaln(y + 1)


def real(f: Array) -> Array:
    return 300.0 + 40.0 * f


CASES = {
    "Gaussian": Case(likelihoods.Gaussian(), 1, real, gaussian),
    "Gaussian, fixed noise": Case(likelihoods.Gaussian(noise=0.3), 1, real, gaussian),
    "Gaussian, two targets": Case(likelihoods.Gaussian(), 2, lambda f: real(np.stack([f, 2 * f], 1)), two_targets),
    "heteroscedastic": Case(likelihoods.Gaussian(noise="head"), 2, real, heteroscedastic),
    "Student-t": Case(likelihoods.StudentT(df=5.0), 1, real, student),
    "quantile": Case(likelihoods.Quantile(tau=0.2), 1, real, quantile),
    "Bernoulli": Case(likelihoods.Bernoulli(), 1, lambda f: (f > 0).astype(int), bernoulli, scaled=False),
    "heads": Case(
        likelihoods.MultiBernoulli(), 2, lambda f: np.stack([f > 0, f > 1], 1).astype(int), heads, scaled=False
    ),
    "Categorical": Case(likelihoods.Categorical(), 3, lambda f: np.digitize(f, [-0.5, 0.5]), categorical, scaled=False),
    "Poisson": Case(likelihoods.Poisson(), 1, lambda f: np.round(np.exp(f)), poisson, scaled=False),
}


def inputs() -> tuple[Array, Array]:
    x = torch.randn(N, 3, generator=stream(1), dtype=DOUBLE) * torch.tensor([10.0, 0.1, 1.0]) + 5.0
    return x.numpy(), torch.randn(N, generator=stream(2), dtype=DOUBLE).numpy()


@cache
def network(name: str) -> tuple[DrawsPosterior, Array, Array]:
    """A posterior, raw inputs and raw targets."""
    case, (x, f) = CASES[name], inputs()
    y = case.target(f)
    net = nn.Sequential(nn.Linear(3, H), nn.Tanh(), nn.Linear(H, case.outputs)).double()
    model = bdl.BayesianNetwork(net, likelihood=case.likelihood)
    whole = np.ndim(y) == 2 and not case.scaled
    data: Any = (torch.tensor(x), torch.tensor(y)) if whole else bdl.Dataset.from_arrays(
        x, y, "regression" if model.task == "regression" else "classification"
    )  # fmt: skip
    return from_prior(model, data), x, y


def oracle(name: str, posterior: DrawsPosterior, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and log density of every draw in raw units, draw by draw."""
    case, draws = CASES[name], posterior.draws()
    pair = np.ndim(y) == 2 and not case.scaled
    train = inputs()[0]
    low, wide = (np.zeros(3), np.ones(3)) if pair else (train.mean(0), train.std(0))
    target = case.target(inputs()[1])
    shift, scale = (target.mean(), target.std()) if case.scaled else (0.0, 1.0)
    found = []
    for s in range(len(draws["0.weight"])):
        one = {key: value[s].numpy() for key, value in draws.items()}
        hidden = np.tanh((x - low) / wide @ one["0.weight"].T + one["0.bias"])
        f = hidden @ one["2.weight"].T + one["2.bias"]
        mean, variance, density = case.by_hand(f, float(one.get("noise", 0.3)), (y - shift) / scale)
        width = y.shape[1] if np.ndim(y) == 2 and case.scaled else 1
        found.append((shift + scale * mean, scale**2 * variance, density - width * math.log(scale)))
    mean, variance, density = (np.stack(part) for part in zip(*found, strict=True))
    return mean, variance, density


@pytest.mark.parametrize("name", CASES)
def test_networks_against_a_loop_over_draws(name: str) -> None:
    posterior, x, y = network(name)
    with untouched():
        prediction = posterior.predict(x)
        density = posterior.log_likelihood(x, y)
    mean, variance, by_draw = oracle(name, posterior, x, y)
    assert prediction.draws == S
    np.testing.assert_allclose(prediction.mean_by_draw, mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(prediction.mean, mean.mean(0), rtol=1e-10)
    np.testing.assert_allclose(prediction.epistemic, mean.var(0), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(prediction.aleatoric, variance.mean(0), rtol=1e-10)
    np.testing.assert_allclose(prediction.variance, mean.var(0) + variance.mean(0), rtol=1e-9)
    np.testing.assert_allclose(density, by_draw, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(prediction.log_prob_by_draw(y), by_draw, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(prediction.log_prob(y), np.log(np.exp(by_draw).mean(0)), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(posterior.function_draws(x)[0], mean, rtol=1e-10, atol=1e-12)
    assert posterior.units == ("raw" if name == "heads" else "scaled")
    assert posterior.problem.scaled == (name != "heads")


@pytest.mark.parametrize("name", ["Gaussian", "quantile", "Student-t"])
def test_density_in_raw_units_integrates_to_one(name: str) -> None:
    posterior, x, _ = network(name)
    prediction = posterior.predict(x[:1])
    # Heavy tails: a grid in the logarithm of the distance, on both sides.
    away = torch.logspace(-8, 7, 6001, dtype=DOUBLE)
    grid = torch.cat([-away.flip(0), away]) + prediction.mean
    density = prediction[[0] * len(grid)].log_prob(grid).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_batches_and_streams_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x, y = network(name)
    whole = posterior.predict(x)
    several = {"batches": posterior.predict(x, batch_size=4), "one by one": posterior.predict(x, batch_size=1)}
    with monkeypatch.context() as patch:
        patch.setattr(predictive, "WORKING", 2 * 3 * 3)  # three rows, one draw at a time
        several["small passes"] = posterior.predict(x)
    with monkeypatch.context() as patch:
        patch.setattr(predictive, "CELLS", 4 * S)
        several["stream"] = posterior.predict(x)
        patch.setattr(predictive, "CELLS", 1)
        several["stream of rows"] = posterior.predict(x)
    assert [n for n, _ in several["stream"]._blocks.blocks] == [4, 4, 1]
    for way, other in several.items():
        assert len(other) == N, way
        for statistic in ("mean", "epistemic", "aleatoric"):
            torch.testing.assert_close(getattr(other, statistic), getattr(whole, statistic), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.log_prob(y), whole.log_prob(y), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other[[3, 8]].mean, whole.mean[[3, 8]], rtol=1e-9, atol=1e-12)


def test_streams_hold_nothing_and_batches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x, _ = network("Gaussian")
    runs: list[int] = []
    at_draws = predictive.at_draws

    def counted(model: Any, given: Any, *rest: Any) -> Any:
        runs.append(len(given["x"]))
        return at_draws(model, given, *rest)

    monkeypatch.setattr(predictive, "at_draws", counted)
    held = posterior.predict(x, batch_size=4)
    _ = held.mean, held.interval(), held.sample(2)
    assert runs == [4, 4, 1]
    runs.clear()
    monkeypatch.setattr(predictive, "CELLS", 4 * S)
    streamed = posterior.predict(x)
    assert runs == [4]  # the first block, which tells the kind of target
    _ = streamed.mean, streamed.variance, streamed.sd
    assert runs == [4, 4, 4, 1]


def test_at_most_so_many_draws_evenly_thinned() -> None:
    posterior, x, y = network("Gaussian")
    mean, _, density = oracle("Gaussian", posterior, x, y)
    few = posterior.predict(x, max_draws=3)
    assert few.draws == 3
    np.testing.assert_allclose(few.mean_by_draw, mean[[0, 3, 6]], rtol=1e-10)
    np.testing.assert_allclose(posterior.log_likelihood(x, y, max_draws=3), density[[0, 3, 6]], rtol=1e-9, atol=1e-10)
    many = from_prior(posterior.problem.model, bdl.Dataset.from_arrays(x, y), 1200)
    assert many.predict(x).draws == 1000
    assert many.predict(x, max_draws=5000).draws == 1200


def test_dtypes_and_containers_do_not_matter() -> None:
    posterior, x, _ = network("Gaussian")
    expected = posterior.predict(x).mean
    for other in (x.tolist(), torch.tensor(x), {"x": x}, {"x": torch.tensor(x)}):
        assert torch.equal(posterior.predict(other).mean, expected)
    rounded = posterior.predict(torch.tensor(x, dtype=torch.float32)).mean
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-3)


# -- programs --------------------------------------------------------------------------------------------------------


def linear(x: Tensor, y: Tensor | None = None) -> None:
    """Regression with an unknown noise, the classic form."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0, dtype=DOUBLE)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


X = torch.randn(6, 2, generator=stream(4), dtype=DOUBLE)
Y = torch.randn(6, generator=stream(5), dtype=DOUBLE)


def test_program_against_a_loop_over_draws() -> None:
    posterior = from_prior(linear, (X, Y))
    new = torch.randn(4, 2, generator=stream(6), dtype=DOUBLE)
    draws = posterior.draws()
    means = torch.stack([new @ w for w in draws["w"]])
    prediction = posterior.predict(new)
    torch.testing.assert_close(prediction.mean_by_draw, means)
    torch.testing.assert_close(prediction.aleatoric, draws["sigma"].square().mean().expand(4))
    one = stats.norm.logpdf(Y.numpy(), (X @ draws["w"].T).T.numpy(), draws["sigma"][:, None].numpy())
    np.testing.assert_allclose(posterior.log_likelihood(X, Y), one, rtol=1e-10)
    assert posterior.units == "raw"


def test_values_decide_the_flow_of_a_program_draw_by_draw() -> None:
    def branching(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        mean = x[:, 0] if w > 0 else -2 * x[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    posterior = from_prior(branching, (X, Y), 20)
    w = posterior.draws()["w"]
    assert 0 < int((w > 0).sum()) < 20
    expected = torch.where(w[:, None] > 0, X[:, 0], -2 * X[:, 0])
    torch.testing.assert_close(posterior.predict(X).mean_by_draw, expected)


def test_dict_data_and_arguments_that_are_no_rows() -> None:
    def program(x: Tensor, offset: Tensor, power: int, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x**power) @ w + offset, 0.5), obs=y)

    given = {"x": X, "offset": torch.tensor(7.0, dtype=DOUBLE), "power": 2, "y": Y}
    posterior = from_prior(program, given)
    new = {"x": X[:3] + 1, "offset": torch.tensor(1.0, dtype=DOUBLE), "power": 2}
    expected = posterior.draws()["w"] @ ((X[:3] + 1) ** 2).T + 1
    torch.testing.assert_close(posterior.predict(new).mean_by_draw, expected)
    torch.testing.assert_close(posterior.predict(new, batch_size=2).mean_by_draw, expected)
    density = posterior.log_likelihood({**new, "y": Y[:3]})
    np.testing.assert_allclose(density, stats.norm.logpdf(Y[:3].numpy(), expected.numpy(), 0.5), rtol=1e-10)
    with pytest.raises(DataError, match="needs y as well"):
        posterior.log_likelihood(new)
    with pytest.raises(DataError, match=r"does not reach.*offset"):
        posterior.predict({"x": X, "power": 2})
    with pytest.raises(DataError, match=r"does not reach.*unknown"):
        posterior.predict({**new, "unknown": 3})
    with pytest.raises(DataError, match="same without target"):
        posterior.predict(X)
    with pytest.raises(DataError, match="one dict"):
        posterior.log_likelihood(X, Y)


def test_program_that_closes_over_its_data() -> None:
    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=Y)

    posterior = from_prior(program, {})
    prediction = posterior.predict({}, batch_size=2)
    torch.testing.assert_close(prediction.mean_by_draw, posterior.draws()["mu"][:, None].expand(S, 6))


# -- what is drawn anew ----------------------------------------------------------------------------------------------


def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, 0.8))
        pyro.sample("y", dist.Normal(theta + x[:, 0], 0.3), obs=y)


def test_latents_of_new_rows_are_drawn_from_their_prior() -> None:
    posterior = from_prior(hierarchical, (X, Y), 4000)
    z = posterior.z.clone()
    place = next(site for site in posterior.problem.density.sites if site.name == "theta")
    z[..., place.start : place.stop] = 50.0  # the training rows' latents, far from their prior: they must not show
    posterior = DrawsPosterior(posterior.problem, z, {}, {})
    mu = posterior.draws()["mu"]
    new = torch.zeros(6, 2, dtype=DOUBLE)
    prediction = posterior.predict(new, max_draws=4000)
    spread = prediction.mean_by_draw - mu[:, None]
    assert (spread.mean(0).abs() < 4 * 0.8 / math.sqrt(4000)).all()
    assert (spread.std(0) / 0.8 - 1).abs().max() < 4 / math.sqrt(2 * 4000)
    assert torch.corrcoef(spread.T).fill_diagonal_(0).abs().max() < 4 / math.sqrt(4000)  # each row its own
    # The analytic mixture over theta: y ~ N(mu, 0.8^2 + 0.3^2).
    y = torch.linspace(-2, 2, 6, dtype=DOUBLE)
    exact = dist.Normal(mu[:, None], math.hypot(0.8, 0.3)).log_prob(y).exp().mean(0)
    each = prediction.log_prob_by_draw(y).exp()
    error = each.std(0) / math.sqrt(4000)
    assert ((each.mean(0) - exact).abs() < 4 * error).all()
    torch.testing.assert_close(posterior.predict(new, max_draws=4000).mean, prediction.mean, rtol=0, atol=0)
    assert not torch.equal(posterior.predict(new, max_draws=4000, seed=1).mean, prediction.mean)
    with pytest.raises(NotFactorised, match=r"predict\(x\).log_prob_by_draw"):
        posterior.log_likelihood(X, Y)


def test_few_draws_are_used_several_times_where_more_is_drawn() -> None:
    posterior = from_prior(hierarchical, (X, Y), 3)
    prediction = posterior.predict(X, max_draws=2000)
    assert prediction.draws == 1998
    torch.testing.assert_close(
        prediction.variance - prediction.epistemic, torch.full((6,), 0.09, dtype=DOUBLE), rtol=1e-9, atol=0
    )
    mu = posterior.draws()["mu"]
    exact = 0.8**2 + 0.3**2 + float(mu.var(correction=0))
    torch.testing.assert_close(prediction.variance, torch.full((6,), exact, dtype=DOUBLE), rtol=0.15, atol=0)
    one = from_prior(linear, (X, Y), 1)
    assert one.predict(X).draws == 1
    assert torch.equal(one.predict(X).epistemic, torch.zeros(6, dtype=DOUBLE))


def test_latents_of_rows_stream_reproducibly(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = from_prior(hierarchical, (X, Y), 50)
    monkeypatch.setattr(predictive, "CELLS", 100)
    prediction = posterior.predict(X, max_draws=50)
    assert len(prediction._blocks.blocks) == 3
    assert torch.equal(prediction.mean_by_draw, prediction.mean_by_draw)
    torch.testing.assert_close(prediction.mean_by_draw.mean(0), prediction.mean)


def mixture(x: Tensor, y: Tensor | None = None) -> None:
    centre = pyro.sample("centre", dist.Normal(torch.tensor([-1.0, 2.0], dtype=DOUBLE), 0.5).to_event(1))
    weight = pyro.sample("weight", dist.Beta(torch.tensor(3.0, dtype=DOUBLE), 2.0))
    with pyro.plate("data", len(x)):
        side = pyro.sample("side", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(torch.where(side > 0, centre[1], centre[0]), 0.4), obs=y)


def test_discrete_latents_of_new_rows_are_drawn() -> None:
    posterior = from_prior(mixture, (X, Y), 3000)
    draws = posterior.draws()
    prediction = posterior.predict(X, max_draws=3000)
    share = draws["weight"]
    mean = (share * draws["centre"][:, 1] + (1 - share) * draws["centre"][:, 0]).mean()
    each = prediction.mean_by_draw
    assert ((each.mean(0) - mean).abs() < 4 * each.std(0) / math.sqrt(3000)).all()
    # Summed out by the density, sampled by the prediction: the same up to the Monte-Carlo error.
    exact = torch.stack(
        [
            (weight * one.exp()[:, 1] + (1 - weight) * one.exp()[:, 0]).log()
            for weight, one in zip(
                share, dist.Normal(draws["centre"][:, None, :], 0.4).log_prob(Y[None, :, None]), strict=True
            )
        ]
    )
    torch.testing.assert_close(posterior.log_likelihood(X, Y, max_draws=3000), exact, rtol=1e-9, atol=1e-9)
    sampled = prediction.log_prob_by_draw(Y).exp()
    error = sampled.std(0) / math.sqrt(3000)
    assert ((sampled.mean(0) - exact.exp().mean(0)).abs() < 4 * error).all()


def test_discrete_latents_of_all_rows_are_refused() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=DOUBLE)))
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu + 10 * k, 1.0), obs=y)

    posterior = from_prior(program, (X, Y))
    with pytest.raises(ModelError, match=r"\['k'\] belong to all rows"):
        posterior.predict(X)
    # Before there are data the prior's value is right.
    prior = bdl.prior_predictive(program, (X, Y), 2000)
    assert float(prior.mean.mean()) == pytest.approx(5.0, abs=0.5)
    assert float(prior.epistemic[0]) == pytest.approx(26.0, rel=0.1)


def two_sites(x: Tensor, y: Tensor | None = None, count: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.tensor(1.0, dtype=DOUBLE), 0.1))
    with pyro.plate("data", len(x)):
        middle = pyro.sample("y", dist.Normal(w * x[:, 0], 0.5), obs=y)
        pyro.sample("count", dist.Normal(2 * middle, 0.2), obs=count)


def test_observed_sites_before_the_target_are_drawn_unless_given() -> None:
    posterior = from_prior(two_sites, {"x": X, "y": Y, "count": 2 * Y}, 500)
    with pytest.raises(ModelError, match=r"y, count.*predict\(x, site="):
        posterior.predict({"x": X})
    w = posterior.draws()["w"]
    first = posterior.predict({"x": X}, site="y", max_draws=500)
    torch.testing.assert_close(first.mean_by_draw, w[:, None] * X[:, 0])
    second = posterior.predict({"x": X}, site="count", max_draws=3000)
    assert second.draws == 3000
    expected = 2 * w.mean() * X[:, 0]
    assert ((second.mean - expected).abs() < 4 * 2 * 0.6 / math.sqrt(500)).all()
    noise = second.mean_by_draw - 2 * w.repeat_interleave(6)[:, None] * X[:, 0]
    assert (noise.std(0) - 1.0).abs().max() < 0.07
    given = posterior.predict({"x": X, "y": Y}, site="count")
    torch.testing.assert_close(given.mean, 2 * Y)
    density = posterior.log_likelihood({"x": X, "y": Y, "count": 2 * Y})
    both = dist.Normal(w[:, None] * X[:, 0], 0.5).log_prob(Y) + dist.Normal(2 * Y, 0.2).log_prob(2 * Y)
    torch.testing.assert_close(density, both)


def test_all_latents_drawn_anew() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(x[:, 0], 1.0))
            pyro.sample("y", dist.Normal(theta, 0.1), obs=y)

    prediction = from_prior(program, (X, Y), 2).predict(X[:3], max_draws=2000)
    assert ((prediction.mean - X[:3, 0]).abs() < 4 / math.sqrt(2000)).all()


def test_coupled_rows_are_predicted_together() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * (x[:, 0] - x[:, 0].mean()), 1.0), obs=y)

    posterior = from_prior(program, (X, Y))
    expected = posterior.draws()["w"][:, None] * (X[:, 0] - X[:, 0].mean())
    torch.testing.assert_close(posterior.predict(X, batch_size=6).mean_by_draw, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictive, "CELLS", 1)
        torch.testing.assert_close(posterior.predict(X).mean_by_draw, expected)
    with pytest.raises(NotFactorised, match="coupled"):
        posterior.predict(X, batch_size=2)


# -- the prior predictive --------------------------------------------------------------------------------------------


def test_prior_predictive_is_the_mixture_over_prior_draws() -> None:
    prior = bdl.prior_predictive(linear, (X, Y), 4000, seed=2)
    assert prior.draws == 4000
    exact = X.square().sum(1)
    each = prior.mean_by_draw
    assert ((each.mean(0)).abs() < 4 * each.std(0) / math.sqrt(4000)).all()
    assert (prior.epistemic / exact - 1).abs().max() < 4 * math.sqrt(2 / 4000)
    assert float(prior.aleatoric[0]) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 4000))
    assert torch.equal(
        bdl.prior_predictive(linear, (X, Y), 50, seed=2).mean, bdl.prior_predictive(linear, (X, Y), 50, seed=2).mean
    )


def test_prior_predictive_in_raw_units_and_by_site() -> None:
    posterior, x, y = network("Gaussian")
    with untouched():
        prior = bdl.prior_predictive(posterior.problem.model, bdl.Dataset.from_arrays(x, y), 500)
    assert float(prior.mean.mean()) == pytest.approx(float(np.mean(y)), abs=4 * float(np.std(y)) / math.sqrt(100))
    assert bdl.prior_predictive(two_sites, {"x": X, "y": Y, "count": Y}, 10, site="y").draws == 10
