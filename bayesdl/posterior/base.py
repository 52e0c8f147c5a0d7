"""What every posterior can do, whatever it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesdl.errors import MethodError, ModelRequired
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.posterior.prediction import Prediction


class Posterior(ABC):
    """What was learnt about a model's latents.

    Attributes:
        info: method, settings, seed, seconds, gradients, and what else the method reports, as JSON values.
    """

    kind: ClassVar[str]

    def __init__(self, problem: Problem | None, info: dict[str, Any]) -> None:
        self._problem = problem
        self.info = info

    @property
    def problem(self) -> Problem:
        """The model and its data.

        Raises:
            ModelRequired: the posterior was loaded without its model.
        """
        if self._problem is None:
            raise ModelRequired(
                "This posterior was loaded without its model, which is code: bayesdl.load(path, model=...) makes it "
                "whole."
            )
        return self._problem

    @property
    def units(self) -> str:
        """In which units the latents are: "scaled" where the data were standardised for the model, else "raw"."""
        return "scaled" if self.problem.scaled else "raw"

    @abstractmethod
    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Draws of the flat unconstrained vector, ``[n, D]``; all stored ones if n is None.

        A finite posterior thins evenly for n up to its size and resamples by the seed beyond.
        """

    def draws(self, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Constrained draws ``[n, *shape]`` by site name, in the model's units (see ``units``)."""
        return self.problem.density.constrain(self.unconstrained_draws(n, seed))

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        max_draws: int = 1000,
        site: str | None = None,
        seed: int = 0,
    ) -> Prediction:
        """The posterior predictive distribution at raw inputs.

        Args:
            x: inputs ``[N, ...]`` in the data's units, or a dict of the program's arguments without the target.
            batch_size: rows per pass; the memory is draws x batch_size x parameters of the likelihood.
            max_draws: most draws to use, evenly thinned (or, of a posterior with a density, drawn).
            site: observed site to predict; the only one by default.
            seed: seed of the draws of a posterior with a density, and of latents inside the data plate.

        Raises:
            DataError: inputs that do not fit the model.
            ModelRequired: loaded without a model.
        """
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        z = self.unconstrained_draws(self._draw_count(max_draws), seed)
        inputs = self.problem.inputs(x)
        return predict(self.problem, z, inputs, site=site, batch_size=batch_size, seed=seed)

    def log_likelihood(self, x: Any, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of every row under every draw, ``[S, N]``, as a density of the raw targets.

        Raises:
            NotFactorised: the program's rows do not separate.
        """
        problem = self.problem
        batch = problem.inputs(x) if y is None else problem.labelled(x, y)
        z = self.unconstrained_draws(self._draw_count(max_draws), seed)
        values = problem.density.log_likelihood(z, batch)
        return values - _targets_per_row(problem, batch) * problem.scaler.y_scale.log().to(values.dtype)

    def kl(self) -> float | None:
        """KL(posterior || prior) in nats where it is known in closed form, else None."""
        return None

    def save(self, path: str | Path) -> Path:
        """Write the posterior into the folder ``path``: tensors in safetensors, the rest in JSON.

        A few training rows are stored as a probe, by which ``load`` recognises the model.
        """
        from bayesdl.posterior.storage import save

        return save(self, Path(path))

    def _draw_count(self, most: int) -> int:
        """How many draws a prediction with ``max_draws=most`` uses."""
        return most

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""

    @classmethod
    @abstractmethod
    def restore(
        cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any], sites: list[dict[str, Any]]
    ) -> Posterior:
        """Rebuild what ``tensors`` wrote; ``sites`` is the layout in the file, for draws without a model."""


def _targets_per_row(problem: Problem, batch: dict[str, Any]) -> int:
    if problem.y_name is None:
        return 1
    target = batch.get(problem.y_name)
    return 1 if target is None or target.dim() < 2 else int(torch.tensor(target.shape[1:]).prod())
