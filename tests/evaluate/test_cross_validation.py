"""Cross-validation and the bootstrap against closed forms: every row is predicted by the rows of other folds alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.errors import DataError
from bayesdl.evaluate.cross_validation import CrossValidation, bootstrap, cross_validate
from bayesdl.infer import sampler
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method
from bayesdl.posterior import DrawsPosterior
from bayesdl.posterior.problem import Problem

DOUBLE = torch.float64
NOISE, PRIOR = 0.6, 5.0


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), PRIOR).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], NOISE), obs=y)


def wide(x: Tensor, y: Tensor | None = None) -> None:
    """The same line with far too much noise."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), PRIOR).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 5.0), obs=y)


def line_data(rows: int) -> tuple[Tensor, Tensor]:
    """The noise grows with x, which the model does not know."""
    x = torch.linspace(-1.0, 2.0, rows, dtype=DOUBLE)[:, None]
    noise = torch.randn(rows, dtype=DOUBLE, generator=generator(0, "noise"))
    return x, 0.5 - x[:, 0] + 0.45 * (0.5 + 0.4 * (x[:, 0] + 1.0) ** 2) * noise


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    design = torch.cat([torch.ones_like(x), x], 1)
    precision = design.T @ design / NOISE**2 + torch.eye(2, dtype=DOUBLE) / PRIOR**2
    return torch.linalg.solve(precision, design.T @ y / NOISE**2), torch.linalg.inv(precision)


@dataclass(frozen=True)
class Exact(Method):
    """Independent draws of the posterior of ``line``, in antithetic pairs, so that their mean is exact."""

    name: ClassVar[str] = "Exact"

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        mean, covariance = exact(problem.batch["x"], problem.batch["y"])
        noise = torch.randn(500, 2, dtype=DOUBLE, generator=generator(run.seed, "exact"))
        noise = torch.cat([noise, -noise])
        return DrawsPosterior(problem, (mean + noise @ torch.linalg.cholesky(covariance).T)[None], {}, {})


def left_out(x: Tensor, y: Tensor, fold: Tensor) -> Tensor:
    """Log predictive density of each row given the other folds, in closed form."""
    found = torch.empty_like(y)
    for k in fold.unique():
        inside = fold != k
        mean, covariance = exact(x[inside], y[inside])
        design = torch.cat([torch.ones_like(x), x], 1)[~inside]
        sd = (NOISE**2 + (design @ covariance * design).sum(1)).sqrt()
        found[~inside] = Normal(design @ mean, sd).log_prob(y[~inside])
    return found


def test_it_equals_the_closed_form_fold_by_fold() -> None:
    x, y = line_data(23)
    found = cross_validate(line, (x, y), Exact(), folds=5, seed=3)
    expected = left_out(x, y, found.fold)
    # log mean exp of 1,000 draws: the further out a row, the fewer of them count
    torch.testing.assert_close(found.log_density, expected, rtol=0.05, atol=0.03)
    assert found.elpd == pytest.approx(float(expected.sum()), abs=0.5)
    assert sorted(torch.bincount(found.fold).tolist()) == [4, 4, 5, 5, 5]
    # Rows that are predicted by fits that saw them look better than they are: the difference would show.
    mean, covariance = exact(x, y)
    design = torch.cat([torch.ones_like(x), x], 1)
    inside = Normal(design @ mean, (NOISE**2 + (design @ covariance * design).sum(1)).sqrt()).log_prob(y).sum()
    assert abs(float(inside) - found.elpd) > 1.0
    assert found.standard_error == pytest.approx(23**0.5 * float(found.log_density.std()))
    assert str(found).startswith("5-fold cross-validation of 23 rows, Exact: elpd ")


def test_a_sampler_runs_folds_of_one_size_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    class Watched(sampler.MarkovEngine):
        def __post_init__(self) -> None:
            super().__post_init__()
            groups.append(self.groups)

    monkeypatch.setattr(sampler, "MarkovEngine", Watched)
    method = bdl.HMC(chains=4, warmup=150, draws=200, leapfrog_steps=6)
    for rows, sizes in ((20, [5]), (21, [1, 4])):
        x, y = line_data(rows)
        groups.clear()
        found = cross_validate(line, (x, y), method, folds=5, progress=False)
        assert sorted(groups) == sizes
        assert (found.log_density - left_out(x, y, found.fold)).abs().max() < 0.15


def test_densities_are_of_raw_targets() -> None:
    x, y = line_data(20)
    results = []
    for factor in (1.0, 1000.0):
        data = bdl.Dataset.from_arrays(x, factor * y)
        results.append(cross_validate(bdl.models.mlp(data, hidden=()), data, bdl.MAP(steps=40), folds=4))
    small, large = results
    torch.testing.assert_close(large.log_density, small.log_density - math.log(1000.0), rtol=1e-4, atol=1e-3)


def test_classes_have_probabilities() -> None:
    x, y = line_data(24)
    data = bdl.Dataset.from_arrays(x, (y > 0).long(), "classification")
    found = cross_validate(bdl.models.mlp(data, hidden=()), data, bdl.MAP(steps=60), folds=4)
    assert float(found.log_density.max()) < 0
    assert found.elpd > 24 * torch.tensor(0.5).log()


def test_differences_are_paired() -> None:
    x, y = line_data(40)
    first, second = (cross_validate(model, (x, y), Exact(), folds=8) for model in (line, wide))
    value, error = first.difference(second)
    each = first.log_density - second.log_density
    assert value == pytest.approx(first.elpd - second.elpd)
    assert error == pytest.approx(40**0.5 * float(each.std()))
    assert value > 0
    back, same = second.difference(first)
    assert (back, same) == pytest.approx((-value, error))
    assert first.difference(first) == (0.0, 0.0)
    other = cross_validate(line, (x, y), Exact(), folds=8, seed=1)
    with pytest.raises(DataError, match="same rows and folds"):
        first.difference(other)


def test_impossible_folds_are_refused() -> None:
    for folds in (1, 21):
        with pytest.raises(DataError, match=f"folds={folds} is not possible for 20 rows"):
            cross_validate(line, line_data(20), Exact(), folds=folds)
    with pytest.raises(DataError, match="a Dataset or a pair"):
        cross_validate(line, dict(zip("xy", line_data(20), strict=True)), Exact())


def test_the_bootstrap_spreads_like_the_sandwich() -> None:
    x, y = line_data(60)
    posteriors = bootstrap(line, (x, y), Exact(), replicates=300, seed=1)
    means = torch.stack([p.unconstrained_draws().mean(0) for p in posteriors])
    mean, covariance = exact(x, y)
    scores = torch.cat([torch.ones_like(x), x], 1) * ((y - mean[0] - mean[1] * x[:, 0]) / NOISE**2)[:, None]
    sandwich = (covariance @ scores.T @ scores @ covariance).diagonal().sqrt()
    # 300 replicates know a standard deviation to 4%; 60 rows make a few per cent beside.
    assert ((means.std(0) / sandwich - 1.0).abs() < 0.2).all()
    assert float(sandwich[1] / covariance[1, 1].sqrt()) > 1.2  # the posterior's own sd is another number
    assert ((means.mean(0) - mean).abs() < 0.5 * sandwich).all()


def test_bootstrap_samples_have_the_size_of_the_data_and_repeat_rows() -> None:
    x, y = line_data(30)
    first, again, other = (bootstrap(line, (x, y), Exact(), replicates=2, seed=seed) for seed in (0, 0, 1))
    rows = [p.problem.batch["x"][:, 0] for p in first]
    assert all(len(sample) == 30 and len(sample.unique()) < 28 for sample in rows)
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], again[0].problem.batch["x"][:, 0])
    assert not torch.equal(rows[0], other[0].problem.batch["x"][:, 0])
    with pytest.raises(DataError, match="replicates=0"):
        bootstrap(line, (x, y), Exact(), replicates=0)


def test_the_standard_error_of_known_numbers() -> None:
    values: Any = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=DOUBLE)
    found = CrossValidation(values, torch.tensor([0, 1, 0, 1]))
    assert found.elpd == 8.0
    assert found.standard_error == pytest.approx(2.0 * (4 / 3) ** 0.5)
