"""A Gaussian posterior over the unconstrained coordinates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.errors import MethodError
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem


class GaussianPosterior(Posterior):
    """q(z) = N(mean, diag sd^2) over the flat unconstrained vector.

    Attributes:
        mean: ``[D]``.
        sd: ``[D]``.
    """

    kind: ClassVar[str] = "gaussian"

    def __init__(self, problem: Problem | None, mean: Tensor, sd: Tensor, info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self.mean = mean.detach()
        self.sd = sd.detach()

    def __repr__(self) -> str:
        """Method and number of coordinates."""
        return f"GaussianPosterior({self.info.get('method', '?')}, {len(self.mean)} coordinates)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Fresh draws ``[n, D]`` by the seed; 1000 if n is None."""
        count = 1000 if n is None else n
        if count < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        generator = _rng.generator(seed, "gaussian draws")
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + self.sd * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of q at ``z [..., D]``, shape ``[...]``."""
        normal = torch.distributions.Normal(self.mean, self.sd, validate_args=False)
        density: Tensor = normal.log_prob(z).sum(-1)
        return density

    def kl(self) -> float | None:
        """KL(q || prior) in nats, closed form, if the prior is an independent Gaussian over z; else None.

        sum_d [ log(s_d / sd_d) + (sd_d^2 + (mean_d - m_d)^2) / (2 s_d^2) - 1/2 ], in float64. It is invariant under
        reparameterisation, so the KL over z is the KL over the constrained latents.
        """
        prior = self.problem.density.gaussian_prior()
        if prior is None:
            return None
        m, s, mean, sd = (value.double() for value in (*prior, self.mean, self.sd))
        return float((torch.log(s / sd) + (sd**2 + (mean - m) ** 2) / (2 * s**2) - 0.5).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Mean, sd, and the prior over z where it is Gaussian (it may have been learnt)."""
        prior = self.problem.density.gaussian_prior()
        extra = {} if prior is None else {"prior_mean": prior[0], "prior_sd": prior[1]}
        return {"mean": self.mean, "sd": self.sd, **extra}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> GaussianPosterior:
        """Rebuild what ``tensors`` wrote; a prior other than the program's was learnt, and replaces it."""
        if problem is not None and "prior_mean" in tensors:
            learnt = tensors["prior_mean"], tensors["prior_sd"]
            own = problem.density.gaussian_prior()
            if own is None or not (torch.equal(own[0], learnt[0]) and torch.equal(own[1], learnt[1])):
                problem = replace(problem, density=problem.density.with_gaussian_prior(*learnt))
        return cls(problem, tensors["mean"], tensors["sd"], info)
