"""torch's elementwise optimisers as pure functions: what they remember goes in, the moved tensor and new memory out.

``torch.optim`` changes parameters in place, and the loop keeps the state before a step, to which an interrupt goes
back. Every element is treated alone, so that one ``[M, D]`` buffer holds M independent members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, tensor
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

Slots = dict[str, Tensor]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's defaults


def _adam(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float, times: float) -> None:
    """Adam (Kingma & Ba, 2015, algorithm 1): of large tensors every pass is felt, and fused it takes one."""
    taken = [tensor(float(step), device=z.device)]
    settings = {"beta1": BETA1, "beta2": BETA2, "eps": EPS * times, "weight_decay": 0.0, "amsgrad": False}
    moments = [slots["first"]], [slots["second"]]
    adam([z], [gradient], *moments, [], taken, fused=True, maximize=True, lr=rate, **settings)  # type: ignore[arg-type]


def _rmsprop(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float, times: float) -> None:
    """RMSprop (Tieleman & Hinton, 2012)."""
    settings = {"alpha": 0.99, "eps": EPS * times, "weight_decay": 0.0, "momentum": 0.0, "centered": False}
    taken = [tensor(float(step), device=z.device)]
    moments = [slots["second"]]
    rmsprop([z], [gradient], moments, [], [], taken, foreach=False, maximize=True, lr=rate, **settings)  # type: ignore[arg-type]


def _sgd(z: Tensor, gradient: Tensor, slots: Slots, step: int, rate: float, times: float) -> None:
    """Stochastic gradient ascent with heavy-ball momentum (Polyak, 1964)."""
    settings = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    sgd([z], [gradient], [slots["first"]], fused=True, maximize=True, lr=rate / times, **settings)  # type: ignore[arg-type]


OPTIMISERS: dict[str, tuple[Callable[[Tensor, Tensor, Slots, int, float, float], None], tuple[str, ...]]] = {
    "adam": (_adam, ("first", "second")),
    "rmsprop": (_rmsprop, ("second",)),
    "sgd": (_sgd, ("first",)),
}


@dataclass(frozen=True)
class AdamStep:
    """Adam together with the gradient it takes, for ``LogDensity.fused``: compiled, one pass over the memory is left.

    Attributes:
        times: as in ``ascend``.
    """

    times: float

    @staticmethod
    def settings(z: Tensor, step: int, rate: float) -> Tensor:
        """The numbers ``[2]`` that change from step to step: the rate, and the second moment's correction."""
        return z.new_tensor([rate / (1 - BETA1 ** (step + 1)), (1 - BETA2 ** (step + 1)) ** -0.5])

    def __call__(
        self,
        z: Tensor,
        first: Tensor,
        second: Tensor,
        settings: Tensor,
        value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Value, sum of the gradient, and z and moments after an update uphill."""
        value, gradient = value_and_grad(z)
        first = first.lerp(gradient, 1 - BETA1)
        second = second.lerp(gradient.square(), 1 - BETA2)
        z = z + settings[0] * first / (second.sqrt() * settings[1] + EPS * self.times)
        return value, gradient.sum(1), z, first, second


def slots_like(name: str, z: Tensor) -> Slots:
    """The zero slots of an optimiser for a tensor, under names that belong into the engine's state."""
    return {f"slot.{slot}": z.new_zeros(z.shape) for slot in OPTIMISERS[name][1]}


def ascend(
    name: str,
    z: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    step: int,
    rate: float,
    times: float = 1.0,
) -> tuple[Tensor, Slots]:
    """One update uphill.

    Args:
        name: key of ``OPTIMISERS``.
        z: where to start, any shape; stays as it is.
        gradient: of so many ``times`` what rises, of the same shape. A log density of N rows gives that of N times its
            mean, and dividing a large tensor first would take a pass of its own.
        state: holds the slots that ``slots_like`` made; they stay as they are.
        step: number of updates before this one.
        rate: the learning rate.
        times: see ``gradient``; positive.

    Returns:
        The moved tensor, and the new slots.
    """
    function, names = OPTIMISERS[name]
    new, slots = z.clone(), {slot: state[f"slot.{slot}"].clone() for slot in names}
    function(new, gradient.contiguous(), slots, step, rate, times)
    return new, {f"slot.{slot}": value for slot, value in slots.items()}
