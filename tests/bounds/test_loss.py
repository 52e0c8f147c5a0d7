from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Gamma, Independent, Normal, Poisson, StudentT, VonMises

from bayesdl.bounds.loss import IntervalMiss, ZeroOne, bounded, default_loss
from bayesdl.errors import CertificateError, ModelError
from bayesdl.posterior import Prediction


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_zero_one_of_draws_and_of_their_mixture_differ() -> None:
    # Two of three draws are right at the first row, but the wrong one is so sure that the mixture is wrong.
    probs = torch.tensor([[0.45, 0.9], [0.45, 0.2], [0.95, 0.9]], dtype=torch.float64)
    prediction = Prediction(Bernoulli(probs=probs))
    y = torch.tensor([0, 1])
    assert ZeroOne().draws(prediction, y).tolist() == [[0, 0], [0, 1], [1, 0]]
    assert ZeroOne().mixture(prediction, y).tolist() == [1, 0]


def test_zero_one_of_several_classes_and_labels() -> None:
    probs = torch.tensor([[[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]], dtype=torch.float64)
    assert ZeroOne().draws(Prediction(Categorical(probs=probs)), torch.tensor([1, 1])).tolist() == [[0, 1]]
    heads = Prediction(Independent(Bernoulli(probs=torch.tensor([[[0.9, 0.1], [0.9, 0.6]]])), 1))
    assert ZeroOne().draws(heads, torch.tensor([[1, 0], [1, 0]])).tolist() == [[0, 1]]
    assert ZeroOne().mixture(heads, torch.tensor([[1, 0], [1, 0]])).tolist() == [0, 1]


def test_interval_misses_agree_with_each_draws_quantiles_in_raw_units() -> None:
    loc = torch.randn(5, 40, generator=generator(0), dtype=torch.float64)
    y = 10 + 4 * torch.randn(40, generator=generator(1), dtype=torch.float64)
    prediction = Prediction(Normal(loc, 0.6), shift=10.0, scale=2.0)
    z = (y - 10) / 2
    expected = ((z - loc).abs() > 0.6 * 1.6448536269514722).double()
    assert torch.equal(IntervalMiss().draws(prediction, y), expected)
    assert 0 < expected.mean() < 1
    low, high = prediction.interval(0.9)
    assert torch.equal(IntervalMiss().mixture(prediction, y), ((y < low) | (y > high)).double())


@pytest.mark.parametrize("family", [StudentT(3.0, torch.zeros(2, 50), 1.0), Poisson(torch.full((2, 50), 4.0))])
def test_interval_misses_agree_with_quantiles_of_other_families(family: StudentT | Poisson) -> None:
    prediction = Prediction(family)
    y = family.sample()[0]
    low, high = prediction.interval(0.9)
    expected = ((y < low) | (y > high)).double()
    assert torch.equal(IntervalMiss().mixture(prediction, y), expected)
    assert torch.equal(IntervalMiss().draws(prediction, y), expected.expand(2, 50))


def test_interval_misses_at_the_edges_of_a_count() -> None:
    # Poisson(1): P(0) = .368, P(Y <= 2) = .920, P(Y <= 3) = .981: the central 90% interval is 0..3.
    prediction = Prediction(Poisson(torch.ones(1, 5, dtype=torch.float64)))
    assert IntervalMiss().draws(prediction, torch.tensor([0, 1, 3, 4, 9])).tolist() == [[0, 0, 0, 1, 1]]


def test_interval_of_several_outputs_misses_if_any_does() -> None:
    prediction = Prediction(Independent(Normal(torch.zeros(2, 3, 2, dtype=torch.float64), 1.0), 1))
    y = torch.tensor([[0.0, 0.0], [0.0, 5.0], [5.0, 5.0]], dtype=torch.float64)
    assert IntervalMiss().draws(prediction, y).tolist() == [[0, 1, 1]] * 2
    assert IntervalMiss().mixture(prediction, y).tolist() == [0, 1, 1]


def test_bounded_losses_are_cut_to_the_unit_interval() -> None:
    loc = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    prediction = Prediction(Normal(loc, 1.0), shift=1.0, scale=2.0)
    y = torch.tensor([1.0, 3.0], dtype=torch.float64)
    squared = bounded(lambda mean, y: (mean - y) ** 2, 20.0)
    assert torch.allclose(squared.draws(prediction, y), torch.tensor([[0.0, 0.0], [0.8, 0.8]], dtype=torch.float64))
    assert torch.allclose(squared.mixture(prediction, y), torch.tensor([0.2, 0.2], dtype=torch.float64))
    nll = 0.5 * math.log(2 * math.pi) + math.log(2)
    assert torch.allclose(bounded("nll", 10.0).draws(prediction, y)[0], torch.tensor(nll / 10, dtype=torch.float64))
    assert bounded("nll", 1.0).draws(prediction, y).max() == 1
    narrow = Prediction(Normal(loc, 1e-3))
    assert bounded("nll", 1.0).mixture(narrow, loc[0]).min() == 0


def test_losses_name_themselves() -> None:
    assert ZeroOne().name == "0-1 loss"
    assert IntervalMiss(0.95).name == "miss of the central 95% interval"
    assert bounded("nll", 5).name == "min(1, max(0, negative log likelihood) / 5)"
    assert default_loss("binary") == ZeroOne()
    assert default_loss("count") == default_loss("real") == IntervalMiss(0.9)


def test_losses_refuse_what_they_do_not_fit() -> None:
    real, classes = Prediction(Normal(torch.zeros(1, 2), 1.0)), Prediction(Bernoulli(probs=torch.full((1, 2), 0.4)))
    broken = Prediction(Bernoulli(probs=torch.tensor([[math.nan, 0.5]]), validate_args=False))
    zero = torch.zeros(2)
    for call, words in [
        (lambda: ZeroOne().draws(real, zero), "needs classes"),
        (lambda: ZeroOne().mixture(broken, zero), "NaN"),
        (lambda: IntervalMiss().draws(classes, zero), "ordered target"),
        (lambda: IntervalMiss(1.0), "level must lie strictly"),
        (lambda: bounded("squared", 1.0), "'nll' or a function"),
        (lambda: bounded("nll", 0.0), "ceiling must be positive"),
        (lambda: bounded("nll", math.inf), "ceiling must be positive"),
    ]:
        with pytest.raises(CertificateError, match=words):
            call()
    circle = Prediction(VonMises(torch.zeros(1, 2), 1.0))
    with pytest.raises(ModelError, match="no cdf"):
        IntervalMiss().draws(circle, zero)
    assert IntervalMiss().draws(Prediction(Gamma(torch.full((1, 2), 2.0), 1.0)), zero + 1).tolist() == [[0, 0]]
