"""The posterior of MC dropout: one set of weights, and the random networks that its masks leave."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Uniform
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.density.program import Substitute
from bayesdl.errors import MethodError
from bayesdl.models.dropout import DropoutNetwork
from bayesdl.posterior import predictive
from bayesdl.posterior.base import Posterior, row_log_likelihood
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.problem import Problem

SITE = "masks of dropout"
MOST_BYTES = 4 * 2**30
"""Of the masks of one prediction."""


class DropoutPosterior(Posterior):
    """Predictions averaged over dropout masks at fixed weights.

    A draw is one mask of the whole network, **shared by all rows**: one thinned network, and so a function. For each
    row by itself that is the law of a mask for every row, as in the literature; between rows, functions have the
    dependence that a mask for every row would lose, and a row's prediction does not depend on the rows beside it. Only
    dropout modules are in training mode; normalising layers keep their fixed statistics.

    The spread over masks is the **epistemic** part of a prediction; the likelihood's noise comes on top as the
    aleatoric part.

    Attributes:
        z: the weights, ``[D]``.
    """

    kind: ClassVar[str] = "dropout"

    def __init__(self, problem: Problem | None, z: Tensor, info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self.z = z.detach()

    def __repr__(self) -> str:
        """Method and number of coordinates."""
        return f"DropoutPosterior({self.info.get('method', '?')}, {len(self.z)} coordinates)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Refuse: the weights are a point.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "MC dropout has one set of weights, posterior.problem.density.constrain(posterior.z), and no draws of "
            "them; its randomness is in the masks. Use functions(x, n) for draws of the function, or predict(x)."
        )

    def predict(
        self, x: Any, *, batch_size: int | None = None, max_draws: int = 1000, site: str | None = None, seed: int = 0
    ) -> Prediction:
        """The mixture over ``max_draws`` masks, see the class; arguments as in ``Posterior.predict``."""
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        inputs = self.problem.inputs(x)
        masks = self._masks(max_draws, seed)
        return predictive.predict(self.thinned, masks, inputs, site=site, batch_size=batch_size, seed=seed)

    def log_likelihood(self, x: Any, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of every row under every mask, ``[S, N]``; the masks are those of ``predict``."""
        return row_log_likelihood(self.thinned, self._masks(max_draws, seed), self.problem.labelled(x, y))

    def functions(self, x: Any, n: int = 100, seed: int = 0) -> Tensor:
        """Joint draws of the likelihood's mean at raw inputs, ``[n, N]``, or ``[n, N, K]`` for K classes or targets.

        Args:
            x: inputs in the data's units.
            n: number of masks.
            seed: the draws are a function of it; those of ``predict`` with the same seed.
        """
        if n < 1:
            raise MethodError(f"functions(n={n}): n must be at least 1.")
        return self.predict(x, max_draws=n, seed=seed).mean_by_draw

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return {"z": self.z}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> DropoutPosterior:
        """Rebuild what ``tensors`` wrote."""
        return cls(problem, tensors["z"], info)

    @cached_property
    def thinned(self) -> Problem:
        """The problem with the weights fixed and the uniform numbers behind the masks as its only latent."""
        problem = self.problem
        model = ThinnedNetwork(problem, self.z)
        return replace(problem, model=model, density=LogDensity(model, problem.batch, data_plate=problem.data_plate))

    def _masks(self, n: int, seed: int) -> Tensor:
        density = self.thinned.density
        each = density.dim * density.dtype.itemsize
        if n * each > MOST_BYTES:
            raise MethodError(
                f"{n} masks of {density.dim:,} units take {n * each / 2**30:,.1f} GiB, more than the "
                f"{MOST_BYTES / 2**30:g} GiB that are allowed; use max_draws={max(1, MOST_BYTES // each)}."
            )
        stream = generator(seed, "masks")
        noise = torch.rand(n, density.dim, generator=stream, dtype=density.dtype).to(density.device)
        return density.unconstrain({SITE: noise})


class ThinnedNetwork:
    """The program ``u ~ Uniform(0, 1)^U; y_i ~ likelihood(net(x_i) with the masks of u)`` at fixed weights."""

    def __init__(self, problem: Problem, z: Tensor) -> None:
        self.network = DropoutNetwork(problem.model, problem.batch[problem.x_name or "x"])
        self.values = problem.density.constrain(z)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program; the weights are no sites of it."""
        model = self.network.model
        zero = torch.zeros(self.network.units, dtype=model.dtype, device=model.device)
        masks = pyro.sample(SITE, Uniform(zero, 1.0).to_event(1))
        with poutine.block(hide=list(self.values)), Substitute(self.values):
            return self.network(x, y, masks)
