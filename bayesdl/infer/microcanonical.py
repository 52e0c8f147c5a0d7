"""Isokinetic dynamics of all chains at once: kicks that turn, drifts that go straight, and their energy.

Momenta of fixed length leave a direction n on the unit sphere, and microcanonical dynamics (Robnik, De Luca,
Silverstein & Seljak, 2023, "Microcanonical Hamiltonian Monte Carlo") in whitened coordinates are

    du/dt = sqrt(D) n,        dn/dt = (1 - n n^T) grad log pi(u) sqrt(D) / (D - 1).

Their authors move at speed 1. Here it is sqrt(D), the length of a usual momentum of HMC in D dimensions, so that step
sizes and trajectory lengths mean what they mean there: times in units of posterior standard deviations.

The flow contracts the sphere; the energy ``log pi`` loses what ``work`` counts, and exp(-work) is the Jacobian
determinant of a kick. So ``change = work - (change of log pi)`` is the error of the energy in a step, and
``min(1, exp(-change))`` the Metropolis probability of a trajectory (Robnik, Cohn-Gordon & Seljak, 2025,
"Metropolis adjusted microcanonical Hamiltonian Monte Carlo", section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR
from bayesdl.infer.kernel import ValueAndGrad

Integrator = Literal["minimal_norm", "leapfrog"]
COEFFICIENTS: dict[Integrator, tuple[float, ...]] = {"leapfrog": (0.5,), "minimal_norm": (0.1931833275037836, 0.5)}
"""First half of the splitting: the outer kick, and the drift between it and an inner kick, if there is one."""
GRADIENTS: dict[Integrator, int] = {"leapfrog": 1, "minimal_norm": 2}
"""Gradients per step."""


def unit(vectors: Tensor) -> Tensor:
    """Directions ``[C, D]`` of vectors that are not 0."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths


def kick(direction: Tensor, grad: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Turn directions towards the gradient: the flow of dn/dt above at a fixed place, solved exactly.

    With e the gradient's direction, c = n . e and the angle d = time sqrt(D) |grad| / (D - 1),

        n' = (n + (sinh d + c (cosh d - 1)) e) / (cosh d + c sinh d),   work = (D - 1) log(cosh d + c sinh d)

    (Robnik et al., 2023, section 3), written in exp(-d), which cannot overflow.

    Args:
        direction: ``[C, D]`` unit vectors, D at least 2.
        grad: ``[C, D]``.
        time: ``[C, 1]``, not negative.

    Returns:
        The new directions, and the work ``[C]``.
    """
    dim = direction.shape[1]
    size = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    toward = grad / size.clamp(min=torch.finfo(size.dtype).tiny)
    angle = time * size * (math.sqrt(dim) / (dim - 1))
    cosine = torch.linalg.vecdot(direction, toward)[:, None]
    gone = -torch.expm1(-angle)
    turned = unit(gone * (2.0 - gone + cosine * gone) * toward + 2.0 * (1.0 - gone) * direction)
    work = angle + torch.log1p(0.5 * (1.0 - cosine) * torch.expm1(-2.0 * angle))
    return turned, (dim - 1) * work[:, 0]


@dataclass(frozen=True)
class IsokineticStep:
    """One step of a symmetric splitting into kicks and drifts.

    "leapfrog" is kick 1/2, drift 1, kick 1/2; "minimal_norm" is kick b, drift 1/2, kick 1 - 2b, drift 1/2, kick b with
    b = 0.193 (McLachlan, 1995; Omelyan, Mryglod & Folk, 2003), whose error is about a tenth, for two gradients.

    Attributes:
        integrator: which splitting.
    """

    integrator: Integrator

    def __call__(
        self, u: Tensor, direction: Tensor, grad: Tensor, step: Tensor, value_and_grad: ValueAndGrad
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take the step.

        Args:
            u: ``[C, D]`` positions.
            direction: ``[C, D]`` unit vectors.
            grad: ``[C, D]`` gradient at ``u``.
            step: ``[C, 1]`` step sizes; 0 stands still.
            value_and_grad: the log density of all chains.

        Returns:
            ``(u, direction, value [C], grad, work [C])`` after the step. It is undone, up to rounding, by a step from
            there in the opposite direction.
        """
        outer, *inner = COEFFICIENTS[self.integrator]
        speed = step * math.sqrt(u.shape[1])
        direction, work = kick(direction, grad, outer * step)
        for drift in inner:
            u = torch.addcmul(u, speed, direction, value=drift)
            _, grad = value_and_grad(u)
            direction, more = kick(direction, grad, (1.0 - 2.0 * outer) * step)
            work = work + more
        u = torch.addcmul(u, speed, direction, value=inner[0] if inner else 1.0)
        value, grad = value_and_grad(u)
        direction, more = kick(direction, grad, outer * step)
        return u, direction, value, grad, work + more


@dataclass(frozen=True)
class LangevinStep:
    """An isokinetic step after which a part of the direction is forgotten.

    Nothing is accepted or refused, but a step whose energy changes by more than ``MAX_ENERGY_ERROR``, or is not finite,
    is undone, and its chain goes on in a direction drawn anew.

    Attributes:
        integrator: of the isokinetic step.
    """

    integrator: Integrator

    def __call__(
        self,
        u: Tensor,
        direction: Tensor,
        value: Tensor,
        grad: Tensor,
        squares: Tensor,
        undone: Tensor,
        step: Tensor,
        length: Tensor,
        normal: Tensor,
        value_and_grad: ValueAndGrad,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Take the step.

        Args:
            u: ``[C, D]`` positions.
            direction: ``[C, D]`` unit vectors.
            value: ``[C]`` log density at ``u``.
            grad: ``[C, D]`` its gradient.
            squares: ``[C]`` sum of the squared changes of the energy in the steps so far.
            undone: ``[C]`` how many of them were undone.
            step: ``[C, 1]`` step sizes; a chain with 0 stays as it is.
            length: ``[C, 1]`` time in which directions decohere.
            normal: ``[C, D]`` standard normal draws.
            value_and_grad: the log density of all chains.

        Returns:
            ``(u, direction, value, grad, squares, undone)`` after the step.
        """
        new_u, turned, new_value, new_grad, work = IsokineticStep(self.integrator)(
            u, direction, grad, step, value_and_grad
        )
        change = work - (new_value - value)
        good = change.abs() <= MAX_ENERGY_ERROR
        kept = good[:, None]
        return (
            torch.where(kept, new_u, u),
            torch.where(kept, refresh(turned, normal, step, length), unit(normal)),
            torch.where(good, new_value, value),
            torch.where(kept, new_grad, grad),
            squares + torch.where(good, change, MAX_ENERGY_ERROR).square(),
            undone + (~good).to(undone),
        )


def refresh(direction: Tensor, normal: Tensor, time: Tensor, length: Tensor) -> Tensor:
    """Forget a part of the directions: ``n' = (n + nu z) / |n + nu z|`` with z ~ N(0, I).

    With ``nu^2 = (exp(2 time / length) - 1) / D`` the correlation of old and new is about exp(-time / length) in many
    dimensions (Robnik & Seljak, 2024, "Fluctuation without dissipation: microcanonical Langevin Monte Carlo", eq. 17).

    Args:
        direction: ``[C, D]`` unit vectors.
        normal: ``[C, D]`` standard normal draws.
        time: ``[C, 1]`` how long to forget.
        length: ``[C, 1]`` time in which directions decohere.
    """
    size = (torch.expm1(2.0 * time / length) / direction.shape[1]).sqrt()
    return unit(torch.addcmul(direction, size, normal))
