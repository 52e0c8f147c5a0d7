"""A Gaussian posterior over the unconstrained coordinates."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.prior import prior_law
from bayesdl.posterior.problem import Problem


class GaussianPosterior(Posterior):
    """q(z) = N(mean, covariance) over the flat unconstrained vector.

    Attributes:
        law: the Gaussian; it knows its density, its parts, and its divergence from any other.
    """

    kind: ClassVar[str] = "gaussian"

    def __init__(self, problem: Problem | None, law: Normal, info: dict[str, Any]) -> None:
        super().__init__(problem, info)
        self.law = law

    def __repr__(self) -> str:
        """Method, number of coordinates, structure."""
        structure = type(self.law.covariance).__name__
        return f"GaussianPosterior({self.info.get('method', '?')}, {self.law.dim} coordinates, {structure})"

    @property
    def mean(self) -> Tensor:
        """``[D]``."""
        return self.law.mean

    @property
    def sd(self) -> Tensor:
        """Standard deviation of every coordinate, ``[D]``."""
        return self.law.covariance.variances().sqrt()

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Fresh draws ``[n, D]`` by the seed; 1000 if n is None."""
        count = 1000 if n is None else n
        if count < 1:
            raise MethodError(f"draws(n={n}): n must be at least 1.")
        return self.law.draws(count, seed)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of q at ``z [..., D]``, shape ``[...]``."""
        return self.law.log_prob(z)

    def draws_and_log_prob(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """See the base class."""
        z, law = self.unconstrained_draws(n, seed), self.law.without_points()
        random = self.law.covariance.variances() > 0
        return z, law.log_prob(z[:, random])

    def kl(self) -> float | None:
        """KL(q || prior) in nats, exact, in float64; None if there is none in closed form.

        That takes a prior that is Gaussian over z, and a q that is a point nowhere. The divergence is
        invariant under reparameterisation, so over z it is what it is over the constrained latents.
        """
        prior = prior_law(self.problem.density)
        if prior is None:
            return None
        found = self.law.kl(prior)
        return None if found.isposinf() else float(found)

    def kl_parts(self) -> dict[str, float] | None:
        """KL of each site's marginal, and what is left, "between sites".

        Under a prior with independent sites that rest is the total correlation of the sites under q, never negative.
        """
        total, prior = self.kl(), prior_law(self.problem.density)
        if total is None or prior is None:
            return None
        parts: dict[str, float] = {}
        for site in self.problem.density.sites:
            part = slice(site.start, site.start + site.unconstrained_shape.numel())
            parts[site.name] = float(self.law.marginal(part).kl(prior.marginal(part)))
        return parts | {"between sites": total - sum(parts.values())}

    def learnt_prior(self) -> Posterior | None:
        """The Gaussian that replaced the model's prior."""
        density = self.problem.density
        law = None if density.new_prior is None else prior_law(density)
        return None if law is None else GaussianPosterior(self.problem, law, self.info)

    def why_no_kl(self) -> str:
        """See the base class."""
        return "knows no KL divergence from its prior in closed form"

    def tensors(self) -> dict[str, Tensor]:
        """Mean and covariance."""
        return self.law.tensors()

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> GaussianPosterior:
        """Rebuild what ``tensors`` wrote."""
        return cls(problem, Normal.restore(tensors), info)
