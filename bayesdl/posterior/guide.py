"""A posterior given by a Pyro guide: a program that draws the latents, with its own trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl.density import sites
from bayesdl.errors import MethodError, ModelMismatch, ModelRequired
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.guide_program import AUTOGUIDES, Guide, guide_name
from bayesdl.posterior.problem import Problem


class GuidePosterior(Posterior):
    """q(latents) as a trained Pyro guide.

    Attributes:
        parameters: the guide's trained parameters by name, in unconstrained coordinates.
    """

    kind: ClassVar[str] = "guide"

    def __init__(
        self, problem: Problem | None, guide: Guide | None, parameters: Mapping[str, Tensor], info: dict[str, Any]
    ) -> None:
        super().__init__(problem, info)
        self.parameters = {name: value.detach() for name, value in parameters.items()}
        self._guide = guide
        self._check: Tensor | None = None  # two draws of the fitted guide, after loading

    def __repr__(self) -> str:
        """Method, guide and number of its parameters."""
        count = sum(value.numel() for value in self.parameters.values())
        return f"GuidePosterior({self.info.get('method', '?')}, {self.info['guide']}, {count} parameters)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Fresh draws ``[n, D]`` by the seed; 1000 if n is None.

        Raises:
            ModelRequired: loaded without the model, or with a guide that is code.
        """
        return self._draw(1000 if n is None else n, seed)[0]

    def draws_and_log_prob(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """See the base class; the guide's density of the constrained latents, after their Jacobian."""
        z, log_q = self._draw(n, seed)
        latents = [site for site in self.problem.density.sites if site.scope != "param"]
        return z, log_q + sites.log_abs_det(latents, z)

    def _draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        if count < 1:
            raise MethodError(f"draws(n={count}): n must be at least 1.")
        if self._guide is None:
            problem = self.problem  # which may be what is missing
            raise ModelRequired(
                f"The guide {self.info['guide']} is code that a file cannot hold (the model has {problem.density.dim} "
                "coordinates): make the posterior whole with posterior.with_guide(guide=...)."
            )
        self._guide.set(self.parameters)
        with torch.no_grad():
            return self._guide.draw(count, seed)

    def with_guide(self, guide: Any) -> GuidePosterior:
        """The posterior made whole with a guide of the user's own code, after ``bayesdl.load``.

        Raises:
            ModelMismatch: the guide has other parameters than the stored ones, or draws other values.
            ModelRequired: the model is missing as well.
        """
        made = GuidePosterior(self.problem, Guide(guide, self.problem), self.parameters, self.info)
        made._record, made._check = self._record, self._check
        draws = made.unconstrained_draws(2)
        if self._check is not None and not torch.allclose(draws, self._check, rtol=1e-4, atol=1e-6):
            raise ModelMismatch(
                f"The guide {guide_name(guide)} draws other values than the fitted one. (A guide that reads the data "
                "needs all training rows, of which a file holds only a few.)"
            )
        return made

    def tensors(self) -> dict[str, Tensor]:
        """The guide's parameters, and two draws by which a guide is recognised."""
        parameters = {f"parameter/{name}": value for name, value in self.parameters.items()}
        return {"check": self.unconstrained_draws(2), **parameters}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> GuidePosterior:
        """Rebuild what ``tensors`` wrote; a guide that is code comes back through ``with_guide``."""
        parameters = {n.removeprefix("parameter/"): v for n, v in tensors.items() if n.startswith("parameter/")}
        posterior = cls(problem, None, parameters, info)
        posterior._check = tensors["check"]
        known = problem is not None and info["guide"] in AUTOGUIDES
        return posterior.with_guide(info["guide"]) if known else posterior
