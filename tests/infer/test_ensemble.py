"""Deep ensembles: members trained side by side are the members trained alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bayesdl.data import Dataset
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.ensemble import DeepEnsemble
from bayesdl.infer.optimise import MAP
from bayesdl.infer.schedules import Constant
from bayesdl.models import mlp
from bayesdl.posterior.problem import prepare


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
