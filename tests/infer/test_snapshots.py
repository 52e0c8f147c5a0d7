"""Snapshot ensembles: members are the iterates at the ends of the cycles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import MethodError
from bayesdl.infer.schedules import Constant, Cyclical
from tests.cases import conjugate, dataset, network


@pytest.mark.parametrize(("steps", "length"), [(60, 20), (61, 21)])
def test_members_are_the_iterates_at_the_ends_of_cycles(steps: int, length: int) -> None:
    path: list[Tensor] = []
    method = bdl.SnapshotEnsemble(steps=steps, cycles=3, batch_size=7)
    posterior = method.fit(
        network("regression"), dataset("regression"), callback=lambda state: bool(path.append(state["z"][0]))
    )
    assert len(path) == 3 * length
    expected = torch.stack([path[(k + 1) * length - 1] for k in range(3)])
    assert torch.equal(posterior.z, expected.unsqueeze(1))
    assert torch.pdist(expected).min() > 0.01


def test_the_rate_is_a_cosine_a_cycle_as_training_with_that_schedule() -> None:
    settings: dict[str, Any] = {"steps": 40, "batch_size": 10, "optimizer": "sgd"}
    snapshots = bdl.SnapshotEnsemble(cycles=2, learning_rate=0.1, **settings).fit(conjugate().program, conjugate().data)
    plain = bdl.MAP(learning_rate=Cyclical(0.1, 40, 2), **settings).fit(conjugate().program, conjugate().data)
    assert torch.equal(snapshots.z[-1], plain.z[0])


def test_one_mode_gives_one_member_many_times() -> None:
    posterior = bdl.SnapshotEnsemble(steps=1200, cycles=3, learning_rate=0.05).fit(
        conjugate().program, conjugate().data
    )
    torch.testing.assert_close(posterior.draws()["w"], conjugate().mean().expand(3, 3), rtol=0, atol=1e-4)


def test_impossible_settings() -> None:
    with pytest.raises(MethodError, match="cycles=0"):
        bdl.SnapshotEnsemble(cycles=0)
    with pytest.raises(MethodError, match="learning_rate must be a number"):
        bdl.SnapshotEnsemble(learning_rate=Constant(0.1))
    with pytest.raises(MethodError, match="steps=3, cycles=4"):
        bdl.SnapshotEnsemble(steps=3, cycles=4)
    with pytest.raises(MethodError, match="before the end of the first cycle"):
        bdl.SnapshotEnsemble(steps=40, cycles=2).fit(
            conjugate().program, conjugate().data, callback=lambda state: state["step"] == 7
        )
