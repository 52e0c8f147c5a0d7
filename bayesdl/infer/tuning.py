"""The search for the prior's precisions and the noise of the highest evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl.infer.evidence import Point, ProfileEvidence
from bayesdl.posterior.problem import Problem

SETTLED = 1e-3
"""Largest gradient of the log evidence, by the logarithm of a number, at which it counts as maximal."""
MOST = 1e8
"""Largest factor, or its inverse, on the precision of the prior that the model came with."""
NOTHING = 1e-2
"""Nats by which the evidence may fall in a round: about as well as modes of large networks are found."""
LONGEST = 2.0
"""Largest change of a logarithm in one round."""
HALVINGS = 6
"""Tries to raise the evidence along one direction."""
EDGE = math.log(MOST)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        problem: with the tuned prior.
        working: the problem of which z is a mode: the same, but with the pull on the noise.
        z: the mode under it, ``[D]``.
        info: factors on the prior's precision by group, gradients there, effective numbers of parameters, rounds,
            whether the evidence is stationary and whether it is so inside all bounds.
    """

    problem: Problem
    working: Problem
    z: Tensor
    info: dict[str, Any]


def tune(evidence: ProfileEvidence, numbers: Tensor, z: Tensor, rounds: int) -> Tuned:
    """Change the prior's precision and the noise until the evidence of refitted modes is stationary in them.

    Each round takes a quasi-Newton step (BFGS) up the evidence, from MacKay's second derivatives, and halves it until
    the evidence of the mode that is found there is no lower than before. A precision at its bound stays there while the
    gradient points outwards; one whose weights the data do not determine goes there at once (``_irrelevant``).

    Args:
        evidence: what to climb.
        numbers: where to begin.
        z: the mode there.
        rounds: most rounds.
    """
    point = evidence.point(numbers, z)
    pairs: list[tuple[Tensor, Tensor]] = []
    slope, bend = evidence.fixed(point)
    gradient = slope + evidence.drift(point)
    round_ = 0
    while True:
        gammas = evidence.effective(point)
        at_bound = _at_bound(evidence, point, gradient)
        # Relative to gamma as well: both vanish where the prior's precision runs to infinity.
        small = torch.full_like(gradient, SETTLED)
        small[: len(gammas)] *= gammas.clamp(max=1.0)
        settled = bool((at_bound | (gradient.abs() < small)).all())
        if settled:
            ended = "stationary"
            break
        if round_ == rounds:
            ended = f"after {rounds} rounds: more rounds= may raise the evidence"
            break
        free = ~at_bound
        step = _step(gradient * free, bend.clamp(min=SETTLED), pairs, free)
        step[: len(gammas)] += _irrelevant(point, gammas, gradient) * 2 * EDGE
        higher = _climb(evidence, point, step)
        if higher is None:
            ended = "no change of the prior raises the evidence, though its gradient does not vanish"
            break
        round_ += 1
        before, moved = gradient, higher.numbers - point.numbers
        point = higher
        slope, bend = evidence.fixed(point)
        gradient = slope + evidence.drift(point)
        pairs.append((moved, before - gradient))
    outside = [evidence.name(k) for k in at_bound.nonzero().flatten().tolist()]
    info: dict[str, Any] = {
        "prior_precision": evidence.told(point.numbers[: evidence.count].exp()),
        "evidence_gradient": evidence.told(gradient[: evidence.count]),
        "effective_by_group": evidence.told(gammas),
        "rounds": round_,
        "tuning_ended": ended,
        "stationary": settled,
        "interior": settled and not outside,
    }
    if evidence.noise is not None:
        info["evidence_gradient"]["noise"] = float(gradient[-1])
    if outside:
        info["at_bound"] = outside
    return Tuned(evidence.under(point.numbers), evidence.working(point.numbers), point.z, info)


def _at_bound(evidence: ProfileEvidence, point: Point, gradient: Tensor) -> Tensor:
    """Which numbers stand at a bound that the gradient does not lead away from, booleans ``[G]``."""
    logs = point.numbers[: evidence.count]
    found = torch.zeros_like(gradient, dtype=torch.bool)
    found[: evidence.count] = (logs.abs() >= EDGE - 0.01) & (gradient[: evidence.count] * logs >= 0)
    return found


def _irrelevant(point: Point, gammas: Tensor, gradient: Tensor) -> Tensor:
    """Which precisions run to infinity, booleans ``[G]``.

    Where the data determine almost nothing of a group, gamma and the gradient fall as 1 / lambda, so that what is left
    to gain on the way to infinity is the gradient itself.
    """
    slope = gradient[: len(gammas)]
    return (gammas < SETTLED) & (slope > 0) & (slope < SETTLED) & (point.numbers[: len(gammas)] > 0)


def _climb(evidence: ProfileEvidence, point: Point, step: Tensor) -> Point | None:
    """The first point along a step, halved again and again, where the evidence is not lower; None if there is none."""
    rounding = NOTHING + 10.0 * torch.finfo(point.z.dtype).eps * (abs(point.value) + len(point.z))
    for _ in range(HALVINGS):
        numbers = point.numbers + step
        numbers[: evidence.count].clamp_(-EDGE, EDGE)
        found = evidence.at(numbers, point)
        if found.value >= point.value - rounding:
            return found
        step = 0.5 * step
    return None


def _step(gradient: Tensor, bend: Tensor, pairs: list[tuple[Tensor, Tensor]], free: Tensor) -> Tensor:
    """A quasi-Newton step, by the moves so far and how the gradient fell over them (Nocedal, 1980).

    Args:
        gradient: ``[G]``, 0 for numbers that stay.
        bend: minus the second derivatives, about.
        pairs: moves and falls, ``[G]`` each.
        free: booleans ``[G]``, the numbers that move.
    """
    useful = [(s, y) for s, y in pairs if float(s @ y) > 1e-10 * float(s.norm() * y.norm())]
    left, shares = gradient.clone(), []
    for s, y in reversed(useful):
        shares.append(float(s @ left) / float(s @ y))
        left -= shares[-1] * y
    step = left / bend
    for s, y in useful:
        step += (shares.pop() - float(y @ step) / float(s @ y)) * s
    step = (step * free).clamp(-LONGEST, LONGEST)
    return step if float(step @ gradient) > 0 else (gradient / bend).clamp(-LONGEST, LONGEST)
