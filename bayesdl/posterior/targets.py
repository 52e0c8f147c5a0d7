"""Kinds of targets: which one a distribution predicts, and whether observed values belong to it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from bayesdl.data.checks import check_finite, check_kind, to_array
from bayesdl.errors import DataError, ModelError
from bayesdl.posterior.families import Stacked
from bayesdl.posterior.quantiles import unwrap

Kind = Literal["real", "count", "binary", "categorical", "multilabel"]
CLASS_KINDS = ("binary", "categorical", "multilabel")


def innermost(distribution: Distribution) -> Distribution:
    """The distribution below all wrappers; of several side by side the first."""
    inner = unwrap(distribution)
    return innermost(inner.members[0]) if isinstance(inner, Stacked) else inner


def kind_of(distribution: Distribution) -> Kind:
    """The kind of target that a likelihood's distribution predicts.

    Raises:
        ModelError: For one-hot targets.
    """
    inner = innermost(distribution)
    if isinstance(inner, Bernoulli):
        return "multilabel" if distribution.event_shape else "binary"
    if isinstance(inner, Categorical):
        return "categorical"
    if isinstance(inner, OneHotCategorical):
        raise ModelError("one-hot targets are not supported: use Categorical with labels 0 to K-1.")
    support: Any = distribution.support
    return "count" if support.is_discrete else "real"


def check_target(y: Any, kind: Kind, shape: tuple[int, ...], classes: int) -> Tensor:
    """Observed targets as a tensor: float64 if real, else int64.

    Args:
        y: Array-like.
        kind: What the values stand for.
        shape: The shape that they must have.
        classes: Number of classes, for a categorical target.

    Raises:
        DataError: Wrong shape, NaN or infinite values, labels or counts out of range.
    """
    array = to_array(y, "y")
    check_kind(array, "y")
    if array.shape != shape:
        raise DataError(f"y has shape {array.shape}, but the prediction is for {shape[0]} rows and needs {shape}.")
    check_finite(array, "y")
    values = torch.as_tensor(np.array(array, dtype=np.float64))
    if kind == "real":
        return values
    highest = {"count": math.inf, "categorical": classes - 1}.get(kind, 1)
    bad = (values != values.round()) | (values < 0) | (values > highest)
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        allowed = "whole numbers from 0 on" if highest == math.inf else f"whole numbers from 0 to {highest}"
        raise DataError(
            f"y holds {int(bad.sum())} values out of range for a {kind} target, the first in row {first[0]}: "
            f"{values[tuple(first)].item():g}; allowed are {allowed}."
        )
    return values.long()
