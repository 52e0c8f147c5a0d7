"""Losses in [0, 1] for certificates, for each draw by itself (the Gibbs predictor) and for the mixture over draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bayesdl.errors import CertificateError
from bayesdl.posterior import Prediction
from bayesdl.posterior.targets import CLASS_KINDS, Kind

PointLoss = Callable[[Tensor, Tensor], Tensor]


class Loss(ABC):
    """A loss in [0, 1].

    Attributes:
        name: What the certificate calls it.
        zero_one: Whether its values are 0 and 1 only, which admits the binomial tail.
    """

    zero_one: ClassVar[bool]

    @property
    @abstractmethod
    def name(self) -> str:
        """What the certificate calls it."""

    @abstractmethod
    def draws(self, prediction: Prediction, y: Tensor) -> Tensor:
        """The loss of each draw's own predictive distribution at each row, ``[S, N]``."""

    @abstractmethod
    def mixture(self, prediction: Prediction, y: Tensor) -> Tensor:
        """The loss of the mixture over draws at each row, ``[N]``."""


@dataclass(frozen=True)
class ZeroOne(Loss):
    """1 where the most probable class (ties: the smaller one) is wrong; with several labels, where any of them is."""

    zero_one: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What the certificate calls it."""
        return "0-1 loss"

    def draws(self, prediction: Prediction, y: Tensor) -> Tensor:
        """Whether each draw's most probable class is wrong, ``[S, N]``."""
        self._need_classes(prediction)
        return self._wrong(prediction, prediction.mean_by_draw, y)

    def mixture(self, prediction: Prediction, y: Tensor) -> Tensor:
        """Whether the class of highest mean probability is wrong, ``[N]``."""
        self._need_classes(prediction)
        return self._wrong(prediction, prediction.probs, y)

    def _wrong(self, prediction: Prediction, probs: Tensor, y: Tensor) -> Tensor:
        if not bool(probs.isfinite().all()):
            raise CertificateError("A predicted probability is NaN, so the 0-1 loss is not defined there.")
        if prediction.kind == "multilabel":
            return ((probs > 0.5) != (y > 0.5)).any(-1).double()
        return (probs.argmax(-1) != y).double()

    def _need_classes(self, prediction: Prediction) -> None:
        if prediction.kind not in CLASS_KINDS:
            raise CertificateError(
                f"The 0-1 loss needs classes; this posterior predicts a {prediction.kind} target: use IntervalMiss() "
                "or bounded(...)."
            )


@dataclass(frozen=True)
class IntervalMiss(Loss):
    """1 where the target lies outside the central predictive interval (of several outputs: where any does).

    Args:
        level: Probability of the interval, in (0, 1).

    Raises:
        CertificateError: For a level outside (0, 1).
    """

    zero_one: ClassVar[bool] = True
    level: float = 0.9

    def __post_init__(self) -> None:
        """Check the level."""
        if not 0 < self.level < 1:
            raise CertificateError(f"level must lie strictly between 0 and 1, got {self.level}.")

    @property
    def name(self) -> str:
        """What the certificate calls it."""
        return f"miss of the central {100 * self.level:g}% interval"

    def draws(self, prediction: Prediction, y: Tensor) -> Tensor:
        """Whether each draw's own interval misses the target, ``[S, N]``."""
        self._check(prediction)
        mass = prediction.log_prob_by_draw(y).exp() if prediction.kind == "count" else None
        return self._missed(prediction, prediction.cdf_by_draw(y), mass)

    def mixture(self, prediction: Prediction, y: Tensor) -> Tensor:
        """Whether the mixture's interval misses the target, ``[N]``."""
        self._check(prediction)
        mass = prediction.log_prob(y).exp() if prediction.kind == "count" else None
        return self._missed(prediction, prediction.cdf(y), mass)

    def _missed(self, prediction: Prediction, cdf: Tensor, mass: Tensor | None) -> Tensor:
        """Below the lower quantile where P(Y <= y) is small, above the upper one where P(Y < y) is large."""
        if not bool(cdf.isfinite().all()):
            raise CertificateError("The predictive cdf is NaN at a row, so the interval is not defined there.")
        tail = (1 - self.level) / 2
        missed = (cdf < tail) | ((cdf if mass is None else cdf - mass) > 1 - tail)
        return (missed.any(-1) if prediction.event_shape else missed).double()

    def _check(self, prediction: Prediction) -> None:
        if prediction.kind in CLASS_KINDS:
            raise CertificateError("Intervals need an ordered target; for classes use ZeroOne().")
        if prediction.kind == "count" and prediction.event_shape:
            raise CertificateError("Intervals of several counts at once are not defined; use bounded(...).")


@dataclass(frozen=True)
class Bounded(Loss):
    """A non-negative loss divided by a ceiling and cut at 1; see ``bounded``."""

    zero_one: ClassVar[bool] = False
    loss: Literal["nll"] | PointLoss
    ceiling: float

    @property
    def name(self) -> str:
        """What the certificate calls it."""
        inner = "negative log likelihood" if self.loss == "nll" else getattr(self.loss, "__name__", "loss")
        return f"min(1, max(0, {inner}) / {self.ceiling:g})"

    def draws(self, prediction: Prediction, y: Tensor) -> Tensor:
        """The cut loss of each draw, ``[S, N]``."""
        if isinstance(self.loss, str):
            return self._cut(-prediction.log_prob_by_draw(y))
        return self._cut(self.loss(prediction.mean_by_draw, y))

    def mixture(self, prediction: Prediction, y: Tensor) -> Tensor:
        """The cut loss of the mixture, ``[N]``."""
        if isinstance(self.loss, str):
            return self._cut(-prediction.log_prob(y))
        return self._cut(self.loss(prediction.mean, y))

    def _cut(self, values: Tensor) -> Tensor:
        return (values.double() / self.ceiling).clamp(0.0, 1.0)  # clamp keeps NaN, which certify refuses


def bounded(loss: Literal["nll"] | PointLoss, ceiling: float) -> Bounded:
    r"""The loss :math:`\min(1, \max(0, \ell) / c)`.

    The ceiling c must be stated in advance or come from rows outside the bound's; a small one hides large losses, a
    large one makes the bound coarse: the bound on the loss itself, cut at c, is c times the certificate's.

    Args:
        loss: "nll" (negative log likelihood in raw units), or a function of the predictive mean (for classes the
            probabilities, with K as last dimension) and the targets ``[N]`` that gives one value per row; it must
            broadcast over a leading dimension of draws.
        ceiling: c, positive and finite.

    Returns:
        A loss for ``certify(loss=)``.

    Raises:
        CertificateError: For another kind of loss or ceiling.
    """
    if not (callable(loss) or loss == "nll"):
        raise CertificateError(f"loss must be 'nll' or a function of (mean, y), got {loss!r}.")
    if isinstance(ceiling, bool) or not 0 < ceiling < math.inf:
        raise CertificateError(f"ceiling must be positive and finite, got {ceiling!r}.")
    return Bounded(loss, float(ceiling))


def default_loss(kind: Kind) -> Loss:
    """0-1 for classes, a miss of the central 90% interval otherwise."""
    return ZeroOne() if kind in CLASS_KINDS else IntervalMiss()
