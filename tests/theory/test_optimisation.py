"""Rates of descent: the theory's recursions against iterates of torch.optim and by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.theory.optimisation import spectral_radius, tuned

DOUBLE = torch.float64


def descend(gradient, start, step, steps, momentum=0.0, form="heavy_ball"):
    """Iterates ``[T + 1, ...]``; ``momentum`` a number or a function of t = 1, 2, ..."""
    w, before, path = start, start, [start]
    for t in range(1, steps + 1):
        rho = momentum(t) if callable(momentum) else momentum
        ahead = w + rho * (w - before)
        w, before = ahead - step * gradient(ahead if form == "nesterov" else w), w
        path.append(w)
    return torch.stack(path)


def by_torch(loss, start, steps, optimiser):
    w = start.clone().requires_grad_()
    optimiser, path = optimiser([w]), [start]
    for _ in range(steps):
        optimiser.zero_grad()
        loss(w).backward()
        optimiser.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def quadratic(*curvatures):
    scale = torch.tensor(curvatures, dtype=DOUBLE)
    return (lambda w: 0.5 * (scale * w.square()).sum()), (lambda w: scale * w)


# -- quadratics ------------------------------------------------------------------------------------------------------


def test_gradient_descent_shrinks_every_eigendirection_by_its_own_factor():
    """S-05 to S-08: (z_m)_t = (1 - eta c)^t; the rate .81818 at curvatures 1 and 10; kappa = 1 takes one step."""
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)).Q
    scale, end = torch.tensor([1.0, 3.0, 10.0], dtype=DOUBLE), torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    a = basis @ torch.diag(scale) @ basis.T
    found = tuned("gradient", 1.0, 10.0)
    path = by_torch(lambda w: 0.5 * w @ a @ w - (a @ end) @ w, torch.zeros(3, dtype=DOUBLE), 30,
                    lambda w: torch.optim.SGD(w, lr=found.step_size))  # fmt: skip
    factors = (1 - found.step_size * scale) ** torch.arange(31, dtype=DOUBLE)[:, None]
    torch.testing.assert_close((path - end) @ basis, factors * (-end @ basis), rtol=1e-9, atol=1e-12)
    assert found.rate == pytest.approx(9 / 11)
    assert tuned("gradient", 4.0, 4.0).rate == 0.0
    assert spectral_radius("gradient", torch.tensor([1.0, 10.0]), 0.2 + 1e-9).max() > 1  # eta < 2 / L


def test_the_rate_is_of_the_distance_and_its_exponential_bound_has_half_the_exponent():
    """C09-17, C09-18, C09-19, T06: m = 1, L = 100, start (1, 1), 100 steps."""
    _, gradient = quadratic(1.0, 100.0)
    found = tuned("gradient", 1.0, 100.0)
    path = descend(gradient, torch.ones(2, dtype=DOUBLE), found.step_size, 100)
    ratio = float(path[-1].norm() / path[0].norm())
    assert ratio == pytest.approx(found.rate**100, rel=1e-9) == pytest.approx(0.13533, abs=1e-5)
    assert math.exp(-4 * 100 / 100) < ratio < math.exp(-2 * 100 / 101)
    eta, m, largest = 0.7 * found.step_size, 1.0, 100.0
    distances = descend(gradient, torch.ones(2, dtype=DOUBLE), eta, 50).square().sum(1)
    assert (distances[1:] <= (1 - 2 * eta * m * largest / (m + largest)) * distances[:-1] + 1e-15).all()


@pytest.mark.parametrize(("method", "rate"), [("gradient", 99 / 101), ("heavy_ball", 9 / 11), ("nesterov", 0.9)])
def test_tuned_methods_on_a_condition_number_of_a_hundred(method, rate):
    """C10-03, C10-09: the spectral radius, and the decay of iterates in the long run."""
    found = tuned(method, 1.0, 100.0)
    assert found.rate == pytest.approx(rate, abs=1e-7)
    _, gradient = quadratic(1.0, 30.0, 100.0)
    path = descend(gradient, torch.ones(3, dtype=DOUBLE), found.step_size, 400, found.momentum, method)
    # Double roots bring a factor t beside the power, so the estimate comes down to the rate slowly.
    assert float((path[400].norm() / path[200].norm()) ** (1 / 200)) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize(
    ("kappa", "radius"), [(5.0, 1.12), (10.0, 1.49), (100.0, 2.12)], ids=lambda value: f"{value:g}"
)
def test_nesterov_diverges_with_the_step_size_of_gradient_descent(kappa, radius):
    """T12; the limit is eta L < (2 + 2 rho) / (1 + 2 rho)."""
    rho = tuned("nesterov", 1.0, kappa).momentum
    curvatures = torch.tensor([1.0, kappa], dtype=DOUBLE)
    eta = 0.99 * 2 / (1 + kappa)
    assert float(spectral_radius("nesterov", curvatures, eta, rho).max()) == pytest.approx(radius, abs=0.005)
    limit = (2 + 2 * rho) / (1 + 2 * rho) / kappa
    assert (
        spectral_radius("nesterov", kappa, 0.999 * limit, rho)
        < 1
        < spectral_radius("nesterov", kappa, 1.001 * limit, rho)
    )


def test_heavy_ball_is_stable_up_to_twice_one_plus_rho_and_with_a_stale_gradient_not():
    """T3-26: beta .9, alpha lambda .2, 300 steps."""
    assert spectral_radius("heavy_ball", 1.0, 3.79, 0.9) < 1 < spectral_radius("heavy_ball", 1.0, 3.81, 0.9)
    good, bad, velocity, old = 1.0, 1.0, 0.0, 0.0
    for _ in range(300):
        velocity = 0.2 * good + 0.9 * velocity
        good -= velocity
        bad, old = bad - old, 0.2 * bad + 0.9 * old
    assert abs(good) < 1e-6
    assert abs(bad) > 1e5


def test_early_stopping_imitates_weight_decay_crudely():
    """D8-02, D8-03: after T = 1 / (eta mu) steps 1.000, .866, .181 of the optimum, against .952, .667, .167."""
    curvature, mu, eta = torch.tensor([10.0, 1.0, 0.1], dtype=DOUBLE), 0.5, 0.01
    stopped = 1 - (1 - eta * curvature) ** round(1 / (eta * mu))
    assert stopped.tolist() == pytest.approx([1.0, 0.866, 0.181], abs=1e-3)
    decayed = by_torch(lambda w: 0.5 * (curvature * (w - 1).square()).sum(), torch.zeros(3, dtype=DOUBLE), 3000,
                       lambda w: torch.optim.SGD(w, lr=0.05, weight_decay=mu))[-1]  # fmt: skip
    assert decayed.tolist() == pytest.approx((curvature / (curvature + mu)).tolist(), abs=1e-9)
    assert (decayed - stopped).abs().max() > 0.1
    # The other sign grows: theta - eta (grad - mu theta) has 1 - eta (lambda - mu) > 1 where lambda < mu (T3-63).
    assert spectral_radius("gradient", 0.1 - mu, eta) > 1


def test_stiff_directions_are_learnt_first():
    """C14-12: on a sloppy quadratic the best step is 1 / lambda in each direction; one step size serves the stiff."""
    scale = torch.logspace(0, -6, 7, dtype=DOUBLE)
    loss, gradient = quadratic(*scale.tolist())
    path = descend(gradient, scale.rsqrt(), 1.0, 100)  # every direction begins with the same loss
    parts = 0.5 * scale * path[-1].square()
    assert (parts[:2] < 1e-8).all()
    assert (parts[3:] > 0.4).all()
    assert float(loss(descend(lambda w: gradient(w) / scale, scale.rsqrt(), 1.0, 1)[1])) < 1e-30


# -- convex functions ------------------------------------------------------------------------------------------------


def pairs(count=200, dim=3, seed=0, positive=False):
    found = torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return found.abs() + 1e-3 if positive else found


CONVEX = {
    "power": (lambda w: w.pow(1.7).sum(-1), True),
    "absolute": (lambda w: w.abs().pow(1.3).sum(-1), False),
    "exp": (lambda w: w.exp().sum(-1), False),
    "-log": (lambda w: -w.log().sum(-1), True),
    "norm": (lambda w: torch.linalg.vector_norm(w, 3, -1), False),
    "log-sum-exp": (lambda w: w.logsumexp(-1), False),
    "quartic": (lambda w: w.pow(4).sum(-1), False),
}


@pytest.mark.parametrize("name", CONVEX)
def test_convexity_between_and_along_tangents(name):
    """C09-01 to C09-04, T01: chords above, tangents below, gradients monotone."""
    function, positive = CONVEX[name]
    one, two = pairs(positive=positive)
    share = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    between = share[:, None] * one + (1 - share)[:, None] * two
    assert (function(between) <= share * function(one) + (1 - share) * function(two) + 1e-12).all()
    slopes = [torch.func.vmap(torch.func.grad(function))(w) for w in (one, two)]
    assert (function(two) >= function(one) + (slopes[0] * (two - one)).sum(1) - 1e-12).all()
    assert (((slopes[0] - slopes[1]) * (one - two)).sum(1) >= -1e-12).all()
    # and the checks can fail
    assert (torch.sin(between).sum(1) > share * torch.sin(one).sum(1) + (1 - share) * torch.sin(two).sum(1)).any()


def logistic(n=30, dim=4, decay=0.1):
    """A smooth and strongly convex loss: it, its gradient, m, L, and its minimum."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    loss = lambda w: torch.nn.functional.softplus(-(w @ x.T)).mean(-1) + decay / 2 * w.square().sum(-1)  # noqa: E731
    gradient = lambda w: -(torch.sigmoid(-(w @ x.T)) @ x) / n + decay * w  # noqa: E731
    largest = float(torch.linalg.eigvalsh(x.T @ x / n)[-1]) / 4 + decay
    w = torch.zeros(dim, dtype=DOUBLE)
    for _ in range(30):
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w), gradient(w))
    return loss, gradient, decay, largest, w


def test_inequalities_of_smooth_and_strongly_convex_functions():
    """C09-06, C09-07, C09-10, C09-11, C09-12, C09-13, C09-16, T05."""
    loss, gradient, m, largest, best = logistic()
    one, two = 3 * pairs(dim=4)
    away, slope, change = two - one, gradient(one), gradient(two) - gradient(one)
    square, inner = away.square().sum(1), (change * away).sum(1)
    gap, steep = loss(one) - loss(best), slope.square().sum(1)
    taylor = loss(two) - loss(one) - (slope * away).sum(1)
    assert (taylor <= largest / 2 * square).all()
    assert (taylor >= m / 2 * square).all()
    assert (inner >= m * square).all()
    assert (inner >= change.square().sum(1) / largest).all()
    assert (inner >= (m * largest * square + change.square().sum(1)) / (m + largest)).all()
    assert (gap <= steep / (2 * m)).all()
    assert (steep / (2 * largest) <= gap).all()
    assert (gap <= largest / 2 * (one - best).square().sum(1)).all()
    # T05: a Lipschitz gradient alone does not make it co-coercive.
    assert (((two.sin() - one.sin()) * away).sum(1) < (two.sin() - one.sin()).square().sum(1)).any()


def test_gradient_descent_on_a_convex_loss_step_by_step():
    """C09-14, C09-15, D3-02: sufficient decrease at eta = 1 / L, and the 1 / t bound."""
    loss, gradient, _, largest, best = logistic(decay=0.01)
    eta = 1 / largest
    path = descend(gradient, torch.full((4,), 3.0, dtype=DOUBLE), eta, 200)
    value, steep, distance = loss(path), gradient(path).square().sum(1), (path - best).square().sum(1)
    gaps = value - loss(best)
    assert (value[1:] <= value[:-1] - eta / 2 * steep[:-1] + 1e-12).all()
    assert (gaps[1:] <= (distance[:-1] - distance[1:]) / (2 * eta) + 1e-12).all()
    assert (gaps[1:] <= distance[0] / (2 * eta * torch.arange(1, 201))).all()


def test_polyak_lojasiewicz_needs_no_convexity():
    """D3-03: x^2 + 3 sin^2 x with mu = .1755, its rate (1 - mu / L)^t, and a quadratic with kappa = 10."""
    x = torch.linspace(-10, 10, 200_001, dtype=DOUBLE)
    value, slope = x.square() + 3 * x.sin().square(), 2 * x + 3 * (2 * x).sin()
    away = x.abs() > 1e-3
    mu = float((0.5 * slope.square() / value)[away].min())
    assert mu == pytest.approx(0.1755, abs=1e-4)
    assert (2 + 6 * (2 * x).cos()).min() < 0
    path = descend(lambda w: 2 * w + 3 * (2 * w).sin(), torch.tensor(3.0, dtype=DOUBLE), 1 / 8, 100)
    gaps = path.square() + 3 * path.sin().square()
    assert (gaps[1:] <= (1 - mu / 8) * gaps[:-1] + 1e-300).all()
    loss, gradient = quadratic(1.0, 10.0)
    path = descend(gradient, torch.ones(2, dtype=DOUBLE), 1 / 10, 59)
    gaps = torch.stack([loss(w) for w in path])
    assert (gaps <= (1 - 1 / 10) ** torch.arange(60) * gaps[0] * (1 + 1e-12)).all()


# -- momentum --------------------------------------------------------------------------------------------------------


def test_forms_of_momentum_and_which_is_torchs():
    """C10-02, C10-04, C10-06, T10, S-26, T-52: one trajectory while eta stays, another when it changes."""
    loss, gradient, *_ = logistic()
    start, eta, rho = torch.full((4,), 2.0, dtype=DOUBLE), 0.3, 0.8
    for form in ("heavy_ball", "nesterov"):
        torch.testing.assert_close(descend(gradient, start, eta, 9, 0.0, form), descend(gradient, start, eta, 9))
    ball = descend(gradient, start, eta, 40, rho)
    ours = by_torch(loss, start, 40, lambda w: torch.optim.SGD(w, lr=eta, momentum=rho))
    torch.testing.assert_close(ours, ball, rtol=1e-10, atol=1e-12)
    # torch's parameters with nesterov=True are the points looked ahead to, not the iterates
    path = descend(gradient, start, eta, 40, rho, "nesterov")
    ahead = path[1:] + rho * (path[1:] - path[:-1])
    looked = by_torch(loss, start, 40, lambda w: torch.optim.SGD(w, lr=eta, momentum=rho, nesterov=True))[1:]
    torch.testing.assert_close(looked, ahead, rtol=1e-10, atol=1e-12)
    assert (looked - path[1:]).abs().max() > 1e-2
    # A rate inside the velocity (m = rho m - eta_t g) is another method once the rate changes.
    velocity = buffer = torch.zeros(())
    inside = outside = torch.tensor(1.0)
    for rate in (0.1, 0.01, 0.01):
        velocity, buffer = rho * velocity - rate * inside, rho * buffer + outside
        inside, outside = inside + velocity, outside - rate * buffer
    assert abs(float(inside - outside)) > 0.05


def test_momentum_multiplies_a_constant_gradient_by_a_geometric_sum():
    """D3-04, T3-51: 1, 1.9, 2.71, ... towards 1 / (1 - beta)."""
    path = descend(lambda w: torch.ones_like(w), torch.tensor(0.0, dtype=DOUBLE), 1.0, 200, 0.9)
    steps = path[:-1] - path[1:]
    assert steps[:3].tolist() == pytest.approx([1.0, 1.9, 2.71])
    assert float(steps[-1]) == pytest.approx(10.0)


def test_without_friction_a_discrete_energy_stays():
    """C10-01: rho = 1 is the Stormer-Verlet scheme, which oscillates for ever."""
    path = descend(lambda w: w, torch.tensor(1.0, dtype=DOUBLE), 0.01, 5000, 1.0)
    energy = (path[1:] - path[:-1]).square() / 0.01 + path[1:] * path[:-1]
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-9, atol=0)
    assert path[-700:].abs().max() > 0.9


def test_tuned_heavy_ball_can_cycle_where_nesterov_converges():
    """C10-05, T09: a 1-D function with m = 1 and L = 25."""

    def gradient(x: Tensor) -> Tensor:
        return torch.where(x < 1, 25 * x, torch.where(x < 2, x + 24, 25 * x - 24))

    start, ball, fast = torch.tensor(3.3, dtype=DOUBLE), tuned("heavy_ball", 1.0, 25.0), tuned("nesterov", 1.0, 25.0)
    assert (ball.step_size, ball.momentum) == (pytest.approx(1 / 9), pytest.approx(4 / 9))
    path = descend(gradient, start, ball.step_size, 3000, ball.momentum)
    cycle = sorted(path[-3:].tolist())
    assert cycle == pytest.approx([-1.8024, 0.6465, 2.1159], abs=1e-4)
    assert (fast.step_size, fast.momentum) == (pytest.approx(1 / 25), pytest.approx(2 / 3))
    assert descend(gradient, start, fast.step_size, 300, fast.momentum, "nesterov")[-1].abs() < 1e-9


def test_the_worst_function_for_first_order_methods():
    """C09-21, C10-07, T08: Nesterov's tridiagonal quadratic in 41 unknowns, 20 steps: bound .00287 below both gaps."""
    t, size = 20, 41
    a = (
        torch.diag(torch.full((size,), 2.0))
        - torch.diag(torch.ones(size - 1), 1)
        - torch.diag(torch.ones(size - 1), -1)
    )
    a, first = a.double() / 4, torch.zeros(size, dtype=DOUBLE)
    first[0] = 0.25
    best = torch.linalg.solve(a, first)
    loss = lambda w: 0.5 * w @ a @ w - first @ w  # noqa: E731
    start = torch.zeros(size, dtype=DOUBLE)
    slow = descend(lambda w: a @ w - first, start, 1.0, t)[-1]
    schedule = lambda k: (k - 1) / (k + 2)  # noqa: E731
    fast = descend(lambda w: a @ w - first, start, 1.0, t, schedule, "nesterov")[-1]
    square = float(best.square().sum())
    gaps = [float(loss(w) - loss(best)) for w in (slow, fast)]
    bound = 3 / 32 * square / (t + 1) ** 2
    assert bound == pytest.approx(0.00287, abs=1e-5)
    assert gaps == pytest.approx([0.01898, 0.00859], abs=1e-5)
    assert gaps[1] <= 2 * square / (t + 1) ** 2 == pytest.approx(0.0612, abs=1e-4)


def test_nesterovs_method_follows_its_differential_equation():
    """C10-08, T11: W'' + (3 / tau) W' + grad l(W) = 0 with tau = sqrt(eta) t; the error falls like sqrt(eta)."""
    scale, start = torch.tensor([1.0, 0.2], dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE)

    def exact(tau: Tensor) -> Tensor:
        """2 J_1(x) / x with x = tau sqrt(c)."""
        x = tau[:, None] * scale.sqrt()
        return start * torch.where(x > 1e-8, 2 * torch.special.bessel_j1(x) / x.clamp(min=1e-8), torch.ones_like(x))

    errors = []
    for eta in (0.1, 0.01, 0.001):
        steps = round(10 / math.sqrt(eta))
        path = descend(lambda w: scale * w, start, eta, steps, lambda k: (k - 1) / (k + 2), "nesterov")
        errors.append(float((path - exact(math.sqrt(eta) * torch.arange(steps + 1, dtype=DOUBLE))).abs().max()))
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(math.sqrt(10), rel=0.25)


# -- not convex ------------------------------------------------------------------------------------------------------


def test_gradient_descent_without_convexity():
    """B1-05: the least gradient falls like 1 / sqrt N. B1-06: x^3 ends at a point that is no minimum. T3-27."""
    function, slope = (lambda x: x.cos() + 0.05 * x**2), (lambda x: -x.sin() + 0.1 * x)
    lipschitz = 1.1
    alpha = 1 / lipschitz
    path = descend(slope, torch.tensor(2.0, dtype=DOUBLE), alpha, 200)
    c = alpha * (1 - lipschitz * alpha / 2)
    grid = torch.linspace(-10, 10, 10_001, dtype=DOUBLE)
    most = (function(path[0]) - function(grid).min()) / c
    least = slope(path[:-1]).abs().cummin(0).values
    assert (least <= (most / torch.arange(1, 201)).sqrt()).all()
    assert c == pytest.approx(1 / (2 * lipschitz))  # alpha = 1 / M is best
    cubic = 1.0
    for _ in range(100_000):
        cubic -= 0.1 * 3 * cubic**2
    assert cubic == pytest.approx(3.3e-5, rel=0.02)
    assert spectral_radius("gradient", 2.1, 1.0) > 1  # a positive curvature alone does not converge


def test_a_saddle_holds_what_starts_on_its_stable_side():
    """A6-03, B1-09, T3-11: (x^2 - y^2) / 2 with eta = .1 leaves |y| < 1 after 145 steps from y = 1e-6, from 0 never."""
    signs = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    path = descend(lambda w: signs * w, torch.tensor([1.0, 1e-6], dtype=DOUBLE), 0.1, 200)
    assert int((path[:, 1].abs() > 1).nonzero()[0]) == 145
    stays = descend(lambda w: signs * w, torch.tensor([1.0, 0.0], dtype=DOUBLE), 0.1, 200)
    assert stays[-1].abs().max() < 1e-8
    # Damping turns the step downhill once it exceeds the most negative eigenvalue, not before.
    w = torch.tensor([1.0, 0.1], dtype=DOUBLE)
    for damping, downhill in ((0.5, False), (1.5, True)):
        step = -(signs * w) / (signs + damping)
        assert bool(step[1] > 0) == downhill


def test_rosenbrock_in_the_space_of_outputs():
    """A5-06: from (-1.2, 1) Gauss-Newton takes 2 steps, descent in the outputs 49, plain descent 20,829."""

    def residuals(w: Tensor) -> Tensor:
        return torch.stack([1 - w[0], 10 * (w[1] - w[0] ** 2)])

    def jacobian(w: Tensor) -> Tensor:
        return torch.stack([torch.stack([-torch.ones_like(w[0]), torch.zeros_like(w[0])]),
                            torch.stack([-20 * w[0], torch.full_like(w[0], 10.0)])])  # fmt: skip

    start = torch.tensor([-1.2, 1.0], dtype=DOUBLE)
    w = start
    for _ in range(2):
        w = w - torch.linalg.solve(jacobian(w), residuals(w))
    assert residuals(w).abs().max() < 1e-12
    # the gradient of |r|^2 is 2 r, so every step of eta = .1 leaves 8 tenths of r
    w, steps = start, 0
    while residuals(w).square().sum() >= 1e-8:
        r = 0.8 * residuals(w)
        w, steps = torch.stack([1 - r[0], (1 - r[0]) ** 2 + r[1] / 10]), steps + 1
    assert steps == 49
    x, y, steps = -1.2, 1.0, 0
    while (1 - x) ** 2 + 100 * (y - x * x) ** 2 >= 1e-8:
        error = y - x * x
        x, y, steps = x + 1e-3 * (2 * (1 - x) + 400 * x * error), y - 1e-3 * 200 * error, steps + 1
    assert steps == pytest.approx(20_829, abs=2)


def test_proximal_steps_and_the_half_in_front_of_the_penalty():
    """A5-01, A5-02, T3-09: |d|^2 gives half the gradient; lambda / 2 d^T G d gives (lambda G)^-1 times minus it."""
    slope = torch.tensor([3.0, -2.0], dtype=DOUBLE)
    metric = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=DOUBLE)
    for penalty, want in (
        (lambda d: d.square().sum(), torch.tensor([-1.5, 1.0], dtype=DOUBLE)),
        (lambda d: 5.0 / 2 * d @ metric @ d, -torch.linalg.solve(5 * metric, slope)),
    ):
        at = torch.zeros(2, dtype=DOUBLE)
        curve = torch.func.hessian(penalty)(at)
        step = -torch.linalg.solve(curve, slope + torch.func.grad(penalty)(at))
        torch.testing.assert_close(step, want)


def test_random_hessians_are_saddles():
    """A6-02: the semicircle's edges for n = 1000, and how seldom a small random symmetric matrix has no way down."""
    stream = torch.Generator().manual_seed(0)

    def goe(count: int, n: int) -> Tensor:
        g = torch.randn(count, n, n, generator=stream, dtype=DOUBLE)
        return (g + g.mT) / math.sqrt(2 * n)

    values = torch.linalg.eigvalsh(goe(1, 600))[0]
    assert (float(values[0]), float(values[-1])) == (pytest.approx(-2, abs=0.06), pytest.approx(2, abs=0.06))
    assert float((values < 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    for n, want in ((2, 0.1464), (3, 0.0252)):  # (2 - sqrt 2) / 4, and (pi - 2 sqrt 2) / (4 pi)
        share = float((torch.linalg.eigvalsh(goe(40_000, n))[:, 0] > 0).double().mean())
        assert share == pytest.approx(want, abs=4 * math.sqrt(want / 40_000))


def test_scale_invariant_losses_grow_their_weights():
    """A6-08: w . grad = 0, grad L(gamma w) = grad L(w) / gamma, and |w| grows like the fourth root of 2 k (eta g)^2."""
    goal = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=DOUBLE)
    loss = lambda w: -(w @ goal) / w.norm()  # noqa: E731
    w = torch.tensor([1.0, 0.2, -0.4, 0.3], dtype=DOUBLE)
    slope = torch.func.grad(loss)
    torch.testing.assert_close(slope(3 * w), slope(w) / 3)
    assert abs(float(w @ slope(w))) < 1e-15
    # A gradient of unit length at |w| = 1, always across: |w|^2 grows by (eta / |w|)^2 a step.
    square, norms = 1.0, []
    for _ in range(100_000):
        square += 0.1**2 / square
        norms.append(square)
    assert math.log(norms[-1] / norms[9_999]) / math.log(10) == pytest.approx(0.5, abs=0.01)


def test_weight_decay_balances_two_linear_layers():
    """C12-14, T36: min |A|^2 + |B|^2 for a given product is twice its nuclear norm, reached at A^T A = B B^T."""
    target = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    stream = torch.Generator().manual_seed(2)
    start = torch.randn(3 * 3 + 3 * 4, generator=stream, dtype=DOUBLE)
    w, decay = start.clone().requires_grad_(), 0.02
    optimiser = torch.optim.LBFGS([w], max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-13,
                                  tolerance_change=0)  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        a, b = w[:9].reshape(3, 3), w[9:].reshape(3, 4)
        loss = 0.5 * (a @ b - target).square().sum() + decay * (a.square().sum() + b.square().sum())
        loss.backward()
        return loss

    optimiser.step(closure)
    a, b = w.detach()[:9].reshape(3, 3), w.detach()[9:].reshape(3, 4)
    torch.testing.assert_close(a.T @ a, b @ b.T, rtol=0, atol=1e-6)
    nuclear = float(torch.linalg.svdvals(a @ b).sum())
    assert float(a.square().sum() + b.square().sum()) == pytest.approx(2 * nuclear, rel=1e-8)
    # The optimum moved: singular values are shrunk by twice the decay.
    shrunk = torch.linalg.svdvals(target) - 2 * decay
    torch.testing.assert_close(torch.linalg.svdvals(a @ b), shrunk, rtol=1e-6, atol=1e-8)


def test_what_is_no_method_is_refused():
    with pytest.raises(MethodError, match="must be one of 'gradient'"):
        spectral_radius("adam", 1.0, 0.1)
    with pytest.raises(MethodError, match="no momentum"):
        spectral_radius("gradient", 1.0, 0.1, 0.9)
    with pytest.raises(MethodError, match="0 < m <= L"):
        tuned("gradient", 0.0, 1.0)
