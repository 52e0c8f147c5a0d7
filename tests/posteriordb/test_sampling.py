"""Samplers against gold-standard draws: every scalar's mean, sd and quantiles, ESS and R-hat.

The budgets are short, for CI; the full 8 x 2,000 draws are in benchmarks/posteriordb.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bayesdl as bdl
from bayesdl.infer.sampler import Sampler
from tests.posteriordb.budgets import method
from tests.posteriordb.exact import PRIORS, exact
from tests.posteriordb.judgement import Judgement, Reference, judge
from tests.posteriordb.mutations import MUTATIONS
from tests.posteriordb.programs import ENTRIES, load

pytestmark = pytest.mark.slow

DRAWS = 500
MORE = {"gp_pois_regr-gp_pois_regr": 800}
CASES = [
    *(("NUTS", name) for name in ENTRIES),
    *(("ChEES", name) for name in ("arK-arK", "kidiq-kidscore_interaction", "mesquite-logmesquite")),
]
"""What is run here; benchmarks/posteriordb.md has both samplers on all posteriors."""
FEW = ("mesquite-logmesquite", "eight_schools-eight_schools_noncentered")
"""Where wrong samplers are tried here; benchmarks/posteriordb.md has them on all posteriors."""


def sampled(name: str, sampler: Sampler, shared: Path, seed: int = 0) -> list[Judgement]:
    """Judgements by the reference draws and, where there is one, by the exact reference."""
    raw, file = load(shared, name)
    posterior = bdl.fit(ENTRIES[name].program, ENTRIES[name].data(raw), sampler, seed=seed, progress=False)
    scalars = ENTRIES[name].scalars(posterior.draws_by_chain(), raw)
    references = [Reference.of_draws(file)]
    if name in PRIORS:
        references.append(exact(name, raw, list(references[0].names)))
    return [judge(scalars, reference) for reference in references]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_sampler_finds_the_reference(kind: str, name: str, shared: Path) -> None:
    for judgement in sampled(name, method(kind, name, draws=MORE.get(name, DRAWS)), shared):
        assert not judgement.failures(), f"{judgement.failures()}\n{judgement}"


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["NUTS"])
def test_stale_momenta_are_noticed(kind: str, name: str, shared: Path) -> None:
    wrong = MUTATIONS["no refreshment"](method(kind, name, draws=DRAWS))
    assert any(judgement.failures() for judgement in sampled(name, wrong, shared))


@pytest.mark.parametrize("kind", ["NUTS"])
def test_a_missing_jacobian_is_noticed(kind: str, shared: Path) -> None:
    name = "mesquite-logmesquite"
    wrong = MUTATIONS["no Jacobian"](method(kind, name, draws=1500))
    assert any(judgement.wrong for judgement in sampled(name, wrong, shared))


def test_a_steep_gradient_alone_leaves_the_draws_right(shared: Path) -> None:
    """Accept and reject by the right value, and any force will do: the target must be tested (test_programs.py)."""
    name = "eight_schools-eight_schools_noncentered"
    wrong = MUTATIONS["gradient x 1.05"](method("NUTS", name, draws=DRAWS))
    assert not any(judgement.wrong for judgement in sampled(name, wrong, shared))
