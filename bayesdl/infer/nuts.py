"""The No-U-Turn sampler (Hoffman & Gelman, 2014) in its multinomial form (Betancourt, 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.infer import method as check
from bayesdl.infer.hamiltonian import Point, ValueAndGrad
from bayesdl.infer.hamiltonian_engine import HamiltonianEngine, Statistics, begin, sample
from bayesdl.infer.loop import Run
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Method, Work
from bayesdl.infer.nuts_tree import nuts_transition
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.problem import Problem

STATISTICS = ("acceptance", "energy", "divergent", "depth", "leapfrogs", "log_density", "step_size")


@dataclass(frozen=True)
class NUTS(Method):
    """Hamiltonian Monte Carlo that chooses its own trajectory lengths; the default for small models.

    All chains move in lockstep as one batch, so four cost little more than one. Step size and diagonal mass matrix are
    adapted during warm-up and shared by the chains (see ``bayesdl.infer.adaptation``). Chains start from independent
    draws of the prior: over-dispersed, as R-hat wants it, and for small networks the first windows of warm-up bring
    them together in function space.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy, divergent, depth, leapfrogs, log_density, step_size.

    Cost: up to ``2^max_depth - 1`` full-batch gradients a draw.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: transitions per chain that are kept.
        target_accept: mean acceptance statistic that the step size is adapted to; nearer to 1 means smaller steps and
            fewer divergences.
        max_depth: doublings of a trajectory at most.
    """

    name: ClassVar[str] = "NUTS"

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    target_accept: float = 0.8
    max_depth: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, chains=self.chains, draws=self.draws, max_depth=self.max_depth)
        check.whole(self.name, at_least=0, warmup=self.warmup)
        check.fraction(self.name, target_accept=self.target_accept)

    def work(self, problem: Problem) -> Work:
        """Leapfrog steps, as many as the trees turn out to have."""
        each = min(ASSUMED_LEAPFROGS, 2**self.max_depth - 1)
        calls = each * (self.warmup + self.draws)
        return Work(self.chains, calls, self.chains * self.draws, f"if trees have {each} leapfrog steps")

    def transition(
        self,
        point: Point,
        momentum: Tensor,
        step_size: float,
        scale: Tensor,
        stream: torch.Generator,
        value_and_grad: ValueAndGrad,
    ) -> tuple[Point, Statistics]:
        """One transition of every chain; see ``bayesdl.infer.nuts_tree.nuts_transition``."""

        def uniforms(depth: int) -> Tensor:
            return torch.rand(2 + (1 << depth), len(momentum), generator=stream, dtype=torch.float64)

        return nuts_transition(point, momentum, step_size, scale, uniforms, value_and_grad, self.max_depth)

    def _fit(self, problem: Problem, run: Run) -> DrawsPosterior:
        engine = HamiltonianEngine(
            label=self.name,
            density=problem.density,
            begin=begin(problem, run, self.chains),
            transition=self.transition,
            names=STATISTICS,
            warmup=self.warmup,
            draws=self.draws,
            step_size=None,
            target_accept=self.target_accept,
            seed=run.seed,
            restart=run.init in (None, "prior"),
        )
        return sample(engine, problem, run)
