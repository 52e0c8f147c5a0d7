"""Does one prediction stand for another? Distances of an approximation from a reference, such as a long run of NUTS.

For classes, the share of rows with the same label and the total variation, as in the comparison of Bayesian networks by
Izmailov et al. (2021, section 4, "What are Bayesian neural network posteriors really like?"). For real targets, the
total variation and the Wasserstein distance of the predictive distributions, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.targets import CLASS_KINDS

LEVELS = 64
"""Quantiles of each distribution at which two of them are compared."""


def agreement(prediction: Prediction, reference: Prediction) -> float:
    """Share of rows (with several labels: of labels) at which both predict the same label.

    Raises:
        DataError: the two are not of the same rows and targets.
        ModelError: they are not of classes.
    """
    _check(prediction, reference)
    if prediction.kind not in CLASS_KINDS:
        raise ModelError(f"only classes agree; for a {prediction.kind} target see total_variation or wasserstein.")
    return float((prediction.labels == reference.labels).to(torch.float64).mean())


def total_variation(prediction: Prediction, reference: Prediction) -> float:
    """Total variation of the two predictive distributions, 0 to 1, averaged over the rows.

    For classes ``1/2 sum_k |p_k - q_k|``. For real targets ``1/2 int |p - q| dy = E_m[|p - q| / (p + q)]`` with m the
    mean of the two, whose expectation is taken at 64 quantiles of each: to about 0.01.

    Raises:
        DataError: the two are not of the same rows and targets.
        ModelError: counts or several targets a row, for which there is no such sum here.
    """
    _check(prediction, reference)
    if prediction.kind in ("binary", "categorical"):
        return float(0.5 * (prediction.probs - reference.probs).abs().sum(1).mean())
    if prediction.kind == "multilabel":
        return float((prediction.probs - reference.probs).abs().mean())
    _need_numbers(prediction, "total_variation")
    total = torch.zeros(len(prediction), dtype=torch.float64)
    for source in (prediction, reference):
        for nodes in _quantiles(source):
            one, other = prediction.log_prob(nodes), reference.log_prob(nodes)
            # |p - q| / (p + q) with the larger of the two taken out
            total += torch.tanh(0.5 * (one - other).abs()).nan_to_num(0.0)
    return float(total.mean() / (2 * LEVELS))


def wasserstein(prediction: Prediction, reference: Prediction) -> float:
    """Wasserstein-2 distance of the two predictive distributions, in units of the target; root mean square over rows.

    Raises:
        DataError, ModelError: as ``wasserstein_by_row``.
    """
    return float(wasserstein_by_row(prediction, reference).square().mean().sqrt())


def wasserstein_by_row(prediction: Prediction, reference: Prediction) -> Tensor:
    """Wasserstein-2 distance of the two predictive distributions of every row, ``[N]``, in units of the target.

    ``W^2 = int_0^1 (F^-1(u) - G^-1(u))^2 du`` at 64 levels u: the outermost 1/128 on either side are taken for what is
    beside them.

    Raises:
        DataError: the two are not of the same rows and targets.
        ModelError: they are not of one real target a row.
    """
    _check(prediction, reference)
    _need_numbers(prediction, "wasserstein")
    return (_quantiles(prediction) - _quantiles(reference)).square().mean(0).sqrt()


def _quantiles(prediction: Prediction) -> Tensor:
    """``[LEVELS, N]`` at the middles of as many equal steps of probability."""
    return prediction.quantile((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS)


def _need_numbers(prediction: Prediction, what: str) -> None:
    if prediction.kind != "real" or prediction.event_shape:
        raise ModelError(f"{what} is for classes or one real target a row; the prediction is of {prediction.kind}.")


def _check(prediction: Prediction, reference: Prediction) -> None:
    mine, theirs = ((p.kind, len(p), p.event_shape) for p in (prediction, reference))
    if mine != theirs:
        raise DataError(f"Predictions of the same rows and targets can be compared; these are {mine} and {theirs}.")
