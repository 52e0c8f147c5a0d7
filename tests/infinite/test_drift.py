"""Lazy training: what stays of the limit at finite width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import DataError, Divergence, MethodError
from bayesdl.infinite import empirical_ntk, kernel_alignment, kernel_distance, kernel_drift, width_rate
from bayesdl.models import BayesianNetwork, priors


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.sin(2 * x[:, :1])


def model(width: int, activation: type[nn.Module] = nn.ReLU) -> BayesianNetwork:
    net = nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, 1)).double()
    return BayesianNetwork(net, priors.Normal("fan_in", w_std=2**0.5, b_std=0.1))


def test_wide_networks_are_lazier_than_narrow_ones() -> None:
    # Inventory D9-04, D9-05, T3-68.
    x, y = data()
    settings = {"steps": 40, "looks": 2, "learning_rate": 0.3}
    narrow, wide = (kernel_drift(model(width, nn.Tanh), x, y, seed=1, **settings) for width in (32, 4096))
    assert narrow.steps.tolist() == wide.steps.tolist() == [0, 20, 40]
    for found in (narrow, wide):
        assert found.change[0] == found.gap[0] == 0
        assert found.alignment[0] == pytest.approx(1)
        assert found.loss[2] < found.loss[1] < found.loss[0]
    assert 10 * wide.change[2] < narrow.change[2]
    assert 10 * wide.gap[2] < narrow.gap[2]
    assert wide.change[2] < 0.03
    assert wide.alignment[2] > 0.9995


def test_the_same_network_in_torchs_parameterisation_and_a_linear_one_that_cannot_drift() -> None:
    x, y = data()
    linear = nn.Linear(3, 1).double()
    found = kernel_drift(linear, x, y, steps=50, x_new=x[:3])
    assert found.change.abs().max() < 1e-12
    torch.testing.assert_close(found.outputs, found.linear, rtol=1e-10, atol=1e-10)
    # By hand: the same steps with torch's optimiser.
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    target = torch.cat([y, -y], 1)
    found = kernel_drift(net, x, target, steps=7, looks=1, learning_rate=0.3)
    before = empirical_ntk(net, x)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(7):
        optimiser.zero_grad()
        (nn.functional.mse_loss(net(x), target) / 2).backward()
        optimiser.step()
    torch.testing.assert_close(found.outputs, net(x).detach(), rtol=1e-10, atol=1e-10)
    after = empirical_ntk(net, x)
    assert found.change[1] == pytest.approx(kernel_distance(after, before))
    assert found.alignment[1] == pytest.approx(kernel_alignment(after, before))


def test_rate_of_a_power_law() -> None:
    widths = [16, 64, 256]
    values = 3 / torch.tensor(widths)[:, None] * torch.tensor([[0.9, 1.0, 1.2]])
    rate, error = width_rate(widths, values)
    assert rate == pytest.approx(-1, abs=1e-6)
    assert 0 < error < 0.1
    with pytest.raises(DataError, match="positive"):
        width_rate(widths, 0 * values)
    with pytest.raises(DataError, match=r"\[W, R\]"):
        width_rate(widths, values[:2])


def test_wrong_settings_are_refused() -> None:
    x, y = data()
    with pytest.raises(MethodError, match="looks"):
        kernel_drift(model(4), x, y, steps=2)
    with pytest.raises(DataError, match="does not fit"):
        kernel_drift(model(4), x, y[:3])
    with pytest.raises(Divergence, match="learning rate"):
        kernel_drift(model(4), x, y, learning_rate=1e4, steps=400, seed=0)


@pytest.mark.slow
def test_drift_falls_with_the_width_and_the_initial_kernel_converges() -> None:
    # Inventory D9-04, D9-05: the kernel at the start is off by width^-1/2 (one draw), its drift falls faster.
    x, y = data()
    widths, draws = (64, 512), 40
    limit = torch.stack([start_kernel(8192, x, seed) for seed in range(30)]).mean(0)
    off = [[kernel_distance(start_kernel(width, x, seed), limit) for seed in range(draws)] for width in widths]
    rate, error = width_rate(widths, torch.tensor(off))
    assert abs(rate + 0.5) < 4 * error + 0.05
    rates = {}
    for activation in (nn.Tanh, nn.ReLU):
        runs = [
            [
                kernel_drift(model(width, activation), x, y, seed=seed, steps=30, looks=1, learning_rate=0.3)
                for seed in range(draws)
            ]
            for width in widths
        ]
        rates[activation] = width_rate(widths, torch.tensor([[run.change[1] for run in row] for row in runs]))
        gap, error = width_rate(widths, torch.tensor([[run.gap[1] for run in row] for row in runs]))
        assert -1.2 < gap < -0.4
        assert error < 0.15
    assert -1.15 < rates[nn.Tanh][0] < -0.7
    assert -0.85 < rates[nn.ReLU][0] < -0.4


def start_kernel(width: int, x: Tensor, seed: int) -> Tensor:
    one = model(width)
    prior = {info.name: one.prior.distribution(info) for info in one.sites}
    torch.manual_seed(seed)
    draw = {name: law.sample() for name, law in prior.items()}
    return empirical_ntk(one, x, params=draw, parameterisation="ntk")
