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
Update = Callable[[Tensor, Tensor, Slots, int, float], tuple[Tensor, Slots]]

# Of large tensors every pass through memory and every new one is felt: as few of both as there can be.


def _adam(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float) -> tuple[Tensor, Slots]:
    """Adam (Kingma & Ba, 2015, algorithm 1) with beta = (0.9, 0.999), eps = 1e-8; bias correction from step 1."""
    first = slots["first"].lerp(gradient, 0.1)
    second = slots["second"].mul(0.999).addcmul_(gradient, gradient, value=0.001)
    # m / (1 - 0.9^t) / (sqrt(v / (1 - 0.999^t)) + eps), the second bias correction taken out of the root.
    root = math.sqrt(1 - 0.999 ** (step + 1))
    scale = second.sqrt().add_(1e-8 * root)
    return torch.addcdiv(z, first, scale, value=-rate * root / (1 - 0.9 ** (step + 1))), {
        "first": first,
        "second": second,
    }


def _rmsprop(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float) -> tuple[Tensor, Slots]:
    """RMSprop (Tieleman & Hinton, 2012) with decay 0.99, eps = 1e-8 beside the root."""
    second = slots["second"].mul(0.99).addcmul_(gradient, gradient, value=0.01)
    return torch.addcdiv(z, gradient, second.sqrt().add_(1e-8), value=-rate), {"second": second}


def _sgd(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float) -> tuple[Tensor, Slots]:
    """Stochastic gradient descent with heavy-ball momentum 0.9 (Polyak, 1964)."""
    first = slots["first"].mul(0.9).add_(gradient)
    return torch.add(z, first, alpha=-rate), {"first": first}


OPTIMISERS: dict[str, tuple[Update, tuple[str, ...]]] = {
    "adam": (_adam, ("first", "second")),
    "rmsprop": (_rmsprop, ("second",)),
    "sgd": (_sgd, ("first",)),
}


def slots_like(name: str, z: Tensor) -> Slots:
    """The zero slots of an optimiser for a tensor, under names that belong into the engine's state."""
    return {f"slot.{slot}": z.new_zeros(z.shape) for slot in OPTIMISERS[name][1]}


def update(
    name: str, z: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rate: float
) -> tuple[Tensor, Slots]:
    """One update.

    Args:
        name: key of ``OPTIMISERS``.
        z: what is optimised, any shape.
        gradient: of the loss, of the same shape.
        state: holds the slots that ``slots_like`` made.
        step: number of updates before this one.
        rate: the learning rate.

    Returns:
        The new z, and the new slots.
    """
    function, names = OPTIMISERS[name]
    moved, slots = function(z, gradient, {slot: state[f"slot.{slot}"] for slot in names}, step, rate)
    return moved, {f"slot.{slot}": value for slot, value in slots.items()}
