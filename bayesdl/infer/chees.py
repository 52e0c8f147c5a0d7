"""HMC whose trajectory length is learnt across chains (Hoffman, Radul & Sountsov, 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import MethodError
from bayesdl.infer.adaptation import Adaptation, StepAndMetric, windows
from bayesdl.infer.checkpoint import State
from bayesdl.infer.engine import MarkovEngine
from bayesdl.infer.hmc import MAX_LEAPFROGS, decide, trajectory
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Work
from bayesdl.infer.metric import Metric
from bayesdl.infer.sampler import TunedSampler
from bayesdl.posterior.problem import Problem

RATE, MEMORY = 0.05, 0.9
"""Learning rate of the log length, and weight of the past in the magnitude that its slope is measured by."""

WHITENED = 2.25
"""Length from which the ascent goes on when the metric was estimated. In whitened coordinates the mean variance is 1
and the largest no smaller, so that the best length is at least that of a standard normal, 2.25. Where chains have
hardly begun to move in their modes, the ascent would take more of a warm-up than there is to get there."""

PROBES = 64
"""Random directions along which two metrics are compared."""


def van_der_corput(count: int) -> float:
    """Element ``count`` >= 1 of the base-2 van der Corput sequence in (0, 1): its binary digits, mirrored."""
    digits = f"{count:b}"
    return int(digits[::-1], 2) / 2.0 ** len(digits)


def slope(
    start: Tensor, end: Tensor, momentum: Tensor, time: Tensor, accepted: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivative of the ChEES criterion with respect to the log length, ``[G]``, and its magnitude.

    ChEES(t) = E[(|u'(t) - m|^2 - |u - m|^2)^2] / 4 is the expected squared change of the squared distance from the
    mean m; trajectories that run back to where they came from, or to the other side, have none. With ``du'/dt = p'``
    its derivative with respect to log t is, weighted by the probability that u' is accepted (eq. 13 of the paper),

        E[t (|u' - m|^2 - |u - m|^2) (u' - m).p'].

    Args:
        start: ``[G, K, D]`` u, of K chains in every group.
        end: ``[G, K, D]`` u'.
        momentum: ``[G, K, D]`` p'.
        time: ``[G, K]`` t.
        accepted: ``[G, K]`` acceptance probabilities; a chain with 0 has no say, whatever its end.
        centre: ``[G, D]`` m.

    Returns:
        The mean over the chains of a group, and the mean of the absolute values.
    """
    before, after = start - centre[:, None], end - centre[:, None]
    change = after.square().sum(2) - before.square().sum(2)
    each = torch.where(accepted > 0.0, accepted * time * change * torch.linalg.vecdot(after, momentum), 0.0)
    weight = accepted.sum(1).clamp(min=torch.finfo(each.dtype).tiny)
    return each.sum(1) / weight, each.abs().sum(1) / weight


def spread(old: Metric, new: Metric, groups: int) -> Tensor:
    """Standard deviation of the leading directions of N(0, ``new``) in the coordinates of ``old``, ``[G]``.

    With S the covariance of that Gaussian, ``sqrt(tr S^2 / tr S)``: the criterion weighs directions by the squares of
    their variances. Both traces are estimated with random probes.
    """
    dim = new.scale.shape[1]
    probes = torch.randn(groups * PROBES, dim, generator=generator(0, "probes"), dtype=torch.float64).to(new.scale)
    there = old.to_u(new.to_z(probes))
    back = new.pull(old.push(there))
    squares = [rows.double().square().sum(1).reshape(groups, -1).mean(1).cpu() for rows in (back, there)]
    return (squares[0] / squares[1]).sqrt()


@dataclass(frozen=True)
class LengthAdaptation:
    """Stochastic ascent of the ChEES criterion, one step a transition, beside the step size and the metric.

    Entries of the state: length ``[G]``, of the next transition; chees.log_length ``[G, 2]``, the present one and its
    average since the metric was last changed; chees.size ``[G, 2]``, magnitude of the slope and number of
    updates; chees.centre ``[G, D]``, running mean of the unconstrained positions, in which the latest third weighs
    most, so that few chains have a mean to measure distances from, too.

    Args:
        warmup: transitions.
        tuner: of step size and metric; None if they are given.
    """

    warmup: int
    tuner: StepAndMetric | None

    def init(self, state: State, engine: MarkovEngine) -> State:
        """A length of one step."""
        added = {} if self.tuner is None else self.tuner.init(state, engine)
        length = (state | added)["step_size"]
        return added | {
            "length": length.clone(),
            "chees.log_length": length.log()[:, None].repeat(1, 2),
            "chees.size": torch.zeros(len(length), 2, dtype=torch.float64),
            "chees.centre": self.positions(state, engine).mean(1),
        }

    def update(self, state: State, statistics: Statistics, engine: MarkovEngine) -> State:
        """One step of Adam, after which step size and metric are adapted."""
        done = state["step"] + 1
        centre = state["chees.centre"]
        centre = centre + 2.0 / (done + 1.0) * (self.positions(state, engine).mean(1) - centre)
        state["chees.centre"] = centre
        log_length, average = state["chees.log_length"].unbind(1)
        log_length, used = log_length + self.ascent(state, statistics, engine), state["step_size"]
        settled = self.warmup // 2
        if self.tuner is not None:
            before, plan = Metric.of(state), windows(self.warmup)
            state = self.tuner.update(state, statistics, engine)
            settled = max(settled, plan.stop)
            if done in plan.ends:
                # Distances are measured in other units now, and so are times.
                state["chees.size"] = torch.zeros_like(state["chees.size"])
                log_length = log_length - spread(before, Metric.of(state), engine.groups).log()
                log_length = log_length.clamp(min=math.log(WHITENED))
        # No shorter than one step; dual averaging now and then tries a step that is far too long, which does not count.
        step = torch.minimum(used, state["step_size"]).log()
        log_length = log_length.clamp(step, step + math.log(MAX_LEAPFROGS))
        average = average + 2.0 / (max(done - settled, 1) + 1.0) * (log_length - average)
        state["chees.log_length"] = torch.stack([log_length, average], 1)
        state["length"] = (average if done == self.warmup else log_length).exp()
        return state

    def ascent(self, state: State, statistics: Statistics, engine: MarkovEngine) -> Tensor:
        """Change of the log length ``[G]``; the magnitude in the state is renewed.

        The slope is measured by its mean magnitude, not by the root of its mean square as Adam does it: while chains
        come in from far away, single ones have slopes that are larger by orders of magnitude, and the length would
        wait for their squares to be forgotten.
        """

        def gather(name: str) -> Tensor:
            rows = engine.everyone(torch.from_numpy(statistics[name])).double()
            return rows.reshape(engine.groups, -1, *rows.shape[1:])

        centre = Metric.of(state).to_u(state["chees.centre"].to(engine.begin)).double().cpu()
        ends = (gather("start"), gather("end"), gather("momentum"))
        gradient, magnitude = slope(*ends, gather("time"), gather("acceptance"), centre)
        size, count = state["chees.size"].unbind(1)
        size, count = MEMORY * size + (1.0 - MEMORY) * magnitude, count + 1.0
        state["chees.size"] = torch.stack([size, count], 1)
        size = (size / (1.0 - MEMORY**count)).clamp(min=torch.finfo(size.dtype).tiny)
        return RATE * (gradient / size).clamp(-1.0, 1.0)

    def positions(self, state: State, engine: MarkovEngine) -> Tensor:
        """Unconstrained positions of all chains, ``[G, K, D]`` in float64."""
        z = engine.everyone(Metric.of(state).to_z(state["z"])).double()
        return z.reshape(engine.groups, -1, z.shape[1])


@dataclass(frozen=True)
class ChEES(TunedSampler):
    """Hamiltonian Monte Carlo for many chains, whose trajectory length is learnt from all of them.

    During warm-up the length climbs the ChEES criterion, the change of the estimator of the expected square: how far
    trajectories change the squared distance from the mean (Hoffman, Radul & Sountsov, 2021, "An adaptive-MCMC scheme
    for setting trajectory lengths in Hamiltonian Monte Carlo"). Every transition takes the same number of leapfrog
    steps in every chain, so that none waits for another as in NUTS: with many chains side by side, the fastest sampler
    here. The length is multiplied by the next number of a van der Corput sequence in (0, 1), common to all chains,
    whose even coverage of long and short is worth half as many effective draws again as independent uniforms.

    The acceptance that is best for trajectories of a given length in many dimensions, 0.651, is not best here: near the
    step size at which the integrator breaks down, the log density itself mixes slowly. Between 0.75 and 0.9 nothing
    much changes.

    It works from 2 chains up, but what it learns from a few is noisy; with fewer than about 10, use ``NUTS``.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy, divergent, leapfrogs, log_density, step_size;
    ``info["length"]`` is the length that was learnt.

    Args:
        chains: chains C, at least 2.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: of the leapfrog integrator, or None to adapt it; the length is learnt in either case.
        target_accept: mean acceptance probability that the step size is adapted to; nearer to 1 means smaller steps
            and fewer divergences.
        metric: "diag", "dense" or "low_rank".
    """

    name: ClassVar[str] = "ChEES"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "energy", "divergent", "leapfrogs", "log_density")

    chains: int = 64
    warmup: int = 500
    draws: int = 250

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.chains < 2:
            raise MethodError(
                f"{self.name}(chains={self.chains}): the trajectory length is learnt across chains; use at least 2, or "
                "NUTS for a single one."
            )

    def work(self, problem: Problem) -> Work:
        """Leapfrog steps, as many as the length will ask for."""
        calls = ASSUMED_LEAPFROGS * (self.warmup + self.draws * self.thin)
        note = f"if a trajectory takes {ASSUMED_LEAPFROGS} leapfrog steps"
        return Work(self.chains, calls, self.chains * self.draws, note)

    def adaptation(self) -> Adaptation:
        """Length, step size and metric; the length alone if the step size is given."""
        tuner = None if self.step_size is not None else StepAndMetric(self.warmup, self.target_accept, self.metric)
        return LengthAdaptation(self.warmup, tuner)

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One trajectory of every chain; beside the statistics, its two ends for the adaptation."""
        jitter = van_der_corput(tuning.done + 1)
        leapfrogs: Floats = np.clip(np.ceil(jitter * tuning.length / tuning.step), 1.0, MAX_LEAPFROGS)
        momentum = noise.normal()
        end = trajectory(point, momentum, tuning.step, leapfrogs, value_and_grad)
        new, statistics = decide(point, momentum, end, noise.uniform(1)[0])
        ends = {"start": point.z, "end": end.z, "momentum": end.momentum}
        return new, statistics | {
            "leapfrogs": leapfrogs,
            "time": leapfrogs * tuning.step,
            **{name: part.cpu().numpy() for name, part in ends.items() if part is not None},
        }
