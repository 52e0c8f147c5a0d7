"""A whole method: random-walk Metropolis on batched chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bayesdl._rng import generator
from bayesdl.infer import method as check
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method
from bayesdl.infer.starts import start
from bayesdl.posterior import DrawsPosterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class Metropolis(Method):
    """Proposes Gaussian steps and accepts by the ratio of the densities."""

    name: ClassVar[str] = "Metropolis"

    chains: int = 4
    draws: int = 1000
    scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws)
        check.positive(self.name, scale=self.scale)

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        state = run.drive(Walk(self.name, self.draws, self, problem, run), problem.density)
        if state["step"] == 0:
            raise run.too_early("the first draw")
        return DrawsPosterior(problem, state["draws"][:, : state["step"]].clone(), {}, {})


@dataclass
class Walk(Engine):
    """One proposal a step; everything that it needs to go on is in the state."""

    label: str
    total: int
    method: Metropolis
    problem: Problem
    run: Run

    def init(self) -> dict[str, Any]:
        z = start(self.problem, self.run, self.method.chains)
        draws = z.new_zeros(len(z), self.total, z.shape[1])
        return {"z": z, "draws": draws, "noise": generator(self.run.seed, self.label, "noise")}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        z, noise = state["z"], state["noise"]
        proposal = z + self.method.scale * torch.randn(z.shape, generator=noise, dtype=z.dtype)
        (old, _), (new, _) = (self.problem.density.value_and_grad(point) for point in (z, proposal))
        accepted = torch.rand(len(z), generator=noise, dtype=z.dtype).log() < new - old
        z = torch.where(accepted[:, None], proposal, z)
        state["draws"][:, state["step"]] = z
        return state | {"z": z}
