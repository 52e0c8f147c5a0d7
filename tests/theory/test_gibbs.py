from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad

from bayesdl.errors import DataError, MethodError, ModelError
from bayesdl.theory.gibbs import (
    double_well,
    gibbs_law,
    langevin_chain,
    linear_scaling,
    relaxation_time,
    stationary_covariance,
    temperature,
)
from bayesdl.theory.markov_chains import kl_divergence

GRID = torch.linspace(-4.5, 4.5, 601, dtype=torch.float64)


def well(w):
    return double_well(w, tilt=0.1)


slope = grad(lambda w: well(w).sum())


def distance(p, q):
    """Total variation between masses."""
    return float((p - q / q.sum()).abs().sum() / 2)


@pytest.mark.parametrize(("eta", "expected", "gibbs"), [(0.01, 8.40e-4, 8.33e-4), (1.0, 0.3333, 0.0833)])
def test_finite_step_variance_on_a_quadratic(eta, expected, gibbs):
    """C11-29, T28: lambda = 1.5, b = 4: (1/(beta lambda)) / (1 - eta lambda / 2), four ways."""
    curvature, b = 1.5, 4
    t = temperature(eta, b)
    exact = t / curvature / (1 - eta * curvature / 2)
    assert exact == pytest.approx(expected, rel=1e-3)
    assert t / curvature == pytest.approx(gibbs, rel=1e-3)
    hessian = torch.tensor([[curvature]], dtype=torch.float64)
    assert float(stationary_covariance(hessian, eta, b)) == pytest.approx(exact, rel=1e-14)
    width = 9 * exact**0.5
    law = gibbs_law(lambda w: curvature * w.square() / 2, t, -width, width, step_size=eta)
    assert law.variance == pytest.approx(exact, rel=1e-12)
    assert gibbs_law(lambda w: curvature * w.square() / 2, t, -width, width).variance == pytest.approx(t / curvature)
    grid = torch.linspace(-width, width, 301, dtype=torch.float64)
    masses = langevin_chain(lambda w: curvature * w, grid, eta, b).invariant_law
    found = float((masses * grid.square()).sum())
    assert found == pytest.approx(exact, rel=1e-9)


def test_stationary_covariance_solves_its_equation():
    """C11-28, C11-29: both covariances of the noise, in three dimensions."""
    stream = torch.Generator().manual_seed(0)
    a, c = torch.randn(2, 3, 3, generator=stream, dtype=torch.float64)
    hessian, noise = a @ a.T / 3 + 0.3 * torch.eye(3), c @ c.T
    eta, b, identity = 0.2, 4.0, torch.eye(3, dtype=torch.float64)
    shrink = identity - eta * hessian
    for covariance, given in ((noise, noise), (identity, None)):
        found = stationary_covariance(hessian, eta, b, given)
        assert torch.allclose(found, shrink @ found @ shrink.T + eta**2 / b * covariance, rtol=1e-12)


def test_noise_with_the_hessian_as_its_covariance_has_no_gibbs_law():
    """C11-29, T28b: the law is round, whatever the curvatures; the Gibbs covariance would be T H^-1."""
    hessian = torch.diag(torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64))
    eta, b = 1e-5, 1
    t = temperature(eta, b)
    found = stationary_covariance(hessian, eta, b, hessian)
    assert torch.allclose(found, t * torch.eye(3, dtype=torch.float64), rtol=1e-3)
    assert torch.allclose(stationary_covariance(hessian, eta, b), t * hessian.inverse(), rtol=1e-3)


def test_temperature_and_linear_scaling():
    """C11-31: eta / (2b), kept by doubling both."""
    assert temperature(0.1, 8) == 0.1 / 16
    assert temperature(0.1, 8, noise_variance=4.0) == 4 * temperature(0.1, 8)
    assert linear_scaling(0.1, 8, 32) == pytest.approx(0.4)
    assert temperature(linear_scaling(0.1, 8, 32), 32) == temperature(0.1, 8)
    with pytest.raises(MethodError, match="positive"):
        temperature(0.0, 8)


def test_linear_scaling_keeps_the_law_up_to_the_step_size():
    """C11-31: (eta, b) against (2 eta, 2b) on a double well: the distance falls with eta, by half if eta is halved."""
    laws = {eta: langevin_chain(slope, GRID, eta, eta / 0.3).invariant_law for eta in (0.2, 0.1, 0.05)}
    first, second = distance(laws[0.2], laws[0.1]), distance(laws[0.1], laws[0.05])
    assert first / second == pytest.approx(2, rel=0.25)
    # Changing b alone is another law.
    other = langevin_chain(slope, GRID, 0.1, 2 * 0.1 / 0.3).invariant_law
    assert distance(laws[0.1], other) > 4 * first


def test_correction_of_the_gibbs_law_is_of_second_order():
    """C11-29, T28a: on a double well at fixed T the Gibbs law is off by O(eta), the corrected one by O(eta^2)."""
    t, errors = 0.15, {0.0: [], 1.0: []}
    for eta in (0.2, 0.1):
        chain = langevin_chain(slope, GRID, eta, eta / (2 * t)).invariant_law
        for share, found in errors.items():
            law = gibbs_law(well, t, -4.5, 4.5, step_size=share * eta, points=601)
            found.append(distance(chain, law.masses))
    assert errors[0.0][0] / errors[0.0][1] == pytest.approx(2, rel=0.2)
    assert errors[1.0][0] / errors[1.0][1] == pytest.approx(4, rel=0.3)
    assert errors[1.0][1] < 0.1 * errors[0.0][1]


def test_mass_at_the_deeper_well_rises_as_the_temperature_falls():
    """C11-32, C11-33: beta to infinity concentrates on the global minimum; equal minima share."""
    masses = [gibbs_law(well, t, -5, 5).probability(-5, 0) for t in (0.4, 0.2, 0.1, 0.05, 0.025)]
    assert masses == sorted(masses)
    assert masses[0] < 0.75
    assert masses[-1] > 0.998
    # Between wells of equal depth the lower temperature prefers the wider one: exp(-depth / T) / sqrt(curvature).
    equal = gibbs_law(lambda w: double_well(w, tilt=0.0), 0.02, -5, 5)
    assert equal.probability(-5, 0) == pytest.approx(0.5, abs=1e-12)

    def widths(w):
        return torch.where(w < 0, (w + 2).square() / 2, 8 * (w - 0.5).square())  # curvatures 1 and 16, equal depths

    assert gibbs_law(widths, 0.01, -5, 5).probability(-5, 0) == pytest.approx(0.8, abs=1e-6)


def test_gibbs_density_of_a_gaussian_by_quadrature():
    """C11-33: density, normaliser, moments and probabilities."""
    t, curvature = 0.3, 2.0
    law = gibbs_law(lambda w: curvature * (w - 0.4).square() / 2, t, -5, 6)
    exact = torch.distributions.Normal(0.4, (t / curvature) ** 0.5)
    assert torch.allclose(law.density, exact.log_prob(law.grid).exp(), atol=1e-13)
    assert law.log_normaliser == pytest.approx(0.5 * math.log(2 * math.pi * t / curvature), rel=1e-12)
    assert law.mean == pytest.approx(0.4, rel=1e-12)
    assert law.variance == pytest.approx(t / curvature, rel=1e-12)
    probability = float(exact.cdf(torch.tensor(1.0)) - exact.cdf(torch.tensor(-0.123)))
    assert law.probability(-0.123, 1.0) == pytest.approx(probability, abs=3e-5)
    assert law.probability(-99, 99) == pytest.approx(1)


def test_a_loss_that_does_not_confine_has_no_gibbs_law():
    """C11-29, T28c: the log loss of separable data is flat towards infinity; a prior confines it."""
    separable = torch.nn.functional.softplus
    for width in (10, 1000):
        with pytest.raises(ModelError, match="prior"):
            gibbs_law(lambda w: separable(-w), 0.1, -width, width)
    law = gibbs_law(lambda w: separable(-w) + 0.05 * w.square(), 0.1, -10, 25)
    assert 0 < law.mean < 5


@pytest.mark.parametrize("eta", [0.5, 0.01])
def test_relaxation_time_of_a_quadratic(eta):
    """C11-33: the mean falls by e in -1/log|1 - eta lambda_min| steps, 1/(eta lambda_min) for small steps."""
    curvatures = torch.tensor([0.2, 1.0], dtype=torch.float64)
    steps = relaxation_time(curvatures, eta)
    assert float((1 - eta * curvatures).pow(steps).max()) == pytest.approx(math.exp(-1))
    assert steps == pytest.approx(1 / (eta * 0.2), rel=0.6 * eta)
    assert relaxation_time(curvatures, 2.0) == math.inf
    assert relaxation_time(torch.ones(1), 1.0) == 0


def test_relaxation_of_the_chain_of_sgd_is_that_of_its_curvature():
    """C11-33: the second eigenvalue of the model's transition matrix is 1 - eta lambda."""
    grid = torch.linspace(-6, 6, 301, dtype=torch.float64)
    chain = langevin_chain(lambda w: w, grid, 0.5, 1.0)
    assert chain.rate == pytest.approx(0.5, abs=1e-3)
    # On a double well it is the crossing of the barrier: far slower than the curvatures say.
    assert 1 / -math.log(langevin_chain(slope, GRID, 0.1, 1.0).rate) > 300 * relaxation_time(torch.ones(1), 0.1)


def test_kl_of_sgd_to_its_invariant_law_never_increases():
    """C11-36: on a loss that is not convex, from either well, in both orders; the loss itself does increase."""
    grid = torch.linspace(-4.5, 4.5, 301, dtype=torch.float64)
    chain = langevin_chain(slope, grid, 0.3, 1.0)
    law = chain.invariant_law
    for start in (0.8, -0.8, 3.0):
        begin = torch.zeros_like(grid)
        begin[(grid - start).abs().argmin()] = 1.0
        laws = chain.laws(begin, 200)
        forward, backward = kl_divergence(law, laws), kl_divergence(laws, law)
        assert forward[0] == math.inf
        for divergences in (forward, backward):
            assert (divergences[1:] <= divergences[:-1] + 1e-15).all()
            assert divergences[-1] < 0.01
    begin = torch.zeros_like(grid)
    begin[(grid + 0.85).abs().argmin()] = 1.0
    assert (chain.laws(begin, 5) @ well(grid)).diff()[0] > 0


def test_no_equilibrium_is_an_error():
    """C11-29, T28a: unstable from eta lambda = 2 on."""
    hessian = torch.diag(torch.tensor([1.0, 4.0]))
    for bad, eta in ((hessian, 0.5), (-hessian, 0.1), (torch.zeros(1, 1), 0.1)):
        with pytest.raises(MethodError, match="equilibrium"):
            stationary_covariance(bad, eta, 1)
    for grid, eta in ((GRID.flip(0), 0.1), (GRID, 0.01), (GRID.exp(), 90.0), (GRID[:1], 0.1)):
        with pytest.raises(DataError, match="equal steps"):
            langevin_chain(slope, grid, eta, 1)
