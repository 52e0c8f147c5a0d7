"""SVGD: its direction against autograd, its limits against Gaussian targets."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import DataError, MethodError
from bayesdl.infer.svgd import SVGDEngine, stein_direction
from bayesdl.posterior import prepare
from tests.cases import conjugate

DOUBLE = torch.float64


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize(("count", "dim", "offset"), [(2, 3, 0.0), (7, 3, 0.0), (6, 40, 1e4)])
def test_the_direction_is_that_of_the_kernels_gradients_by_autograd(count: int, dim: int, offset: float) -> None:
    z, gradient = rows(count, dim) + offset, rows(count, dim, 1)
    distances = torch.pdist(z)
    width = distances.median() ** 2 / math.log(count)
    expected = torch.zeros_like(z)
    for i in range(count):
        for j in range(count):
            other = z[j].clone().requires_grad_()
            kernel = torch.exp(-(other - z[i]).square().sum() / width)
            expected[i] += kernel.detach() * gradient[j] + torch.autograd.grad(kernel, other)[0]
    torch.testing.assert_close(stein_direction(z, gradient), expected / count, rtol=1e-6, atol=1e-9)


def test_particles_at_one_point_move_as_one() -> None:
    z, gradient = rows(1, 3).expand(4, 3), rows(1, 3, 1).expand(4, 3)
    torch.testing.assert_close(stein_direction(z, gradient), gradient)


def test_many_particles_in_few_dimensions_have_the_moments_of_the_posterior() -> None:
    case = conjugate()
    method = bdl.SVGD(particles=100, steps=350, learning_rate=0.05)
    draws = method.fit(case.program, case.data, init="prior").draws()["w"]
    sd = case.covariance().diagonal().sqrt()
    assert ((draws.mean(0) - case.mean()).abs() / sd).max() < 0.02
    ratio = torch.linalg.solve(case.covariance(), torch.cov(draws.T))
    eigenvalues = torch.linalg.eigvals(ratio).real
    assert eigenvalues.min() > 0.8
    assert eigenvalues.max() < 1.1


def test_in_many_dimensions_the_variance_collapses() -> None:
    def program(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(100, dtype=DOUBLE), 1.0).to_event(1))

    draws = bdl.SVGD(particles=10, steps=400, learning_rate=0.1).fit(program, {"x": torch.zeros(1)}, init="prior")
    variance = draws.draws()["w"].var(0).mean()
    assert 0.01 < variance < 0.05  # 0.026; the posterior's is 1


def test_temperature_scales_the_covariance() -> None:
    case = conjugate()
    cold, hot = (
        bdl.SVGD(particles=40, steps=400, learning_rate=0.1, temperature=t).fit(case.program, case.data, init="prior")
        for t in (1.0, 4.0)
    )
    ratio = hot.draws()["w"].var(0) / cold.draws()["w"].var(0)
    torch.testing.assert_close(ratio, torch.full((3,), 4.0, dtype=DOUBLE), rtol=0.1, atol=0)


def test_one_particle_is_the_mode_over_z() -> None:
    def program(x: Tensor) -> None:
        pyro.sample("s", dist.LogNormal(torch.tensor(0.3, dtype=DOUBLE), 0.8))

    one = bdl.SVGD(particles=1, steps=400).fit(program, {"x": torch.zeros(1)})
    assert float(one.draws()["s"].log()) == pytest.approx(0.3, abs=1e-3)  # in the constrained space: 0.3 - 0.64
    assert float(bdl.MAP(steps=400).fit(program, {"x": torch.zeros(1)}).draws()["s"].log()) == pytest.approx(
        -0.34, abs=1e-2
    )


def test_directions_of_an_epochs_mini_batches_average_to_that_of_all_rows() -> None:
    case, z = conjugate(), 0.3 * rows(5, 3)
    problem = prepare(case.program, case.data)
    engine = SVGDEngine(bdl.SVGD(particles=5, batch_size=12), problem, 0, 5, lambda: z)
    state: dict[str, Any] = engine.init()
    found = []
    for _ in range(5):
        order, moved = engine.order.next(state)
        state |= moved
        assert order is not None
        assert order.shape == (1, 12)
        found.append(engine.value_and_grad(z, engine.batch(state, order))[1])
    torch.testing.assert_close(torch.stack(found).mean(0), engine.value_and_grad(z, None)[1])


def test_particles_have_no_chains_to_diagnose() -> None:
    posterior = bdl.SVGD(particles=6, steps=5).fit(conjugate().program, conjugate().data)
    assert posterior.z.shape == (6, 1, 3)
    with pytest.raises(DataError, match="chain"):
        posterior.diagnostics()
    with pytest.raises(MethodError, match="particles=0"):
        bdl.SVGD(particles=0)
