from __future__ import annotations

import pytest
import torch

from bayesdl._rng import generator
from bayesdl.bounds import clopper_pearson_upper
from bayesdl.errors import DataError, Divergence, MethodError
from bayesdl.infer.schedules import Polynomial
from bayesdl.posterior.convergence import mcse_mean
from bayesdl.theory.gibbs import (
    double_well,
    gibbs_law,
    langevin_chain,
    relaxation_time,
    stationary_covariance,
    temperature,
)
from bayesdl.theory.gradient_noise import EmpiricalLoss, gradient_covariance, minibatch_factor
from bayesdl.theory.sgd import (
    anneal,
    ergodic_averages,
    gaussian_gradient,
    isotropic_gradient,
    minibatch_gradient,
    run,
)

LEVELS = (0.4, 0.3, 0.2, 0.15, 0.1)
EACH = 400
RUNS = 1000


def slope(w):
    """Of ``double_well``."""
    return w - 4 * w * (-2 * w.square()).exp() + 0.1


def regression(n=20, seed=0):
    """Two correlated columns: the loss, and its Hessian, minimum and gradient covariance there."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=stream, dtype=torch.float64) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]]).double()
    y = x @ torch.tensor([0.6, -0.4]).double() + torch.randn(n, generator=stream, dtype=torch.float64)
    loss = EmpiricalLoss(n, lambda w, rows: ((x[rows] * w).sum(1) - y[rows])[:, None] * x[rows], 2**20)
    minimum = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return loss, x.T @ x / n, minimum, gradient_covariance(loss, minimum)


def deviations(draws, expected):
    """Of the mean over independent rows ``[C, ...]`` from what is expected, in standard errors."""
    return (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("make", [minibatch_gradient, gaussian_gradient])
def test_update_has_the_mean_and_the_covariance_of_mini_batches(make, replace):
    """C11-27, C11-28: mean -eta grad, covariance (eta^2/b) C, times (n-b)/(n-1) without replacement."""
    loss, _, minimum, _ = regression()
    w, eta, b, copies = minimum + 0.5, 0.3, 5, 40_000
    steps = run(make(loss, b, replace=replace), w.expand(copies, 2), step_size=eta, steps=1, seed=1)[:, 0] - w
    mean = -eta * loss.gradient(w[None])[0]
    covariance = eta**2 * minibatch_factor(20, b, replace=replace) * gradient_covariance(loss, w)
    assert (deviations(steps, mean).abs() < 4).all()
    products = (steps - mean)[:, :, None] * (steps - mean)[:, None, :]
    assert (deviations(products, covariance).abs() < 4).all()
    # With the other factor it would be far off: the test tells 1 from 15/19.
    other = eta**2 * minibatch_factor(20, b, replace=not replace) * gradient_covariance(loss, w)
    assert (deviations(products, other).abs() > 8).any()


def test_gaussian_model_is_gaussian_and_mini_batches_are_not():
    """C11-28: same mean and covariance, another law: kurtosis of steps with b = 1."""
    loss, _, minimum, _ = regression()
    kurtosis = []
    for make in (minibatch_gradient, gaussian_gradient):
        found = run(make(loss, 1), minimum.expand(40_000, 2), step_size=0.3, steps=1, seed=3)[:, 0, 0] - minimum[0]
        kurtosis.append(float((found / found.std()).pow(4).mean()))
    assert abs(kurtosis[1] - 3) < 4 * (24 / 40_000) ** 0.5
    assert abs(kurtosis[0] - 3) > 0.5


def test_all_rows_without_replacement_are_gradient_descent():
    """C11-27, T70: the factor is 0 and the chain deterministic."""
    loss, hessian, minimum, _ = regression()
    start = torch.ones(2, 2, dtype=torch.float64)
    found = run(minibatch_gradient(loss, 20, replace=False), start, step_size=0.4, steps=3)
    w = start
    for t in range(3):
        w = w - 0.4 * (w - minimum) @ hessian
        assert torch.allclose(found[:, t], w, rtol=1e-12)


@pytest.mark.parametrize(("eta", "found", "gibbs"), [(0.01, 8.35e-4, 8.33e-4), (1.0, 0.3339, 0.0833)])
def test_stationary_variance_of_the_isotropic_model(eta, found, gibbs):
    """C11-29, T28: the inventory's two runs; at eta = 1 the Gibbs variance is a quarter of the true one."""
    curvature, b, copies = 1.5, 4, 20_000
    exact = float(stationary_covariance(torch.full((1, 1), curvature), eta, b))
    assert found == pytest.approx(exact, rel=0.01)
    noisy = isotropic_gradient(lambda w: curvature * w, b)
    # The start has the exact law at eta = 0.01, where 100 steps are an autocorrelation time and not yet equilibrium.
    start = torch.randn(copies, 1, generator=generator(5, "start"), dtype=torch.float64) * exact**0.5
    squares = run(noisy, start, step_size=eta, steps=100, seed=2)[:, -1, 0].square()
    assert abs(deviations(squares, exact)) < 4
    if eta == 1.0:
        assert deviations(squares, gibbs) > 50


def test_stationary_covariance_of_sgd_on_a_regression():
    """C11-29, T28b: with small steps SGD has the covariance of its own noise; the isotropic model's is another."""
    loss, hessian, minimum, noise = regression()
    eta, b, copies = 0.04, 4, 2500
    start = minimum.expand(copies, 2)
    warm = int(4 * relaxation_time(torch.linalg.eigvalsh(hessian), eta))
    expected = stationary_covariance(hessian, eta, b, noise)
    for noisy, target in (
        (minibatch_gradient(loss, b), expected),
        (gaussian_gradient(loss, b), expected),
        (isotropic_gradient(lambda w: (w - minimum) @ hessian, b), stationary_covariance(hessian, eta, b)),
    ):
        found = run(noisy, start, step_size=eta, steps=1, warmup=warm, seed=4)[:, 0] - minimum
        products = found[:, :, None] * found[:, None, :]
        # The noise grows away from the minimum, which adds O(eta / b): four per cent are allowed for it.
        error = products.std(0) / copies**0.5
        assert ((products.mean(0) - target).abs() < 4 * error + 0.04 * target.abs()).all()
    assert not torch.allclose(expected, stationary_covariance(hessian, eta, b), rtol=0.2)


def test_ergodic_averages_have_one_sum_over_time():
    """C11-30, T29: the double sum of the text grows with T and tends to T mean^2, not to the second moment."""
    eta, b, steps = 1.0, 0.5, 20_000
    exact = float(stationary_covariance(torch.ones(1, 1), eta, b))  # 1/b / (2 - 1) = 2
    noisy = isotropic_gradient(lambda w: w - 2.0, b)
    path = run(noisy, torch.full((4, 1), 2.0, dtype=torch.float64), step_size=eta, steps=steps, warmup=20)
    found = ergodic_averages(path)
    assert found.mean.shape == (4, 1)
    assert found.second_moment.shape == (4, 1, 1)
    assert abs((found.mean.mean() - 2.0) / mcse_mean(path)[0]) < 4
    assert abs((found.second_moment.mean() - (4.0 + exact)) / mcse_mean(path.square())[0]) < 4
    printed = path.sum(1).square() / steps
    assert (printed / steps - found.mean.square()).abs().max() < 1e-9
    assert (printed > 1000 * found.second_moment[:, 0]).all()


def test_second_moment_keeps_the_order_of_coordinates():
    """C11-30: a matrix, symmetric, of products at equal times."""
    path = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([sum(torch.outer(w, w) for w in one) / 50 for one in path])
    assert torch.allclose(ergodic_averages(path).second_moment, expected)


def test_linear_scaling_of_mini_batches_keeps_the_histogram():
    """C11-31: (eta, b) and (2 eta, 2b) have equal distribution functions up to O(eta); (eta, 2b) has not."""
    loss, _, minimum, _ = regression()
    copies, found = 4000, {}
    for eta, b in ((0.02, 2), (0.04, 4), (0.02, 4)):
        found[eta, b] = run(
            minibatch_gradient(loss, b), minimum.expand(copies, 2), step_size=eta, steps=1, warmup=round(4 / eta)
        )[:, 0, 0]
    places = found[0.02, 2].quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    shares = {key: (values[:, None] < places).double().mean(0) for key, values in found.items()}
    # Two samples of 4,000: sd at most sqrt(2 / 4 / 4000) = 0.011.
    assert (shares[0.02, 2] - shares[0.04, 4]).abs().max() < 4 * 0.011 + 0.01
    assert (shares[0.02, 2] - shares[0.02, 4]).abs().max() > 0.07


def ends(levels, seed=0):
    """Of runs that start in the shallow well of a double well, how many end in the deep one; and the exact share."""
    start = torch.full((RUNS, 1), 0.83, dtype=torch.float64)
    final = anneal(isotropic_gradient(slope, 1), start, step_sizes=levels, steps_each=EACH, seed=seed)[:, 0]
    grid = torch.linspace(-4, 4, 201, dtype=torch.float64)
    law = torch.zeros_like(grid)
    law[(grid - 0.83).abs().argmin()] = 1.0
    for eta in levels:
        law = langevin_chain(slope, grid, eta, 1).power(EACH).T @ law
    return int((final < 0.04).sum()), float(law[grid < 0.04].sum())


def test_annealing_ends_in_the_deeper_well_more_often_than_constant_steps():
    """C11-32, T67: as frequencies with binomial confidence bounds, and never in all runs."""
    annealed, exact = ends(LEVELS)
    assert (annealed - RUNS * exact) ** 2 < 16 * RUNS * exact * (1 - exact)
    lower = 1 - clopper_pearson_upper(errors=RUNS - annealed, n=RUNS, delta=1e-6)
    # Steps of the first size cross the barrier all the time, steps of the last hardly ever.
    for eta in (LEVELS[0], LEVELS[-1]):
        constant, share = ends((eta,) * len(LEVELS), seed=1)
        assert (constant - RUNS * share) ** 2 < 16 * RUNS * share * (1 - share)
        assert lower > clopper_pearson_upper(errors=constant, n=RUNS, delta=1e-6)
    assert annealed < RUNS
    assert clopper_pearson_upper(errors=annealed, n=RUNS, delta=1e-6) < 0.99


def test_slope_is_that_of_the_double_well():
    w = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(double_well(w).sum(), w)
    assert torch.allclose(found, slope(w))


def test_frequency_of_a_well_in_equilibrium_is_its_mass():
    """C11-32: the constant step size, run long, against the corrected Gibbs law; the mass rises as the step falls."""
    masses = []
    for eta in (0.3, 0.15):
        path = run(isotropic_gradient(slope, 0.5), torch.zeros(500, 1).double(), step_size=eta, steps=600, warmup=150)
        left = (path < 0).double()
        law = gibbs_law(double_well, temperature(eta, 0.5), -7, 7, step_size=eta)
        masses.append(law.probability(-7, 0))
        # The corrected law is itself off by O(eta^2), here less than 0.02.
        assert abs(left.mean() - masses[-1]) < 4 * mcse_mean(left)[0] + 0.02
    assert masses[1] > masses[0] + 0.05


def test_runs_record_what_they_are_asked_for():
    loss, _, minimum, _ = regression()
    noisy = minibatch_gradient(loss, 3)
    start = minimum.expand(2, 2)
    all_steps = run(noisy, start, step_size=0.1, steps=12, seed=7)
    assert torch.equal(run(noisy, start, step_size=0.1, steps=9, warmup=3, thin=3, seed=7), all_steps[:, [5, 8, 11]])
    assert not torch.equal(all_steps[0], all_steps[1])
    assert torch.equal(start, minimum.expand(2, 2))
    decaying = run(noisy, start, step_size=Polynomial(0.1, gamma=1.0), steps=12, seed=7)
    assert torch.allclose(decaying[:, 0], all_steps[:, 0])
    assert not torch.allclose(decaying[:, 1], all_steps[:, 1])


def test_bad_requests_are_refused():
    loss, _, minimum, _ = regression()
    with pytest.raises(Divergence, match="smaller step"):
        run(isotropic_gradient(lambda w: w, 1), torch.zeros(1, 1), step_size=9.0, steps=2000)
    with pytest.raises(DataError, match="chains, D"):
        run(minibatch_gradient(loss, 2), minimum, step_size=0.1, steps=1)
    with pytest.raises(MethodError, match="batch_size=21"):
        minibatch_gradient(loss, 21, replace=False)
