"""A smooth function of a few hyperparameters, maximised by BFGS one resumable step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Engine

SUFFICIENT = 1e-4  # Armijo's constant: the part of the predicted increase that a step must reach
_OWN = {"z", "value", "gradient", "inverse", "fresh", "stopped", "converged", "step", "gradients"}  # else: warm start
LONGEST = 2.0  # largest change of a coordinate z in one step, in units of 1 + |z|; many are logarithms of scales


class Objective(Protocol):
    """What is maximised."""

    def start(self) -> Tensor:
        """Where to begin, ``[P]`` float64."""
        ...

    def evaluate(self, z: Tensor, warm: Mapping[str, Tensor]) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Value, gradient ``[P]``, and what helps the next evaluation nearby; -inf where the function is undefined."""
        ...


class Maximise(Engine):
    """BFGS with backtracking (Nocedal and Wright, 2006, algorithm 6.1; the first scaling is their eq. 6.20).

    It stops when the predicted increase ``g^T H g / 2`` falls below ``tolerance``, or no step increases the function.
    The state holds all of it: the point, its value and gradient, the inverse Hessian ``[P, P]`` and the objective's own
    warm start.
    """

    def __init__(self, objective: Objective, total: int, tolerance: float = 1e-4) -> None:
        self.objective, self.total, self.tolerance, self.label = objective, total, tolerance, "hyperparameters"

    def init(self) -> State:
        """Evaluate the starting point.

        Raises:
            Divergence: the function is not finite there.
        """
        z = self.objective.start()
        value, gradient, warm = self.objective.evaluate(z, {})
        if not (value > -torch.inf and torch.isfinite(gradient).all()):
            raise Divergence(
                f"The log evidence is {value} at the kernel's initial hyperparameters. If the kernel is a covariance "
                "function, scale the inputs, begin at other hyperparameters, or give a larger noise."
            )
        inverse = torch.eye(len(z), dtype=z.dtype) / gradient.norm().clamp(min=1)
        return {**_state(z, value, gradient, inverse, fresh=True), **warm}

    def done(self, state: State) -> bool:
        """Whether the function cannot be increased any more, or all steps are taken."""
        return bool(state["stopped"]) or bool(state["step"] >= self.total)

    def status(self, state: State) -> str:
        """The function's value."""
        return f"log evidence {state['value']:.2f}"

    def step(self, state: State) -> State:
        """One line search and one update of the inverse Hessian."""
        z, gradient, inverse = state["z"], state["gradient"], state["inverse"]
        warm = {name: value for name, value in state.items() if name not in _OWN}
        direction = inverse @ gradient
        slope = float(gradient @ direction)
        if slope / 2 < self.tolerance:
            return {**state, "stopped": True, "converged": True}
        length = min(1.0, LONGEST / float((direction.abs() / (1 + z.abs())).max()))
        for _ in range(30):
            step = length * direction
            value, new_gradient, new_warm = self.objective.evaluate(z + step, warm)
            if value >= state["value"] + SUFFICIENT * length * slope and bool(torch.isfinite(new_gradient).all()):
                break
            length /= 2
        else:
            # Near the maximum it is the rounding of the value that hides the last increase.
            return {**state, "stopped": True, "converged": slope / 2 < 100 * self.tolerance}
        bend = gradient - new_gradient  # positive curvature of a maximum: step . bend > 0
        inverse, fresh = _update(inverse, step, bend, state["fresh"])
        return {**_state(z + step, value, new_gradient, inverse, fresh), **new_warm}


def _state(z: Tensor, value: float, gradient: Tensor, inverse: Tensor, fresh: bool) -> State:
    flags = {"fresh": fresh, "stopped": False, "converged": False}
    return {"z": z, "value": value, "gradient": gradient, "inverse": inverse, **flags}


def _update(inverse: Tensor, step: Tensor, bend: Tensor, fresh: bool) -> tuple[Tensor, bool]:
    """Return the BFGS update, or the matrix as it is where the function is not concave along the step."""
    curvature = step @ bend
    if curvature <= 1e-10 * step.norm() * bend.norm():
        return inverse, fresh
    eye = torch.eye(len(step), dtype=step.dtype)
    if fresh:
        inverse = eye * (curvature / bend.square().sum())
    left = eye - torch.outer(step, bend) / curvature
    return left @ inverse @ left.T + torch.outer(step, step) / curvature, False
