"""Step-size schedules: frozen, JSON-able functions from the step number to a positive number."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from bayesdl.errors import MethodError


def _check(name: str, value: Any, ok: bool, allowed: str) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and ok):
        raise MethodError(f"{name}={value!r} is not possible for a schedule: it must be {allowed}.")


@dataclass(frozen=True)
class Schedule(ABC):
    """A step size as a function of the step number, counted from 0. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The step size of step number ``step`` (0, 1, 2, ...)."""

    def samples(self, step: int) -> bool:
        """Whether a sampler takes draws at this step; elsewhere it adds no noise and explores."""
        return True

    def to_json(self) -> dict[str, Any]:
        """The schedule's name and numbers, as kept in checkpoints and posteriors."""
        return {"schedule": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """``value`` at every step."""

    value: float

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("value", self.value, self.value > 0, "a positive number")

    def __call__(self, step: int) -> float:
        """The step size of a step."""
        return self.value


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``a (b + step)^(-gamma)``, the Robbins-Monro family of Welling & Teh (2011).

    With gamma in (0.5, 1] the sum of the step sizes is infinite and the sum of their squares finite; other
    exponents are refused.
    """

    a: float
    b: float = 1.0
    gamma: float = 0.55

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("a", self.a, self.a > 0, "a positive number")
        _check("b", self.b, self.b > 0, "a positive number")
        _check("gamma", self.gamma, 0.5 < self.gamma <= 1, "above 0.5 and at most 1 (Robbins and Monro's conditions)")

    def __call__(self, step: int) -> float:
        """The step size of a step."""
        return float(self.a * (self.b + step) ** -self.gamma)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``initial`` at step 0 to ``final`` at step ``total``, and ``final`` afterwards."""

    initial: float
    total: int
    final: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("initial", self.initial, self.initial > 0, "a positive number")
        _check("total", self.total, self.total >= 1, "at least 1 step")
        _check("final", self.final, 0 <= self.final <= self.initial, "between 0 and initial")

    def __call__(self, step: int) -> float:
        """The step size of a step."""
        part = min(step, self.total) / self.total
        return self.final + (self.initial - self.final) * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Cyclical(Schedule):
    """``cycles`` cosines one after the other, each from ``initial`` towards 0 (Zhang et al., 2020, eq. 1).

    A cycle has ``ceil(total / cycles)`` steps, and its last step is still above 0. In the first part of each, of length
    ``exploration``, stochastic-gradient samplers add no noise and take no draws: they look for another mode (their
    algorithm 1); in the rest they sample it.
    """

    initial: float
    total: int
    cycles: int = 4
    exploration: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("initial", self.initial, self.initial > 0, "a positive number")
        _check("cycles", self.cycles, self.cycles >= 1, "at least 1")
        _check("total", self.total, self.total >= self.cycles, "at least as many steps as there are cycles")
        _check("exploration", self.exploration, 0 <= self.exploration < 1, "at least 0 and below 1")

    @property
    def length(self) -> int:
        """Steps in one cycle."""
        return math.ceil(self.total / self.cycles)

    def __call__(self, step: int) -> float:
        """The step size of a step."""
        return self.initial * 0.5 * (1 + math.cos(math.pi * (step % self.length) / self.length))

    def samples(self, step: int) -> bool:
        """Whether the step lies in the second stage of its cycle."""
        return step % self.length >= self.exploration * self.length


@dataclass(frozen=True)
class Warmup(Schedule):
    """A straight line from ``initial`` at step 0 to ``final`` at step ``total``, and ``final`` afterwards."""

    total: int
    initial: float = 0.0
    final: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("total", self.total, self.total >= 1, "at least 1 step")
        _check("final", self.final, self.final > 0, "a positive number")
        _check("initial", self.initial, 0 <= self.initial <= self.final, "between 0 and final")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.initial + (self.final - self.initial) * min(step, self.total) / self.total


def as_schedule(value: Any, name: str = "step_size") -> Schedule:
    """A number as a constant schedule; a schedule as it is.

    Raises:
        MethodError: neither a positive number nor a schedule; the message bears ``name``.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise MethodError(f"{name}={value!r} is not possible: it must be a positive number or a Schedule.")
    return Constant(float(value))


def robbins_monro(schedule: Schedule) -> bool:
    """Whether the step sizes sum to infinity and their squares to a finite number (Robbins & Monro, 1951).

    Stochastic-gradient MCMC without this has a bias that more steps do not remove. Constant, cosine and cyclical
    schedules do not have the property.
    """
    return isinstance(schedule, Polynomial)


def as_setting(value: Any) -> Any:
    """A setting as a method takes it, from its JSON form: schedules are rebuilt, all else stays.

    Raises:
        MethodError: the value names a schedule that does not exist.
    """
    if not isinstance(value, dict) or "schedule" not in value:
        return value
    known = {kind.__name__: kind for kind in (Constant, Polynomial, Cosine, Cyclical, Warmup)}
    if value["schedule"] not in known:
        raise MethodError(f"There is no schedule {value['schedule']!r}; there are {', '.join(known)}.")
    return known[value["schedule"]](**{name: entry for name, entry in value.items() if name != "schedule"})
