"""Stein variational gradient descent: particles that follow the gradient and repel each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.density.log_density import Batch, Target
from bayesdl.infer import method as check
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import Training, as_posterior
from bayesdl.infer.training import TrainingEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class SVGD(Training):
    r"""Moves M particles together towards the posterior (Liu & Wang, 2016, algorithm 1).

    Particle i moves along

        phi(z_i) = (1/M) sum_j [k(z_j, z_i) grad log p(z_j) + grad_{z_j} k(z_j, z_i)],
        k(z, z') = exp(-|z - z'|^2 / h),

    the direction in the kernel's function space in which KL(particles || posterior) falls fastest. The squared width is
    h = median^2 / log M, with the median over the distances between particles, anew at every step. The density is that
    over z, Jacobian included. One particle is the mode of that density.

    **What it approximates.** With many particles in few dimensions, the posterior. In high dimension all distances are
    alike, the repulsion is too weak, and the particles' **variance collapses** (Ba et al., 2022). Measured on standard
    normal targets: 100 particles keep 0.93 of the variance in 2 dimensions, 0.44 in 10, 0.14 in 30; 10 particles keep
    0.03 in 100 and 0.003 in 1000. Particles of a network are an ensemble of points near modes; their spread is not the
    posterior's.

    The posterior has M chains of one draw: particles are neither independent nor a Markov chain, so R-hat and effective
    sizes do not exist for them.

    Cost of a step: M gradients on one mini-batch, which all particles share, and M^2 D.

    Args:
        particles: M. The other settings are those of training, see ``MAP``; the loss curve is of -(log density) / N.
    """

    name: ClassVar[str] = "SVGD"
    tempered: ClassVar[bool] = True
    takes_parameters: ClassVar[bool] = False
    target: ClassVar[Target] = "posterior"

    particles: int = 20

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, particles=self.particles)

    @property
    def members(self) -> int:
        """The particles, which are trained side by side."""
        return self.particles

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        engine = SVGDEngine(self, problem, run.seed, self.particles, self.begin(problem, run, self.particles))
        state = run.drive(engine, problem.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        return as_posterior(problem, engine.result(state), engine.report(state), self.target, self.batch_size)


@dataclass
class SVGDEngine(TrainingEngine):
    """Training in which the gradients of all particles act on each."""

    own_batches: ClassVar[bool] = False

    def data_order(self) -> DataOrder:
        """One order for all particles."""
        return DataOrder(self.problem, self.method.batch_size, 1, self.seed)

    def batch(self, state: dict[str, Tensor], rows: Tensor | None) -> Batch | None:
        """The rows that all particles see."""
        return None if rows is None else self.problem.minibatch(rows[0])

    def value_and_grad(self, z: Tensor, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """The log density, and the direction phi in the place of its gradient."""
        value, gradient = super().value_and_grad(z, batch)
        return value, stein_direction(z, gradient)


def stein_direction(z: Tensor, gradient: Tensor) -> Tensor:
    """``phi(z_i)``, see ``SVGD``.

    With k_ij the kernel's matrix the repulsion is ``sum_j grad_{z_j} k_ij = (2 / h) sum_j k_ij (z_i - z_j)``.

    Args:
        z: particles ``[M, D]``.
        gradient: of the log density at them, ``[M, D]``.

    Returns:
        ``[M, D]``; the gradient itself for one particle.
    """
    count = len(z)
    if count == 1:
        return gradient
    centred = z - z.mean(0)  # distances from inner products: large common offsets would round them away
    norms = centred.square().sum(1)
    squares = (norms[:, None] + norms - 2 * centred @ centred.mT).clamp(min=0.0)
    pairs = torch.triu_indices(count, count, 1, device=z.device)
    width = squares[pairs[0], pairs[1]].median() / math.log(count)
    width = width.clamp(min=torch.finfo(z.dtype).tiny)  # all particles at one point: no repulsion
    kernel = (-squares / width).exp()
    repulsion = (2 / width) * (kernel.sum(1, keepdim=True) * centred - kernel @ centred)
    return (kernel @ gradient + repulsion) / count
