"""Do probabilities mean what they say? Brier score with its decomposition, and expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.evaluate.metrics import binary_problems
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.targets import CLASS_KINDS

BINS = 15


@dataclass(frozen=True)
class BrierParts:
    """The Brier score and its parts: ``score = reliability - resolution + uncertainty + within`` exactly.

    Args:
        score: Mean squared error of the probabilities.
        reliability: Squared distance of each bin's mean probability from its observed frequency; 0 if calibrated.
        resolution: Variance of the bins' observed frequencies; large if the bins tell cases apart.
        uncertainty: Variance of the outcome itself, a property of the data.
        within: What binning hides: variance of probabilities within bins minus twice their covariance with outcomes.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


@dataclass(frozen=True)
class ReliabilityBins:
    """Rows by the confidence of their prediction, in equal bins of [0, 1]; empty bins have count 0 and zeros elsewhere.

    Args:
        count: Rows in each bin ``[bins]``.
        confidence: Their mean confidence ``[bins]``.
        accuracy: The share of them that is predicted right ``[bins]``.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error, sum_b (n_b / N) |accuracy_b - confidence_b|."""
        gaps = (self.accuracy - self.confidence).abs()
        return float((self.count * gaps).sum() / self.count.sum())


def brier(prediction: Prediction, y: Any) -> float:
    """Mean squared error of the class probabilities.

    Binary: (P(1) - y)^2, from 0 to 1. Several classes: summed over classes, from 0 to 2 (Brier, 1950). Several labels:
    the mean over labels of the binary score.

    Raises:
        DataError: See ``Prediction.target``.
        ModelError: The prediction is not of classes.
    """
    return brier_parts(prediction, y).score


def brier_parts(prediction: Prediction, y: Any, bins: int = BINS) -> BrierParts:
    """Murphy's (1973) decomposition in equal bins of probability, with the within-bin terms that make it exact.

    The within-bin terms are those of Stephenson, Coelho & Jolliffe (2008, eq. 11). Several classes: the parts of the
    one-against-the-rest problems, summed as the score is; several labels: averaged.

    Args:
        prediction: Of classes.
        y: Labels.
        bins: Number of equal bins of [0, 1].

    Raises:
        DataError: See ``Prediction.target``; or fewer than one bin.
        ModelError: The prediction is not of classes.
    """
    target = _classes(prediction, y, bins)
    scores, truth = binary_problems(prediction, target)
    parts = torch.stack([_murphy(p, o, bins) for p, o in zip(scores, truth, strict=True)])
    total = parts.mean(0) if prediction.kind == "multilabel" else parts.sum(0)
    return BrierParts(*total.tolist())


def reliability_bins(prediction: Prediction, y: Any, bins: int = BINS) -> ReliabilityBins:
    """Rows (with several labels: labels) binned by the probability of the predicted class.

    Args:
        prediction: Of classes.
        y: Labels.
        bins: Number of equal bins of [0, 1]; a bin holds its lower edge, and the last one also confidence 1.

    Raises:
        DataError: See ``Prediction.target``; or fewer than one bin.
        ModelError: The prediction is not of classes.
    """
    target = _classes(prediction, y, bins)
    p = prediction.probs
    confidence = torch.maximum(p, 1 - p).flatten() if prediction.kind == "multilabel" else p.amax(1)
    right = (prediction.labels == target).flatten().to(torch.float64)
    place = _bin(confidence, bins)
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, torch.ones_like(confidence))
    return ReliabilityBins(count, _bin_means(confidence, place, count), _bin_means(right, place, count))


def ece(prediction: Prediction, y: Any, bins: int = BINS) -> float:
    """Expected calibration error of the predicted class (Guo et al., 2017, eq. 3), in equal bins of confidence."""
    return reliability_bins(prediction, y, bins).ece


def _classes(prediction: Prediction, y: Any, bins: int) -> Tensor:
    if prediction.kind not in CLASS_KINDS:
        raise ModelError(f"this score is for classes; the prediction is of a {prediction.kind} target.")
    if bins < 1:
        raise DataError(f"at least one bin is needed; got bins={bins}.")
    return prediction.target(y)


def _bin(p: Tensor, bins: int) -> Tensor:
    return (p * bins).floor().long().clamp(0, bins - 1)


def _bin_means(values: Tensor, place: Tensor, count: Tensor) -> Tensor:
    return torch.zeros_like(count).index_add_(0, place, values) / count.clamp(min=1)


def _murphy(p: Tensor, outcome: Tensor, bins: int) -> Tensor:
    place = _bin(p, bins)
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, torch.ones_like(p))
    p_bin, o_bin = _bin_means(p, place, count), _bin_means(outcome, place, count)
    weight, base = count / len(p), outcome.mean()
    reliability = (weight * (p_bin - o_bin).square()).sum()
    resolution = (weight * (o_bin - base).square()).sum()
    p_rest, o_rest = p - p_bin[place], outcome - o_bin[place]
    within = p_rest.square().mean() - 2 * (p_rest * o_rest).mean()
    return torch.stack([(p - outcome).square().mean(), reliability, resolution, base * (1 - base), within])
