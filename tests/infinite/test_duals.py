"""Closed-form duals against quadrature, known numbers and finite differences, at and beyond correlation one."""

import math

import numpy as np
import pytest
import torch

from bayesdl.errors import ModelError
from bayesdl.infinite.duals import DUALS, FAMILIES, PHI, erf, relu
from bayesdl.infinite.polar import integrate
from bayesdl.infinite.quadrature import Expectation, Quadrature
from bayesdl.infinite.table import Table

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


@pytest.mark.parametrize("name", DUALS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["covariance", "slope"])
@pytest.mark.parametrize("name", [*(name for name in DUALS), "tanh", "elu"])
def test_value_and_gradient_are_finite_at_the_edges(name: str, part: str, dtype: torch.dtype) -> None:
    quadrature = {"tanh": torch.tanh, "elu": torch.nn.functional.elu}
    whole = Quadrature(quadrature[name]) if name in quadrature else DUALS[name]
    dual = getattr(whole, part)
    rows = [
        (1.0, 1.0, 1.0), (1.0, 1.0, -1.0), (2.0, 0.5, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1e-30, 1e-30, 1e-30),
        (1.0, 1.0, 1.0000001), (1.0, 1.0, -1.0000001), (1e8, 1e8, 1e8), (1e8, 1e-8, 1.0), (1e20, 1e20, 1e20),
    ]  # fmt: skip
    # the order of a quadrature grows with the variance; gelu squares a variance, which 1e20 in single precision is not
    rows = rows[:8] if name in quadrature else rows[:10] if name == "gelu" else rows
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


def entries(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = torch.randn(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = a @ a.mT
    s[:5, 0, 1] = s[:5, 1, 0] = 0.999999 * (s[:5, 0, 0] * s[:5, 1, 1]).sqrt()
    return s[:, 0, 0], s[:, 1, 1], s[:, 0, 1]


CLOSED = [(name, DUALS[name], PHI[name]) for name in DUALS]
CLOSED += [
    ("leaky_relu", FAMILIES["leaky_relu"][1](0.2), lambda x: torch.nn.functional.leaky_relu(x, 0.2)),
    ("cube", FAMILIES["monomial"][1](3), lambda x: x**3),
    ("wave", FAMILIES["sin"][1](2.0, 0.7, 0.4), lambda x: 2 * torch.sin(0.7 * x + 0.4)),
    ("erf3", FAMILIES["erf"][1](0.5, 0.4, 0.5), lambda x: 0.5 * torch.erf(0.4 * x) + 0.5),
]


@pytest.mark.parametrize(("name", "dual", "phi"), CLOSED)
def test_closed_forms_equal_the_polar_quadrature(name: str, dual: object, phi: object) -> None:
    q = entries()
    by_nodes = Quadrature(phi)
    torch.testing.assert_close(dual.covariance(*q), by_nodes.covariance(*q), rtol=1e-10, atol=1e-12)
    if name in ("sign", "step"):
        assert dual.slope(*q).abs().max() == 0
        with pytest.raises(ModelError, match="jumps"):
            by_nodes.slope(*q)
    else:
        torch.testing.assert_close(dual.slope(*q), by_nodes.slope(*q), rtol=1e-10, atol=1e-12)
        value, slope = dual.both(*q)
        torch.testing.assert_close(value, dual.covariance(*q), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slope, dual.slope(*q), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "dual", "phi"), CLOSED)
def test_the_slope_is_the_derivative_by_the_covariance(name: str, dual: object, phi: object) -> None:
    q = [part[5:].clone().requires_grad_() for part in entries(12)]
    assert torch.autograd.gradcheck(dual.covariance, q, atol=1e-6)
    assert torch.autograd.gradcheck(dual.slope, q, atol=1e-6)
    if name not in ("sign", "step"):
        (by_covariance,) = torch.autograd.grad(dual.covariance(*q).sum(), q[2])
        torch.testing.assert_close(by_covariance, dual.slope(*q).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("phi", [torch.tanh, torch.nn.functional.elu, torch.nn.functional.softplus])
def test_derivatives_of_a_quadrature_agree_with_finite_differences(phi: object) -> None:
    q = [part[5:].clone().requires_grad_() for part in entries(9)]
    dual = Quadrature(phi)
    assert torch.autograd.gradcheck(dual.covariance, q, atol=1e-6)
    assert torch.autograd.gradcheck(dual.slope, q, atol=1e-6)


def test_tanh_at_a_large_variance_where_hermite_nodes_fail() -> None:
    # sigma_w = 4, sigma_b = 0.3: the fixed point of the length map, and chi_1, from two independent quadratures
    q = torch.full((1,), 12.60415, dtype=torch.float64)
    dual = Quadrature(torch.tanh)
    assert 16 * dual.variance(q).item() + 0.09 == pytest.approx(12.60415, abs=2e-5)
    assert 16 * dual.slope(q, q, q).item() == pytest.approx(2.36726, abs=2e-5)
    # the line integral by a fine trapezoidal rule
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    for variance in (0.01, 1.0, 100.0):
        line = (density * torch.tanh(math.sqrt(variance) * z) ** 2).sum().item()
        assert dual.variance(torch.tensor([variance], dtype=torch.float64)).item() == pytest.approx(line, rel=1e-9)


@pytest.mark.parametrize("phi", [torch.tanh, torch.nn.functional.elu])
@pytest.mark.parametrize("span", [(1.3, 1.3), (0.0, 1.5)])
def test_tables_equal_the_quadrature(phi: object, span: tuple[float, float]) -> None:
    stream = torch.Generator().manual_seed(1)
    t1, t2, c = torch.rand(3, 50, generator=stream, dtype=torch.float64)
    t1, t2 = (span[0] + (span[1] - span[0]) * t for t in (t1, t2))
    table = Table(phi, *span, Expectation(phi).order(span[1]))
    exact = integrate(phi, t1, t2, math.pi * c, 54)
    assert (table.entries(t1, t2, math.pi * c) - exact).abs().max() < 5e-8
    pairs = table.pairs(t1, t2, (math.pi * c).expand(50, 50))
    torch.testing.assert_close(pairs.diagonal(), table.entries(t1, t2, math.pi * c), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("phi", [lambda x: x.softmax(-1), lambda x: x[..., :1], lambda x: x.cumsum(-1)])
def test_functions_that_mix_entries_are_refused(phi: object) -> None:
    with pytest.raises(ModelError, match="not elementwise"):
        Quadrature(phi)


def test_a_function_with_poles_has_no_limit() -> None:
    one = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ModelError, match="not finite"):
        Quadrature(lambda x: x.log()).covariance(one, one, one * 0.3)


def test_a_kink_away_from_zero_says_what_it_reached() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="agrees only to"):
        value = Quadrature(lambda x: (x - 0.4).abs()).covariance(one, one, one)
    assert value.item() == pytest.approx(1.16, abs=1e-4)
