"""Closed forms of training against reference values, explicit descent, and an ensemble of finite networks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayesdl.errors import DataError, MethodError
from bayesdl.infinite import GradientFlow, empirical_ntk, learning_rate_limit, linearize
from bayesdl.models import BayesianNetwork, priors

INF = math.inf


def relu_kernels(x1: Tensor, x2: Tensor, depth: int = 2, w: float = 1.5, b: float = 0.1) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of ``depth`` hidden relu layers, from the arc-cosine formulas."""
    d = x1.shape[1]
    k, q1, q2 = x1 @ x2.T / d, x1.square().sum(1) / d, x2.square().sum(1) / d
    k, q1, q2 = (w**2 * v + b**2 for v in (k, q1, q2))
    theta = k
    for _ in range(depth):
        norms = (q1[:, None] * q2).sqrt()
        cosine = (k / norms).clamp(-1, 1)
        angle = torch.where(cosine > 1 - 1e-14, 0.0, torch.arccos(cosine))
        slope = (math.pi - angle) / (2 * math.pi)
        k = norms * (angle.sin() / (2 * math.pi) + slope * cosine)
        k, q1, q2 = (w**2 * v + b**2 for v in (k, q1 / 2, q2 / 2))
        theta = w**2 * theta * slope + k
    return k, theta


@pytest.mark.parametrize("which", ["nngp", "ntk"])
def test_moments_equal_an_independent_implementation(which: str, shared: Path) -> None:
    with np.load(shared / "reference/infinite_width.npz") as stored:
        found = {key.removeprefix("train/"): torch.tensor(stored[key]) for key in stored if key.startswith("train/")}
    x, y, new = found["x"], found["y"], found["x_test"]
    (k, theta), (k_cross, theta_cross), (k_new, _) = (relu_kernels(*p) for p in ((x, x), (new, x), (new, new)))
    if which == "nngp":
        flow, cross = GradientFlow(k, y, ridge=1e-4), k_cross
    else:
        flow, cross = GradientFlow(theta, y, k, ridge=1e-4), theta_cross
    times = torch.tensor([0.5, 5.0, 50.0, INF], dtype=torch.float64)
    means, covariances = flow.mean(times, cross), flow.covariance(times, cross, k_cross, k_new)
    assert means.shape == (4, 5, 1)
    for label, mean, covariance in zip(("0.5", "5.0", "50.0", "inf"), means, covariances, strict=True):
        torch.testing.assert_close(mean, found[f"{which}_t{label}_mean"], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(covariance, found[f"{which}_t{label}_cov"], rtol=1e-9, atol=1e-11)


def problem(n: int = 6, outputs: int = 2) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    x, y, new = (torch.randn(n, k, dtype=torch.float64) for k in (3, outputs, 3))
    return net, x, y, new[:4]


def jacobian_kernel(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``[N1 K, N2 K]``: with several outputs, the rows of one kernel over rows and outputs."""
    k = empirical_ntk(net, x1, x2, per_output=True)
    return k.transpose(1, 2).reshape(len(x1) * k.shape[2], -1)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_linearised_network_trains_as_the_closed_form_says(loss: str) -> None:
    net, x, y, new = problem()
    kernel, cross = jacobian_kernel(net, x, x), jacobian_kernel(net, new, x)
    limit = learning_rate_limit(kernel, loss=loss)
    flow = GradientFlow(kernel, y.flatten(), learning_rate=0.4 * limit, loss=loss, discrete=True)
    assert flow.learning_rate_limit == pytest.approx(limit)
    linear = linearize(net)
    assert dict(linear.named_parameters()).keys() == dict(net.named_parameters()).keys()
    optimiser = torch.optim.SGD(linear.parameters(), lr=0.4 * limit)
    with torch.no_grad():
        start = net(new).flatten(), net(x).flatten()
    torch.testing.assert_close(linear(new).flatten(), start[0])
    for _ in range(25):
        optimiser.zero_grad()
        error = (linear(x) - y).square() / 2
        (error.mean() if loss == "mean" else error.sum()).backward()
        optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(linear(new).flatten(), flow.mean(25, cross, start), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            linear(x).flatten(), flow.mean(25, None, (start[1], start[1])), rtol=1e-10, atol=1e-10
        )


def test_learning_rate_limit_separates_descent_from_divergence() -> None:
    net, x, y, _ = problem()
    kernel = jacobian_kernel(net, x, x)
    limit = learning_rate_limit(kernel)
    for factor, stable in ((0.98, True), (1.02, False)):
        linear = linearize(net)
        losses = []
        for _ in range(120):
            loss = (linear(x) - y).square().mean() / 2
            losses.append(loss.item())
            parameters = list(linear.parameters())
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.data -= factor * limit * slope
        assert (losses[-1] < losses[0]) is stable
    with pytest.raises(MethodError, match="diverges"):
        GradientFlow(kernel, y.flatten(), learning_rate=1.1 * limit, discrete=True).mean(INF)


def test_linearised_network_is_the_first_order_expansion() -> None:
    # Inventory D9-01: the error is of second order in the step.
    net, x, _, _ = problem()
    linear = linearize(net)
    away = {name: torch.randn_like(value) for name, value in net.named_parameters()}
    errors = []
    for size in (1e-2, 5e-3):
        moved = {name: value.detach() + size * away[name] for name, value in net.named_parameters()}
        errors.append((functional_call(linear, moved, (x,)) - functional_call(net, moved, (x,))).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_flow_solves_its_differential_equation() -> None:
    # Inventory D9-03, T3-68: f' = -Theta (f - y) / c and, for new rows, the same with their kernel.
    net, x, y, new = problem(outputs=1)
    kernel, cross = empirical_ntk(net, x), empirical_ntk(net, new, x)
    flow = GradientFlow(kernel, y, learning_rate=0.3)
    both = torch.cat([kernel, cross])
    f0 = net(torch.cat([x, new])).detach()[:, 0]

    def slope(_: float, f: np.ndarray) -> np.ndarray:
        return (-0.3 * both @ (torch.as_tensor(f)[:6] - y[:, 0]) / 6).numpy()

    solved = solve_ivp(slope, (0, 7.0), f0.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    found = flow.mean(7.0, cross, (f0[6:, None], f0[:6, None]))[:, 0]
    torch.testing.assert_close(found, torch.as_tensor(solved[6:]), rtol=1e-7, atol=1e-8)


def test_kernel_regression_is_the_limit_and_needs_the_initial_function() -> None:
    # Inventory D9-02, T3-67: f_0(x) + k^T K^-1 (y - f_0(X)) interpolates; without f_0(x) it does not.
    net, x, y, new = problem(outputs=1)
    kernel, cross = empirical_ntk(net, x), empirical_ntk(net, new, x)
    f0, f0_new = net(x).detach(), net(new).detach()
    flow = GradientFlow(kernel, y)
    exact = f0_new + cross @ torch.linalg.solve(kernel, y - f0)
    torch.testing.assert_close(flow.mean(INF, cross, (f0_new, f0)), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow.mean(INF, kernel, (f0, f0)), y, rtol=1e-8, atol=1e-8)
    assert (flow.mean(INF, kernel, (0 * f0, f0)) - y).abs().max() > 0.1


def test_limits_of_the_ensemble() -> None:
    x, new = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (6, 4))
    y = x[:, 0]
    (k, theta), (k_cross, theta_cross), (k_new, _) = (relu_kernels(*p) for p in ((x, x), (new, x), (new, new)))
    flow = GradientFlow(theta, y, k)
    torch.testing.assert_close(flow.covariance(0.0, theta_cross, k_cross, k_new), k_new)
    assert not flow.mean(0.0, theta_cross).any()
    torch.testing.assert_close(flow.mean(INF), y)
    torch.testing.assert_close(flow.covariance(INF), torch.zeros_like(k), atol=1e-12, rtol=0)
    # Inventory T3-78: only the readout's training ends at the posterior; the NTK's ensemble is another law.
    posterior = k_new - k_cross @ torch.linalg.solve(k, k_cross.T)
    readout = GradientFlow(k, y).covariance(INF, k_cross, prior_new=k_new)
    torch.testing.assert_close(readout, posterior, rtol=1e-8, atol=1e-10)
    tangent = flow.covariance(INF, theta_cross, k_cross, k_new)
    assert (tangent.diagonal() > 1.005 * posterior.diagonal()).all()
    assert torch.linalg.eigvalsh(tangent).min() > -1e-12
    # The error's square halves its rate: at the training rows the covariance is exp(-t Theta / c) K exp(-t Theta / c).
    decay = torch.linalg.matrix_exp(-2.0 * theta / 6)
    torch.testing.assert_close(flow.covariance(2.0), decay @ k @ decay, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("discrete", [False, True])
def test_singular_kernels_are_learnt_where_they_can_be(discrete: bool) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x[:1]])  # repeated, with another target, and rank 2
    y = torch.arange(6.0, dtype=torch.float64)
    kernel = x @ x.T
    flow = GradientFlow(kernel, y, learning_rate=0.5, discrete=discrete)
    times = torch.tensor([0.0, 3.0, 1e20, INF], dtype=torch.float64)
    found, spread = flow.mean(times, kernel), flow.covariance(times, kernel, kernel, kernel)
    assert found.isfinite().all()
    assert spread.isfinite().all()
    least_squares = x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(found[2:], least_squares.expand(2, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spread[3], torch.zeros_like(kernel), rtol=0, atol=1e-12)
    zero = GradientFlow(torch.zeros(3, 3), torch.ones(3))
    assert not zero.mean(INF).any()


def test_ridge_is_weight_decay_towards_the_start() -> None:
    net, x, y, new = problem(outputs=1)
    kernel, cross = empirical_ntk(net, x), empirical_ntk(net, new, x)
    flow = GradientFlow(kernel, y, ridge=0.2, discrete=True, learning_rate=0.05)
    decay = 0.2 * kernel.diagonal().mean() / 6
    linear, start = linearize(net), [p.detach().clone() for p in net.parameters()]
    for _ in range(15):
        parameters = list(linear.parameters())
        slopes = torch.autograd.grad((linear(x) - y).square().mean() / 2, parameters)
        for parameter, slope, origin in zip(parameters, slopes, start, strict=True):
            parameter.data -= 0.05 * (slope + decay * (parameter.data - origin))
    f0 = net(x).detach()
    torch.testing.assert_close(
        flow.mean(15, cross, (net(new).detach(), f0)), linear(new).detach(), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(flow.mean(15, None, (f0, f0)), linear(x).detach(), rtol=1e-10, atol=1e-10)


def test_wrong_input_is_refused() -> None:
    eye, y = torch.eye(3), torch.ones(3)
    with pytest.raises(DataError, match="NaN"):
        GradientFlow(eye / 0, y)
    with pytest.raises(DataError, match="eigenvalue"):
        GradientFlow(-eye, y)
    with pytest.raises(DataError, match=r"\[N, N\]"):
        GradientFlow(eye[:2], y)
    with pytest.raises(DataError, match="y must be"):
        GradientFlow(eye, y[:2])
    flow = GradientFlow(eye, y, discrete=True)
    with pytest.raises(MethodError, match="negative"):
        flow.mean(-1)
    with pytest.raises(MethodError, match="numbers of steps"):
        flow.mean(1.5)
    with pytest.raises(DataError, match="prior_new"):
        flow.covariance(1, torch.ones(2, 3))
    with pytest.raises(DataError, match="new and training rows"):
        flow.mean(1, torch.ones(2, 2))


@pytest.mark.slow
def test_ensemble_of_wide_networks_has_the_mean_and_covariance_of_the_limit() -> None:
    # Inventory D9-04: descent in the NTK parameterisation on 300 networks of 512 units, all weights, against the limit.
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 4))
    y = torch.sin(2 * x[:, 0])
    (k, theta), (k_cross, theta_cross), (k_new, _) = (relu_kernels(*p, 1) for p in ((x, x), (new, x), (new, new)))
    members, width, w, b = 300, 512, 1.5, 0.1
    shapes = ((width, 3), (width,), (1, width), (1,))
    weights = [torch.randn(members, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def forward(rows: Tensor) -> Tensor:
        w1, b1, w2, b2 = weights
        h = torch.relu(w / 3**0.5 * rows @ w1.mT + b * b1.unsqueeze(1))
        return (w / width**0.5 * h @ w2.mT)[..., 0] + b * b2  # [members, N]

    rate, steps = 0.25, 40
    flow = GradientFlow(theta, y, k, learning_rate=rate, discrete=True)
    assert rate < 0.5 * flow.learning_rate_limit
    for _ in range(steps):
        slopes = torch.autograd.grad((forward(x) - y).square().mean(1).sum() / 2, weights)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.data -= rate * slope
    with torch.no_grad():
        f = forward(new)
    covariance = flow.covariance(steps, theta_cross, k_cross, k_new)
    error = (covariance.diagonal() / members).sqrt()
    assert ((f.mean(0) - flow.mean(steps, theta_cross)).abs() < 4 * error).all()
    spread = (torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2).div(members).sqrt()
    assert ((f.T.cov() - covariance).abs() < 4.5 * spread).all()
    assert covariance.trace() < 0.4 * k_new.trace()


def test_ntk_parameterisation_of_the_linearised_network_moves_by_prior_variances() -> None:
    net, x, _, _ = problem()
    model = BayesianNetwork(net, priors.Normal("fan_in", w_std=2.0, b_std=0.5))
    linear = linearize(model, parameterisation="ntk")
    torch.testing.assert_close(linear(x), net(x))
    z = {name: p.detach() for name, p in linear.named_parameters()}
    torch.testing.assert_close(z["0.weight"] * 2 / 3**0.5, net[0].weight.detach())
    jacobian = jacrev(lambda values: functional_call(linear, values, (x,)))(z)
    flat = torch.cat([part.flatten(2) for part in jacobian.values()], 2).flatten(0, 1)
    kernel = empirical_ntk(model, x, parameterisation="ntk", per_output=True)
    torch.testing.assert_close(flat @ flat.T, kernel.transpose(1, 2).reshape(12, 12), rtol=1e-10, atol=1e-10)
