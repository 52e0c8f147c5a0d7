"""Does uncertainty tell inputs like the training data from inputs of another kind?"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from bayesdl.errors import DataError
from bayesdl.evaluate.metrics import area_under_curve
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.targets import CLASS_KINDS

Score = Literal["total", "epistemic"]


def detection_auroc(inside: Prediction, outside: Prediction, score: Score = "total") -> float:
    """Probability that a foreign input is less certain than a familiar one, ties counting one half.

    0.5 is chance, 1 a clean separation. Nothing is fitted: the uncertainty itself is the score.

    Args:
        inside: predictions for inputs like those of the training data.
        outside: predictions for inputs of another kind.
        score: "total" (entropy of the predicted class, or variance of a number) or "epistemic" (mutual information of
            label and parameters, or variance of the mean): the part that more data would remove.

    Raises:
        DataError: the two predictions are of different targets, or the score is unknown.
    """
    if score not in get_args(Score):
        raise DataError(f"score is one of {', '.join(map(repr, get_args(Score)))}; got {score!r}.")
    if (inside.kind, inside.event_shape) != (outside.kind, outside.event_shape):
        raise DataError(f"The two predictions are of different targets: {inside.kind} and {outside.kind}.")
    both = []
    for prediction in (inside, outside):
        if prediction.kind in CLASS_KINDS:
            value = prediction.entropy if score == "total" else prediction.mutual_information
        else:
            value = prediction.variance if score == "total" else prediction.epistemic
        both.append(value.to(torch.float64).reshape(len(prediction), -1).sum(1))
    truth = torch.cat([torch.zeros_like(both[0]), torch.ones_like(both[1])])
    return area_under_curve(torch.cat(both), truth)
