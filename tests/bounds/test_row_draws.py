"""Rows with weights of their own: the right average, independent losses, a bound that covers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.bounds import ZeroOne, betting_upper, chernoff_upper
from bayesdl.bounds.loss import IntervalMiss, Loss
from bayesdl.bounds.risk import gibbs_risk
from bayesdl.bounds.row_draws import RowSampler, draws_by_row, row_risk
from tests.cases import dataset, network


def convolutional() -> tuple[bdl.BayesianNetwork, bdl.Dataset]:
    small = bdl.data.load("digits").train.subset(range(120))
    data = bdl.Dataset.from_arrays(small.x.reshape(-1, 1, 8, 8), small.y, name="digits")
    net = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 10)),
    )
    return bdl.BayesianNetwork(net, likelihood=bdl.likelihoods.Categorical()), data


CASES: dict[str, Any] = {
    "linear layers alone": lambda: (network("classes"), dataset("classes"), ZeroOne()),
    "a noise as well": lambda: (network("regression"), dataset("regression"), IntervalMiss()),
    "convolutions": lambda: (*convolutional(), ZeroOne()),
}


def fitted(case: str) -> tuple[Any, bdl.Dataset, Loss]:
    model, data, loss = CASES[case]()
    posterior: Any = bdl.fit(model, data, bdl.MeanFieldVI(steps=60, initial_scale=0.5), prior_rows=0.5, progress=False)
    return posterior, data, loss


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_that_of_weights_for_all_rows(case: str) -> None:
    posterior, data, loss = fitted(case)
    assert draws_by_row(posterior)
    passes, draws = 60, 1500
    own = row_risk(posterior, data, loss, passes=passes, seed=0, progress=False)
    shared = gibbs_risk(posterior, data, loss, draws=draws, seed=0, progress=False)
    # Losses of one draw depend on each other, so that the sd of its average may be as large as that of one loss.
    error = math.sqrt(0.25 / (passes * len(data)) + 0.25 / draws)
    assert own == pytest.approx(shared, abs=3 * error)
    assert own == row_risk(posterior, data, loss, passes=passes, seed=0, progress=False)
    assert own != row_risk(posterior, data, loss, passes=passes, seed=1, progress=False)


@pytest.mark.parametrize("case", CASES)
def test_equal_rows_have_independent_losses(case: str) -> None:
    posterior, data, loss = fitted(case)
    risks = loss.draws(posterior.predict(data.x, max_draws=400, seed=1), data.y).double().mean(0)
    row = int((risks - 0.5).abs().argmin())  # whose loss is the most uncertain
    count = 3000
    sampler = RowSampler(posterior, posterior.problem.inputs(data.x[[row]].expand(count, *data.x.shape[1:])), 0)
    losses = loss.draws(sampler.predict(torch.arange(count)), data.y[[row]].expand(count))[0].double()
    p = float(risks[row])
    # With one draw for all of them the mean would be 0 or 1.
    assert float(losses.mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) * (1 / count + 1 / 400)) + 1e-9)
    lag = float((losses[1:] * losses[:-1]).mean() - losses.mean() ** 2)
    assert abs(lag) < 4 * 0.25 / math.sqrt(count)


def test_the_monte_carlo_step_covers() -> None:
    posterior, data, loss = fitted("linear layers alone")
    truth = row_risk(posterior, data, loss, passes=1500, seed=99, progress=False)
    delta, failures, runs = 0.1, {"by its bound": 0, "without one": 0}, 120
    for seed in range(runs):
        risk = row_risk(posterior, data, loss, passes=1, seed=seed, progress=False)
        failures["by its bound"] += float(chernoff_upper(risk=risk, n=len(data), delta=delta)) < truth
        failures["without one"] += risk < truth
    # Binomial with 120 trials: 3 standard errors above delta.
    assert failures["by its bound"] / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert failures["without one"] / runs > 2 * delta


def test_betting_on_shared_draws_bounds_the_same_risk() -> None:
    """The other way to few draws: the average losses of whole networks vary little, and a bet uses that."""
    posterior, data, loss = fitted("linear layers alone")
    delta, passes = 0.05, 400
    truth = gibbs_risk(posterior, data, loss, draws=20_000, seed=99, progress=False)
    each = torch.tensor([gibbs_risk(posterior, data, loss, draws=1, seed=k, progress=False) for k in range(400)])
    few = betting_upper(each.double().reshape(8, 50), delta=delta)
    assert int((few < truth).sum()) <= 2  # of eight bounds, each of which fails in a twentieth of all cases at most
    whole = float(betting_upper(each.double(), delta=delta))
    own = row_risk(posterior, data, loss, passes=passes, seed=0, progress=False)
    by_row = float(chernoff_upper(risk=own, n=passes * len(data), delta=delta))
    by_kl = float(chernoff_upper(risk=float(each.mean()), n=len(each), delta=delta))
    assert truth < by_row < whole < by_kl
    assert whole - float(each.mean()) < 0.5 * (by_kl - float(each.mean()))


def test_only_independent_weights_are_drawn_by_row() -> None:
    data, model = dataset("regression"), network("regression")
    assert not draws_by_row(bdl.fit(model, data, bdl.FullRankVI(steps=2), progress=False))
    assert not draws_by_row(bdl.fit(model, data, bdl.DeepEnsemble(members=2, steps=2), progress=False))
    posterior = bdl.fit(model, data, bdl.MeanFieldVI(steps=2), prior_rows=0.5, progress=False)
    certificate = bdl.certify(posterior, data, draws=50)
    assert certificate.draws == 64  # whole passes over the 16 rows
    assert replace(certificate, draws=1).bound == certificate.bound
