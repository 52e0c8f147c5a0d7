"""Elliptical slice sampling (Murray, Adams & MacKay, 2010)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.infer.checkpoint import State
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad, choose, column
from bayesdl.infer.method import Work
from bayesdl.infer.metric import Metric
from bayesdl.infer.sampler import Sampler
from bayesdl.infer.target import advance, value_at
from bayesdl.posterior.problem import Problem

MAX_SHRINKS = 200
"""Times that a bracket is shrunk at most; by then its angles are those of the present state to rounding."""


def elliptical_slice_transition(
    start: Point, direction: Tensor, threshold: Floats, noise: Noise, value_and_grad: ValueAndGrad
) -> tuple[Point, Statistics]:
    """Move every chain along an ellipse on which its prior N(0, I) is constant.

    The ellipse ``u cos(a) + direction sin(a)`` runs through the present state u at a = 0. An angle is drawn uniformly
    from a bracket, at first the whole circle, and taken if the likelihood there exceeds ``threshold`` times that of
    the present state; else the bracket is shrunk to the angle on its side of 0 and another is drawn (figure 2 of the
    paper). The chains shrink side by side: one that has arrived waits for the others.

    With whitened coordinates whose prior is standard normal, the log likelihood is ``log density + |u|^2 / 2``.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        direction: ``[C, D]`` standard normal draws.
        threshold: ``[C]`` draws from U(0, 1).
        noise: uniforms for the angles, in a stream of its own.
        value_and_grad: the log density; called until all chains have arrived.

    Returns:
        The new ``Point`` and, each ``[C]``: ``evaluations`` (angles tried), ``log_density``.
    """
    level = log_likelihood(start) + np.log(threshold)
    point = start
    evaluations = np.zeros(len(level))
    waiting = np.ones(len(level), dtype=bool)
    angle = 2.0 * math.pi * noise.uniform(1)[0]
    low, high = angle - 2.0 * math.pi, angle
    for _ in range(MAX_SHRINKS):
        cos, sin = column(np.cos(angle), start.z), column(np.sin(angle), start.z)
        moved = start.z * cos + direction * sin
        (value,) = advance(value_at, value_and_grad, moved)
        proposal = Point(moved, value.double().cpu(), start.grad)
        evaluations += waiting
        arrived = waiting & (log_likelihood(proposal) > level)
        point = choose(arrived, proposal, point)
        waiting &= ~arrived
        if not waiting.any():
            break
        low, high = np.where(angle < 0.0, angle, low), np.where(angle < 0.0, high, angle)
        angle = low + (high - low) * noise.uniform(1)[0]
    return point, {"evaluations": evaluations, "log_density": point.value.numpy()}


def log_likelihood(point: Point) -> Floats:
    """Log density less the standard normal prior's, ``[C]``; a density that is not finite is a likelihood of 0."""
    found = point.value + 0.5 * torch.linalg.vecdot(point.z, point.z).double().cpu()
    likelihood: Floats = found.nan_to_num(nan=-math.inf, posinf=-math.inf).numpy()
    return likelihood


@dataclass(frozen=True)
class EllipticalSlice(Sampler):
    """Slice sampling on ellipses of the prior, for priors that are independent Gaussians over the unknowns.

    Nothing has to be adapted and nothing is rejected: every transition moves. It suits priors that say a lot and
    likelihoods that say little (latent Gaussian models, wide networks with few rows), where its cost does not grow with
    the dimension; where the data determine the unknowns sharply, brackets shrink far and moves are short: use NUTS.

    With temperature T the ellipses are those of the tempered prior N(m, T s^2), so that the target is
    p(theta, y)^(1/T) as with every other sampler.

    The posterior's ``stats``, each ``[C, S]``: evaluations (angles tried), log_density.

    Cost: as many evaluations of all rows a transition as the slowest chain tries angles, usually 3 to 10; where the
    density is compiled, without its gradient.

    Args:
        chains: chains C.
        warmup: transitions per chain that are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
    """

    name: ClassVar[str] = "EllipticalSlice"
    statistics: ClassVar[tuple[str, ...]] = ("evaluations", "log_density")

    def work(self, problem: Problem) -> Work:
        """Some angles a transition."""
        each = 6
        calls = each * (self.warmup + self.draws * self.thin)
        return Work(self.chains, calls, self.chains * self.draws, f"if a transition tries {each} angles")

    def applies_to(self, density: LogDensity) -> str | None:
        """It needs a Gaussian prior."""
        if density.gaussian_prior() is None:
            return (
                "the prior is not an independent Gaussian over all unknowns, on whose ellipses it moves; use NUTS, or "
                "give every latent site a Normal prior with fixed mean and scale"
            )
        return super().applies_to(density)

    def start(self, state: State, engine: MarkovEngine) -> State:
        """Coordinates in which the tempered prior is standard normal."""
        prior = engine.density.gaussian_prior()
        if prior is None:
            raise AssertionError("applies_to has asked for a Gaussian prior")
        mean, sd = (part.expand(engine.groups, -1) for part in prior)
        return engine.change_metric(state, Metric(sd * math.sqrt(self.temperature), centre=mean))

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One ellipse of every chain."""
        direction, branch = noise.normal(), noise.branch()
        return elliptical_slice_transition(point, direction, branch.uniform(1)[0], branch, value_and_grad)
