"""What a kernel moves in: the log density of all chains, in the coordinates of a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.density.blocks import Step
from bayesdl.infer.kernel import ValueAndGrad
from bayesdl.infer.metric import Metric


class Target:
    """``u [C, D] -> (log density [C], gradient with respect to u [C, D])``, for as long as the metric stays.

    ``advance`` takes whole steps of an integrator, which a density that compiles itself compiles along.
    """

    def __init__(self, metric: Metric, density: LogDensity, rows: Mapping[str, Any] | None) -> None:
        """A log density of all chains.

        Args:
            metric: of G groups.
            density: of z.
            rows: batch of its own for every chain, or None.
        """
        self.metric, self.density, self.rows = metric, density, rows
        self._prepared: dict[Any, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        return self.metric.around(self._of_z)(u)

    def advance(self, step: Step, *rows: Tensor) -> Sequence[Tensor]:
        """``step(*rows, value_and_grad)``."""
        call = self._prepared.get(step)
        if call is None:
            call = self._prepared[step] = self._prepare(step, rows)
        return call(*rows)

    def _prepare(self, step: Step, rows: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        parts, groups = self.metric.parts(), len(self.metric.scale)
        whole, own = WhitenedStep(step, tuple(parts)), self.rows is not None
        if groups == 1:
            return self.density.fused(whole, rows, tuple(parts.values()), self.rows, per_chain=own)
        if set(parts) != {"scale"}:  # matrices of many groups: nothing is compiled around them
            return lambda *given: step(*given, self)
        # As of groups of one chain each: then no chain looks at another's row.
        scale = self.metric.scale.repeat_interleave(len(rows[0]) // groups, 0)
        call = self.density.fused(whole, (*rows, scale), (), self.rows, per_chain=own)
        return lambda *given: call(*given, scale)

    def _of_z(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.density.value_and_grad(z, self.rows, per_chain=self.rows is not None)


def advance(step: Step, value_and_grad: ValueAndGrad, *rows: Tensor) -> Sequence[Tensor]:
    """``step(*rows, value_and_grad)``, compiled along with a target that compiles itself.

    Args:
        step: a pure function whose chains do not look at each other; equal steps are the same step.
        value_and_grad: a ``Target``, or any other log density.
        rows: its tensors, one entry per chain; positions first.
    """
    if isinstance(value_and_grad, Target):
        return value_and_grad.advance(step, *rows)
    return step(*rows, value_and_grad)


def gradient_at(u: Tensor, value_and_grad: ValueAndGrad) -> tuple[Tensor, Tensor]:
    """The step that stands still: value and gradient at ``u``."""
    return value_and_grad(u)


def value_at(u: Tensor, value_and_grad: ValueAndGrad) -> tuple[Tensor]:
    """The value at ``u``; where the step is compiled, what only the gradient needs is left out."""
    return (value_and_grad(u)[0],)


@dataclass(frozen=True)
class WhitenedStep:
    """A step in u as a function of the log density of z and of the parts of the metric.

    Attributes:
        step: ``(*rows, value_and_grad) -> results``, with a log density of u.
        names: of the parts, which come after the rows.
    """

    step: Step
    names: tuple[str, ...]

    def __call__(self, *given: Any) -> tuple[Tensor, ...]:
        """The results."""
        *tensors, value_and_grad = given
        count = len(tensors) - len(self.names)
        metric = Metric(**dict(zip(self.names, tensors[count:], strict=True)))
        return self.step(*tensors[:count], metric.around(value_and_grad))
