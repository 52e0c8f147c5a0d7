"""IVON: mean-field variational inference by natural gradients, the variational online Newton method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.gaussian_families import MeanField
from bayesdl.infer.gaussian_vi import GaussianVI
from bayesdl.infer.row_noise import KINDS
from bayesdl.infer.schedules import Schedule
from bayesdl.infer.variational_engine import GaussianEngine
from bayesdl.posterior.problem import Problem

MOMENTUM = 0.9


@dataclass(frozen=True)
class IVON(GaussianVI):
    r"""Maximises the ELBO over Gaussians with independent coordinates by natural gradients (Shen et al., 2024).

    The settings are those of ``GaussianVI``; the optimum is that of ``MeanFieldVI``. Natural gradients scale a step by
    q's own covariance, so learning rates have no units: 1 is Newton's method. With Pi = 1 / sd^2 and the curvature of
    the negative log density estimated from slopes alone, ``C = -E[slope * e] / sd`` (the reparameterisation trick; no
    second derivatives),

        Pi <- Pi + r (C - Pi) + r^2 (C - Pi)^2 / (2 Pi)        (which stays positive; Lin et al., 2020)
        mean <- mean + learning_rate * sd^2 * (running mean of the slopes)

    The paper's Hessian is (Pi - prior precision) / N, its weight decay prior precision / N, its effective sample size
    N; here all of them follow from the log density. The running mean of the slopes holds those of the prior as well.

    Args:
        learning_rate: of the mean, 1 being Newton's method; a number starts a cosine to zero.
        initial_scale: as in ``GaussianVI``, but smaller: steps are in units of q's variances, and where these are too
            wide at first the mean is thrown far from where the training before had brought it.
        curvature_rate: r, of the precision; small where mini-batches are, 1 minus the paper's beta_2.
    """

    name: ClassVar[str] = "IVON"
    takes_parameters: ClassVar[bool] = False
    estimators: ClassVar[tuple[str, ...]] = (*GaussianVI.estimators, *KINDS)

    learning_rate: float | Schedule = 0.1
    initial_scale: float = 0.01
    curvature_rate: float = 0.02

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.fraction(self.name, curvature_rate=self.curvature_rate)

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = super().applies_to(density)
        if reason is None and not bool(self.where_random(density).all()):
            return f"its steps are scaled by q's variances, and random={self.random!r} leaves points; use MeanFieldVI"
        return reason

    def family(self, density: LogDensity) -> MeanField:
        """Independent coordinates."""
        return MeanField(self.dim(density))

    def engine(self, problem: Problem, seed: int, begin: Callable[[], Tensor]) -> NaturalGradientEngine:
        """See the base class."""
        random = self.where_random(problem.density)
        return NaturalGradientEngine(self, problem, random, self.family(problem.density), seed, begin)


@dataclass
class NaturalGradientEngine(GaussianEngine):
    """The mean-field engine with steps scaled by q's variances.

    State: as its parent's, with momentum ``[D]``, the running mean of the mean's gradient, for the slots.
    """

    method: IVON

    def slots(self, parameters: Tensor) -> State:
        """See the base class."""
        return {"momentum": torch.zeros_like(self.objective.split(parameters)[0])}

    def move(self, state: State, gradient: Tensor) -> State:
        """One natural-gradient update.

        The ELBO's gradient in log sd is 1 - C sd^2, so with u = -r times it the precision is multiplied by
        1 + u + u^2 / 2.
        """
        step = state["step"]
        mean, log_sd = self.objective.split(state["parameters"])
        slope, along = self.objective.split(gradient)
        momentum = state["momentum"].lerp(slope, 1.0 - MOMENTUM)
        change = -self.method.curvature_rate * along
        log_sd = log_sd - 0.5 * torch.log1p(change + 0.5 * change.square())
        rate = self.schedule(step) / (1.0 - MOMENTUM ** (step + 1))
        mean = mean + rate * (2.0 * log_sd).exp() * momentum
        return {"momentum": momentum, "parameters": torch.cat([mean, log_sd])}
