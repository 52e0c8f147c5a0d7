r"""How fast gradient descent, heavy ball and Nesterov's method are, on quadratics exactly.

On ``l(w) = (w - w*)^T A (w - w*) / 2`` every eigendirection of A is a recursion of its own, with curvature c, step size
eta and momentum rho:

    gradient descent:  e' = (1 - eta c) e
    heavy ball:        e' = (1 + rho - eta c) e - rho e_before                  (Polyak, 1964)
    Nesterov:          e' = (1 - eta c) ((1 + rho) e - rho e_before)            (Nesterov, 1983)

Elsewhere these are local rates; what holds globally is less. Gradient descent keeps its rate on all functions whose
curvature lies between m and L, Nesterov's keeps ``1 - 1/sqrt(kappa)`` for the gap of the loss, and heavy ball may cycle
for ever (Lessard, Recht and Packard, 2016, section 4.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesdl.errors import MethodError

Descent = Literal["gradient", "heavy_ball", "nesterov"]


@dataclass(frozen=True)
class Tuning:
    """Step size and momentum of a method, and the factor by which they shrink the distance a step.

    Attributes:
        step_size: eta.
        momentum: rho.
        rate: the largest spectral radius over curvatures between m and L.
    """

    step_size: float
    momentum: float
    rate: float


def spectral_radius(method: Descent, curvature: float | Tensor, step_size: float, momentum: float = 0.0) -> Tensor:
    """The factor by which a method shrinks a quadratic's error a step, in the long run.

    It converges where the radius is below 1: gradient descent for ``eta c < 2``, heavy ball for
    ``eta c < 2 (1 + rho)``, Nesterov's for ``eta c < (2 + 2 rho) / (1 + 2 rho)``.

    Args:
        method: "gradient", "heavy_ball" or "nesterov".
        curvature: eigenvalues c of the Hessian, ``[...]``.
        step_size: eta.
        momentum: rho, 0 for "gradient".

    Returns:
        ``[...]``.

    Raises:
        MethodError: unknown method, or momentum for gradient descent.
    """
    if method not in get_args(Descent):
        raise MethodError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Descent)))}.")
    if method == "gradient" and momentum:
        raise MethodError("Gradient descent has no momentum: use 'heavy_ball' or 'nesterov'.")
    shrunk = 1 - step_size * torch.as_tensor(curvature, dtype=torch.float64)
    # x^2 - trace x + determinant = 0
    trace = shrunk + momentum if method == "heavy_ball" else shrunk * (1 + momentum)
    determinant = momentum * (torch.ones_like(shrunk) if method == "heavy_ball" else shrunk)
    square = trace.square() / 4 - determinant
    real = trace.abs() / 2 + square.clamp(min=0.0).sqrt()
    return torch.where(square < 0, determinant.clamp(min=0.0).sqrt(), real)


def tuned(method: Descent, m: float, largest: float) -> Tuning:
    """The usual best step size and momentum for curvatures between m > 0 and L, with kappa = L / m.

    - "gradient": ``2 / (m + L)``, rate ``(kappa - 1) / (kappa + 1)``.
    - "heavy_ball": ``4 / (sqrt(L) + sqrt(m))^2`` and momentum the square of its rate,
      ``(sqrt(kappa) - 1) / (sqrt(kappa) + 1)``.
    - "nesterov": ``1 / L``, momentum ``(sqrt(kappa) - 1) / (sqrt(kappa) + 1)``, rate ``1 - 1 / sqrt(kappa)``.

    Args:
        method: see there.
        m: least curvature.
        largest: L.

    Raises:
        MethodError: m and L are not ``0 < m <= L``, or the method is unknown.
    """
    if not 0 < m <= largest < math.inf:
        raise MethodError(f"Curvatures between {m} and {largest}: it must be 0 < m <= L.")
    root = math.sqrt(largest / m)
    step, momentum = 1 / largest, (root - 1) / (root + 1)
    if method == "gradient":
        step, momentum = 2 / (m + largest), 0.0
    elif method == "heavy_ball":
        step, momentum = 4 / (math.sqrt(largest) + math.sqrt(m)) ** 2, momentum**2
    rate = spectral_radius(method, torch.tensor([m, largest]), step, momentum).max()
    return Tuning(step, momentum, float(rate))
