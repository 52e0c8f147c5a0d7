"""Signals, gradients and curves in random networks of finite width, against the maps of infinite width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import DataError, ModelError
from bayesdl.infinite import from_module, monte_carlo_kernel
from bayesdl.models import BayesianNetwork, priors
from bayesdl.theory import curves
from bayesdl.theory import signal_propagation as sp
from bayesdl.theory.mean_field import MeanField

ORDERED, CHAOTIC = (1.3, 0.3), (2.5, 0.3)
WIDTH, SEEDS = 500, range(8)


def networks(w: float, b: float, widths: tuple[int, ...], activation: str = "tanh") -> list[sp.RandomNetwork]:
    return [sp.RandomNetwork(activation, widths, w, b, seed=seed) for seed in SEEDS]


def mean_and_error(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.stack(rows)
    return values.mean(0), values.std(0) / len(rows) ** 0.5


@pytest.mark.parametrize(("w", "b"), [ORDERED, CHAOTIC])
def test_lengths_and_correlations_follow_the_maps(w: float, b: float) -> None:
    """A2-01, A2-02, B5-02, B5-03, B5-05, T3-04: one wide layer averages over its units, so one network is enough."""
    field = MeanField("tanh", w, b)
    q = float(field.q_star)
    runs = [
        sp.moments(net, net.start(q, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))) for net in networks(w, b, (WIDTH,) * 9)
    ]
    path = field.propagate(8, q, 0.5)
    for found, expected in (([r.q[:, 0] for r in runs], path.q1), ([r.c[:, 0, 1] for r in runs], path.c)):
        mean, error = mean_and_error(found)
        assert mean[0] == pytest.approx(float(expected[0]), abs=1e-12)
        # Besides the error of eight networks there is a bias of order 1 / width.
        assert ((mean - expected).abs() < 4 * error + 6 / WIDTH).all()
        assert (error < 0.04 * q).all()
    # The first layer's length is a sum over independent units: its relative sd falls like 1 / sqrt(width).
    first = torch.stack([r.q[1, 0] for r in runs]).std()
    assert first < 3 * math.sqrt(2 / WIDTH) * q


@pytest.mark.parametrize(("w", "b"), [ORDERED, CHAOTIC])
def test_total_gradients_change_by_chi_whatever_the_widths(w: float, b: float) -> None:
    """A3-05, A3-06, B5-09, B5-10, T3-39: the total squared gradient, not its mean over units."""
    field = MeanField("tanh", w, b)
    q = float(field.q_star)
    widths = (WIDTH, WIDTH // 2, WIDTH // 4, WIDTH // 2, WIDTH)
    logs = []
    for net in networks(w, b, widths):
        lengths = sp.gradient_lengths(net, net.start(q, torch.eye(4)), seed=net.seed)
        logs.append((lengths[:-1] / lengths[1:]).mean(1))
    mean, error = mean_and_error(logs)
    assert ((mean / field.chi - 1).abs() < 4 * error / field.chi + 0.02).all()
    assert (error < 0.05 * field.chi).all()
    # Over the whole depth: exp(-L / xi).
    whole = torch.stack(logs).log().sum(1)
    expected = -4 / float(field.xi_gradient)
    assert float(whole.mean()) == pytest.approx(expected, abs=4 * float(whole.std()) / len(logs) ** 0.5 + 0.03)


def test_gradients_are_those_of_backpropagation() -> None:
    """A3-05: the recursion against autograd."""
    net = sp.RandomNetwork("tanh", (5, 7, 6), 1.5, 0.2)
    h = net.start(1.3).requires_grad_()
    top = net.signals(h)[-1]
    delta = torch.randn(top.shape, generator=sp.generator(3, "last gradient"), dtype=torch.float64)
    (exact,) = torch.autograd.grad((top * delta).sum(), h)
    torch.testing.assert_close(sp.gradient_lengths(net, h.detach(), seed=3)[0], exact.square().sum(1))


def test_curves_have_the_geometry_of_circles_and_ellipses() -> None:
    """A3-01, T3-06: scaling by r multiplies g^E by r^2 and kappa by 1 / r; g^G = kappa^2 g^E off the circle too."""
    t = torch.linspace(0, 6, 200, dtype=torch.float64)
    identity = sp.RandomNetwork("linear", (2, 2), 1.0, weights="orthogonal")
    for a, b in ((1.0, 1.0), (3.0, 3.0), (3.0, 1.0)):
        h = torch.stack([a * t.cos(), b * t.sin()], 1)
        v = torch.stack([-a * t.sin(), b * t.cos()], 1)
        found = curves.curve(identity, h, v, -h)
        speed = (a * t.sin()) ** 2 + (b * t.cos()) ** 2
        for layer in (0, 1):  # a rotation changes nothing
            torch.testing.assert_close(found.metric[layer], speed)
            torch.testing.assert_close(found.curvature[layer], a * b / speed**1.5)
        unit = v / speed.sqrt()[:, None]
        turned = ((unit[2:] - unit[:-2]) / (t[2:] - t[:-2])[:, None]).square().sum(1)
        torch.testing.assert_close(found.gauss_metric[0, 1:-1], turned, rtol=1e-2, atol=0)
        if a != b:  # without constant speed the derivative of v is not perpendicular to v
            assert float((v * -h).sum(1).abs().max()) == pytest.approx(4, abs=0.01)


def test_derivatives_of_an_image_of_a_curve() -> None:
    """Velocity and acceleration through tanh layers against differences."""
    net, h = sp.RandomNetwork("tanh", (4, 5, 3), 2.0, 0.3), 1e-4
    one, two = net.start(1.0, torch.eye(2))

    def image(theta: float) -> Tensor:
        return net.signals((math.cos(theta) * one + math.sin(theta) * two)[None])[-1][0]

    low, middle, high = (image(0.7 + step) for step in (-h, 0, h))
    v, a = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
    speed = v.square().sum()
    curvature = (speed * a.square().sum() - (v * a).sum() ** 2).sqrt() / speed**1.5
    point = (math.cos(0.7) * one + math.sin(0.7) * two)[None]
    velocity = (math.cos(0.7) * two - math.sin(0.7) * one)[None]
    found = curves.curve(net, point, velocity, -point)
    torch.testing.assert_close(found.metric[-1, 0], speed, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.curvature[-1, 0], curvature, rtol=1e-5, atol=0)


def test_great_circles_grow_in_the_chaotic_phase_and_shrink_in_the_ordered() -> None:
    """A3-02: g^E grows by chi a layer while the curvature stays, so that the image fills the sphere."""
    law = curves.great_circle_law(MeanField("tanh", *CHAOTIC), 8)
    assert float(law.metric[-1]) == pytest.approx(162.7, abs=0.1)
    assert float(law.curvature[-1]) == pytest.approx(3.777, abs=1e-3)
    nets = networks(*CHAOTIC, (WIDTH,) * 9)
    circles = [curves.great_circle(net, float(net.field.q_star), 8) for net in nets]
    for values, expected in (
        ([c.metric.mean(1) / WIDTH for c in circles], law.metric),
        ([c.curvature.square().mean(1) * WIDTH for c in circles], law.curvature),
    ):
        mean, error = mean_and_error(values)
        assert mean[0] == pytest.approx(float(expected[0]))
        assert ((mean / expected - 1).abs() < 4 * error / expected + 0.03).all()
        assert (error[1:] < 0.1 * expected[1:]).all()
    gauss = torch.stack([c.gauss_metric.mean(1) for c in circles]).mean(0)
    assert float(gauss[0]) == pytest.approx(1)
    assert 450 < gauss[-1] < 800  # 614 in the published run
    ordered = curves.great_circle_law(MeanField("tanh", *ORDERED), 4).metric
    assert ordered[[0, -1]].tolist() == pytest.approx([0.607, 0.4736], abs=1e-3)
    with pytest.raises(ModelError, match="kink"):
        curves.great_circle_law(MeanField("relu", 1.2, 0.3), 2)
    with pytest.raises(ModelError, match="neither 0"):
        curves.great_circle_law(MeanField("tanh", 0.9), 2)


def test_the_mean_squared_singular_value_is_a_power_of_chi() -> None:
    """A4-01, T3-08: chi^L is their mean; the mean of the squares of s^2 is 1 + L for linear networks at w_std = 1."""
    for depth in (1, 4, 10):
        net = sp.RandomNetwork("linear", (400,) * (depth + 1), 1.0)
        values = sp.squared_singular_values(net, net.start(1.0)[0])
        assert float(values.mean()) == pytest.approx(1, abs=0.08)
        assert float(values.square().mean()) == pytest.approx(1 + depth, rel=0.25)
    nets = networks(*CHAOTIC, (200,) * 5)
    means = torch.stack([sp.squared_singular_values(n, n.start(float(n.field.q_star))[0]).mean() for n in nets])
    expected = float(nets[0].field.chi) ** 4
    assert float(means.mean()) == pytest.approx(
        expected, abs=4 * float(means.std()) / len(nets) ** 0.5 + 0.02 * expected
    )


def test_orthogonal_weights_give_a_narrower_spectrum() -> None:
    """A4-02: about the same mean, a far smaller largest value and spread."""
    spread, largest = {}, {}
    for weights in ("gaussian", "orthogonal"):
        net = sp.RandomNetwork("tanh", (200,) * 31, 1.05, 0.02, weights)
        values = sp.squared_singular_values(net, net.start(float(net.field.q_star))[0])
        spread[weights], largest[weights] = float(values.std() / values.mean()), float(values.max())
        assert float(values.mean()) == pytest.approx(float(net.field.chi) ** 30, rel=0.5)
    assert spread["orthogonal"] < 0.3 * spread["gaussian"]
    assert largest["orthogonal"] < 0.2 * largest["gaussian"]
    square = sp.RandomNetwork("tanh", (6, 6, 3), 2.0, weights="orthogonal")
    w, narrow = square.layer(1)[0], square.layer(2)[0]
    torch.testing.assert_close(w @ w.T, 4 * torch.eye(6).double())
    torch.testing.assert_close(narrow @ narrow.T, 4 * torch.eye(3).double())


def test_the_kernel_of_a_finite_relu_network() -> None:
    """A2-06, T3-92: the recursion carries both lengths; at width 400 the bias is far below the error of the draws."""
    net = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 1)).double()
    model = BayesianNetwork(net, priors.Normal("fan_in", w_std=math.sqrt(2), b_std=math.sqrt(0.1)))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.tensor([[0.5], [1.0], [1.0], [2.0]]).double()
    found = monte_carlo_kernel(model, x, draws=100, ntk=False)
    exact = from_module(model).nngp(x)
    assert ((found.nngp - exact).abs() < 4 * found.nngp_error).all()
    assert found.nngp_error.max() < 0.025 * exact.max()
    # The same by the maps, one pair at a time.
    q = (2 * x @ x.T / 3 + 0.1).tolist()
    path = MeanField("relu", math.sqrt(2), math.sqrt(0.1)).propagate(
        2, q[0][0], q[0][3] / math.sqrt(q[0][0] * q[3][3]), q2=q[3][3]
    )
    assert float(path.c[-1] * (path.q1[-1] * path.q2[-1]).sqrt()) == pytest.approx(float(exact[0, 3]), rel=1e-12)


def test_seeds_and_refusals() -> None:
    net = sp.RandomNetwork("tanh", (4, 5), 1.0, 0.1)
    assert torch.equal(net.layer(1)[0], sp.RandomNetwork("tanh", (4, 5, 6), 1.0, 0.1).layer(1)[0])
    assert not torch.equal(net.layer(1)[0], sp.RandomNetwork("tanh", (4, 5), 1.0, 0.1, seed=1).layer(1)[0])
    c = torch.tensor([[1.0, -0.3], [-0.3, 1.0]], dtype=torch.float64)
    h = net.start(2.0, c)
    torch.testing.assert_close(h @ h.T / 4, 2 * c)
    for bad in (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.eye(5), 2 * torch.eye(2)):
        with pytest.raises(DataError, match="correlations"):
            net.start(1.0, bad)
    with pytest.raises(ModelError, match="at least two"):
        sp.RandomNetwork("tanh", (4,), 1.0)
    with pytest.raises(ModelError, match="orthogonal"):
        sp.RandomNetwork("tanh", (4, 4), 1.0, weights="sparse")  # type: ignore[arg-type]
