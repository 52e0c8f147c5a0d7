"""Kalman filtering of a network's weights: one pass over the rows, each an exact update of a linearised network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import jacrev

from bayesdl.curvature.linearised import LinearisedPosterior
from bayesdl.density import LogDensity
from bayesdl.density.sites import split
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.linear_gaussian import embedded, noise_site, not_a_regression, prior_of
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.starts import start
from bayesdl.models import BayesianNetwork
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import MOST_DENSE, Dense
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

LOOKED_AT = 64
"""Rows on which a network is asked whether it is linear in its weights."""


@dataclass(frozen=True)
class KalmanFilter(Method):
    r"""The extended Kalman filter over the weights: a full Gaussian, from one pass over the rows in their order.

    The network is linearised at the present mean, ``f(x; w) = f(x; m) + J (w - m)``, and the Gaussian of w conditioned
    on the targets of a few rows, again and again. Where the network is linear in its weights, that is exact: the
    posterior of conjugate regression in any order, and ``info["log_evidence"]`` its evidence. Else it depends on the
    order and, like every linearisation, forgets what it had approximated; one row at a time is best. It then predicts
    with the network linearised at the last mean (``LinearisedPosterior``), as which it has learnt.

    A linear model starts at its prior. The mean of a network's symmetric prior is a saddle point, which no linearised
    step can leave: there the first Gaussian has the prior's covariance around the network's own initialisation (or
    around ``init``).

    Cost: P^2 a row for P weights, and 3 P^2 numbers of memory in double precision.

    Args:
        batch_size: rows in one update; None takes all rows at once.
        noise: standard deviation of the Gaussian noise in the units of the standardised target. By default the
            likelihood's own; where that has a prior, the median of a LogNormal.

    Source: Singhal and Wu (1989); Sarkka (2013), section 5.2.
    """

    name: ClassVar[str] = "KalmanFilter"
    tempered: ClassVar[bool] = False

    batch_size: int | None = 1
    noise: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole_or_none(self.name, batch_size=self.batch_size)
        if self.noise is not None:
            check.positive(self.name, noise=self.noise)
        if self.likelihood_temperature != 1:
            raise MethodError(f"{self.name}: likelihood_temperature={self.likelihood_temperature!r} must be 1 here.")

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = not_a_regression(density, "whose outputs it linearises")
        if reason is not None:
            return reason
        assert isinstance(density.model, BayesianNetwork)  # else there is a reason
        part, known = _weights(density), {"noise", *(site.name for site in density.model.sites)}
        others = [site.name for site in density.sites if site.name not in known]
        if others:
            return f"the prior has unknowns of its own ({', '.join(others)}); it filters weights under a fixed prior"
        if part.stop > MOST_DENSE:
            return (
                f"the covariance of {part.stop} weights takes {3 * part.stop**2 * 8 / 2**30:,.1f} GiB of memory; use "
                "LastLayer, MeanFieldVI, or a smaller network"
            )
        if prior_of(density, part, None) is None:
            return "the prior of the weights is not Gaussian"
        if self._noise(density) is None:
            return "the noise has a prior without a known median here; give noise="
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """No gradients of the density: a derivative of the outputs and a product a row."""
        size = _weights(problem.density).stop
        return Work(note=f"{problem.n} rows x {size}^2 multiplications, about {3 * size**2 * 8 / 2**30:.2f} GiB")

    def _noise(self, density: LogDensity) -> float | None:
        """The noise level, or None if it is not known."""
        if self.noise is not None:
            return self.noise
        stated = density.model.likelihood.noise  # type: ignore[attr-defined]  # applies_to has asked
        if isinstance(stated, (int, float)):
            return float(stated)
        site = noise_site(density)
        return None if site is None or site.gaussian is None else float(site.transform(site.gaussian[0]))

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        density, part = problem.density, _weights(problem.density)
        noise = self._noise(density)
        assert noise is not None  # applies_to has asked
        z = start(problem, run, 1, default="network")[0]
        if density.dim > part.stop:
            z = density.unconstrain(density.constrain(z) | {"noise": z.new_tensor(noise)})
        prior = prior_of(density, part, z)
        assert prior is not None  # likewise
        linear = _is_linear(problem, prior.mean, z[part])
        mean = prior.mean if linear else z[part]
        engine = KalmanEngine(problem, self.batch_size or problem.n, noise, Normal(mean, prior.covariance))
        state = run.drive(engine, density)
        if state["step"] == 0:
            raise run.too_early("the first row")
        seen = min(state["step"] * engine.batch_size, problem.n)
        law = Normal(state["mean"], Dense.of(state["covariance"])).to(density.dtype, density.device)
        info = {
            "noise": noise,
            "linear": linear,
            "log_evidence": float(state["log_evidence"]) - seen * problem.log_scale,
        }
        kind = GaussianPosterior if linear else LinearisedPosterior
        return kind(problem, embedded(law, z, part), info)


@dataclass
class KalmanEngine(Engine):
    """One step is the update with a few rows.

    State: mean ``[P]`` and covariance ``[P, P]`` of the weights and log_evidence, in double precision.
    """

    problem: Problem
    batch_size: int
    noise: float
    prior: Normal
    label: str = field(default=KalmanFilter.name, init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the updates."""
        self.total = math.ceil(self.problem.n / self.batch_size)

    def init(self) -> State:
        """The prior."""
        mean = self.prior.mean.double()
        return {"mean": mean, "covariance": self.prior.covariance.double().dense(), "log_evidence": mean.new_zeros(())}

    def step(self, state: State) -> State:
        """Condition on the next rows.

        The covariance loses ``V^T V`` with V as high as there are targets: P^2 instead of the P^3 of Joseph's form.

        Raises:
            Divergence: the network's outputs, or their derivatives, are not finite.
        """
        first = state["step"] * self.batch_size
        rows = self.problem.minibatch(torch.arange(first, min(first + self.batch_size, self.problem.n)))
        outputs = _outputs(self.problem, rows[self.problem.x_name or "x"])
        at = state["mean"].to(self.problem.density.dtype)
        design, value = jacrev(outputs)(at).double(), outputs(at).double()
        away = rows[self.problem.y_name or "y"].double().reshape(-1) - value
        if not (design.isfinite().all() and away.isfinite().all()):
            raise Divergence(
                f"{self.label}: the outputs left the finite numbers at row {first} of {self.problem.n}; use a larger "
                "noise=, or a narrower prior."
            )
        across = design @ state["covariance"]
        spread = across @ design.mT
        spread.diagonal().add_(self.noise**2)
        root = torch.linalg.cholesky(spread)
        known = torch.linalg.solve_triangular(root, across, upper=False)
        white = torch.linalg.solve_triangular(root, away[:, None], upper=False)[:, 0]
        log_det = 2 * root.diagonal().log().sum() + len(away) * math.log(2 * math.pi)
        return state | {
            "mean": state["mean"] + white @ known,
            "covariance": state["covariance"] - known.mT @ known,
            "log_evidence": state["log_evidence"] - 0.5 * (white.square().sum() + log_det),
        }


def _weights(density: LogDensity) -> slice:
    """Where the network's parameters lie in z: they come first."""
    assert isinstance(density.model, BayesianNetwork)
    names = {site.name for site in density.model.sites}
    return slice(0, max(site.stop for site in density.sites if site.name in names))


def _outputs(problem: Problem, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The network's outputs, flat, as a function of its weights ``[P]``."""
    model: Any = problem.model
    sites = [site for site in problem.density.sites if site.stop <= _weights(problem.density).stop]

    def outputs(weights: Tensor) -> Tensor:
        values = {site.name: leaf for site, leaf in zip(sites, split(sites, weights), strict=True)}
        flat: Tensor = model.forward(values, x).reshape(-1)
        return flat

    return outputs


def _is_linear(problem: Problem, one: Tensor, other: Tensor) -> bool:
    """Whether the outputs have the same derivatives at two points, of some rows."""
    outputs = _outputs(problem, problem.batch[problem.x_name or "x"][:LOOKED_AT])
    here, there = (jacrev(outputs)(point.to(problem.density.dtype)) for point in (one, other))
    return bool(torch.allclose(here, there, rtol=1e-6, atol=1e-8))
