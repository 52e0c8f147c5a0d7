"""Distances between predictions against closed forms, and the detection of foreign inputs."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm

from bayesdl.errors import DataError, ModelError
from bayesdl.evaluate.detection import detection_auroc
from bayesdl.evaluate.fidelity import agreement, total_variation, wasserstein, wasserstein_by_row
from bayesdl.posterior import Prediction


def normal(mean, sd, draws=1):
    shape = (draws, len(mean))
    return Prediction(dist.Normal(torch.tensor(mean).double().expand(shape), torch.tensor(sd).double().expand(shape)))


def classes(*rows):
    return Prediction(dist.Categorical(probs=torch.tensor(rows).double()[None]))


@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0, 20.0])
def test_shifted_gaussians(shift):
    one, other = normal([0.0, 5.0], [1.0, 1.0]), normal([shift, 5.0 + shift], [1.0, 1.0])
    assert total_variation(one, other) == pytest.approx(2 * norm.cdf(shift / 2) - 1, abs=0.01)
    assert wasserstein(one, other) == pytest.approx(shift, rel=1e-6)


def test_a_wider_gaussian():
    one, other = normal([0.0], [1.0]), normal([0.0], [2.0])
    crossing = math.sqrt(2 * math.log(2.0) / (1 - 0.25))
    exact = 2 * (norm.cdf(crossing) - norm.cdf(crossing / 2))
    assert total_variation(one, other) == pytest.approx(exact, abs=0.01)
    # sqrt of the mean square of 64 normal scores is a little below 1: the tails are cut.
    assert 0.97 < wasserstein(one, other) < 1.0


def test_the_distance_is_of_mixtures_and_averaged_over_rows():
    two_draws = Prediction(dist.Normal(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double(), 1.0))
    same = Prediction(dist.Normal(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), 1.0))
    assert total_variation(two_draws, same) == 0
    assert wasserstein(two_draws, same) == pytest.approx(0, abs=1e-9)
    shifted = Prediction(dist.Normal(torch.tensor([[-1.0, 2.0], [1.0, 2.0]]).double(), 1.0))
    assert wasserstein(two_draws, shifted) == pytest.approx(math.sqrt(2.0), rel=1e-6)  # rows 0 and 2
    torch.testing.assert_close(wasserstein_by_row(two_draws, shifted), torch.tensor([0.0, 2.0]).double())
    assert total_variation(two_draws, shifted) == pytest.approx((2 * norm.cdf(1) - 1) / 2, abs=0.01)


def test_classes():
    one, other = classes([0.7, 0.2, 0.1], [0.4, 0.35, 0.25]), classes([0.6, 0.3, 0.1], [0.3, 0.45, 0.25])
    assert total_variation(one, other) == pytest.approx(0.1)
    assert agreement(one, other) == 0.5
    assert agreement(one, one) == 1
    with pytest.raises(ModelError, match="real target"):
        wasserstein(one, other)


def test_predictions_of_other_rows_are_refused():
    with pytest.raises(DataError, match="same rows"):
        total_variation(normal([0.0], [1.0]), normal([0.0, 1.0], [1.0, 1.0]))
    with pytest.raises(ModelError, match="wasserstein"):
        agreement(normal([0.0], [1.0]), normal([0.0], [1.0]))


def test_detection_by_total_and_by_epistemic_uncertainty():
    sure, unsure = [0.98, 0.02], [0.5, 0.5]
    inside, outside = classes(sure, sure, unsure), classes(unsure, sure)
    # pairs of (inside, outside): one half of the unsure pair, two wins, two ties and one defeat
    assert detection_auroc(inside, outside) == pytest.approx((2 + 0.5 * 3) / 6)
    split = Prediction(dist.Categorical(probs=torch.tensor([[[0.99, 0.01]], [[0.01, 0.99]]]).double()))
    assert detection_auroc(classes(unsure), split) == pytest.approx(0.5)  # both have entropy log 2
    assert detection_auroc(classes(unsure), split, "epistemic") == 1.0
    assert detection_auroc(normal([0.0, 1.0], [1.0, 1.0]), normal([0.0], [3.0])) == 1.0
    with pytest.raises(DataError, match="different targets"):
        detection_auroc(classes(sure), normal([0.0], [1.0]))
    with pytest.raises(DataError, match="score"):
        detection_auroc(classes(sure), classes(sure), "entropy")
