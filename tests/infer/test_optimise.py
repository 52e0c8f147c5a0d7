"""Maximum likelihood and MAP against closed forms; averages, early stopping, divergence, resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.density import forecast
from bayesdl.errors import Divergence, MethodError, ModelError
from bayesdl.infer.mc_dropout import MCDropout
from bayesdl.infer.optimise import MAP, MaximumLikelihood
from bayesdl.infer.optimisers import OPTIMISERS, AdamStep, ascend, slots_like
from bayesdl.infer.schedules import Constant, Polynomial
from bayesdl.infer.training import EMA_DECAY


def lognormal() -> None:
    pyro.sample("s", dist.LogNormal(torch.tensor(0.3, dtype=torch.float64), 0.8))


def test_map_is_ridge_with_the_ratio_of_variances(linear: Any) -> None:
    posterior = MAP(optimizer="lbfgs").fit(linear.model, linear.data)
    penalty = 0.5**2 / 0.4**2 * torch.eye(3, dtype=torch.float64)  # sigma^2 / tau^2 for the summed loss
    ridge = torch.linalg.solve(linear.x.T @ linear.x + penalty, linear.x.T @ linear.y)
    torch.testing.assert_close(posterior.draws()["w"], ridge.unsqueeze(0), rtol=0, atol=1e-7)
    least_squares = torch.linalg.lstsq(linear.x, linear.y).solution
    assert (ridge - least_squares).abs().max() > 1e-2  # the test tells them apart
    likeliest = MaximumLikelihood(optimizer="lbfgs").fit(linear.model, linear.data)
    torch.testing.assert_close(likeliest.draws()["w"][0], least_squares, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"optimizer": "adam", "learning_rate": 0.1}, 1e-6),
        ({"optimizer": "sgd"}, 1e-8),
        ({"optimizer": "rmsprop"}, 1e-4),
        ({"optimizer": "sgd", "clip_norm": 0.5}, 1e-6),
    ],
)
def test_first_order_optimisers_find_the_mode(linear: Any, settings: dict[str, Any], tolerance: float) -> None:
    posterior = MAP(**settings).fit(linear.model, linear.data)
    torch.testing.assert_close(posterior.draws()["w"][0], linear.posterior()[0], rtol=0, atol=tolerance)


def test_mini_batches_keep_the_weight_of_the_prior(linear: Any) -> None:
    method = MAP(
        batch_size=10, steps=4000, optimizer="sgd", learning_rate=Polynomial(0.3, 100.0, 1.0), average="polyak"
    )
    posterior = method.fit(linear.model, linear.data)
    mode = linear.posterior()[0]
    # Without the factor N/B the prior would weigh ten times as much, ten times too little if it were applied twice.
    for wrong in (0.1, 10.0):
        far = linear.posterior(likelihood_temperature=1 / wrong)[0]
        assert (far - mode).abs().max() > 0.02
    torch.testing.assert_close(posterior.draws()["w"][0], mode, rtol=0, atol=0.005)


def test_the_mode_is_that_of_the_constrained_density() -> None:
    posterior = MAP(optimizer="lbfgs").fit(lognormal, {})
    expected = torch.tensor([0.3 - 0.8**2], dtype=torch.float64).exp()
    torch.testing.assert_close(posterior.draws()["s"], expected, rtol=1e-6, atol=0)


def test_parameters_without_a_prior_are_estimated(linear: Any) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        sigma = pyro.param("sigma", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 100.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    start = {"w": torch.zeros(3, dtype=torch.float64), "sigma": torch.tensor(1.0, dtype=torch.float64)}
    posterior = MaximumLikelihood(optimizer="lbfgs").fit(model, linear.data, init=start)
    residual = linear.y - linear.x @ torch.linalg.lstsq(linear.x, linear.y).solution
    assert float(posterior.draws()["sigma"][0]) == pytest.approx(float(residual.square().mean().sqrt()), rel=1e-6)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda z: torch.optim.Adam([z], lr=0.1)),
        ("rmsprop", lambda z: torch.optim.RMSprop([z], lr=0.1)),
        ("sgd", lambda z: torch.optim.SGD([z], lr=0.1, momentum=0.9)),
    ],
)
def test_optimisers_give_the_numbers_of_torch(name: str, reference: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, generator=noise, dtype=torch.float64)
    theirs = z.clone().requires_grad_()
    optimiser, slots = reference(theirs), slots_like(name, z)
    assert set(slots) == {f"slot.{slot}" for slot in OPTIMISERS[name][1]}
    for step in range(60):
        gradient = torch.randn(4, 5, generator=noise, dtype=torch.float64)
        before = {key: value.clone() for key, value in slots.items()} | {"z": z.clone()}
        moved, new = ascend(name, z, -70.0 * gradient, slots, step, 0.1, times=70.0)
        assert all(torch.equal((slots | {"z": z})[key], before[key]) for key in before)  # pure
        z = moved
        slots = new
        theirs.grad = gradient
        optimiser.step()
    torch.testing.assert_close(z, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_adam_along_with_its_gradient_is_adam() -> None:
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, generator=noise, dtype=torch.float64)
    whole, slots = z, slots_like("adam", z)
    first = second = torch.zeros_like(z)
    for step in range(60):
        gradient = torch.randn(4, 5, generator=noise, dtype=torch.float64)
        whole, slots = ascend("adam", whole, 70.0 * gradient, slots, step, 0.1, times=70.0)
        settings = AdamStep.settings(z, step, 0.1)
        answer = torch.ones(4), 70.0 * gradient
        value, slope, z, first, second = AdamStep(70.0)(z, first, second, settings, lambda _, answer=answer: answer)
        assert value is answer[0]
        torch.testing.assert_close(slope, 70.0 * gradient.sum(1))
    torch.testing.assert_close(z, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [10, None])
def test_a_compiled_update_is_the_same_update(
    batch_size: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a run that is stopped and goes on ends where an unbroken one does."""
    data = bdl.data.load("diabetes").train
    model = bdl.models.mlp(data, hidden=(8,))
    method = bdl.DeepEnsemble(members=3, steps=40, batch_size=batch_size)
    replayed: Any = bdl.fit(model, data, method, progress=False)
    monkeypatch.setattr(forecast, "pays", lambda *counts: True)
    compiled: Any = bdl.fit(model, data, method, progress=False)
    assert (replayed.problem.density.execution, compiled.problem.density.execution) == ("replay", "compile")
    torch.testing.assert_close(compiled.z, replayed.z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(compiled.info["loss_trace"]), torch.tensor(replayed.info["loss_trace"]), rtol=1e-5, atol=1e-6
    )
    checkpoint = bdl.Checkpoint(tmp_path / "run.ckpt", every=10)
    bdl.fit(model, data, method, progress=False, checkpoint=checkpoint, callback=lambda state: state["step"] == 15)
    resumed: Any = bdl.fit(model, data, method, progress=False, checkpoint=checkpoint)
    assert torch.equal(resumed.z, compiled.z)


@pytest.mark.parametrize("average", ["polyak", "ema"])
def test_averages_are_means_of_the_iterates(linear: Any, average: str) -> None:
    path: list[Tensor] = []
    method = MAP(steps=40, batch_size=10, learning_rate=Constant(0.05), average=average)
    posterior = method.fit(linear.model, linear.data, callback=lambda state: bool(path.append(state["z"])))
    iterates = torch.cat(path)
    weights = torch.zeros(40, dtype=torch.float64)
    if average == "polyak":
        weights[20:] = 1.0
    else:
        weights = EMA_DECAY ** torch.arange(39, -1, -1, dtype=torch.float64)
    expected = (weights / weights.sum()) @ iterates
    torch.testing.assert_close(posterior.draws()["w"][0], expected, rtol=1e-10, atol=1e-12)


def test_averaging_takes_the_gradient_noise_out(linear: Any) -> None:
    settings = {"steps": 3000, "batch_size": 5, "optimizer": "sgd", "learning_rate": Constant(0.02)}
    mode = linear.posterior()[0]
    last, mean = (
        (MAP(**settings, average=average).fit(linear.model, linear.data).draws()["w"][0] - mode).norm()
        for average in (None, "polyak")
    )
    assert mean < last / 3


def test_early_stopping_returns_the_best_on_rows_that_it_did_not_train_on() -> None:
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(60, 40, generator=noise, dtype=torch.float64)
    y = x[:, 0] + torch.randn(60, generator=noise, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(40, dtype=torch.float64), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    start = {"w": torch.zeros(40, dtype=torch.float64)}
    method = MAP(validation=0.3, patience=5, optimizer="sgd", learning_rate=Constant(0.01))
    posterior = method.fit(model, (x, y), init=start)
    full = MAP(optimizer="sgd", learning_rate=Constant(0.01)).fit(model, (x, y), init=start)
    assert posterior.info["steps"] < full.info["steps"]
    truth = torch.zeros(40, dtype=torch.float64)
    truth[0] = 1.0
    assert (posterior.draws()["w"][0] - truth).norm() < (full.draws()["w"][0] - truth).norm()
    # the loss that was reached is that of 18 rows which the training density does not hold
    problem = posterior.problem
    nll = -problem.density.log_likelihood(posterior.z[:, 0])[0]
    from bayesdl._rng import generator

    held = torch.randperm(60, generator=generator(0, "validation"))[:18]
    assert posterior.info["validation_nll"][0] == pytest.approx(float(nll[held].mean()), rel=1e-10)


@pytest.mark.parametrize("gradient", ["plain", "saga", "svrg"])
def test_control_variates_reach_the_exact_optimum_at_a_constant_step(linear: Any, gradient: str) -> None:
    """C11-16, C11-18: ridge regression, a linear rate where plain mini-batches stay at a floor; also T22."""
    x, mode = linear.x, linear.posterior()[0]
    curvature = float(x.square().sum(1).max()) / 0.5**2  # of the stiffest row; momentum 0.9 makes the step ten times it
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    method = MAP(
        epochs=70, batch_size=2, optimizer="sgd", learning_rate=Constant(0.1 / (3 * curvature)), gradient=gradient
    )
    path: list[Tensor] = []
    posterior = method.fit(linear.model, linear.data, init=start, callback=lambda state: bool(path.append(state["z"])))
    gaps = [float((z[0] - mode).norm()) for z in path[:: len(path) // 5]]
    if gradient == "plain":
        assert (posterior.draws()["w"][0] - mode).norm() > 1e-3
    else:
        assert (posterior.draws()["w"][0] - mode).norm() < 1e-9
        # a line over epochs: each fifth gains at least a decade
        assert all(after < before / 10 for before, after in itertools.pairwise(gaps[1:]))


def test_a_control_variate_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(MethodError, match="give a batch_size"):
        MAP(gradient="saga")
    with pytest.raises(MethodError, match="masks are drawn anew"):
        MCDropout(gradient="svrg", batch_size=8)


def test_the_loss_curve_is_the_joint_per_row(linear: Any) -> None:
    start = {"w": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)}
    posterior = MAP(steps=3).fit(linear.model, linear.data, init=start)
    z = posterior.problem.density.unconstrain(start)
    expected = -float(posterior.problem.density.log_density(z, target="joint")) / len(linear.y)
    assert posterior.info["loss_trace"][0][0] == pytest.approx(expected, rel=1e-12)
    assert posterior.info["gradients"] == 3


def test_divergence_is_an_error_that_says_where_and_what_to_do(linear: Any) -> None:
    with pytest.raises(Divergence, match=r"step \d+ of 2000 .*learning rate was 50: try 5"):
        MAP(optimizer="sgd", learning_rate=Constant(50.0)).fit(linear.model, linear.data)
    with pytest.raises(Divergence, match="start itself"):
        MAP().fit(linear.model, linear.data, init={"w": torch.full((3,), 1e200, dtype=torch.float64)})


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 120, "batch_size": 7, "average": "ema", "validation": 0.2},
        {"steps": 120, "optimizer": "rmsprop", "average": "polyak"},
    ],
)
@pytest.mark.parametrize("stop", [1, 61])
def test_resume_is_bit_for_bit(linear: Any, tmp_path: Any, settings: dict[str, Any], stop: int) -> None:
    method = MAP(**settings)
    whole = method.fit(linear.model, linear.data, seed=5)
    path = tmp_path / "map"
    first = method.fit(linear.model, linear.data, seed=5, checkpoint=path, callback=lambda state: state["step"] == stop)
    assert first.info["steps"] == stop
    second = method.fit(linear.model, linear.data, seed=5, checkpoint=path)
    assert torch.equal(second.z, whole.z)
    assert second.info["loss_trace"] == whole.info["loss_trace"]
    assert second.info["gradients_here"] == 120 - stop + 1


def test_same_seed_same_result_and_global_generators_untouched(linear: Any) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    method = MAP(steps=20, batch_size=10)
    first, again, other = (method.fit(linear.model, linear.data, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.z, again.z)
    assert not torch.equal(first.z, other.z)


def test_starts(linear: Any) -> None:
    start = MAP(steps=1, optimizer="sgd", learning_rate=Constant(1e-12))
    given = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    here = start.fit(linear.model, linear.data, init={"w": given})
    torch.testing.assert_close(here.draws()["w"][0], given)
    there = start.fit(linear.model, linear.data, init=here)
    torch.testing.assert_close(there.draws()["w"][0], given)
    mode = start.fit(linear.model, linear.data, init="map").draws()["w"][0]
    torch.testing.assert_close(mode, linear.posterior()[0], rtol=0, atol=0.05)
    with pytest.raises(MethodError, match="init='modes' is unknown"):
        start.fit(linear.model, linear.data, init="modes")
    with pytest.raises(ModelError, match="unknown: \\['v'\\]"):
        start.fit(linear.model, linear.data, init={"v": given})
    with pytest.raises(MethodError, match="NaN"):
        start.fit(linear.model, linear.data, init={"w": given * torch.nan})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, r"steps=0"),
        ({"steps": 2.5}, r"steps=2\.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"optimizer": "adamw"}, "optimizer='adamw'"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0"),
        ({"validation": 1.0}, r"validation=1\.0"),
        ({"average": "mean"}, "average='mean'"),
        ({"temperature": 2.0}, r"only temperature=1"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"optimizer": "lbfgs", "clip_norm": 1.0}, "leave out .*clip_norm"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        MAP(**settings)


def test_methods_that_do_not_apply_say_why(linear: Any) -> None:
    with pytest.raises(MethodError, match="mini-batches"):
        MAP(batch_size=10).fit(lognormal, {})
    with pytest.raises(MethodError, match="early stopping"):
        MAP(validation=0.1).fit(lognormal, {})
    with pytest.raises(MethodError, match="prior_rows"):
        MAP().fit(linear.model, linear.data, prior_rows=0.5)
    with pytest.raises(MethodError, match=r"seed=0\.5"):
        MAP().fit(linear.model, linear.data, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="validate with"):
        MAP(validation=0.001).fit(linear.model, linear.data)
