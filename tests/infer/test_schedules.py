"""Schedules against their formulas."""

from __future__ import annotations

import json
import math

import pytest

from bayesdl.errors import MethodError
from bayesdl.infer.schedules import Constant, Cosine, Cyclical, Polynomial, Warmup, as_schedule, robbins_monro


def test_values() -> None:
    assert Constant(0.3)(17) == 0.3
    assert Polynomial(0.5, 10.0, 0.6)(6) == pytest.approx(0.5 * 16**-0.6, rel=1e-14)
    cosine = Cosine(2.0, 100, 0.5)
    assert (cosine(0), cosine(100), cosine(1000)) == (2.0, 0.5, 0.5)
    assert cosine(50) == pytest.approx(1.25)
    cyclical = Cyclical(1.0, 100, 4)
    assert [cyclical(step) for step in (0, 25, 50, 75)] == [1.0] * 4
    assert cyclical(24) == pytest.approx(0.5 * (1 + math.cos(math.pi * 24 / 25)))
    assert min(cyclical(step) for step in range(100)) > 0
    assert [Warmup(10)(step) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert Warmup(4, 0.2, 0.6)(1) == pytest.approx(0.3)


def test_a_cosine_integrates_to_half() -> None:
    cosine = Cosine(1.0, 10_000)
    assert sum(cosine(step) for step in range(10_000)) == pytest.approx(5_000.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(0.0), "value=0.0"),
        (lambda: Constant(math.nan), "value=nan"),
        (lambda: Polynomial(1.0, 1.0, 0.5), "gamma=0.5"),
        (lambda: Polynomial(1.0, 1.0, 1.1), "gamma=1.1"),
        (lambda: Polynomial(-1.0), "a=-1.0"),
        (lambda: Cosine(1.0, 0), "total=0"),
        (lambda: Cosine(1.0, 10, 2.0), r"final=2\.0"),
        (lambda: Cyclical(1.0, 3, 4), "total=3"),
        (lambda: Warmup(10, 0.5, 0.4), r"initial=0\.5"),
        (lambda: as_schedule("fast"), "step_size='fast'"),  # type: ignore[arg-type]
        (lambda: as_schedule(True, "learning_rate"), "learning_rate=True"),
        (lambda: as_schedule(math.inf), "step_size=inf"),
    ],
)
def test_impossible_settings(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MethodError, match=words):
        make()


def test_robbins_monro_and_json() -> None:
    assert robbins_monro(Polynomial(1.0))
    assert not any(robbins_monro(s) for s in (Constant(1.0), Cosine(1.0, 5), Cyclical(1.0, 5)))
    assert json.loads(json.dumps(Polynomial(1.0, 2.0, 0.7).to_json())) == {
        "schedule": "Polynomial",
        "a": 1.0,
        "b": 2.0,
        "gamma": 0.7,
    }
    assert as_schedule(2) == Constant(2.0)
    assert as_schedule(Constant(1.0)) == Constant(1.0)
