"""MC dropout: training with dropout, and predictions that keep drawing its masks (Gal & Ghahramani, 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.density.log_density import Batch
from bayesdl.errors import MethodError
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import Optimiser
from bayesdl.infer.optimisers import OPTIMISERS
from bayesdl.infer.training import OptimiserEngine
from bayesdl.models.dropout import DropoutNetwork, has_dropout
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.dropout import DropoutPosterior
from bayesdl.posterior.problem import Problem

MASKS = "masks"


@dataclass(frozen=True)
class MCDropout(Optimiser):
    r"""Trains a network with its dropout modules active, and averages predictions over their masks.

    The loss is that of MAP with fresh masks r for every row and step, ``-(1/N) [log p(theta) + (N/B) sum_i log p(y_i |
    x_i, theta, r_i)]``: an average over masks of the fit's quality, not of its likelihood. It is the variational
    objective of Gal & Ghahramani (2016, eq. 7) up to how the prior enters: there each weight matrix behind a dropout of
    rate p is penalised with 1 - p times the weight, here with all of it.

    **What it approximates.** A posterior whose only randomness are on-off switches with fixed rates: its spread is set
    by p and does not shrink to zero with more data. For a linear model with inputs dropped, predictions have the mean
    ``w^T x`` and the epistemic variance ``p / (1 - p) sum_i (w_i x_i)^2``. Choose p on held-out rows. Weight scaling,
    which switches dropout off for predictions, is ``MAP``'s prediction; for a softmax layer on dropped inputs it is the
    normalised geometric mean over masks, where this method takes the arithmetic mean.

    Only ``torch.nn.Dropout`` modules and their like are switched on; the ``dropout=`` inside LSTM or
    MultiheadAttention, and functional dropout in code of your own, stay off. The posterior is a
    ``DropoutPosterior``; its weights are a point, so ``draws`` raises and ``functions`` gives functions. Early stopping
    looks at the network with dropout off.

    Cost: one training, with as many uniform numbers a row and step as there are units behind dropout modules.

    Args:
        steps: as in ``MAP``, like all settings. The optimisers that take all rows at every step and the control
            variates of ``gradient=`` need a loss that is not random, and are left out.
    """

    name: ClassVar[str] = "MCDropout"
    optimizers: ClassVar[tuple[str, ...]] = tuple(OPTIMISERS)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.gradient != "plain":
            raise MethodError(
                f"{self.name}(gradient={self.gradient!r}): masks are drawn anew at every step, so an earlier gradient "
                "says nothing about their noise; use gradient='plain'."
            )

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        if not has_dropout(density.model):
            return (
                "it draws the masks of dropout modules, and the model is no BayesianNetwork with any; add "
                "torch.nn.Dropout(p) to the network, or use bayesdl.models.mlp(data, dropout=p)"
            )
        return super().applies_to(density)

    def engine(
        self, problem: Problem, run: Run, members: int, begin: Callable[[], Tensor], held_out: dict[str, Any] | None
    ) -> OptimiserEngine:
        """What trains the weights."""
        return DropoutEngine(self, problem, run.seed, members, begin, held_out)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        z, info = self.optimise(problem, run, members=1)
        return DropoutPosterior(problem, z[0], info)


@dataclass
class DropoutEngine(OptimiserEngine):
    """Training with fresh masks for every row and step, which enter the density as data.

    State besides that of training: masks, the generator of the uniform numbers behind them.
    """

    def __post_init__(self) -> None:
        """Make the density with masks; the numbers in its own batch, all 1, keep every unit and take no memory."""
        super().__post_init__()
        problem = self.problem
        network = DropoutNetwork(problem.model, problem.batch[problem.x_name or "x"])
        like = problem.density
        self.shape = (self.members, self.order.size or problem.n, network.units)
        ones = torch.ones((), dtype=like.dtype, device=like.device).expand(problem.n, network.units)
        self.density = LogDensity(
            network,
            {**problem.batch, MASKS: ones},
            data_plate=problem.data_plate,
            likelihood_temperature=like.likelihood_temperature,
        )

    def init(self) -> State:
        """Also the stream of the masks."""
        return super().init() | {MASKS: generator(self.seed, "masks")}

    def batch(self, state: State, rows: Tensor | None) -> Batch:
        """Also the masks ``[M, B, U]``."""
        noise = torch.rand(self.shape, generator=state[MASKS], dtype=self.density.dtype)
        return {**(super().batch(state, rows) or {}), MASKS: noise.to(self.density.device)}
