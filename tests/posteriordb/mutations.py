"""Wrong samplers, made of right ones: what the judgement must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.infer.kernel import Noise, Point, Statistics, Tuning, ValueAndGrad
from bayesdl.infer.loop import Run
from bayesdl.infer.sampler import Sampler
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem

Mutation = Callable[[Any], Any]


class Changed(LogDensity):
    """A density whose ``value_and_grad`` is another: nothing is compiled around the right one."""

    def fused(
        self, step: Any, rows: Any, shared: Any = (), batch: Any = None, **kwargs: Any
    ) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *given: step(*given, *shared, self.value_and_grad)


class NoJacobian(Changed):
    """The density of the constrained values, taken for that of the unconstrained ones."""

    def value_and_grad(self, z: Tensor, batch: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().value_and_grad(z, batch, **(kwargs | {"target": "joint"}))


class SteepGradient(Changed):
    """The right value and 1.05 times its gradient."""

    def value_and_grad(self, z: Tensor, batch: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        value, gradient = super().value_and_grad(z, batch, **kwargs)
        return value, 1.05 * gradient


class Steep(Changed):
    """1.05 times the log density, value and gradient alike."""

    def value_and_grad(self, z: Tensor, batch: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        value, gradient = super().value_and_grad(z, batch, **kwargs)
        return 1.05 * value, 1.05 * gradient


DENSITIES: dict[str, type[LogDensity]] = {"no Jacobian": NoJacobian, "gradient x 1.05": SteepGradient}


def changed(density: LogDensity, kind: type[LogDensity]) -> LogDensity:
    """The same density with the methods of another class."""
    other = copy.copy(density)
    other.__class__ = kind
    return other


class Stale(Noise):
    """Noise whose Gaussian draws are those of the first transition, for ever."""

    first: dict[str, Tensor]

    def normal(self) -> Tensor:
        return self.first.setdefault("momentum", super().normal())


def with_density(method: Sampler, kind: type[LogDensity]) -> Sampler:
    """The sampler on a changed density."""

    class Wrong(type(method)):  # type: ignore[misc]  # its base is whatever sampler is given
        def _fit(self, problem: Problem, run: Run) -> Posterior:
            return super()._fit(replace(problem, density=changed(problem.density, kind)), run)

    return _like(method, Wrong)


def without_refreshment(method: Sampler) -> Sampler:
    """The sampler with every chain's first momentum at every transition."""
    first: dict[str, Tensor] = {}

    class Wrong(type(method)):  # type: ignore[misc]  # its base is whatever sampler is given
        def transition(
            self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
        ) -> tuple[Point, Statistics]:
            stale = Stale(**{entry.name: getattr(noise, entry.name) for entry in fields(noise)})
            object.__setattr__(stale, "first", first)
            return super().transition(point, tuning, stale, value_and_grad)

    return _like(method, Wrong)


def _like(method: Sampler, kind: Any) -> Sampler:
    wrong: Sampler = kind(**{entry.name: getattr(method, entry.name) for entry in fields(method)})
    return wrong


MUTATIONS: dict[str, Callable[[Sampler], Sampler]] = {
    "no Jacobian": lambda method: with_density(method, NoJacobian),
    "gradient x 1.05": lambda method: with_density(method, SteepGradient),
    "no refreshment": without_refreshment,
}
