"""Preconditioned SGLD: Langevin dynamics behind an RMSprop preconditioner (Li, Chen, Carlson & Carin, 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.kernel import ValueAndGrad
from bayesdl.infer.sgld import SGLD
from bayesdl.infer.stochastic_engine import Turn

Correction = Literal["frozen", "gamma", "none"]
CORRECTIONS = get_args(Correction)


def preconditioner(square: Tensor, damping: float) -> Tensor:
    """``G = 1 / (damping + sqrt(square))``, elementwise."""
    return square.sqrt().add_(damping).reciprocal_()


def psgld_step(
    z: Tensor, gradient: Tensor, noise: Tensor, step_size: float, precondition: Tensor, gamma: Tensor | None = None
) -> Tensor:
    """``z + step_size/2 (G gradient + Gamma) + sqrt(step_size G) noise``.

    Args:
        z: ``[C, D]``.
        gradient: ``[C, D]`` of the log density.
        noise: ``[C, D]`` with mean 0 and variance 1.
        step_size: in units of z squared, where G is 1.
        precondition: the diagonal G, ``[C, D]``.
        gamma: ``Gamma_i = dG_i/dz_i``, or None to leave it out.
    """
    drift = gradient * precondition if gamma is None else torch.addcmul(gamma, gradient, precondition)
    return torch.add(z, drift, alpha=0.5 * step_size).addcmul_(noise, precondition.sqrt(), value=math.sqrt(step_size))


def correction_term(gradient: Tensor, curvature: Tensor, square: Tensor, damping: float, decay: float) -> Tensor:
    """``Gamma_i = dG_i/dz_i`` where ``square_i = decay * (the past) + (1 - decay) gradient_i^2``.

    ``Gamma_i = -(1 - decay) gradient_i H_ii / (sqrt(square_i) (damping + sqrt(square_i))^2)``, H the log density's
    Hessian. It is of order 1 - decay, which is why Li et al. leave it out.

    Args:
        gradient: ``[C, D]``.
        curvature: the diagonal H_ii, or an unbiased estimate of it, ``[C, D]``.
        square: ``[C, D]``, the present gradient included.
        damping: as in ``preconditioner``.
        decay: of the running mean.
    """
    root = square.sqrt()
    slope = gradient * curvature * (decay - 1.0)
    return torch.where(root > 0, slope / (root * (root + damping).square()), torch.zeros_like(root))


def hessian_diagonal(z: Tensor, density: ValueAndGrad, signs: Tensor) -> Tensor:
    """Unbiased estimate of H_ii at ``z [C, D]``: ``signs * (H signs)``, by a central difference of two gradients.

    Exact where the Hessian is diagonal (Hutchinson's estimator; Bekas, Kokiopoulou & Saad, 2007).
    """
    width = torch.finfo(z.dtype).eps ** (1 / 3)
    ahead, behind = (density(z + sign * width * signs)[1] for sign in (1.0, -1.0))
    return signs * (ahead - behind) / (2.0 * width)


@dataclass(frozen=True)
class PSGLD(SGLD):
    """SGLD with steps that are larger where gradients are small.

    With ``square`` a running mean of squared gradients (in units of the prior's sd) and ``G = 1 / (damping +
    sqrt(square))``, a step is ``z + step_size/2 (G gradient + Gamma) + sqrt(step_size G) noise``. A G that moves with z
    changes the stationary law unless ``Gamma_i = dG_i/dz_i`` is added: in one dimension, with ``decay=0`` and without
    Gamma, it is p/G instead of p. What is done about that:

    - "frozen": G learns during warm-up only; then it is constant, Gamma is zero, and nothing is to be corrected.
    - "gamma": G goes on learning, and Gamma is added (Hutchinson's estimate of the Hessian's diagonal: two further
      gradients a step). It is exact to first order in the step for ``decay=0``; the dependence of G on earlier
      gradients is left out, as in the paper.
    - "none": G goes on learning, without Gamma: the paper's algorithm 1.

    Step sizes are in units of the prior's variance where G is 1. ``step_size=None`` is SGLD's default with the
    curvature and the gradient noise behind G.

    Args:
        decay: of the running mean.
        damping: added to the root; with 1 no direction moves further in a step than SGLD would let it.
        correction: as said.
    """

    name: ClassVar[str] = "PSGLD"

    decay: float = 0.99
    damping: float = 1.0
    correction: Correction = "frozen"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.positive(self.name, damping=self.damping)
        if self.decay != 0:
            check.fraction(self.name, decay=self.decay)
        check.one_of(self.name, CORRECTIONS, correction=self.correction)

    def begin(self, z: Tensor, noise: Callable[[], Tensor], gradient: Callable[[], Tensor]) -> State:
        """The first squared gradient."""
        return {"square": gradient().square()}

    def scale(self, state: State) -> Tensor:
        """``sqrt(G)``."""
        return preconditioner(state["square"], self.damping).sqrt_()

    def move(self, state: State, turn: Turn) -> State:
        """One step; the running mean takes up the gradient first, unless it is frozen."""
        square, gamma = state["square"], None
        if turn.warmth < 1.0 or self.correction != "frozen":
            square = (square * self.decay).addcmul_(turn.gradient, turn.gradient, value=1.0 - self.decay)
        if self.correction == "gamma":
            z = state["z"]
            signs = torch.randint(2, z.shape, generator=state["probe"], device=z.device).to(z.dtype).mul_(2.0).sub_(1.0)
            curvature = hessian_diagonal(z, turn.density, signs)
            gamma = correction_term(turn.gradient, curvature, square, self.damping, self.decay)
        precondition = preconditioner(square, self.damping)
        return {
            "z": psgld_step(state["z"], turn.gradient, turn.noise(), turn.step_size, precondition, gamma),
            "square": square,
        }
