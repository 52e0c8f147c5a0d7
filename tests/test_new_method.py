"""What a new method takes: one file, one line in the registry; the whole contract battery then runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from bayesdl import _registry
from bayesdl.posterior.convergence import ess_mean, mcse_mean
from tests.cases import MethodCase, conjugate, dataset, network
from tests.contract import CHECKS, Subject, assert_equal, predicted_elsewhere, predictions

SOURCE = Path(__file__).with_name("toy_method.py")
NAME = "Metropolis"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The toy method as its author would add it: a module of its own, and an entry in the table."""
    folder = tmp_path_factory.mktemp("new_method")
    (folder / "a_new_method.py").write_text(SOURCE.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(_registry.METHODS, NAME, f"a_new_method:{NAME}")
        yield Subject(NAME, MethodCase({"chains": 2, "draws": 40, "scale": 0.2}))
        bdl.__dict__.pop(NAME, None)


@pytest.mark.parametrize("check", CHECKS)
def test_a_new_method_keeps_the_contract(check: str, toy: Subject, tmp_path: Path) -> None:
    CHECKS[check](toy, tmp_path)


def test_another_process_predicts_with_it_the_same(toy: Subject, tmp_path: Path) -> None:
    posterior, x = toy.fit(), dataset("regression").x
    found = predicted_elsewhere({"toy": (posterior, x)}, tmp_path)
    assert_equal({name.removeprefix("toy/"): value for name, value in found.items()}, predictions(posterior, x))


def test_it_stands_beside_the_others(toy: Subject) -> None:
    assert bdl.Metropolis is _registry.method_class("metropolis")
    assert NAME in dir(bdl)
    with pytest.raises(bdl.errors.MethodError, match=r"Metropolis\(draws=0\): draws must be a whole number"):
        bdl.Metropolis(draws=0)
    diagnostics = bdl.fit(network("binary"), dataset("binary"), bdl.Metropolis(draws=50)).diagnostics()
    assert diagnostics.rhat > 1.05


def test_it_samples_the_tempered_posterior(toy: Subject) -> None:
    method = bdl.Metropolis(chains=64, draws=600, scale=0.2, temperature=4.0)
    posterior = bdl.fit(conjugate().program, conjugate().data, method)
    draws = posterior.draws_by_chain()["w"][:, 200:]
    squares = (draws - conjugate().mean()).square()
    assert float(ess_mean(squares).min()) > 400
    for values, exact in ((draws, conjugate().mean()), (squares, conjugate().covariance(4.0).diagonal())):
        assert ((values.mean((0, 1)) - exact) / mcse_mean(values)).abs().max() < 4.5
    assert not torch.allclose(squares.mean((0, 1)), conjugate().covariance().diagonal(), rtol=0.5)
