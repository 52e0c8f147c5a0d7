"""Deep ensembles: members trained side by side are the members trained alone."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl.data import Dataset
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.ensemble import DeepEnsemble, EnsembleEngine, known_noise
from bayesdl.infer.optimise import MAP
from bayesdl.infer.schedules import Constant
from bayesdl.models import mlp
from bayesdl.posterior.problem import prepare
from tests.cases import conjugate


@pytest.fixture(scope="module")
def data() -> Dataset:
    noise = torch.Generator().manual_seed(11)
    x = torch.randn(45, 2, generator=noise, dtype=torch.float64)
    y = torch.sin(x[:, 0]) + 0.1 * torch.randn(45, generator=noise, dtype=torch.float64)
    return Dataset.from_arrays(x, y)


SETTINGS = [
    {"steps": 60},
    {"steps": 60, "batch_size": 10, "clip_norm": 0.2, "average": "ema"},
    {"steps": 150, "optimizer": "sgd", "learning_rate": Constant(0.1), "validation": 0.3, "patience": 1},
    {"steps": 60, "optimizer": "lbfgs"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_member_does_not_depend_on_the_others(data: Dataset, settings: dict[str, Any]) -> None:
    model = mlp(data, hidden=(4,))
    alone = MAP(**settings).fit(model, data, seed=3)
    two = DeepEnsemble(members=2, **settings).fit(model, data, seed=3)
    four = DeepEnsemble(members=4, **settings).fit(model, data, seed=3)
    assert four.z.shape == (4, 1, four.problem.density.dim)
    # Rounding differs between batch sizes and grows along the path, fastest through line searches.
    tolerance = 1e-4 if "lbfgs" in settings.values() else 1e-8
    torch.testing.assert_close(four.z[:1], alone.z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(four.z[:2], two.z, rtol=tolerance, atol=tolerance)
    apart = torch.cdist(four.z[:, 0], four.z[:, 0])[~torch.eye(4, dtype=torch.bool)]
    assert apart.min() > 0.1


def test_early_stopping_is_each_members_own(data: Dataset) -> None:
    settings = SETTINGS[2]
    stopped: dict[int, list[bool]] = {}
    DeepEnsemble(members=4, **settings).fit(
        mlp(data, hidden=(4,)),
        data,
        seed=3,
        callback=lambda state: bool(stopped.update({state["step"]: state["active"].tolist()})),
    )
    assert any(any(active) and not all(active) for active in stopped.values())


def test_members_see_their_own_order_and_every_row_once_an_epoch(data: Dataset) -> None:
    problem = prepare(mlp(data), data)
    order = DataOrder(problem, 10, 3, seed=0)
    state = order.init()
    assert order.batches == 4
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(4):
            rows, changed = order.next(state)
            assert rows is not None
            state |= changed
            seen.append(rows)
        rows = torch.cat(seen, dim=1)
        assert rows.shape == (3, 40)
        assert all(len(member.unique()) == 40 for member in rows)
        epochs.append(rows)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    batch = problem.minibatch(epochs[0][:, :10])
    torch.testing.assert_close(batch["x"][2], problem.batch["x"][epochs[0][2, :10]])


@pytest.mark.parametrize("settings", SETTINGS)
def test_resume_is_bit_for_bit(data: Dataset, tmp_path: Any, settings: dict[str, Any]) -> None:
    model, method = mlp(data, hidden=(4,)), DeepEnsemble(members=3, **settings)
    stop = 2 if settings.get("optimizer") == "lbfgs" else 33
    whole = method.fit(model, data)
    method.fit(model, data, checkpoint=tmp_path / "run", callback=lambda state: state["step"] == stop)
    resumed = method.fit(model, data, checkpoint=tmp_path / "run")
    assert torch.equal(resumed.z, whole.z)
    assert 0 < resumed.info["gradients_here"] < resumed.info["gradients"]


def test_training_steps_from_several_starts_disagree_away_from_the_data(data: Dataset) -> None:
    posterior = DeepEnsemble(members=5, steps=500).fit(mlp(data, hidden=(8,)), data)
    near, far = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 8.0, dtype=torch.float64)
    assert posterior.predict(far).epistemic[0] > 10 * posterior.predict(near).epistemic[0] > 0
    assert posterior.info["members_in_parallel"]
    assert len(posterior.info["loss_trace"]) == 5


def test_divergence_names_the_member(linear: Any) -> None:
    start = {"w": torch.zeros(3, 3, dtype=torch.float64)}
    start["w"][1] = 1e200
    with pytest.raises(Divergence, match=r"member \[1\] of 3"):
        DeepEnsemble(members=3, optimizer="sgd").fit(linear.model, linear.data, init=start)


def test_bad_settings() -> None:
    with pytest.raises(MethodError, match="members=0"):
        DeepEnsemble(members=0)
    with pytest.raises(MethodError, match="only temperature=1"):
        DeepEnsemble(temperature=0.5)


# -- members with problems of their own, against ridge regression in closed form ---------------------------------------


EXACT = {
    "anchored": lambda p, a, prior: p @ prior @ p,
    "perturbed": lambda p, a, prior: p @ a @ p,
    "both": lambda p, a, prior: p,
}
FLAGS: dict[str, dict[str, Any]] = {
    "anchored": {"anchored": True},
    "perturbed": {"perturbed": True},
    "both": {"anchored": True, "perturbed": True},
}


@pytest.mark.parametrize("kind", FLAGS)
def test_members_spread_by_the_covariance_of_the_closed_form(kind: str) -> None:
    case, members = conjugate(), 1500
    method = DeepEnsemble(members=members, steps=400, optimizer="sgd", learning_rate=0.02, **FLAGS[kind])
    draws = method.fit(case.program, case.data).draws()["w"]
    data = case.x.T @ case.x / case.sigma**2
    prior = torch.eye(3, dtype=torch.float64) / case.prior**2
    covariance = EXACT[kind](case.covariance(), data, prior)
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (draws - case.mean()).T, upper=False)
    # standard errors of a mean, a variance and a correlation of M independent standard normal draws
    assert white.mean(1).abs().max() < 4 / members**0.5
    second = white @ white.T / members
    assert (second.diagonal() - 1).abs().max() < 4 * (2 / members) ** 0.5
    assert second[~torch.eye(3, dtype=torch.bool)].abs().max() < 4 / members**0.5
    if kind != "both":
        assert (covariance.diagonal() < 0.9 * case.covariance().diagonal()).any()


def test_each_member_is_the_ridge_estimate_of_its_own_problem() -> None:
    case = conjugate()
    method = DeepEnsemble(members=3, steps=1500, optimizer="sgd", anchored=True, perturbed=True, bootstrap=True)
    posterior = method.fit(case.program, case.data)
    engine = EnsembleEngine(method, posterior.problem, 0, 3, lambda: torch.zeros(3, 3))
    assert engine.rows is not None
    assert engine.targets is not None
    assert engine.anchors is not None
    for k in range(3):
        x, y = case.x[engine.rows[k]], engine.targets[k][engine.rows[k]]
        precision = x.T @ x / case.sigma**2 + torch.eye(3, dtype=torch.float64) / case.prior**2
        right = x.T @ y / case.sigma**2 + engine.anchors[k] * case.prior / case.prior**2
        torch.testing.assert_close(posterior.z[k, 0], torch.linalg.solve(precision, right), rtol=0, atol=1e-7)
    assert all(len(rows.unique()) < 60 for rows in engine.rows)


def test_gradients_of_an_epoch_average_to_that_of_each_members_own_rows() -> None:
    problem, z = prepare(conjugate().program, conjugate().data), torch.full((3, 3), 0.2, dtype=torch.float64)
    flags = {"anchored": True, "perturbed": True, "bootstrap": True}
    methods = [DeepEnsemble(members=3, batch_size=size, **flags) for size in (None, 12)]
    whole, parts = (EnsembleEngine(method, problem, 0, 3, lambda: z) for method in methods)
    value, expected = whole.value_and_grad(z, whole.batch({}, None))
    state, values, gradients = parts.init(), [], []
    for _ in range(5):
        order, moved = parts.order.next(state)
        state |= moved
        found = parts.value_and_grad(z, parts.batch(state, order))
        values.append(found[0])
        gradients.append(found[1])
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)
    torch.testing.assert_close(torch.stack(values).mean(0), value)
    # the value is that of the density with the member's prior mean, written out
    assert whole.rows is not None
    assert whole.targets is not None
    assert whole.anchors is not None
    case, rows = conjugate(), whole.rows[1]
    noise = torch.distributions.Normal(case.x[rows] @ z[1], case.sigma).log_prob(whole.targets[1][rows]).sum()
    prior = torch.distributions.Normal(whole.anchors[1] * case.prior, case.prior).log_prob(z[1]).sum()
    torch.testing.assert_close(value[1], noise + prior)


def test_bootstrapped_means_spread_by_sd_over_root_n() -> None:
    y = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def program(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1e3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    method = DeepEnsemble(members=2000, steps=200, optimizer="sgd", learning_rate=0.1, bootstrap=True)
    means = method.fit(program, (torch.zeros(200, 1).double(), y)).draws()["mean"]
    expected = float(y.std(correction=0)) / 200**0.5
    assert float(means.std()) == pytest.approx(expected, rel=4 / (2 * 2000) ** 0.5)
    assert float(means.mean()) == pytest.approx(float(y.mean()), abs=4 * expected / 2000**0.5)


def test_the_committee_errs_at_most_as_much_as_its_members_on_average(data: Dataset) -> None:
    posterior = DeepEnsemble(members=4, steps=100, bootstrap=True).fit(mlp(data, hidden=(4,)), data)
    prediction = posterior.predict(data.x)
    each = (prediction.mean_by_draw - data.y).square().mean(1)
    gap = each.mean() - (prediction.mean - data.y).square().mean()
    # Jensen's inequality; the gap is the members' disagreement
    torch.testing.assert_close(gap, prediction.epistemic.mean())
    assert gap > 0


def test_randomised_ensembles_say_what_they_need(data: Dataset) -> None:
    with pytest.raises(MethodError, match=r"perturbed=True.*known size"):
        DeepEnsemble(steps=2, perturbed=True).fit(mlp(data), data)
    with pytest.raises(MethodError, match="leave out .*anchored"):
        DeepEnsemble(optimizer="lbfgs", anchored=True)
    with pytest.raises(MethodError, match="bootstrap=2"):
        DeepEnsemble(bootstrap=2)  # type: ignore[arg-type]

    def hierarchical(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    with pytest.raises(MethodError, match="independent Gaussian over z"):
        DeepEnsemble(anchored=True).fit(hierarchical, (data.x.float(), data.y.float()))


def test_a_known_noise_in_raw_units_is_added_in_model_units(data: Dataset) -> None:
    from bayesdl.models.likelihoods import Gaussian

    posterior = DeepEnsemble(members=2, steps=2, perturbed=True).fit(mlp(data, likelihood=Gaussian(noise=0.2)), data)
    target, sd = known_noise("DeepEnsemble", posterior.problem)
    torch.testing.assert_close(sd, torch.full_like(target, 0.2))
    torch.testing.assert_close(target, posterior.problem.batch["y"])
