"""Lengths and correlations in deep random networks, against published values, closed forms and a trapezoid rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bayesdl.errors import ModelError
from bayesdl.theory.mean_field import MeanField, critical_init, critical_init_, critical_line, depth_scale
from bayesdl.theory.mean_field_plots import depth_curves, phase_diagram

W = torch.tensor([0.9, 0.9, 1.3, 1.5, 2.5, 4.0], dtype=torch.float64)
B = torch.tensor([0.0, 0.3, 0.3, 0.0, 0.3, 0.3], dtype=torch.float64)
TANH = MeanField("tanh", W, B)
Z = np.linspace(-10, 10, 4001)
MASS = np.exp(-(Z**2) / 2) / math.sqrt(2 * math.pi) * (Z[1] - Z[0])


def near(value: object, *expected: float, tol: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(value, dtype=float), np.array(expected), atol=tol, rtol=0)


def test_fixed_points_slopes_and_depth_scales_of_tanh() -> None:
    """A2-03, A2-04, B5-06, B5-08, T3-05, T3-07, T3-18: all six published settings in one grid."""
    near(TANH.q_star, 0, 0.216525, 0.607047, 0.793354, 4.079124, 12.604149)
    near(TANH.chi, 0.81, 0.600371, 0.939807, 1.139323, 1.585225, 2.367261)
    near(TANH.c_star[1:], 1, 1, 0, 0.122104, 0.029696)
    near(TANH.alpha[[2, 4, 5]], 0.473516, 0.233922, 0.130082)
    near(TANH.chi_star[[2, 4, 5]], 0.939807, 0.822229, 0.759744)
    near(TANH.xi_q[[2, 4, 5]], 1.338, 0.688, 0.490, tol=6e-4)
    near(TANH.xi_c[[2, 4, 5]], 16.108, 5.109, 3.639, tol=6e-4)
    near(TANH.xi_gradient[[2, 4]], 16.108, -1 / math.log(1.585225), tol=6e-4)
    assert list(TANH.phase) == ["ordered"] * 3 + ["chaotic"] * 3
    # No correlation is defined where the signal dies out.
    assert TANH.c_star[0].isnan()
    assert TANH.xi_c[0].isnan()
    assert TANH.correlation_map(0.5)[0].isnan()


def test_slopes_are_those_of_the_maps() -> None:
    """B5-06, B5-08, T3-19, T3-38: slopes against differences of the maps, and Stein's identity."""
    field, h = MeanField("tanh", 1.3, 0.3), 1e-4
    q = float(field.q_star)
    near((field.length_map(q + h) - field.length_map(q - h)) / (2 * h), float(field.alpha), tol=1e-7)
    near((field.correlation_map(1.0) - field.correlation_map(1 - h)) / h, float(field.chi), tol=1e-4)
    root = math.sqrt(q)
    t = np.tanh(root * Z)
    near(field.length_map(q), 1.69 * (t**2 @ MASS) + 0.09, tol=1e-9)
    near(field.chi, 1.69 * ((1 - t**2) ** 2 @ MASS), tol=1e-9)
    bend = -2 * t * (1 - t**2)
    near(field.alpha, float(field.chi) + 1.69 * (bend * t) @ MASS, tol=1e-9)
    stein = (t * Z) @ MASS, root * ((1 - t**2) @ MASS)
    near(stein[0], stein[1], tol=1e-12)
    near([np.tanh(Z) * Z @ MASS, (1 - np.tanh(Z) ** 2) @ MASS], 0.605706, 0.605706)
    # In the chaotic phase the slope at c*, with the integral over both inputs written out.
    chaotic = MeanField("tanh", 2.5, 0.3)
    c, s = float(chaotic.c_star), math.sqrt(float(chaotic.q_star))
    z, mass = Z[::4], 4 * MASS[::4]
    u, v = s * z[:, None], s * (c * z[:, None] + math.sqrt(1 - c**2) * z)
    near(chaotic.chi_star, 6.25 * (mass @ ((1 - np.tanh(u) ** 2) * (1 - np.tanh(v) ** 2)) @ mass), tol=1e-7)
    near(chaotic.correlation_map(c), (6.25 * (mass @ (np.tanh(u) * np.tanh(v)) @ mass) + 0.09) / s**2, tol=1e-7)
    near(chaotic.correlation_map(c), c, tol=1e-9)


@pytest.mark.parametrize(("w", "b"), [(1.3, 0.3), (2.5, 0.3)])
def test_iterated_maps_decay_at_the_stated_rates(w: float, b: float) -> None:
    """A3-04, B5-08: lengths at alpha and correlations at the slope at c*, in both phases."""
    field = MeanField("tanh", w, b)
    path = field.propagate(60, float(field.q_star), 0.9)
    away = (path.c - field.c_star).abs()
    near(away[40] / away[39], float(field.chi_star), tol=2e-3)
    lengths = (field.propagate(12, 3.0, 1.0).q1 - field.q_star).abs()
    near(lengths[10] / lengths[9], float(field.alpha), tol=2e-3)


def test_criticality_is_a_power_law() -> None:
    """A3-04, T3-07: (1 - c) l for tanh, (1 - c) l^2 for relu; the depth scale is infinite and says nothing of these."""
    tanh = MeanField("tanh", critical_init("tanh", 0.3), 0.3)
    assert (tanh.phase, float(tanh.xi_c), float(tanh.xi_gradient)) == ("critical", math.inf, math.inf)
    c = tanh.propagate(400, float(tanh.q_star), 0.5).c
    near(400 * (1 - c[-1]), 4.31, tol=0.01)
    relu = MeanField("relu", math.sqrt(2))
    c = relu.propagate(3000, 1.0, 0.5).c
    near(9e6 * (1 - c[-1]), 4.5 * math.pi**2, tol=0.6)


def test_relu() -> None:
    """B5-04, B5-07, T3-05: closed forms, and where there is no fixed point."""
    field = MeanField("relu", math.sqrt(1.5), 0.3)
    near(field.q_star, 0.36, tol=1e-12)
    near(field.chi, 0.75, tol=1e-12)
    c = torch.tensor([-0.5, 0.0, 0.3, 0.9], dtype=torch.float64)
    f = (field.correlation_map(c) * 0.36 - 0.09) / (1.5 * 0.36 / 2)
    near(f, 0.108998, 0.318310, 0.482744, 0.909538)
    slope = (field.correlation_map(c + 1e-5) - field.correlation_map(c - 1e-5)) / 2e-5
    near(slope, *(0.75 * (math.pi - torch.acos(c)) / math.pi).tolist(), tol=1e-8)
    # 2: every length is fixed; 2 with biases, and above 2: none.
    assert float(MeanField("relu", math.sqrt(2), start=3.0).q_star) == 3.0
    for w, b, phase in ((math.sqrt(2), 0.1, "critical"), (1.6, 0.1, "chaotic"), (1.6, 0.0, "chaotic")):
        grows = MeanField("relu", w, b)
        assert float(grows.q_star) == math.inf
        assert grows.c_star.isnan()
        assert grows.phase == phase
        near(grows.chi, w**2 / 2, tol=1e-12)


def test_all_fixed_points_of_a_length_map() -> None:
    """A2-03, B5-04: tanh leaves zero for w_std > 1; the square has two fixed points, of which one is stable."""
    zero, other = MeanField("tanh", 1.5).fixed_points()
    assert (zero.q, zero.stable, other.stable) == (0.0, False, True)
    near([zero.slope, other.q], 2.25, 0.793354)
    (only,) = MeanField("tanh", 0.9).fixed_points()
    assert (only.q, only.stable) == (0.0, True)
    square = MeanField(torch.square, 0.1, 0.5)  # V(q) = 0.03 q^2 + 0.25
    roots = [(1 + sign * math.sqrt(1 - 4 * 0.03 * 0.25)) / 0.06 for sign in (-1, 1)]
    near([p.q for p in square.fixed_points()], *roots, tol=1e-10)
    assert [p.stable for p in square.fixed_points()] == [True, False]
    near(square.q_star, roots[0], tol=1e-12)
    assert float(MeanField(torch.square, 0.1, 0.5, start=40.0).q_star) == math.inf
    assert MeanField("relu", math.sqrt(2)).fixed_points()[0].q == 0
    with pytest.raises(ModelError, match="single numbers"):
        TANH.fixed_points()


def test_lengths_may_change_on_the_way() -> None:
    """T3-92: with lengths frozen at q* the correlation after three layers would be 0.853."""
    field = MeanField("relu", math.sqrt(1.5), math.sqrt(0.1))
    path = field.propagate(3, 3.0, 0.4 / math.sqrt(1.5), q2=0.5)
    near(path.c[-1], 0.728, tol=6e-4)
    near(path.q1[1], 1.5 * 3 / 2 + 0.1, tol=1e-12)
    assert path.c.shape == (4,)
    c = torch.tensor(0.4 / math.sqrt(1.5), dtype=torch.float64)
    for _ in range(3):
        c = field.correlation_map(c)
    near(c, 0.853, tol=6e-4)


def test_critical_line() -> None:
    """A2-05: tanh's published points; the line solves both of its equations; orthodox initialisations lie on it."""
    line = critical_line("tanh", torch.tensor([math.sqrt(0.05), 0.3]))
    near(line.w_std.square(), 1.760955, 1.947655)
    near(line.q_star[0], 0.57005, tol=1e-5)
    for name in ("tanh", "erf", "elu", "sigmoid"):
        field = MeanField(name, critical_init(name, 0.4), 0.4)
        assert field.phase == "critical", name
    assert critical_init("relu") == pytest.approx(math.sqrt(2), abs=1e-12)
    assert critical_init(nn.LeakyReLU(0.2)) == pytest.approx(math.sqrt(2 / 1.04), abs=1e-9)
    assert critical_init("tanh") == pytest.approx(1, abs=1e-12)
    assert critical_init("erf") == pytest.approx(math.sqrt(math.pi) / 2, abs=1e-12)
    # The limit of small signals through a kink sees both sides of it.
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    assert critical_init("selu") == pytest.approx(math.sqrt(2 / (scale**2 + (scale * alpha) ** 2)), rel=1e-6)
    assert critical_init(lambda x: 0.5 * x) == pytest.approx(2)
    with pytest.raises(ModelError, match="no critical point"):
        critical_init("softplus")
    with pytest.warns(UserWarning, match="grow on"):
        assert critical_init("gelu") == pytest.approx(2)


def test_critical_init_keeps_signals_and_gradients_of_a_deep_network() -> None:
    """Thirty layers of tanh: torch's own initialisation loses the gradient by many orders of magnitude."""
    torch.manual_seed(0)
    layers = [layer for _ in range(30) for layer in (nn.Linear(200, 200), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(200, 1)).double()
    x = torch.randn(8, 200, dtype=torch.float64)

    def ratio() -> float:
        net.zero_grad()
        net(x).sum().backward()
        return float(net[0].weight.grad.norm() / net[-3].weight.grad.norm())

    own = ratio()
    assert critical_init_(net, b_std=0.2, generator=torch.Generator().manual_seed(1)) is net
    w = critical_init("tanh", 0.2)
    assert float(net[4].weight.detach().std()) == pytest.approx(w / math.sqrt(200), rel=0.02)
    assert float(torch.cat([layer.bias.detach() for layer in net[::2]]).std()) == pytest.approx(0.2, rel=0.05)
    assert own < 1e-4
    assert 0.1 < ratio() < 10


def test_networks_that_critical_init_refuses() -> None:
    with pytest.raises(ModelError, match="needs biases"):
        critical_init_(nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1)), 0.1)
    with pytest.raises(ModelError, match="different activations"):
        critical_init_(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)))
    with pytest.raises(ModelError, match="LayerNorm changes"):
        critical_init_(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)))
    with pytest.raises(ModelError, match="no activation"):
        critical_init_(nn.Linear(2, 3))
    net = critical_init_(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1))
    )
    assert float(net[2].weight.detach().std()) == pytest.approx(math.sqrt(2 / 36), rel=0.2)
    assert float(net[2].bias.detach().abs().max()) == 0


def test_bad_settings() -> None:
    for w, b in ((0.0, 0.0), (-1.0, 0.0), (1.0, -0.1), (math.nan, 0.0)):
        with pytest.raises(ModelError, match="must be positive"):
            MeanField("tanh", w, b)
    with pytest.raises(ModelError, match="positive length"):
        MeanField("tanh", 1.0, start=0.0)
    with pytest.raises(ModelError, match="no activation 'tan'"):
        _ = MeanField("tan", 1.0).phi
    with pytest.raises(ModelError, match="must not be negative"):
        critical_line("tanh", -0.1)
    sign = MeanField("sign", 1.6, 0.1)
    near(sign.length_map(0.3), 2.57, tol=1e-12)
    near(sign.q_star, 2.57, tol=1e-12)
    with pytest.raises(ModelError, match="jumps"):
        _ = sign.chi
    near(depth_scale(torch.tensor([0.0, 1.0, -0.5, 2.0])), 0, math.inf, 1 / math.log(2), -1 / math.log(2))


def test_pictures() -> None:
    axes = phase_diagram("erf", points=9)
    line = next(line for line in axes.get_lines() if line.get_label() == "critical line")
    near(line.get_xdata()[0], math.sqrt(math.pi) / 2)
    field = MeanField("erf", 2.5, 0.3)
    labels = [line.get_label() for line in depth_curves(field).get_lines()]
    assert f"depth scale {field.xi_c:.2f}" in labels
    assert len(depth_curves(MeanField("relu", 1.6), depth=5).get_lines()) == 0  # nothing to approach
