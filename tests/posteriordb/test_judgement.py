"""The judgement itself: it accepts draws of the reference's law, and rejects what is a little off or badly mixed."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from bayesdl._rng import generator
from tests.posteriordb.judgement import LEVELS, STATISTICS, Judgement, Reference, judge


def reference() -> Reference:
    """A standard normal and an exponential scalar."""
    laws = (stats.norm(), stats.expon())
    values = torch.tensor([[law.mean(), law.std(), *law.ppf(LEVELS)] for law in laws]).double().T
    return Reference(["normal", "skewed"], values, torch.zeros_like(values))


def draws(seed: int, correlation: float = 0.0) -> Tensor:
    """``[8, 2000, 2]``; an autoregression of the normal scores."""
    noise = torch.randn(8, 2000, 2, dtype=torch.float64, generator=generator(seed, "judged"))
    scores = [noise[:, 0]]
    for row in noise.unbind(1)[1:]:
        scores.append(correlation * scores[-1] + (1 - correlation**2) ** 0.5 * row)
    z = torch.stack(scores, 1)
    return torch.stack([z[..., 0], -torch.special.log_ndtr(-z[..., 1])], -1)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_right_draws_pass_and_their_errors_are_as_large_as_they_say(correlation: float) -> None:
    found = [judge(draws(seed, correlation), reference()) for seed in range(8)]
    assert not any(judgement.failures() for judgement in found), [str(judgement) for judgement in found]
    squares = torch.stack([judgement.z for judgement in found]).square().mean(0)
    assert ((squares > 0.15) & (squares < 3.5)).all(), squares  # chi-square with 8 degrees of freedom, over 8


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        (lambda x: x + 0.06, "mean"),
        (lambda x: 1.06 * x, "sd"),
        (lambda x: torch.where(x > 1.7, x + 0.3, x), "95%"),
        (lambda x: torch.where(x.isclose(x.amax()), torch.nan, x), "mean"),
    ],
)
def test_wrong_draws_fail(change: object, statistic: str) -> None:
    found: Judgement = judge(change(draws(0)), reference())  # type: ignore[operator]  # a lambda, says its use
    assert found.wrong
    row = STATISTICS.index(statistic)
    assert not found.z[row].abs().max() < 4.0


def test_badly_mixed_draws_fail() -> None:
    apart = draws(0) + torch.linspace(-0.5, 0.5, 8, dtype=torch.float64)[:, None, None]
    assert any("R-hat" in failure for failure in judge(apart, reference()).failures())
    slow = draws(0, 0.97)
    assert any("ESS" in failure for failure in judge(slow, reference()).failures())


def test_the_table_names_every_scalar() -> None:
    text = str(judge(draws(0), reference()))
    assert "normal" in text
    assert "skewed" in text
    assert len(text.splitlines()) == 7
