"""Deep ensembles (Lakshminarayanan et al., 2017): the same training from several starts, or of randomised problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.density import LogDensity
from bayesdl.density.log_density import Batch
from bayesdl.density.program import distribution_at
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import SECOND_ORDER, Optimiser, as_posterior
from bayesdl.infer.training import OptimiserEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem

RANDOMISED = ("anchored", "perturbed", "bootstrap")


@dataclass(frozen=True)
class DeepEnsemble(Optimiser):
    r"""Trains ``members`` networks by MAP, side by side, and predicts with the mixture of them.

    Start and data order of member k depend on the seed and k alone: the first members of a larger ensemble, and MAP
    with the same settings for member 0, are the same networks up to rounding. Gradient norms, early stopping and
    divergence are each member's own.

    **What it approximates.** The modes that training finds, with equal weights; where the posterior has one mode, all
    members are the same. Each member may be given a problem of its own, so that they spread around a mode as well:

    - ``anchored``: its prior has the mean a_k, a draw of the prior (Pearce et al., 2020);
    - ``perturbed``: its targets are y + e_k, e_k a draw of the likelihood's noise;
    - ``bootstrap``: its rows are N draws from the rows, with replacement.

    Linear regression with known noise s, prior N(m, t^2), A = X^T X / s^2 and precision P = A + 1 / t^2 tells what each
    is worth: members are independent draws with the posterior's mean P^-1 (X^T y / s^2 + m / t^2) and the covariance

        anchored: P^-1 t^-2 P^-1,   perturbed: P^-1 A P^-1,   both: P^-1, **exactly the posterior**.

    Anchoring alone spreads too little wherever the data say something; both together are randomised MAP sampling
    (randomise, then optimise), exact for linear Gaussian models only. The bootstrap's spread is that of the estimate
    under new data, whatever the likelihood says, and knows no prior.

    Args:
        members: number of networks. The other settings are those of ``MAP``.
        anchored: needs a prior that is an independent Gaussian over z.
        perturbed: needs Gaussian noise whose size is known, as in ``likelihoods.Gaussian(noise=0.5)``.
        bootstrap: needs rows that the density can take apart.
    """

    name: ClassVar[str] = "DeepEnsemble"

    members: int = 5
    anchored: bool = False
    perturbed: bool = False
    bootstrap: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, members=self.members)
        check.flag(self.name, anchored=self.anchored, perturbed=self.perturbed, bootstrap=self.bootstrap)
        asked = [name for name in RANDOMISED if getattr(self, name)]
        if self.optimizer in SECOND_ORDER and asked:
            raise MethodError(
                f"{self.name}(optimizer={self.optimizer!r}) trains all members on one problem: leave out {asked}."
            )

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        if self.anchored and density.gaussian_prior() is None:
            return "anchored=True needs a prior that is an independent Gaussian over z; use perturbed= or bootstrap="
        if self.bootstrap and not density.factorised:
            return "bootstrap=True needs a log density with one term per row"
        return super().applies_to(density)

    def engine(
        self, problem: Problem, run: Run, members: int, begin: Callable[[], Tensor], held_out: dict[str, Any] | None
    ) -> OptimiserEngine:
        """What trains the members."""
        return EnsembleEngine(self, problem, run.seed, members, begin, held_out)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        z, info = self.optimise(problem, run, self.members)
        return as_posterior(problem, z, info, self.target, self.batch_size)


@dataclass
class EnsembleEngine(OptimiserEngine):
    """Training in which every member may have a problem of its own, which the seed and its number decide.

    Attributes:
        anchors: prior means less the prior's own, in units of its sd, ``[M, D]``, or None.
        targets: perturbed targets ``[M, N, ...]``, or None.
        rows: bootstrapped rows ``[M, N]``, or None.
    """

    method: DeepEnsemble

    def __post_init__(self) -> None:
        """Draw each member's problem."""
        super().__post_init__()
        method, problem = self.method, self.problem
        self.prior = problem.density.gaussian_prior() if method.anchored else None
        self.anchors: Tensor | None = None
        self.targets: Tensor | None = None
        self.rows: Tensor | None = None
        if self.prior is not None:
            self.anchors = self._noise("anchor", self.prior[0])
        if method.perturbed:
            target, sd = known_noise(method.name, problem)
            self.targets = target + sd * self._noise("targets", target)
        if method.bootstrap:
            streams = [generator(self.seed, "member", k, "bootstrap") for k in range(self.members)]
            self.rows = torch.stack([torch.randint(problem.n, (problem.n,), generator=one) for one in streams])

    def batch(self, state: State, rows: Tensor | None) -> Batch | None:
        """The rows of each member's own problem."""
        if self.rows is not None:
            rows = self.rows if rows is None else self.rows.gather(1, rows)
        batch = super().batch(state, rows)
        if self.targets is None:
            return batch
        member = torch.arange(self.members).unsqueeze(1)
        return {**(batch or {}), str(self.problem.y_name): self.targets if rows is None else self.targets[member, rows]}

    def value_and_grad(self, z: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """The density with each member's prior mean: ``log N(z; a, s^2) - log N(z; m, s^2)`` is linear in z."""
        value, gradient = super().value_and_grad(z, batch)
        if self.anchors is None or self.prior is None:
            return value, gradient
        mean, sd = self.prior
        return value + (self.anchors * ((z - mean) / sd - self.anchors / 2)).sum(1), gradient + self.anchors / sd

    def _noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal numbers ``[M, *like.shape]``, each member's by its number."""
        streams = [generator(self.seed, "member", k, purpose) for k in range(self.members)]
        noise = [torch.randn(like.shape, dtype=like.dtype, generator=stream) for stream in streams]
        return torch.stack(noise).to(like.device)


def known_noise(method: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """The targets ``[N, ...]``, and the standard deviation of their Gaussian noise.

    Raises:
        MethodError: the noise is not Gaussian, or depends on what is to be learnt.
    """
    found = []
    if problem.y_name is not None:
        values = problem.density.constrain(problem.density.prior_draws(2, derive_seed(problem.seed, "noise")))
        for k in range(2):
            one = {name: value[k] for name, value in values.items()}
            with torch.no_grad():
                law = distribution_at(problem.model, problem.batch, one, problem.target)
            while isinstance(law, (Independent, torch.distributions.Independent)):
                law = law.base_dist
            found += [law.scale] if isinstance(law, Normal) else []
    if len(found) < 2 or not torch.equal(found[0], found[1]):
        raise MethodError(
            f"{method}(perturbed=True) adds draws of the likelihood's noise to the targets y of a pair (x, y). It "
            "needs Gaussian noise of a known size, as in likelihoods.Gaussian(noise=0.5). Use anchored= or bootstrap=."
        )
    target: Tensor = problem.batch[str(problem.y_name)]
    return target, found[0]
