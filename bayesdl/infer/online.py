"""Prior and noise tuned while the network trains (Immer et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.infer.checkpoint import State
from bayesdl.infer.evidence import ProfileEvidence
from bayesdl.infer.training import OptimiserEngine
from bayesdl.infer.tuning import EDGE, SETTLED

BURN_IN = 0.1
"""Share of the steps before the first change of the prior."""
LONGEST = 1.0
"""Largest change of a logarithm at once, while the weights have not settled."""


@dataclass
class TuningEngine(OptimiserEngine):
    """Training in which the prior's precisions change, at evenly spaced steps, by the evidence where the weights are.

    A change is one step up the gradient of ``ProfileEvidence``, over MacKay's second derivatives, with the weights that
    training has reached in the mode's place. A Gaussian likelihood's unknown noise stays a coordinate that training
    moves; what the evidence wants of it beyond the log joint pushes it, as a constant force between two changes.

    State besides that of training: logs ``[G]`` float64, logarithms of the factors on the prior's precisions; push, the
    force on the noise, a scalar.
    """

    evidence: ProfileEvidence | None = None
    changes: int = 0

    def init(self) -> State:
        """Also the prior that the model came with."""
        assert self.evidence is not None
        return super().init() | {
            "logs": torch.zeros(self.evidence.count, dtype=torch.float64),
            "push": torch.zeros((), dtype=torch.float64),
        }

    def on_rows(self, state: State, z: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Under the prior of the state, and with the push on the noise in the gradient."""
        value, gradient = super().on_rows(state, z, rows)
        found = self.evidence
        assert found is not None
        numbers = found.joined(state["logs"], z[0])
        more = found.sd_at(numbers).square().reciprocal() - found.sd.square().reciprocal()
        away = z - found.centre
        value = value - 0.5 * (more * away.square()).sum(1) - (found.sd_at(numbers) / found.sd).log().sum()
        gradient = gradient - more * away
        if found.noise is not None:
            gradient[:, found.noise] += state["push"].to(gradient)
        return value, gradient

    def step(self, state: State) -> State:
        """One update, and a change of the prior where one is due."""
        new, done = super().step(state), state["step"] + 1
        return new | self._changed(new) if self._due(done) > self._due(done - 1) else new

    def _due(self, steps: int) -> int:
        """Changes that belong to so many steps."""
        first = int(BURN_IN * self.total)
        return max(steps - first, 0) * self.changes // max(self.total - first, 1)

    def _changed(self, state: State) -> State:
        found, z = self.evidence, state["z"][0]
        assert found is not None
        point = found.point(found.joined(state["logs"], z), z)
        slope, bend = found.fixed(point)
        drift = found.drift(point)
        step = ((slope + drift) / bend.clamp(min=SETTLED)).clamp(-LONGEST, LONGEST)[: found.count]
        new: State = {"logs": (state["logs"] + step).clamp(-EDGE, EDGE)}
        if found.noise is not None:
            new["push"] = point.effective + drift[-1]
        return new
