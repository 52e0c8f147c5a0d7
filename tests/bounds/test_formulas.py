"""Every bound that is a formula: outward and within 1e-12 of mpmath, monotone, kinds of numbers, bad input."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch

from bayesdl.bounds import concentration, uniform
from bayesdl.errors import CertificateError
from tests.bounds import exact

BOUNDS: dict[str, Callable] = {
    name: getattr(concentration if hasattr(concentration, name) else uniform, name) for name in exact.FORMULAS
}
CUT = {"hoeffding", "hoeffding_tail", "bernstein", "empirical_bernstein", "rademacher_bound", "online_to_batch"} | {
    "margin_bound"
}
# +1: a larger argument gives a larger bound.
DIRECTION = {
    "risk": 1,
    "variance": 1,
    "delta": -1,
    "n": -1,
    "epsilon": -1,
    "log_size": 1,
    "description": 1,
    "dimension": 1,
    "m": 1,
    "complexity": 1,
    "mistakes": 1,
    "radius": 1,
    "margin": -1,
}
BAD = {
    "risk": [-1e-9, 1.0000001],
    "variance": [-1e-9, 1.0],
    "delta": [0.0, 1.0, -0.1],
    "n": [0, 2.5, math.inf],
    "m": [0, 2.5],
    "epsilon": [-1e-9],
    "log_size": [-1e-9],
    "description": [-1e-9],
    "dimension": [-1, 1.5],
    "complexity": [-1e-9],
    "mistakes": [-1, 1e9],
    "radius": [0.0, math.inf],
    "margin": [0.0, -1.0],
}


def arguments(name: str, rng: np.random.Generator) -> dict[str, float]:
    """Random arguments over many magnitudes."""
    names = inspect.signature(BOUNDS[name]).parameters
    n = int(10 ** rng.uniform(0.5, 3 if "dimension" in names else 6))
    mistakes = int(rng.integers(0, n + 1))
    drawn = {
        "risk": float(rng.choice([0.0, 1.0, rng.uniform(), 10 ** rng.uniform(-12, 0)])),
        "variance": float(rng.choice([0.0, 0.25, 10 ** rng.uniform(-9, -0.61)])),
        "delta": float(10 ** rng.uniform(-30, -0.01)),
        "n": n,
        "m": n,
        "epsilon": float(10 ** rng.uniform(-3, 0)),
        "log_size": float(rng.choice([0.0, 10 ** rng.uniform(-2, 4)])),
        "description": float(rng.choice([0.0, 10 ** rng.uniform(-2, 4)])),
        "dimension": int(rng.choice([0, 1, 3, 20, 100])),
        "complexity": float(10 ** rng.uniform(-4, 0)),
        "mistakes": mistakes,
        "radius": float(10 ** rng.uniform(-1, 1)),
        "margin": float(10 ** rng.uniform(-2, 1)),
    }
    return {key: value for key, value in drawn.items() if key in names}


@pytest.mark.parametrize("name", exact.FORMULAS)
def test_is_never_below_the_exact_value_and_within_1e_12(name: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(12 if name in ("chernoff_upper", "occam") else 30):
        numbers = arguments(name, rng)
        value = mp.mpf(float(BOUNDS[name](**numbers)))
        expected = exact.FORMULAS[name](**{key: mp.mpf(number) for key, number in numbers.items()})
        expected = min(expected, 1) if name in CUT else expected
        assert value >= expected, (numbers, value / expected - 1)
        if name == "vc_tail" and expected > 1:
            continue  # says nothing; its logarithm is as exact as the others are
        assert value <= expected * (1 + mp.mpf("1e-12")) + mp.mpf("1e-320"), (numbers, value / expected - 1)


@pytest.mark.parametrize("name", exact.FORMULAS)
def test_moves_with_each_number_as_it_must(name: str) -> None:
    rng = np.random.default_rng(12)
    for _ in range(20):
        numbers = arguments(name, rng)
        here = float(BOUNDS[name](**numbers))
        for key, value in numbers.items():
            more: float = value + 1 if isinstance(value, int) else value * 1.1 + 1e-3
            if key == "n" and name in ("vc_tail", "online_to_batch"):
                continue  # the first grows before it falls, the second counts mistakes among n
            if (key in ("risk", "delta") and more >= 1) or (key == "variance" and more > 0.25):
                continue
            if key == "mistakes" and more > numbers["n"]:
                continue
            there = float(BOUNDS[name](**(numbers | {key: more})))
            assert DIRECTION[key] * (there - here) >= -1e-13 * abs(here), (key, numbers)


@pytest.mark.parametrize("name", exact.FORMULAS)
def test_refuses_what_is_outside_its_domain(name: str) -> None:
    good = arguments(name, np.random.default_rng(13)) | (
        {"n": 50} if "n" in inspect.signature(BOUNDS[name]).parameters else {}
    )
    if "mistakes" in good:
        good["mistakes"] = 3
    BOUNDS[name](**good)
    for key in good:
        for bad in (*BAD[key], math.nan):
            with pytest.raises(CertificateError, match=key):
                BOUNDS[name](**(good | {key: bad}))


@pytest.mark.parametrize("name", exact.FORMULAS)
def test_kinds_follow_the_inputs(name: str) -> None:
    good = arguments(name, np.random.default_rng(14))
    key = "delta" if "delta" in good else "n" if "n" in good else "m"
    two = np.array([good[key], good[key] / 2 if key == "delta" else good[key] + 1])
    number, array, tensor = (BOUNDS[name](**(good | {key: kind})) for kind in (good[key], two, torch.from_numpy(two)))
    assert isinstance(number, float)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float64
    assert array[0] == tensor[0] == number


@pytest.mark.parametrize(
    "name", [name for name in exact.FORMULAS if "risk" in inspect.signature(BOUNDS[name]).parameters]
)
def test_bounds_on_a_risk_close_in_on_it(name: str) -> None:
    numbers = arguments(name, np.random.default_rng(15)) | {"risk": 0.2, "n": 10**12, "delta": 0.05}
    small = {key: 1e-9 for key in ("complexity", "radius") if key in numbers} | (
        {"description": 1.0} if "description" in numbers else {}
    )
    assert 0.2 <= BOUNDS[name](**(numbers | small)) == pytest.approx(0.2, abs=1e-4)
    assert BOUNDS[name](**(numbers | {"n": 2, "delta": 1e-9})) > 0.9  # two rows say nothing at this confidence
