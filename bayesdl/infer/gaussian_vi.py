"""What the methods of Gaussian variational inference share: settings, start, run, and what is told of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.density.sites import random_sites
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.gaussian_families import Family
from bayesdl.infer.gaussian_objective import standard_error
from bayesdl.infer.gradient_quality import gradient_quality
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.row_noise import KINDS, row_noise
from bayesdl.infer.schedules import Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.training import thinned
from bayesdl.infer.variational_engine import GaussianEngine
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

FEWEST_DRAWS, MOST_DRAWS = 10, 200
"""Draws behind the ELBO that the posterior reports: within these, as many as cost a fraction of the training."""


@dataclass(frozen=True)
class GaussianVI(Method):
    r"""Settings and fit of the methods that maximise the ELBO over Gaussians q in unconstrained coordinates.

    ``ELBO = E_q[log p(z, y)] + H(q) = E_q[log p(y | z)] - KL(q || p)``. For T other than 1 the target is p(z, y)^(1/T),
    as everywhere. ``pyro.param`` sites get a point. Draws of z come as antithetic pairs where the ELBO allows it.

    The learning rate falls along a cosine, and the result is the mean of the parameters over the last quarter of the
    steps, which takes most of the gradient noise out of it.

    ``posterior.info`` tells the ELBO of the result and its Monte-Carlo error, the bound's estimates along the way, and
    under "gradient" how good a step's gradient estimate is there (see ``gradient_quality``).

    Args:
        steps: updates.
        batch_size: rows in a mini-batch; None takes all rows.
        samples: draws of z for one gradient.
        learning_rate: of Adam, in units of the unconstrained coordinates and of log sd; a number starts a cosine to
            zero, a Schedule is taken as it is.
        initial_scale: sd at the start, relative to the prior's at the coordinates where that is Gaussian; with
            ``prior=`` it is the prior's.
        random: names of the sites that are Gaussian, as patterns ("2.*"), one or several. All others get a point, the
            mode of what is left: in unconstrained coordinates, with their prior. So a last layer alone can be random.
        estimator: of the gradient. "sticking" differentiates log p - log q along the draws alone, without the score
            (Roeder et al., 2017): it has no variance at all where q is the posterior. "reparameterisation" is the plain
            one: the entropy, or the KL from a prior that is Gaussian in z, in closed form. "score" takes values instead
            of slopes, for densities that are flat or jump (see ``ScoreObjective``); it is noisier by far. For networks,
            and q with independent coordinates: "local" (local reparameterisation; Kingma et al., 2015) and "flipout"
            (Wen et al., 2018) draw the weights of linear and convolutional layers for each row, so that the gradient's
            variance falls with the batch and ``samples=1`` is enough. "local" is exact for linear layers and takes the
            pixels of a convolution for independent, "flipout" is unbiased for both (``bayesdl.models.local_noise``).
            Other parameters, layers that run twice, and priors that are not Gaussian have one draw for all rows.
        alpha: order of Renyi's divergence behind the bound ``log E[mean w^(1 - alpha)] / (1 - alpha)`` over ``samples``
            draws with weights w = p/q (Li & Turner, 2016): 1 is the ELBO, 0 the importance-weighted bound (IWAE; Burda
            et al., 2016). Smaller orders cover the posterior better. Takes all rows: of mini-batches these bounds would
            be biased.
        kl_weight: beta of the beta-VAE, ``E_q[log p(y | z)] - beta KL(q || p)``: a number, or a Schedule such as
            ``schedules.Warmup(1000)``. What a weight other than 1 at the end finds is no approximation of the Bayesian
            posterior, but of the one with ``likelihood_temperature=beta``. It needs a prior that is Gaussian in z.
    """

    takes_parameters: ClassVar[bool] = True
    estimators: ClassVar[tuple[str, ...]] = ("sticking", "reparameterisation", "score")

    steps: int = 3000
    batch_size: int | None = None
    samples: int = 8
    learning_rate: float | Schedule = 0.02
    initial_scale: float = 0.1
    random: str | tuple[str, ...] = "*"
    estimator: str = "sticking"
    alpha: float = 1.0
    kl_weight: float | Schedule = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps, samples=self.samples)
        check.whole_or_none(self.name, batch_size=self.batch_size)
        check.rate(self.name, learning_rate=self.learning_rate, kl_weight=self.kl_weight)
        check.positive(self.name, initial_scale=self.initial_scale)
        check.one_of(self.name, self.estimators, estimator=self.estimator)
        if not isinstance(self.random, str):
            object.__setattr__(self, "random", tuple(self.random))
        check.share(self.name, alpha=self.alpha)
        if self.alpha != 1 and (self.batch_size is not None or self.estimator != "sticking"):
            raise MethodError(
                f"{self.name}(alpha={self.alpha!r}) takes all rows (batch_size=None), because of mini-batches the "
                "bound is biased, and estimator='sticking', which is its doubly reparameterised gradient."
            )
        if self.estimator == "score" and (self.samples < 2 or self.kl_weight != 1):
            raise MethodError(
                f"{self.name}(estimator='score') compares draws, so that samples must be at least 2, and has no "
                "kl_weight: use likelihood_temperature."
            )
        if self.kl_weight != 1 and (self.alpha, self.temperature, self.likelihood_temperature) != (1, 1, 1):
            raise MethodError(
                f"{self.name}: kl_weight, a temperature and alpha are three ways to leave the Bayesian ELBO; use one. "
                "A constant kl_weight=b finds the same as likelihood_temperature=b."
            )

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        try:
            random = self.where_random(density)
        except MethodError as error:
            return str(error).rstrip(".")
        if not bool(random.any()):
            return f"of the sites that random={self.random!r} names none has a prior: there is nothing to be random"
        if self.kl_weight != 1 and density.gaussian_prior() is None:
            return (
                "kl_weight needs a prior that is an independent Gaussian in unconstrained coordinates; a constant "
                "kl_weight=b finds the same as likelihood_temperature=b, which takes any prior"
            )
        if self.estimator == "score" and not bool(random.all()):
            return "estimator='score' has no slope by which a point could move; use random='*', or estimator='sticking'"
        if self.estimator in KINDS:
            found = row_noise(density, self.random, self.estimator)
            if isinstance(found, str):
                return found
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """One gradient of all particles a step; the search for a start comes on top."""
        return Work(self.samples, self.steps, 2, "and a short MAP to start from")

    def where_random(self, density: LogDensity) -> Tensor:
        """Which coordinates are Gaussian, booleans ``[D]``."""
        found = torch.zeros(density.dim, dtype=torch.bool, device=density.device)
        for site in random_sites(density.sites, self.random):
            found[site.start : site.stop] = True
        return found

    def dim(self, density: LogDensity) -> int:
        """R, the number of random coordinates."""
        return int(self.where_random(density).sum())

    @abstractmethod
    def family(self, density: LogDensity) -> Family:
        """The family of Gaussians over the random coordinates."""

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        law, info = self.approximate(problem, run, lambda: self._start(problem, run))
        return GaussianPosterior(problem, law, info)

    def _start(self, problem: Problem, run: Run) -> Tensor:
        """Mean at a mode, or as ``init`` says; small sd, so that the first gradients are those of training.

        An earlier posterior as the prior has been through training: its own sd is where to go on.
        """
        mean = start(problem, run, 1, default="map", batch_size=self.batch_size)[0]
        random = self.where_random(problem.density)
        scale = self.initial_scale if problem.density.new_prior is None else 1.0
        sd = scale * problem.density.prior_scale[random]
        stream = generator(run.seed, "spread", device=sd.device)
        return torch.cat([mean, self.family(problem.density).start(sd, stream)])

    def engine(self, problem: Problem, seed: int, begin: Callable[[], Tensor]) -> GaussianEngine:
        """What runs the optimisation, from the parameters ``[P]`` that ``begin`` gives."""
        random = self.where_random(problem.density)
        return GaussianEngine(self, problem, random, self.family(problem.density), seed, begin)

    def approximate(self, problem: Problem, run: Run, begin: Callable[[], Tensor]) -> tuple[Normal, dict[str, Any]]:
        """Run the optimisation.

        Args:
            problem: the model and the rows to condition on.
            run: how to run.
            begin: gives the parameters ``[P]`` to start from: the mean, then the family's spread.

        Returns:
            The Gaussian, and what to tell of the run.

        Raises:
            Divergence: the ELBO is not finite.
        """
        engine = self.engine(problem, run.seed, begin)
        engine.expect()
        objective = engine.objective
        state = run.drive(engine, objective.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        parameters, stream = state["average"], generator(run.seed, "final ELBO", device=problem.density.device)
        log_weights = objective.log_weights(parameters, objective.normals(self._final_draws(problem), stream))
        elbo = float(log_weights.mean())
        if not math.isfinite(elbo):
            raise engine.diverged(state["step"])
        info = {
            "steps": state["step"],
            "elbo": elbo,
            "elbo_error": float(standard_error(log_weights, paired=objective.paired)),
            "elbo_trace": thinned(state["trace"][:1, : state["step"]])[0],
            "elbo_trace_error": thinned(state["trace"][1:, : state["step"]])[0],
            "gradient": gradient_quality(engine, parameters, run.seed),
            "execution": objective.density.execution,
        }
        return objective.law(parameters), info

    def _final_draws(self, problem: Problem) -> int:
        """A draw passes all rows once, without a gradient; so many that training passes them four times a draw."""
        epochs = self.steps if self.batch_size is None else self.steps * self.batch_size // problem.n
        return min(max(epochs * self.samples // 4, FEWEST_DRAWS), MOST_DRAWS)
