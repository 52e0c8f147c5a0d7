"""The pure steps of the stochastic-gradient samplers against the exact laws that they have on a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.infer.baoab import baoab_step, baoab_variance
from bayesdl.infer.langevin_noise import draw_noise
from bayesdl.infer.preconditioned import correction_term, hessian_diagonal, preconditioner, psgld_step
from bayesdl.infer.sghmc import sghmc_step, sghmc_variance
from bayesdl.infer.sgld import sgld_step, sgld_variance
from bayesdl.infer.sgnht import sgnht_step
from tests.infer.linear_laws import Step, stationary

TABLE = [(0.1, 1.0), (0.2, 1.0), (0.5, 1.0), (0.1, 0.2)]
"""Step sizes and frictions of inventory row D10-07."""


def sgld(size: float) -> Step:
    return lambda state, gradient, noise: (sgld_step(state[0], gradient, noise, size),)


def sghmc(size: float, friction: float, estimate: float | None = None) -> Step:
    given = None if estimate is None else torch.full((1,), estimate, dtype=torch.float64)
    return lambda state, gradient, noise: sghmc_step(*state, gradient, noise, size, friction, given)


def baoab(size: float, friction: float) -> Step:
    return lambda state, gradient, noise: baoab_step(*state, gradient, noise, size, friction)


def printed(size: float, friction: float) -> Step:
    """The scheme of the inventory, whose position moves with the old momentum (trap T3-74)."""

    def step(state: tuple[Tensor, ...], gradient: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        _, momentum = sghmc_step(*state, gradient, noise, size, friction)
        return state[0] + size * state[1], momentum

    return step


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [(printed, (1.114, 1.264, 2.154, 2.005)), (sghmc, (1.0026, 1.011, 1.091, 1.0025)), (baoab, (1.0, 1.0, 1.0, 1.0))],
)
def test_the_table_of_underdamped_schemes(scheme: object, expected: tuple[float, ...]) -> None:
    # the printed numbers were found by simulation, which explains the last digits
    found = [float(stationary(scheme(*row), 2)[0, 0]) for row in TABLE]  # type: ignore[operator]
    assert found == pytest.approx(expected, rel=2e-3)
    if scheme is baoab:
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("step_size", [0.01, 0.5, 2.0])
def test_sgld_on_the_unit_gaussian(step_size: float) -> None:
    assert float(stationary(sgld(step_size), 1)[0, 0]) == pytest.approx(1 / (1 - step_size / 4), rel=1e-12)
    assert sgld_variance(1.0, step_size) == pytest.approx(1 / (1 - step_size / 4), rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("curvature", [0.3, 2.0])
@pytest.mark.parametrize(("size", "friction"), [*TABLE, (0.9, 0.7)])
def test_the_formulas_of_the_variances(size: float, friction: float, curvature: float, noise: float) -> None:
    for variance, step, entries in (
        (sgld_variance(curvature, size, noise), sgld(size), 1),
        (sghmc_variance(curvature, size, friction, noise), sghmc(size, friction), 2),
        (baoab_variance(curvature, size, friction, noise), baoab(size, friction), 2),
    ):
        assert float(stationary(step, entries, curvature, noise)[0, 0]) == pytest.approx(variance, rel=1e-10)


def test_beyond_the_limits_of_stability_the_variance_is_infinite() -> None:
    assert sgld_variance(1.0, 3.99) < math.inf == sgld_variance(1.0, 4.0)
    assert baoab_variance(1.0, 1.99, 1.0) < math.inf == baoab_variance(1.0, 2.0, 1.0)
    assert sghmc_variance(1.0, 1.4, 1.0) == math.inf == sghmc_variance(0.01, 1.0, 2.5)
    for step, entries in ((sgld(4.01), 1), (sghmc(1.42, 1.0), 2), (baoab(2.01, 1.0), 2), (printed(0.21, 0.2), 2)):
        with pytest.raises(AssertionError, match="unstable"):
            stationary(step, entries)


def test_the_noise_estimate_takes_the_heat_out() -> None:
    size, friction, noise = 0.2, 1.0, 4.0
    warm = float(stationary(sghmc(size, friction), 2, 1.0, noise)[0, 0])
    cool = float(stationary(sghmc(size, friction, noise), 2, 1.0, noise)[0, 0])
    half = float(stationary(sghmc(size, friction, noise / 2), 2, 1.0, noise)[0, 0])
    exact = sghmc_variance(1.0, size, friction)
    assert cool == pytest.approx(exact, rel=1e-12)
    assert warm == pytest.approx(1.4 * exact, rel=1e-12)
    assert half == pytest.approx(1.2 * exact, rel=1e-12)
    # an estimate above what the friction can balance leaves no noise of its own
    assert float(stationary(sghmc(size, friction, 1e6), 2)[0, 0]) == pytest.approx(0.0, abs=1e-15)


def test_momenta_have_variance_one() -> None:
    for size, friction in TABLE:
        law = stationary(baoab(size, friction), 2, 2.0)
        assert float(law[1, 1]) == pytest.approx(1.0, abs=1e-12)
        # SGHMC's are taken half a step from where they are 1: off by friction eta / 2 and by the position's bias
        law = stationary(sghmc(size, friction), 2, 2.0)
        off = sghmc_variance(2.0, size, friction) * 2.0 / (1.0 - 0.5 * friction * size)
        assert float(law[1, 1]) == pytest.approx(off, rel=1e-12)


def fixed_thermostat(size: float, friction: float, thermostat: float) -> Step:
    def step(state: tuple[Tensor, ...], gradient: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        xi = torch.full((1,), thermostat, dtype=torch.float64)
        return sgnht_step(*state, xi, gradient, noise, size, friction, frozen=True)[:2]

    return step


def test_a_thermostat_at_rest_is_baoab() -> None:
    law = stationary(fixed_thermostat(0.3, 1.5, 1.5), 2, 2.0)
    torch.testing.assert_close(law, stationary(baoab(0.3, 1.5), 2, 2.0))
    # also where the friction vanishes or turns negative: (1 - exp(-2 xi eta)) / xi is positive and smooth
    state = [torch.ones(3, 1, dtype=torch.float64) for _ in range(4)]
    xi = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    z, momentum, _ = sgnht_step(state[0], state[1], xi, state[2], state[3], 0.1, 1.0, frozen=True)
    assert z.isfinite().all()
    torch.testing.assert_close(momentum, (1.1 + math.sqrt(0.2)) * state[0], rtol=1e-8, atol=0)


def simulated_thermostat(size: float, noise: float, dim: int = 400, chains: int = 64) -> tuple[float, float, float]:
    """Position's variance, momenta's and mean thermostat of SGNHT on N(0, I)."""
    stream = generator(0, "thermostat", int(100 * size), int(noise))

    def normal() -> Tensor:
        return torch.randn(chains, dim, dtype=torch.float64, generator=stream)

    z, momentum, xi = normal(), normal(), torch.ones(chains, dtype=torch.float64) * (1 + size * noise / 2)
    sums, burn, steps = np.zeros(3), math.ceil(20 / size), math.ceil(60 / size)
    for step in range(burn + steps):
        gradient = -z + math.sqrt(noise) * normal()
        z, momentum, xi = sgnht_step(z, momentum, xi, gradient, normal(), size, 1.0)
        if step >= burn:
            sums += [float(z.square().mean()), float(momentum.square().mean()), float(xi.mean())]
    found = sums / steps
    return float(found[0]), float(found[1]), float(found[2])


def test_the_thermostat_takes_unknown_heat_out() -> None:
    size, noise = 0.2, 5.0
    variance, temperature, friction = simulated_thermostat(size, noise)
    # BAOAB would have the variance 1.51. What is left is of the order size^2, not size.
    assert baoab_variance(1.0, size, 1.0, noise) == pytest.approx(1.51, abs=0.01)
    assert friction == pytest.approx(1.0 + size * noise / 2, rel=0.1)
    assert variance == pytest.approx(1.0, abs=0.06)
    variance, temperature, friction = simulated_thermostat(size, 0.0)
    assert variance == pytest.approx(1.0, abs=0.01)
    assert temperature == pytest.approx(1.0, abs=0.01)
    assert friction == pytest.approx(1.0, abs=0.02)


# -- preconditioning -------------------------------------------------------------------------------------------------


def test_the_preconditioned_step_with_a_constant_preconditioner() -> None:
    # seen in z / sqrt(G), it is SGLD on a Gaussian of curvature G a
    scale, curvature, size = 0.3, 2.0, 0.8
    given = torch.full((1, 1), scale, dtype=torch.float64)
    found = stationary(lambda s, g, n: (psgld_step(s[0], g, n, size, given),), 1, curvature, 3.0)
    assert float(found[0, 0]) == pytest.approx(scale * sgld_variance(scale * curvature, size, scale * 3.0), rel=1e-10)


def moving_preconditioner(correct: bool, factor: float = 1.0) -> float:
    """Time average of z^2 of 20,000 walkers on N(0, 1) behind G = 1 / (1 + |z|), which has no memory."""
    stream, size, damping = generator(1, "preconditioned"), 0.02, 1.0
    z = torch.randn(20_000, 1, dtype=torch.float64, generator=stream)
    total, burn, steps = 0.0, 400, 400
    for step in range(burn + steps):
        gradient = -z
        square = gradient.square()
        gamma = None
        if correct:
            gamma = factor * correction_term(gradient, -torch.ones_like(z), square, damping, 0.0)
        noise = torch.randn(z.shape, dtype=torch.float64, generator=stream)
        z = psgld_step(z, gradient, noise, size, preconditioner(square, damping), gamma)
        total += float(z.square().mean()) * (step >= burn)
    return total / steps


def test_gamma_and_its_absence() -> None:
    # without Gamma the law is p / G = p (1 + |z|): E z^2 = (sqrt(2 pi) + 4) / (sqrt(2 pi) + 2)
    root = math.sqrt(2 * math.pi)
    assert moving_preconditioner(correct=False) == pytest.approx((root + 4) / (root + 2), rel=0.02)
    assert moving_preconditioner(correct=True) == pytest.approx(1.0, rel=0.03)
    assert abs(moving_preconditioner(correct=True, factor=-1.0) - 1.0) > 0.5


def test_the_correction_term_is_the_derivative() -> None:
    z = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64)[:, None]
    past, decay, damping = torch.full_like(z, 0.7), 0.9, 0.3

    def precondition(z: Tensor) -> Tensor:
        gradient = -z - z.pow(3)
        return preconditioner(decay * past + (1 - decay) * gradient.square(), damping)

    gradient, curvature = -z - z.pow(3), -1 - 3 * z.square()
    square = decay * past + (1 - decay) * gradient.square()
    found = correction_term(gradient, curvature, square, damping, decay)
    width = 1e-5
    torch.testing.assert_close(found, (precondition(z + width) - precondition(z - width)) / (2 * width))
    assert (correction_term(z * 0, curvature, z * 0, damping, 0.0) == 0).all()


def test_the_hessian_diagonal_is_unbiased() -> None:
    hessian = torch.tensor([[-2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, -4.0]], dtype=torch.float64)
    z = torch.randn(3, dtype=torch.float64, generator=generator(0, "point")).expand(8, 3)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    found = hessian_diagonal(z, lambda w: (w.sum(1), w @ hessian), signs)
    torch.testing.assert_close(found.mean(0), hessian.diagonal(), rtol=1e-8, atol=1e-8)


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 21), (2, 64), (1, 1)])
def test_signs_are_signs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    noise = draw_noise("signs", torch.empty(shape, dtype=dtype), generator(0, "signs"))
    assert noise.dtype == dtype
    assert noise.shape == shape
    assert (noise.abs() == 1).all()
    again = draw_noise("signs", torch.empty(shape, dtype=dtype), generator(0, "signs"))
    assert torch.equal(noise, again)


def test_signs_are_independent_and_fair() -> None:
    stream, like = generator(0, "signs"), torch.empty(1, 256, dtype=torch.float64)
    draws = torch.cat([draw_noise("signs", like, stream) for _ in range(20_000)])
    error = 1 / math.sqrt(len(draws))
    assert float(draws.mean(0).abs().max()) < 4.5 * error
    products = draws.T @ draws / len(draws) - torch.eye(256, dtype=torch.float64)
    assert float(products.abs().max()) < 5.5 * error  # of 32,640 pairs
    lagged = draws[1:].T @ draws[:-1] / len(draws)
    assert float(lagged.abs().max()) < 5.5 * error
    triples = (draws[:, :-2] * draws[:, 1:-1] * draws[:, 2:]).mean(0)
    assert float(triples.abs().max()) < 5.0 * error


def test_signs_leave_second_moments_and_thin_the_tails() -> None:
    stream, size = generator(0, "tails"), 0.5
    z = torch.zeros(200_000, 1, dtype=torch.float64)
    for _ in range(40):
        z = sgld_step(z, -z, draw_noise("signs", z, stream), size)
    variance = float(z.square().mean())
    keep = (1 - size / 2) ** 2
    excess = -2 * (1 - keep) / (1 + keep)
    fourth = float(z.pow(4).mean()) / variance**2 - 3
    errors = math.sqrt(24 / len(z))
    assert variance == pytest.approx(sgld_variance(1.0, size), abs=4.5 * variance * math.sqrt(2 / len(z)))
    assert fourth == pytest.approx(excess, abs=5 * errors)
    normal = draw_noise("normal", torch.empty(200_000, 1, dtype=torch.float64), stream)
    assert float(normal.pow(4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / 200_000))
