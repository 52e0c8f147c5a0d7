"""Elementwise first-order optimisers as pure functions: slots in, step and slots out.

``torch.optim`` keeps its state in objects that change in place. These give the same numbers (a test compares them),
leave the old state as it was, as the loop asks, and treat every element alone, so that one ``[M, D]`` buffer holds M
independent members.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Slots = dict[str, Tensor]
Update = Callable[[Tensor, Slots, int], tuple[Tensor, Tensor | None, float, Slots]]
"""Gradient, slots and step to ``top, bottom, factor, slots``: the direction is ``factor * top / bottom``."""


def _adam(gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Tensor | None, float, Slots]:
    """Adam (Kingma & Ba, 2015, algorithm 1) with beta = (0.9, 0.999), eps = 1e-8; bias correction from step 1."""
    first = slots["first"].lerp(gradient, 0.1)
    second = slots["second"].mul(0.999).addcmul_(gradient, gradient, value=0.001)
    # m / (1 - 0.9^t) / (sqrt(v / (1 - 0.999^t)) + eps), the second correction taken out of the root: of large tensors
    # every pass through memory is felt.
    root = math.sqrt(1 - 0.999 ** (step + 1))
    scale = second.sqrt().add_(1e-8 * root)
    return first, scale, root / (1 - 0.9 ** (step + 1)), {"first": first, "second": second}


def _rmsprop(gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Tensor | None, float, Slots]:
    """RMSprop (Tieleman & Hinton, 2012) with decay 0.99, eps = 1e-8 beside the root."""
    second = slots["second"].mul(0.99).addcmul_(gradient, gradient, value=0.01)
    return gradient, second.sqrt().add_(1e-8), 1.0, {"second": second}


def _sgd(gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Tensor | None, float, Slots]:
    """Stochastic gradient descent with heavy-ball momentum 0.9 (Polyak, 1964)."""
    first = slots["first"].mul(0.9).add_(gradient)
    return first, None, 1.0, {"first": first}


OPTIMISERS: dict[str, tuple[Update, tuple[str, ...]]] = {
    "adam": (_adam, ("first", "second")),
    "rmsprop": (_rmsprop, ("second",)),
    "sgd": (_sgd, ("first",)),
}


def slots_like(name: str, z: Tensor) -> Slots:
    """The zero slots of an optimiser for a tensor, under names that belong into the engine's state."""
    return {f"slot.{slot}": z.new_zeros(z.shape) for slot in OPTIMISERS[name][1]}


def update(name: str, gradient: Tensor, state: dict[str, Tensor], step: int) -> tuple[Tensor, Slots]:
    """One update.

    Args:
        name: key of ``OPTIMISERS``.
        gradient: of the loss, any shape.
        state: holds the slots that ``slots_like`` made.
        step: number of updates before this one.

    Returns:
        The direction, to be multiplied by minus the learning rate, and the new slots.
    """
    top, bottom, factor, slots = _parts(name, gradient, state, step)
    return (top if bottom is None else torch.div(top, bottom, out=bottom).mul_(factor)), slots


def descend(
    name: str, z: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rate: float
) -> tuple[Tensor, Slots]:
    """``z`` less ``rate`` times the direction of ``update``, in one pass, and the new slots."""
    top, bottom, factor, slots = _parts(name, gradient, state, step)
    if bottom is None:
        return torch.add(z, top, alpha=-rate * factor), slots
    return torch.addcdiv(z, top, bottom, value=-rate * factor), slots


def _parts(
    name: str, gradient: Tensor, state: dict[str, Tensor], step: int
) -> tuple[Tensor, Tensor | None, float, Slots]:
    function, names = OPTIMISERS[name]
    top, bottom, factor, slots = function(gradient, {slot: state[f"slot.{slot}"] for slot in names}, step)
    return top, bottom, factor, {f"slot.{slot}": value for slot, value in slots.items()}
