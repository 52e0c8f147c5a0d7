"""The No-U-Turn sampler (Hoffman & Gelman, 2014) in its multinomial form (Betancourt, 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bayesdl.infer import method as check
from bayesdl.infer.kernel import Floats, Noise, Point, Statistics, Tuning, ValueAndGrad
from bayesdl.infer.method import ASSUMED_LEAPFROGS, Work
from bayesdl.infer.nuts_tree import nuts_transition
from bayesdl.infer.sampler import TunedSampler
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class NUTS(TunedSampler):
    """Hamiltonian Monte Carlo that chooses its own trajectory lengths; the default for small models.

    All chains move in lockstep as one batch, so four cost little more than one. Step size and metric are adapted during
    warm-up and shared by the chains (see ``bayesdl.infer.adaptation``). Chains start from independent draws of the
    prior: over-dispersed, as R-hat wants it, and for small networks the first windows of warm-up bring them together in
    function space.

    The posterior's ``stats``, each ``[C, S]``: acceptance, energy, divergent, depth, leapfrogs, log_density, step_size.

    Cost: up to ``2^max_depth - 1`` full-batch gradients a draw.

    Args:
        chains: chains C.
        warmup: transitions per chain that adapt and are thrown away.
        draws: draws per chain that are kept.
        thin: transitions per kept draw.
        step_size: of the leapfrog integrator, or None to adapt it.
        target_accept: mean acceptance statistic that the step size is adapted to; nearer to 1 means smaller steps and
            fewer divergences.
        metric: "diag", "dense" or "low_rank".
        max_depth: doublings of a trajectory at most.
    """

    name: ClassVar[str] = "NUTS"
    statistics: ClassVar[tuple[str, ...]] = ("acceptance", "energy", "divergent", "depth", "leapfrogs", "log_density")

    max_depth: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, max_depth=self.max_depth)

    def work(self, problem: Problem) -> Work:
        """Leapfrog steps, as many as the trees turn out to have."""
        each = min(ASSUMED_LEAPFROGS, 2**self.max_depth - 1)
        calls = each * (self.warmup + self.draws * self.thin)
        return Work(self.chains, calls, self.chains * self.draws, f"if trees have {each} leapfrog steps")

    def transition(
        self, point: Point, tuning: Tuning, noise: Noise, value_and_grad: ValueAndGrad
    ) -> tuple[Point, Statistics]:
        """One transition of every chain; see ``bayesdl.infer.nuts_tree.nuts_transition``."""
        momentum, branch = noise.normal(), noise.branch()

        def uniforms(depth: int) -> Floats:
            return branch.uniform(2 + (1 << depth))

        return nuts_transition(point, momentum, tuning.step, uniforms, value_and_grad, self.max_depth)
