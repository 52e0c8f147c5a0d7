"""Pathfinder: its inverse Hessian against the formula written out, its paths on targets whose law is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.infer import pathfinder
from bayesdl.infer.inverse_hessian import inverse_hessian, next_diagonal
from bayesdl.infer.loop import Run
from bayesdl.infer.pathfinder import DRAWS, PathfinderEngine
from tests.infer.targets import CENTRE, COVARIANCE, Target, banana, correlated, funnel, normal

DOUBLE = torch.float64
LOG_2PI = math.log(2.0 * math.pi)


def paths(target: Any, chains: int, *, spread: float = 1.0, seed: int = 0, begin: Tensor | None = None) -> Any:
    """The starts ``[C, D]`` and the last state of the paths from wide prior draws."""
    begin = spread * target.prior_draws(chains, seed) if begin is None else begin
    engine = PathfinderEngine(target, begin, seed)
    state = Run(progress=False).drive(engine, target)
    return engine.result(state), state


def written_out(diagonal: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The dense inverse Hessian after the BFGS updates of some pairs, one after the other (Nocedal & Wright, 6.17)."""
    h, eye = diagonal.diag(), torch.eye(len(diagonal), dtype=DOUBLE)
    for s, y in pairs:
        left = eye - torch.outer(s, y) / (s @ y)
        h = left @ h @ left.T + torch.outer(s, s) / (s @ y)
    return h


@pytest.mark.parametrize("dim", [2, 5, 20])
def test_inverse_hessian_is_that_of_the_bfgs_updates(dim: int) -> None:
    noise = generator(dim, "pairs")
    root = torch.randn(dim, dim, dtype=DOUBLE, generator=noise)
    precision = root @ root.T + torch.eye(dim, dtype=DOUBLE)
    steps = torch.randn(2, 3, dim, dtype=DOUBLE, generator=noise)
    changes = steps @ precision
    steps[1, 0] = changes[1, 0] = 0.0  # the second chain has two pairs yet
    diagonal = 0.1 + torch.rand(2, dim, dtype=DOUBLE, generator=noise)
    found = inverse_hessian(diagonal, steps, changes)
    for k, pairs in enumerate((range(3), range(1, 3))):
        exact = written_out(diagonal[k], [(steps[k, j], changes[k, j]) for j in pairs])
        dense = found.times(torch.eye(dim, dtype=DOUBLE)[:, None].expand(dim, 2, dim).reshape(-1, dim)[:2])
        torch.testing.assert_close(dense[k], exact[0])
        root_k = found.root(torch.eye(dim, dtype=DOUBLE).expand(2, dim, dim))[k].T
        torch.testing.assert_close(root_k @ root_k.T, exact)
        torch.testing.assert_close(found.log_det()[k], torch.logdet(exact))
        torch.testing.assert_close(found.variances()[k], exact.diagonal())


def test_dependent_directions_fall_back_on_the_diagonal() -> None:
    step = torch.ones(1, 1, 4, dtype=DOUBLE)
    broken = torch.cat([step, step * math.inf], 1)
    found = inverse_hessian(torch.full((1, 4), 2.0, dtype=DOUBLE), broken, broken)
    torch.testing.assert_close(found.times(step[0]), 2.0 * step[0])
    torch.testing.assert_close(found.log_det(), torch.tensor([4.0 * math.log(2.0)], dtype=DOUBLE))


def test_diagonal_is_that_of_the_scaled_bfgs_update() -> None:
    noise = generator(0, "diagonal")
    step, diagonal = (0.1 + torch.rand(1, 4, dtype=DOUBLE, generator=noise) for _ in range(2))
    change = step * torch.tensor([[0.01, 1.0, 25.0, 3.0]], dtype=DOUBLE)
    s, y = step[0], change[0]
    hessian = (1.0 / diagonal[0]).diag() * (y @ (diagonal[0] * y)) / (s @ y)
    hs = hessian @ s
    hessian = hessian - torch.outer(hs, hs) / (s @ hs) + torch.outer(y, y) / (s @ y)
    torch.testing.assert_close(next_diagonal(diagonal, step, change)[0], 1.0 / hessian.diagonal())


def test_a_path_finds_a_gaussian_and_its_evidence() -> None:
    starts, state = paths(correlated(), 1000, spread=2.0)
    evidence = 0.5 * float(torch.logdet(COVARIANCE)) + 1.5 * LOG_2PI
    assert abs(float(state["best_elbo"].median()) - evidence) < 0.1
    root = torch.linalg.cholesky(COVARIANCE)
    off = torch.linalg.solve_triangular(root, (starts - CENTRE).T, upper=False)
    # of 1000 independent draws a mean is off by 0.032, a variance by 0.045 (1 s.e.); a few paths end early
    assert off.mean(1).abs().max() < 0.13
    assert (off.cov() - torch.eye(3, dtype=DOUBLE)).abs().max() < 0.18


def test_scales_far_apart_are_learnt() -> None:
    scales = torch.logspace(-2, 1, 20, dtype=DOUBLE)
    starts, state = paths(normal(scales), 100)
    assert (starts / scales).square().mean(0).sqrt().sub(1.0).abs().max() < 0.4
    best = float(state["best_elbo"].median())
    assert abs(best - float(scales.log().sum()) - 10.0 * LOG_2PI) < 1.0


def test_draws_behind_the_elbo_have_the_density_that_is_counted() -> None:
    target = correlated()
    engine = PathfinderEngine(target, target.prior_draws(3), 0)
    state: dict[str, Any] = {"step": 0} | engine.init()
    for _ in range(40):
        state = engine.step(state)
    assert state["iterates"].min() > 2
    found = inverse_hessian(state["diagonal"], state["steps"], state["changes"])
    for k in range(3):
        root = found.root(torch.eye(3, dtype=DOUBLE).expand(3, 3, 3))[k].T
        centre = state["z"][k] + state["direction"][k]
        law = torch.distributions.MultivariateNormal(centre, root @ root.T)
        torch.testing.assert_close(state["log_q"][k], law.log_prob(state["draws"][k]))


def test_the_start_is_chosen_by_importance_weight() -> None:
    # Draws of weights 1, 2, 3, 0, 2: how often each is kept is its share of their sum.
    chains = 20000
    target = normal(torch.ones(1, dtype=DOUBLE))
    engine = PathfinderEngine(target, torch.zeros(chains, 1, dtype=DOUBLE), 3)
    state = {"step": 0} | engine.init()
    state["phase"] = torch.ones_like(state["phase"])
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 2.0], dtype=DOUBLE)
    for k in range(DRAWS):
        at, drawing = state["phase"] - 1, torch.ones(chains, dtype=torch.bool)
        state = engine._drawn(
            state, drawing, torch.full((chains, 1), float(k), dtype=DOUBLE), weights[k].log().expand(chains), at
        )
    shares = torch.stack([(state["chosen"] == k).double().mean() for k in range(DRAWS)])
    assert (shares - weights / weights.sum()).abs().max() < 4.0 * math.sqrt(0.25 / chains)


@pytest.mark.parametrize("target", [funnel(), banana()], ids=["funnel", "banana"])
def test_curved_targets_end_with_starts_in_their_bulk(target: Target) -> None:
    wide = target.prior_draws(200, 1) * 5.0
    starts, state = paths(target, 200, begin=wide)
    value = target.value_and_grad(starts)[0]
    assert starts.isfinite().all()
    assert value.median() > target.value_and_grad(wide)[0].median() + 10.0
    assert starts.abs().max() < 20.0
    assert starts.std(0).min() > 0.3  # not all in the mode
    assert bool((state["phase"] == pathfinder.DONE).all())


def test_chains_are_independent_of_each_other() -> None:
    begin = funnel().prior_draws(7, 4)
    many, state = paths(funnel(), 7, seed=4, begin=begin)
    few, _ = paths(funnel(), 3, seed=4, begin=begin[:3])
    torch.testing.assert_close(many[:3], few)
    assert len(state["iterates"].unique()) > 1  # they ended at different times
    other, _ = paths(funnel(), 3, seed=5, begin=begin[:3])
    assert not torch.allclose(few, other)


@dataclass
class Walls:
    """A target that is NaN beyond radius 3, -inf beyond radius 2, and linear within."""

    target: Target

    def function(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.target.function(z)
        radius = z.norm(dim=1)
        value = torch.where(radius > 2.0, -math.inf, value)
        return torch.where(radius > 3.0, math.nan, value), torch.where((radius > 3.0)[:, None], math.nan, grad)


def test_places_without_a_density_are_survived() -> None:
    inner = normal(torch.tensor([1.0, 0.5], dtype=DOUBLE))
    walled = Target(Walls(inner).function, 2)
    begin = torch.tensor([[0.5, 0.5], [1.5, -0.5], [40.0, 3.0], [0.0, 0.0]], dtype=DOUBLE)
    starts, state = paths(walled, 4, begin=begin)
    assert (starts.norm(dim=1) < 2.0).all()
    assert state["best_elbo"].isfinite().any()
    nowhere = Target(lambda z: (z[:, 0] * math.nan, z * math.nan), 2)
    starts, state = paths(nowhere, 2)
    assert starts.isfinite().all()
    assert state["step"] == 0


def test_every_evaluation_of_every_chain_is_counted() -> None:
    target = correlated()
    engine = PathfinderEngine(target, target.prior_draws(4), 2)
    run = Run(progress=False)
    state = run.drive(engine, target)
    assert run.tally.gradients == target.gradients == 4 * (state["step"] + 1)
