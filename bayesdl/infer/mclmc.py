"""Microcanonical Langevin Monte Carlo (Robnik et al., 2023), without and with an accept step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.infer import method as check
from bayesdl.infer.adaptation import Adaptation
from bayesdl.infer.checkpoint import State
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hamiltonian import MAX_ENERGY_ERROR, acceptance
from bayesdl.infer.hmc import MAX_LEAPFROGS
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad, choose, column
from bayesdl.infer.mclmc_adaptation import MicrocanonicalAdaptation, UnadjustedAdaptation, first_length
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Work
from bayesdl.infer.microcanonical import COEFFICIENTS, GRADIENTS, Integrator, IsokineticStep, LangevinStep, unit
from bayesdl.infer.sampler import TunedSampler
from bayesdl.infer.target import advance
from bayesdl.posterior.problem import Problem

DRAWN = 0.5
"""Part of the decoherence length between two draws without an accept step: nothing is refused, so a path may be looked
at as often as is worth it. Twice per length is worth 10 to 30% in effective draws over once; more adds little."""


def adjusted_transition(
    start: Point,
    direction: Tensor,
    step: Floats,
    steps: Floats,
    uniform: Floats,
    value_and_grad: ValueAndGrad,
    integrator: Integrator,
) -> tuple[Point, Statistics]:
    """Move every chain along one trajectory and accept its end with probability ``min(1, exp(-energy change))``.

    A rejected chain stays, and its old state counts once more. An end whose energy is not finite is rejected.

    Args:
        start: where the chains stand, ``C`` chains of dimension ``D``.
        direction: ``[C, D]`` fresh unit vectors.
        step: ``[C]`` step sizes.
        steps: ``[C]`` steps of the trajectories; a chain that has fewer than others waits at its end.
        uniform: ``[C]`` draws from U(0, 1), for the decision.
        value_and_grad: the log density.
        integrator: of the isokinetic dynamics.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the probability), ``energy_change`` (of the whole
        trajectory), ``divergent``, ``leapfrogs`` (gradients), ``log_density``.
    """
    u, grad, full, move = start.z, start.grad, column(step, start.z), IsokineticStep(integrator)
    work = torch.zeros_like(grad[:, 0])
    together = steps.min()
    for done in range(int(steps.max())):
        sizes = full if done < together else full * column(steps > done, full)
        u, direction, value, grad, more = advance(move, value_and_grad, u, direction, grad, sizes)
        work = work + more
    ends = torch.stack([work, value]).double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        change = ends[0] - (ends[1] - start.value.numpy())
        probability = acceptance(-change)
        divergent = ~(change <= MAX_ENERGY_ERROR)
    point = choose(uniform < probability, Point(u, torch.from_numpy(ends[1]), grad), start)
    return point, {
        "acceptance": probability,
        "energy_change": np.where(np.isnan(change), np.inf, change),
        "divergent": divergent.astype(np.float64),
        "leapfrogs": steps * GRADIENTS[integrator],
        "log_density": point.value.numpy(),
    }


def unadjusted_transition(
    start: Point, tuning: Tuning, steps: Floats, noise: Noise, value_and_grad: ValueAndGrad, integrator: Integrator
) -> tuple[Point, Statistics]:
    """Move every chain by some steps of microcanonical Langevin dynamics (see ``LangevinStep``).

    Args:
        start: where the chains stand and where they are heading.
        tuning: step size and decoherence length.
        steps: ``[C]`` steps.
        noise: for the refreshments, of a stream of this transition's own.
        value_and_grad: the log density.
        integrator: of the isokinetic dynamics.

    Returns:
        The new ``Point`` and, each ``[C]``: ``acceptance`` (the fraction of the steps that was not undone),
        ``energy_change`` (root of the mean square over the steps), ``divergent`` (steps undone), ``leapfrogs``,
        ``log_density``.
    """
    u, value, grad, direction = start.z, start.value.to(start.grad), start.grad, start.momentum
    if direction is None:
        raise AssertionError("the chains are heading nowhere")
    full, length, move = column(tuning.step, u), column(tuning.length, u), LangevinStep(integrator)
    squares, undone = torch.zeros_like(value), torch.zeros_like(value)
    together = steps.min()
    for done in range(int(steps.max())):
        sizes = full if done < together else full * column(steps > done, full)
        u, direction, value, grad, squares, undone = advance(
            move, value_and_grad, u, direction, value, grad, squares, undone, sizes, length, noise.normal()
        )
    told = torch.stack([squares, undone, value]).double().cpu().numpy()
    return Point(u, torch.from_numpy(told[2]), grad, direction), {
        "acceptance": 1.0 - told[1] / steps,
        "energy_change": np.sqrt(told[0] / steps),
        "divergent": told[1],
        "leapfrogs": steps * GRADIENTS[integrator],
        "log_density": told[2],
    }


@dataclass(frozen=True)
class MCLMC(TunedSampler):
    """Microcanonical Langevin Monte Carlo: dynamics at constant speed whose direction the gradient turns.

    Step sizes and lengths are times in units of posterior standard deviations, as in ``HMC``; the authors' step size is
    sqrt(D) times as large.

    ``adjusted=True`` (MAMS): trajectories of random length from a fresh direction, each accepted or refused at its
    end; exact up to Monte-Carlo error. The length of a trajectory is drawn from U(1 - jitter, 1 + jitter) times the
    mean length, the same for all chains.

    ``adjusted=False``: no accept step. The chains keep their directions and forget them within ``length``; the step
    size is the one at which the variance of the energy change per step and dimension is ``energy_variance``. The draws
    are **biased** by an amount that shrinks with the square of the step and does not show in R-hat; there is no bound
    on it. At the authors' 5e-4 the variances of a standard Gaussian come out 2% too small (3.5% too large with the
    leapfrog). On a network of 600 weights the gain over the accept step was a factor of 1.5 in effective size per
    gradient. A draw is taken twice per ``length``.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy_change (adjusted: the error of the energy along the
    trajectory; unadjusted: root mean square error of its steps), divergent, leapfrogs (gradients), log_density,
    step_size.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: of the integrator, or None to adapt it.
        target_accept: mean acceptance probability that the step size is adapted to, if adjusted.
        metric: "diag", "dense" or "low_rank".
        adjusted: whether trajectories are accepted or refused.
        length: mean length of the trajectories, or the time in which directions decohere; None to adapt it.
        energy_variance: what the step size is adapted to, if not adjusted.
        jitter: of the trajectories' length, if adjusted.
        integrator: "minimal_norm" (two gradients a step) or "leapfrog"; None is the latter if adjusted, else the
            former, which at the same ``energy_variance`` costs as much and has the smaller bias.
    """

    name: ClassVar[str] = "MCLMC"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "energy_change", "divergent", "leapfrogs", "log_density")

    warmup: int = 500
    draws: int = 500
    target_accept: float = 0.9
    adjusted: bool = True
    length: float | None = None
    energy_variance: float = 5e-4
    jitter: float = 1.0
    integrator: Integrator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.one_of(self.name, (None, *COEFFICIENTS), integrator=self.integrator)
        check.positive(self.name, energy_variance=self.energy_variance)
        if self.length is not None:
            check.positive(self.name, length=self.length)
        if not 0 <= self.jitter <= 1:
            raise check.MethodError(f"{self.name}(jitter={self.jitter!r}): jitter must be from 0 to 1.")

    @property
    def splitting(self) -> Integrator:
        """The integrator, by default the one that suits."""
        return self.integrator or ("leapfrog" if self.adjusted else "minimal_norm")

    def applies_to(self, density: LogDensity) -> str | None:
        """It needs room to turn."""
        if density.dim < 2:
            return "with a single unknown there is no direction that could turn; use NUTS"
        return super().applies_to(density)

    def adaptation(self) -> Adaptation | None:
        """Of step size, metric and length, unless the step size is given."""
        if self.step_size is not None:
            return None
        if self.adjusted:
            return MicrocanonicalAdaptation(self.warmup, self.target_accept, self.metric, self.length)
        return UnadjustedAdaptation(self.warmup, 0.0, self.metric, self.length, self.energy_variance)

    def start(self, state: State, engine: MarkovEngine) -> State:
        """The given step size and length; directions, for chains that keep them."""
        length = self.length or first_length(engine.density)
        new = super().start(state, engine) | {"length": torch.full_like(state["length"], length)}
        return new if self.adjusted else new | {"momentum": unit(engine.noise(state).normal())}

    def work(self, problem: Problem) -> Work:
        """Gradients, as many as step size and length will ask for."""
        each, note = ASSUMED_LEAPFROGS, f"if a transition takes {ASSUMED_LEAPFROGS} gradients"
        if self.step_size is not None:
            given = Tuning(np.array([self.step_size]), np.array([self.length or first_length(problem.density)]))
            part = 1.0 if self.adjusted else DRAWN
            each, note = int(self.steps(given, part)[0]) * GRADIENTS[self.splitting], ""
        return Work(self.chains, each * (self.warmup + self.draws * self.thin), self.chains * self.draws, note)

    def steps(self, tuning: Tuning, part: float = 1.0) -> Floats:
        """Steps of a transition through a part of the length, ``[C]``."""
        most = MAX_LEAPFROGS // GRADIENTS[self.splitting]
        return np.clip(np.round(tuning.length * part / tuning.step), 1.0, most)

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One trajectory, or one decoherence length, of every chain."""
        if not self.adjusted:
            return unadjusted_transition(
                point, tuning, self.steps(tuning, DRAWN), noise.branch(), value_and_grad, self.splitting
            )
        steps = self.steps(tuning, 1.0 + self.jitter * (2.0 * noise.shared() - 1.0))
        return adjusted_transition(
            point, unit(noise.normal()), tuning.step, steps, noise.uniform(1)[0], value_and_grad, self.splitting
        )
