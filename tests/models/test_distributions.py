"""Our own distributions: normalised, with a cdf that is the density's integral, and draws that follow it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from bayesdl.models.distributions import AsymmetricLaplace, ScaleMixtureNormal

CASES = {
    "asymmetric_laplace_low": lambda: AsymmetricLaplace(0.7, 0.4, double(0.2)),
    "asymmetric_laplace_high": lambda: AsymmetricLaplace(-0.3, 1.5, double(0.85)),
    "scale_mixture": lambda: ScaleMixtureNormal(0.3, 1.2, double(0.2)),
}


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def integral(function: object, low: float, high: float, breaks: list[float]) -> float:
    points = [low, *[b for b in breaks if low < b < high], high]
    return sum(scipy.integrate.quad(function, a, b, limit=200)[0] for a, b in pairwise(points))


@pytest.mark.parametrize("case", CASES)
def test_density_cdf_and_moments_agree_by_quadrature(case: str) -> None:
    one = CASES[case]()
    breaks = [-100.0, -20.0, -3.0, -0.3, -0.1, 0.0, 0.1, 0.7, 3.0, 20.0, 100.0]

    def density(v: float) -> float:
        return float(one.log_prob(double(v)).exp())

    assert integral(density, -400, 400, breaks) == pytest.approx(1, abs=1e-8)
    for at in (-1.0, -0.3, 0.2, 0.7, 2.5):
        assert float(one.cdf(double(at))) == pytest.approx(integral(density, -400, at, breaks), abs=1e-8)
    mean = integral(lambda v: v * density(v), -400, 400, breaks)
    assert float(one.mean) == pytest.approx(mean, abs=1e-7)
    variance = integral(lambda v: (v - mean) ** 2 * density(v), -400, 400, breaks)
    assert float(one.variance) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_cdf(case: str) -> None:
    torch.manual_seed(0)
    one = CASES[case]()
    draws = one.sample((4000,))
    assert draws.dtype == torch.float64
    assert scipy.stats.kstest(one.cdf(draws).numpy(), "uniform").pvalue > 1e-4


def test_the_location_of_an_asymmetric_laplace_is_its_quantile() -> None:
    one = AsymmetricLaplace(1.0, 0.5, double(0.9))
    assert float(one.cdf(double(1.0))) == pytest.approx(0.9, abs=1e-15)
    levels = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    torch.testing.assert_close(one.cdf(one.icdf(levels)), levels, rtol=1e-12, atol=1e-12)


def test_the_sign_of_the_residual_is_target_minus_location() -> None:
    # At level 0.9 a target above the location costs nine times as much as one as far below.
    one = AsymmetricLaplace(0.0, 1.0, double(0.9))
    top = float(one.log_prob(double(0.0)))
    assert top - float(one.log_prob(double(1.0))) == pytest.approx(0.9)
    assert top - float(one.log_prob(double(-1.0))) == pytest.approx(0.1)


def test_scale_mixture_equals_torchs_mixture() -> None:
    pi, scales = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([1.2, 0.2], dtype=torch.float64)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(pi), torch.distributions.Normal(torch.zeros_like(scales), scales)
    )
    at = torch.linspace(-3, 3, 25, dtype=torch.float64)
    one = ScaleMixtureNormal(0.3, 1.2, double(0.2))
    torch.testing.assert_close(one.log_prob(at), reference.log_prob(at), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.cdf(at), reference.cdf(at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_expanding_keeps_the_numbers(case: str) -> None:
    one = CASES[case]()
    many = one.expand((2, 3))
    assert many.batch_shape == (2, 3)
    assert many.sample((4,)).shape == (4, 2, 3)
    at = double(0.4)
    torch.testing.assert_close(many.log_prob(at), one.log_prob(at).expand(2, 3))
    assert many.to_event(2).log_prob(at.expand(2, 3)).shape == ()


def test_values_and_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="scale"):
        AsymmetricLaplace(0.0, -1.0, 0.5, validate_args=True)
    with pytest.raises(ValueError, match="sigma1"):
        ScaleMixtureNormal(0.5, -1.0, 1.0, validate_args=True)
    for one in (
        AsymmetricLaplace(0.0, 1.0, 0.5, validate_args=True),
        ScaleMixtureNormal(0.5, 1.0, 2.0, validate_args=True),
    ):
        with pytest.raises(ValueError, match="support"):
            one.log_prob(torch.tensor(np.nan))


def test_pyros_parameterisation_is_the_same_family() -> None:
    # Pyro: rates 1 / (scale * asymmetry) on the left and asymmetry / scale on the right.
    tau, scale = 0.3, 0.7
    asymmetry = (tau / (1 - tau)) ** 0.5
    pyros = dist.AsymmetricLaplace(double(0.2), double(scale / (tau * (1 - tau)) ** 0.5), double(asymmetry))
    at = torch.linspace(-4, 4, 17, dtype=torch.float64)
    torch.testing.assert_close(
        AsymmetricLaplace(0.2, scale, double(tau)).log_prob(at), pyros.log_prob(at), rtol=1e-12, atol=1e-12
    )
