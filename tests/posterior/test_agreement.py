"""Which chain is to blame: planted chains are named, perfect and slow ones are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.posterior import convergence
from bayesdl.posterior.agreement import agreement


def chains(count: int, draws: int, columns: int, rho: float = 0.0, seed: int = 0) -> Tensor:
    """Stationary autoregressions with unit variance, ``[C, S, P]``."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(draws, count, columns))
    x = np.empty_like(noise)
    x[0] = noise[0]
    for t in range(1, draws):
        x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * noise[t]
    return torch.from_numpy(x.transpose(1, 0, 2).copy())


@pytest.mark.parametrize(
    ("count", "draws", "rho"),
    [(1, 200, 0.5), (2, 200, 0.5), (4, 20, 0.0), (4, 100, 0.9), (4, 300, 0.9), (16, 60, 0.8), (64, 40, 0.0)],
)
def test_nobody_is_blamed_where_chance_explains_all(count: int, draws: int, rho: float) -> None:
    for seed in range(8):
        found = agreement(chains(count, draws, 40, rho, seed))
        assert (found.apart, found.moving, found.agreeing) == ((), (), count)


def test_stuck_chains_are_named() -> None:
    x = chains(64, 100, 30, 0.6)
    x[7] += 2.0  # elsewhere in every quantity
    x[21, :, 4] -= 1.5  # in one only
    x[40] *= 0.2  # too narrow
    x[41] = 0.3  # has not moved
    found = agreement(x)
    assert (found.apart, found.moving, found.agreeing) == ((7, 21, 40, 41), (), 60)
    assert float(convergence.rhat(x[[c for c in range(64) if c not in found.apart]]).max()) < 1.05


def test_a_stuck_chain_does_not_make_its_neighbours_look_wrong() -> None:
    x = chains(5, 400, 3)
    x[0] += 40.0
    x[1] += 2.0
    assert agreement(x).apart == (0, 1)
    assert agreement(1e6 * x + 1e8).apart == (0, 1)


@pytest.mark.parametrize("sizes", [(4, 3), (5, 2)])
def test_the_smaller_mode_is_the_one_apart(sizes: tuple[int, int]) -> None:
    x = chains(sum(sizes), 200, 10, 0.5)
    x[sizes[0] :] += 6.0
    assert agreement(x).apart == tuple(range(sizes[0], sum(sizes)))


@pytest.mark.parametrize("count", [2, 4, 16])
def test_halves_that_disagree_have_no_majority(count: int) -> None:
    x = chains(count, 200, 10, 0.5)
    x[count // 2 :] += 6.0
    found = agreement(x)
    assert found.apart == ()
    assert found.agreeing == count // 2
    assert found.moving == ()


def test_a_drifting_chain_is_moving() -> None:
    x = chains(8, 300, 5, 0.3)
    x[3] += torch.linspace(4, 0, 300)[:, None]
    found = agreement(x)
    assert found.moving == (3,)
    assert found.apart == (3,)
    step = chains(1, 300, 5, 0.3)
    step[:, 150:] += 3.0
    assert agreement(step).moving == (0,)


def test_what_is_constant_or_not_finite_is_left_out() -> None:
    x = chains(4, 50, 3)
    x[..., 0] = 5.0
    x[2, 3, 1] = torch.inf
    assert agreement(x).apart == ()
    x[1, :, 2] += 3.0
    assert agreement(x).apart == (1,)
    assert agreement(torch.ones(4, 50, 2)).agreeing == 4
