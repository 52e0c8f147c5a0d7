"""Closed-form duals against quadrature, known numbers and finite differences, at and beyond correlation one."""

import math

import numpy as np
import pytest
import torch

from bayesdl.infinite.duals import DUALS, erf, relu

PHI = {"relu": torch.relu, "erf": torch.erf, "linear": lambda u: u}
QUADRATIC = [(1.0, 1.0, 0.3), (3.0, 0.5, 0.4), (0.2, 2.0, -0.5), (1.0, 1.0, 0.0), (4.0, 4.0, 3.9), (1e-3, 5.0, 0.01)]


def by_quadrature(name: str, q1: float, q2: float, q12: float) -> float:
    # polar coordinates: relu is linear in the radius, and its kink in the angle is met by small steps
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)[:-1]
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.laguerre.laggauss(50))
    radius = (2 * nodes).sqrt()
    total = 0.0
    slope, rest = q12 / math.sqrt(q1), math.sqrt(max(q2 - q12**2 / q1, 0.0))
    for r, w in zip(radius, weights, strict=True):
        z1, z2 = r * angles.cos(), r * angles.sin()
        total += float(w * (PHI[name](math.sqrt(q1) * z1) * PHI[name](slope * z1 + rest * z2)).mean())
    return total


@pytest.mark.parametrize("name", ["relu", "erf", "linear"])
@pytest.mark.parametrize("q", QUADRATIC)
def test_dual_equals_the_expectation(name: str, q: tuple[float, float, float]) -> None:
    value = DUALS[name].covariance(*(torch.tensor(v, dtype=torch.float64) for v in q))
    assert value.item() == pytest.approx(by_quadrature(name, *q), rel=2e-7, abs=2e-7)


@pytest.mark.parametrize("name", ["relu", "erf", "linear"])
def test_variance_is_the_covariance_of_equal_arguments(name: str) -> None:
    q = torch.tensor([0.0, 1e-12, 0.3, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(DUALS[name].variance(q), DUALS[name].covariance(q, q, q), rtol=1e-12, atol=1e-15)


def test_relu_correlation_map_has_the_known_values() -> None:
    # f(c) = 2 E[relu(u) relu(v)] at unit variances, and f'(c) = (pi - arccos c) / pi
    c = torch.tensor([-0.5, 0.0, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(c)
    f = 2 * relu(one, one, c)
    known = torch.tensor([0.108998, 0.318310, 0.482744, 0.909538], dtype=torch.float64)
    torch.testing.assert_close(f.detach(), known, rtol=0, atol=5e-7)
    (slope,) = torch.autograd.grad(f.sum(), c)
    torch.testing.assert_close(slope, (math.pi - torch.arccos(c.detach())) / math.pi, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dual", [relu, erf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_finite_at_the_edges(dual: object, dtype: torch.dtype) -> None:
    rows = [
        (1.0, 1.0, 1.0), (1.0, 1.0, -1.0), (2.0, 0.5, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1e-30, 1e-30, 1e-30),
        (1.0, 1.0, 1.0000001), (1.0, 1.0, -1.0000001), (1e8, 1e8, 1e8), (1e8, 1e-8, 1.0), (1e20, 1e20, 1e20),
    ]  # fmt: skip
    q = torch.tensor(rows, dtype=dtype, requires_grad=True)
    value = dual(*q.unbind(-1))
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert value.isfinite().all()
    assert gradient.isfinite().all(), gradient


def test_relu_at_correlation_one_is_half_the_variance_with_slope_one_half() -> None:
    q = torch.tensor([0.7, 3.0], dtype=torch.float64)
    parts = [q.clone().requires_grad_() for _ in range(3)]
    value = relu(*parts)
    g1, g2, g12 = torch.autograd.grad(value.sum(), parts)
    torch.testing.assert_close(value.detach(), q / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(g12, torch.full_like(q, 0.5), rtol=1e-7, atol=0)
    torch.testing.assert_close(g1 + g2, torch.zeros_like(q), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dual", [relu, erf])
def test_derivatives_agree_with_finite_differences(dual: object) -> None:
    q = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 3.0], [2.0, 0.5], [-0.7, 0.6])]
    assert torch.autograd.gradcheck(dual, q)
    assert torch.autograd.gradgradcheck(dual, q)


def test_relu_works_under_vmap_and_broadcasts() -> None:
    q1, q2 = torch.rand(5, 1, dtype=torch.float64) + 1, torch.rand(1, 3, dtype=torch.float64) + 1
    q12 = torch.rand(5, 3, dtype=torch.float64)
    whole = relu(q1, q2, q12)
    assert whole.shape == (5, 3)
    mapped = torch.func.vmap(torch.func.grad(lambda a, b, c: relu(a, b, c).sum(), argnums=2))
    rows = mapped(q1.expand(5, 3), q2.expand(5, 3), q12)
    theta = torch.arccos(q12 / (q1 * q2).sqrt())
    torch.testing.assert_close(rows, (math.pi - theta) / (2 * math.pi), rtol=1e-12, atol=0)
