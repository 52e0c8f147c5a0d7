"""Scores of a prediction against observed targets. Logarithms are natural; scores of rows are averaged.

Every function takes a `Prediction` of N rows and targets ``y [N]`` (``[N, K]`` for several outputs or labels) and
raises ``DataError`` for targets of another shape, with NaN, or with labels out of range, and ``ModelError`` where the
score does not apply to the kind of target.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, ModelError
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.targets import CLASS_KINDS

PAIRS = 10**8
"""Largest number of pairs of mixture components for which the CRPS is computed in closed form (a few seconds)."""
_ROWS = 64  # rows of pairs at a time, so that they stay in the processor's cache
SAMPLES = 1000
"""Samples a row for the CRPS where there is no closed form, or where it would be too dear."""


def nll(prediction: Prediction, y: Any) -> float:
    """Negative log predictive density -mean_i log p(y_i), nats a row, of the density in raw units."""
    return -float(prediction.log_prob(y).mean())


def rmse(prediction: Prediction, y: Any) -> float:
    """Root mean squared error of the predictive mean, units of y."""
    return math.sqrt(float((_ordered(prediction, y) - prediction.mean).square().mean()))


def mae(prediction: Prediction, y: Any) -> float:
    """Mean absolute error of the predictive mean, units of y."""
    return float((_ordered(prediction, y) - prediction.mean).abs().mean())


def crps(prediction: Prediction, y: Any, seed: int = 0) -> float:
    """Continuous ranked probability score, E|Y - y| - E|Y - Y'|/2 = integral of (F(t) - 1[y <= t])^2 dt, units of y.

    In closed form for Gaussian likelihoods (Grimit et al., 2006, eq. 8), at a cost of S^2 N; from samples otherwise
    and above ``PAIRS`` (see `crps_method`).

    Args:
        prediction: Of a real or count target.
        y: Observed targets.
        seed: Seed of the samples, where they are needed.
    """
    return float(crps_by_row(prediction, y, seed).mean())


def crps_by_row(prediction: Prediction, y: Any, seed: int = 0) -> Tensor:
    """The CRPS of every entry of y, see `crps`."""
    target = _ordered(prediction, y)
    components = prediction.gaussian_components if crps_method(prediction) == "exact" else None
    if components is not None:
        return _gaussian_mixture_crps(*components, target)
    return _fair_crps(prediction.sample(SAMPLES, seed).to(torch.float64), target)


def crps_method(prediction: Prediction) -> str:
    """How `crps` is computed: "exact" or "samples"."""
    pairs = prediction.draws**2 * len(prediction) * math.prod(prediction.event_shape)
    return "exact" if prediction.family == "Normal" and pairs <= PAIRS else "samples"


def pinball(prediction: Prediction, y: Any, q: float) -> float:
    """Mean quantile loss max(q r, (q - 1) r) with r = y - quantile(q), units of y."""
    residual = _ordered(prediction, y) - prediction.quantile(q)
    return float(torch.maximum(q * residual, (q - 1) * residual).mean())


def coverage(prediction: Prediction, y: Any, level: float = 0.9) -> float:
    """Share of targets inside the central interval; calibrated if about ``level``."""
    target = _ordered(prediction, y)
    low, high = prediction.interval(level)
    return float(((low <= target) & (target <= high)).to(torch.float64).mean())


def width(prediction: Prediction, level: float = 0.9) -> float:
    """Mean width of the central interval, units of y: of two predictions with right coverage the narrower is better."""
    low, high = prediction.interval(level)
    return float((high - low).mean())


def pit(prediction: Prediction, y: Any, seed: int = 0) -> Tensor:
    """Probability integral transform F_i(y_i), uniform on [0, 1] if calibrated; shape of y.

    For counts the randomised one, F(y - 1) + u (F(y) - F(y - 1)) with u uniform (Czado et al., 2009, eq. 1).
    """
    target = _ordered(prediction, y)
    value = prediction.cdf(target)
    if prediction.kind != "count":
        return value
    below = torch.where(target > 0, prediction.cdf((target - 1).clamp(min=0)), torch.zeros_like(value))
    u = torch.rand(value.shape, dtype=value.dtype, generator=generator(seed, "pit"))
    return below + u * (value - below)


def calibration_error(prediction: Prediction, y: Any) -> float:
    """Mean of |share of PIT values <= p - p| over p = 0.05, 0.10 ... 0.95 (after Kuleshov et al., 2018, eq. 9)."""
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    observed = (pit(prediction, y).flatten()[:, None] <= levels).to(torch.float64).mean(0)
    return float((observed - levels).abs().mean())


def accuracy(prediction: Prediction, y: Any) -> float:
    """Share of rows (with several labels: of labels) predicted right."""
    target = _classes(prediction, y)
    return float((prediction.labels == target).to(torch.float64).mean())


def auroc(prediction: Prediction, y: Any) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting one half.

    Several classes: one against the rest, averaged over classes (macro); several labels: averaged over labels. Classes
    that y lacks, or that it consists of, have no curve and are left out; NaN if none is left.
    """
    target = _classes(prediction, y)
    scores, truth = binary_problems(prediction, target)
    areas = [area_under_curve(s, t) for s, t in zip(scores, truth, strict=True)]
    defined = [area for area in areas if not math.isnan(area)]
    return sum(defined) / len(defined) if defined else math.nan


def perplexity(prediction: Prediction, y: Any) -> float:
    """Perplexity exp(nll), the inverse geometric mean of the probabilities of what was seen; C for a uniform guess."""
    _classes(prediction, y)
    return math.exp(min(nll(prediction, y), 709.0))


def predictive_entropy(prediction: Prediction) -> float:
    """Mean entropy of the predictive distribution over classes, nats: total uncertainty."""
    return float(prediction.entropy.mean())


def mutual_information(prediction: Prediction) -> float:
    """Mean mutual information between label and parameters, nats: epistemic uncertainty."""
    return float(prediction.mutual_information.mean())


def epistemic_share(prediction: Prediction) -> float:
    """Epistemic part of the total uncertainty, 0 to 1: of the mean variance, or for classes of the mean entropy."""
    if prediction.kind in CLASS_KINDS:
        part, total = mutual_information(prediction), predictive_entropy(prediction)
    else:
        part, total = float(prediction.epistemic.mean()), float(prediction.variance.mean())
    return part / total if total else 0.0


def binary_problems(prediction: Prediction, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and 0/1 outcomes ``[N]`` of each yes-no question in a prediction: class (or label) k, or not?"""
    p = prediction.probs
    if prediction.kind == "binary":
        return [p[:, 1]], [target.to(torch.float64)]
    if prediction.kind == "multilabel":
        return list(p.unbind(1)), list(target.to(torch.float64).unbind(1))
    return list(p.unbind(1)), [(target == k).to(torch.float64) for k in range(p.shape[1])]


def area_under_curve(score: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of scores ``[N]`` for outcomes 0 and 1 ``[N]``; NaN if there is only one outcome."""
    positive = float(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return math.nan
    ranks = torch.from_numpy(rankdata(score.numpy(), method="average"))
    return (float((ranks * truth).sum()) - positive * (positive + 1) / 2) / (positive * negative)


def _ordered(prediction: Prediction, y: Any) -> Tensor:
    if prediction.kind in CLASS_KINDS:
        raise ModelError(f"this score is for real and count targets; the prediction is of classes ({prediction.kind}).")
    return prediction.target(y).to(torch.float64)


def _classes(prediction: Prediction, y: Any) -> Tensor:
    if prediction.kind not in CLASS_KINDS:
        raise ModelError(f"this score is for classes; the prediction is of a {prediction.kind} target.")
    return prediction.target(y)


def _expected_distance(difference: Tensor, sd: Tensor) -> Tensor:
    """E|Z| of Z ~ Normal(difference, sd^2)."""
    scaled = difference / sd
    density = torch.exp(-scaled.square() / 2) / math.sqrt(2 * math.pi)
    return 2 * sd * density + difference * torch.erf(scaled / math.sqrt(2))


def _gaussian_mixture_crps(means: Tensor, sds: Tensor, y: Tensor) -> Tensor:
    draws = len(means)
    flat_means, flat_sds, flat_y = means.reshape(draws, -1), sds.reshape(draws, -1), y.reshape(-1)
    first = _expected_distance(flat_y - flat_means, flat_sds).mean(0)
    second = torch.empty_like(first)
    for low in range(0, len(second), _ROWS):
        m, s = flat_means[:, low : low + _ROWS], flat_sds[:, low : low + _ROWS]
        # Each pair once, as the distance is symmetric; a component and its own copy are 2 sd / sqrt(pi) apart.
        total = s.sum(0) / math.sqrt(math.pi)
        for k in range(draws - 1):
            total += _expected_distance(m[k] - m[k + 1 :], (s[k].square() + s[k + 1 :].square()).sqrt()).sum(0)
        second[low : low + _ROWS] = 2 * total / draws**2
    return (first - second / 2).reshape(y.shape)


def _fair_crps(samples: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimator with divisor M (M - 1) (Ferro, 2014); the pairs' sum from the sorted samples."""
    if len(samples) < 2:
        raise DataError(f"the CRPS needs at least two samples; got {len(samples)}.")
    m = len(samples)
    weight = (2 * torch.arange(1, m + 1, dtype=torch.float64) - m - 1).reshape(-1, *[1] * y.dim())
    pairs = (samples.sort(0).values * weight).sum(0) / (m * (m - 1))
    return (samples - y).abs().mean(0) - pairs
