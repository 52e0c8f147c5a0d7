"""The programs are the posteriors: their densities, gradients and Jacobians against numpy, at reference draws."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from bayesdl.density import LogDensity
from bayesdl.posterior import prepare
from bayesdl.posterior.convergence import mcse_mean
from tests.posteriordb.densities import DENSITIES
from tests.posteriordb.exact import PRIORS, exact
from tests.posteriordb.judgement import STANDARD_ERRORS, Reference
from tests.posteriordb.mutations import NoJacobian, Steep, SteepGradient, changed
from tests.posteriordb.programs import ENTRIES, load
from tests.posteriordb.target import mismatch, spread_out

POINTS = 8


@cache
def density(name: str, shared: Path) -> LogDensity:
    raw, _ = load(shared, name)
    return prepare(ENTRIES[name].program, ENTRIES[name].data(raw)).density


def test_every_posterior_has_a_program_and_a_density(shared: Path) -> None:
    folders = {path.name for path in (shared / "data" / "posteriordb").iterdir()}
    assert folders == set(ENTRIES) == set(DENSITIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_scalars_and_sites_are_each_others_inverse(name: str, shared: Path) -> None:
    raw, reference = load(shared, name)
    draws = spread_out(reference["draws"], POINTS)
    again = ENTRIES[name].scalars(ENTRIES[name].sites(draws, raw), raw)
    torch.testing.assert_close(again, draws, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_density_is_the_one_written_in_numpy_and_a_wrong_one_is_not(name: str, shared: Path) -> None:
    raw, reference = load(shared, name)
    right, draws = density(name, shared), spread_out(reference["draws"], POINTS)
    assert right.execution != "loop"
    found = mismatch(name, raw, right, draws)
    assert not found.wrong, found
    for kind in (NoJacobian, SteepGradient, Steep):
        assert mismatch(name, raw, changed(right, kind), draws).wrong, kind.__name__


@pytest.mark.parametrize("name", ENTRIES)
def test_the_mean_gradient_at_the_reference_draws_is_zero(name: str, shared: Path) -> None:
    """E grad log pi = 0: the draws belong to this density, Jacobian included."""
    raw, reference = load(shared, name)
    right = density(name, shared)
    draws = torch.from_numpy(reference["draws"][:, ::25]).double()
    z = right.unconstrain(ENTRIES[name].sites(draws.flatten(0, 1), raw))
    gradient = torch.cat([right.value_and_grad(rows)[1] for rows in z.split(POINTS)]).unflatten(0, draws.shape[:2])
    assert (gradient.mean((0, 1)) / mcse_mean(gradient)).abs().max() < STANDARD_ERRORS


@pytest.mark.parametrize("name", PRIORS)
def test_the_reference_draws_agree_with_what_is_exact(name: str, shared: Path) -> None:
    raw, file = load(shared, name)
    reference = Reference.of_draws(file)
    known = exact(name, raw, list(reference.names))
    assert ((reference.values - known.values) / reference.errors).abs().max() < STANDARD_ERRORS
