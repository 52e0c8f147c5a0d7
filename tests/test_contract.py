"""The contract battery over every method of the registry."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._registry import METHODS
from tests import cases
from tests.cases import dataset, network, untouched
from tests.contract import CHECKS, Subject, assert_equal, predicted_elsewhere, predictions


@cache
def subject(name: str) -> Subject:
    """One subject per method, so that the checks share its fits."""
    return Subject(name, cases.METHODS[name])


def test_every_method_of_the_registry_has_its_quick_settings() -> None:
    assert set(cases.METHODS) == set(METHODS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", cases.METHODS)
def test_method(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](subject(name), tmp_path)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_variants_reproduce_and_resume(variant: str, tmp_path: Path) -> None:
    name, case = cases.VARIANTS[variant]
    varied = Subject(name, case)
    CHECKS["the seed decides everything"](varied, tmp_path)
    CHECKS["a stopped fit resumes bit for bit"](varied, tmp_path)


EVERY_FIT = [(name, kind) for name, case in cases.METHODS.items() for kind in case.kinds]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """Predictions of all methods for all kinds of data, made by one other process."""
    jobs = {f"{name}-{kind}": (subject(name).fit(kind), dataset(kind).x) for name, kind in EVERY_FIT}
    found = predicted_elsewhere(jobs, tmp_path_factory.mktemp("elsewhere"))
    return lambda key: {name.split("/")[1]: value for name, value in found.items() if name.split("/")[0] == key}


@pytest.mark.parametrize(("name", "kind"), EVERY_FIT)
def test_another_process_predicts_the_same(name: str, kind: str, elsewhere: Callable[[str], dict[str, Tensor]]) -> None:
    assert_equal(elsewhere(f"{name}-{kind}"), predictions(subject(name).fit(kind), dataset(kind).x))


@pytest.mark.parametrize("kind", cases.NETWORKS)
def test_the_prior_predicts_before_any_fit(kind: str) -> None:
    model, data = network(kind), dataset(kind)
    with untouched():
        first, again = (bdl.prior_predictive(model, data, 50, seed=3) for _ in range(2))
        other = bdl.prior_predictive(model, data, 50, seed=4)
    assert (len(first), first.draws) == (len(data), 50)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
    assert first.mean.isfinite().all()
    assert (bdl.prior_predictive(model, data, 1).epistemic == 0).all()
    if kind == "regression":
        # Prior functions of standardised inputs have a spread of about one, so in raw units about that of the targets.
        assert abs(float(first.mean.mean() - data.y.mean())) < 3 * float(data.y.std())
        assert 0.1 < float(first.epistemic.mean().sqrt() / data.y.std()) < 10
