"""What is said of adaptive optimisers, control variates and information matrices, against torch.optim and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

DOUBLE = torch.float64


def follow(gradients, optimiser, start=0.0):
    """Values ``[T + 1, ...]`` of a parameter under given gradients."""
    w = torch.full_like(torch.as_tensor(gradients[0], dtype=DOUBLE), start).requires_grad_()
    method, path = optimiser([w]), [w.detach().clone()]
    for gradient in gradients:
        w.grad = torch.as_tensor(gradient, dtype=DOUBLE).expand_as(w).clone()
        method.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def adam(**settings):
    return lambda w: torch.optim.Adam(w, lr=1.0, **settings)


def test_adam_written_out_is_torchs_and_as_printed_it_is_not_a_number():
    """S-30, A8-07, D3-05, T25, T3-22, T3-52: corrected moments, the step's own ones, eps beside the root."""
    gradients = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    w, m, v = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(follow(gradients, adam())[-1], w, rtol=1e-12, atol=1e-13)
    stale = torch.zeros(3, dtype=DOUBLE) / (1 - 0.9**0)
    assert stale.isnan().all()
    # without the corrections the first step is 3.16 times as long, and multiplied instead of divided it is not Adam
    assert 0.1 / math.sqrt(0.001) == pytest.approx(3.162, abs=1e-3)


def test_adams_steps_are_bounded_by_the_rate_only_where_gradients_are_steady():
    """S-31, T-54: eta for constant gradients and at t = 1; 3.16, 6.55 and at most 7.27 times eta elsewhere."""
    steady = follow([[0.3, -5.0]] * 20, adam(eps=0.0)).diff(dim=0)
    torch.testing.assert_close(steady, torch.tensor([[-1.0, 1.0]], dtype=DOUBLE).expand(20, 2), rtol=1e-12, atol=0)
    scaled = follow(1e-3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE), adam(eps=0.0))
    plain = follow(torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE), adam(eps=0.0))
    torch.testing.assert_close(scaled, plain)
    late = follow([0.0] * 8_000 + [1.0] * 11, adam(eps=1e-30)).diff().abs()
    assert float(late[8_000]) == pytest.approx(3.16, abs=0.01)
    assert float(late.max()) == pytest.approx(6.55, abs=0.02)
    assert int(late.argmax()) == 8_010
    bound = 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))
    assert bound == pytest.approx(7.27, abs=0.005)
    worst = [0.0] * 8_000 + [(0.999 / 0.9) ** (t - 150) for t in range(150)]
    reached = float(follow(worst, adam(eps=1e-300)).diff().abs().max())
    assert 7.2 < reached <= bound


def test_rprop_moves_by_signs_alone():
    """S-27, S-28, T-53: .1 nine times and -.9 once sum to 0; steps of equal size go down by eight of them."""
    gradients = [0.1] * 9 + [-0.9]
    moved = follow(gradients, lambda w: torch.optim.Rprop(w, lr=1.0, etas=(0.999999999, 1.0 + 1e-12)))
    assert float(moved[-1]) == pytest.approx(-9.0, abs=1e-6)  # torch skips the step after a change of sign
    by_hand = sum(-math.copysign(1.0, g) for g in gradients)
    assert by_hand == -8.0
    assert sum(gradients) == pytest.approx(0.0, abs=1e-12)
    grown = follow([1.0] * 4, lambda w: torch.optim.Rprop(w, lr=1.0)).diff()
    assert grown.tolist() == pytest.approx([-1.0, -1.2, -1.44, -1.728])


@pytest.mark.parametrize(("size", "apart"), [(1.0, False), (1e-5, True)])
def test_rmsprop_and_adagrad_have_eps_beside_the_root(size, apart):
    """S-29, A8-06, D3-05, T3-21: it matters where the squares are no larger than eps."""
    eps, g = 1e-8, torch.tensor(size, dtype=DOUBLE)
    rms = follow([size], lambda w: torch.optim.RMSprop(w, lr=1.0, alpha=0.9, eps=eps))[-1]
    v = 0.1 * g**2
    torch.testing.assert_close(rms, -g / (v.sqrt() + eps))
    inside = -g / (v + eps).sqrt()
    assert bool((rms - inside).abs() > 0.1 * rms.abs()) == apart
    grad = follow([size, 2 * size], lambda w: torch.optim.Adagrad(w, lr=1.0, eps=eps))[-1]
    torch.testing.assert_close(grad, -g / (g + eps) - 2 * g / ((5 * g**2).sqrt() + eps))


def test_weight_decay_in_the_gradient_keeps_the_mode_and_beside_it_does_not():
    """N7-11, N7-16, D8-02, T-54: w' = (1 - eta alpha) w - eta grad; Adam with it ends at MAP, AdamW elsewhere."""
    alpha, curvature = 0.5, torch.tensor([10.0, 1.0, 0.1], dtype=DOUBLE)
    mode = curvature / (curvature + alpha)
    ends = {}
    for name, make in {
        "sgd": lambda w: torch.optim.SGD(w, lr=0.1, weight_decay=alpha),
        "adam": lambda w: torch.optim.Adam(w, lr=0.1, weight_decay=alpha),
        "adamw": lambda w: torch.optim.AdamW(w, lr=0.1, weight_decay=alpha),
    }.items():
        w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
        optimiser = make([w])
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1500)
        for step in range(1500):
            before = w.detach().clone()
            w.grad = curvature * (before - 1)
            optimiser.step()
            if step == 0 and name == "sgd":
                torch.testing.assert_close(w.detach(), (1 - 0.1 * alpha) * before - 0.1 * w.grad)
            rates.step()
        ends[name] = w.detach()
    torch.testing.assert_close(ends["sgd"], mode, rtol=0, atol=1e-3)
    torch.testing.assert_close(ends["adam"], mode, rtol=0, atol=1e-3)
    assert (ends["adamw"] - mode).abs().max() > 0.1


def test_exponential_means_of_iterates_take_noise_out():
    """S-17: the mean of a constant is the constant; of independent noise (1 - gamma) / (1 + gamma) of the variance."""
    gamma, count = 0.9, 200_000
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    kernel = (1 - gamma) * gamma ** torch.arange(200, dtype=DOUBLE)
    means = torch.nn.functional.conv1d(noise.reshape(1, 1, -1), kernel.flip(0).reshape(1, 1, -1))[0, 0]
    assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-8)
    ratio = (1 - gamma) / (1 + gamma)
    # consecutive means are correlated: about count (1 - gamma) / (1 + gamma) independent ones
    assert float(means.var()) == pytest.approx(ratio, abs=4 * ratio * math.sqrt(2 / (count * ratio)))


def test_control_variates_help_with_the_right_coefficient_and_hurt_with_a_wrong_one():
    """C11-15, T21: Var(X + c (Y - EY)) is (1 - corr^2) Var X at c = -Cov / Var Y, and more than Var X at 2.5 c."""
    x, y = torch.randn(2, 400, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    x = 0.8 * y + 0.6 * x
    covariance = torch.stack([x, y]).cov()
    best = -covariance[0, 1] / covariance[1, 1]
    corr = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    torch.testing.assert_close((x + best * (y - y.mean())).var(), (1 - corr**2) * x.var())
    assert (x + 2.5 * best * (y - y.mean())).var() > x.var()


def ridge(n=100, d=5, decay=0.1):
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=stream, dtype=DOUBLE)
    y = torch.randn(n, generator=stream, dtype=DOUBLE)
    best = torch.linalg.solve(x.T @ x / n + decay * torch.eye(d, dtype=DOUBLE), x.T @ y / n)
    return lambda w, i: x[i] * (x[i] @ w - y[i]) + decay * w, best, float(x.square().sum(1).max()) + decay


@pytest.mark.parametrize("name", ["SAGA", "SAG", "plain"])
def test_tables_of_gradients_converge_linearly_one_row_at_a_time(name):
    """C11-16, C11-17, T22: ridge with n = 100; SAG's step is the mean of the refreshed table (11.20)."""
    gradient, best, largest = ridge()
    w, rate, n = torch.zeros(5, dtype=DOUBLE), 1 / (3 * largest), 100
    table = torch.stack([gradient(w, i) for i in range(n)])
    mean, gap = table.mean(0), float((w - best).norm())
    for i in torch.randint(n, (60 * n,), generator=torch.Generator().manual_seed(1)).tolist():
        fresh = gradient(w, i)
        change = fresh - table[i]
        step = {"SAGA": change + mean, "SAG": change / n + mean, "plain": fresh}[name]
        mean, table[i] = mean + change / n, fresh
        if name == "SAG":
            torch.testing.assert_close(step, mean, rtol=1e-9, atol=1e-12)
        w = w - rate * step
    assert (float((w - best).norm()) < 1e-7 * gap) == (name != "plain")


def test_fisher_information_is_the_curvature_of_the_divergence():
    """A8-08 to A8-12, T3-23 to T3-25: Bernoulli(.3), .01 away."""
    p, away = torch.tensor(0.3, dtype=DOUBLE), 0.01
    kl = lambda a, b: a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()  # noqa: E731
    fisher = 1 / (p * (1 - p))
    assert float(kl(p, p + away)) == pytest.approx(2.3517e-4, abs=1e-8)
    assert float(kl(p + away, p)) == pytest.approx(2.3662e-4, abs=1e-8)
    assert float(0.5 * fisher * away**2) == pytest.approx(2.3810e-4, abs=1e-8)
    law, log_prob = torch.stack([p, 1 - p]), lambda q: torch.stack([q, 1 - q]).log()
    assert float((law * (log_prob(p + away) - log_prob(p)).square()).sum()) == pytest.approx(4.67e-4, abs=1e-6)
    score = torch.func.jacfwd(log_prob)(p)
    curve = torch.func.jacfwd(torch.func.jacfwd(log_prob))(p)
    torch.testing.assert_close((law * score**2).sum(), fisher)
    torch.testing.assert_close(-(law * curve).sum(), fisher)


def test_gauss_newton_is_the_hessian_at_a_fit_where_outer_products_of_gradients_vanish():
    """A5-05, C11-20, C14-04, T23, T24, T3-10: a relu network; residuals are what the matrices differ by."""
    stream = torch.Generator().manual_seed(5)
    x, w = torch.randn(20, 2, generator=stream, dtype=DOUBLE), torch.randn(12, generator=stream, dtype=DOUBLE)

    def f(w: Tensor) -> Tensor:
        return torch.relu(x @ w[:8].reshape(2, 4)) @ w[8:]

    jacobian = torch.func.jacrev(f)(w)
    gauss_newton = jacobian.T @ jacobian / 20
    off = []
    for noise in (1.0, 0.01, 0.0):
        y = f(w) + noise * torch.randn(20, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
        exact = torch.func.hessian(lambda v, y=y: 0.5 * (f(v) - y).square().mean())(w)
        rows = jacobian * (f(w) - y)[:, None]
        off.append(float((exact - gauss_newton).norm() / exact.norm()))
        if noise == 0.01:
            assert (rows.T @ rows / 20).trace() < 1e-3 * exact.trace()
    assert off[0] > 0.05  # relu's own second derivative is 0, the product of two layers' is not
    assert off[1] == pytest.approx(off[0] / 100, rel=0.3)
    assert off[2] < 1e-15
    assert torch.linalg.eigvalsh(gauss_newton)[0] > -1e-12
    # A6-01: its largest eigenvalue is the Jacobian's largest singular value, squared
    largest = torch.linalg.svdvals(jacobian)[0] ** 2 / 20
    torch.testing.assert_close(torch.linalg.eigvalsh(gauss_newton)[-1], largest)


def test_critical_points_are_told_by_the_signs_of_the_curvature_and_zero_tells_nothing():
    """S-09, A8-13, T31: Morse indices of minimum, saddle and maximum; w^3 and w^4 look the same at 0."""
    functions = {
        0: lambda w: w[0] ** 2 + w[1] ** 2,
        1: lambda w: w[0] ** 2 - w[1] ** 2,
        2: lambda w: -(w[0] ** 2) - w[1] ** 2,
    }
    at = torch.zeros(2, dtype=DOUBLE)
    for index, function in functions.items():
        values = torch.linalg.eigvalsh(torch.func.hessian(function)(at))
        assert int((values < 0).sum()) == index
    for power in (3, 4):
        assert float(torch.func.hessian(lambda w, p=power: w**p)(torch.tensor(0.0, dtype=DOUBLE))) == 0.0
