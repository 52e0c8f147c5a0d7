"""Variational inference with Gaussians: independent coordinates, low rank plus diagonal, and full covariance."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.density.sites import random_sites
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.gaussian_families import Family, FullRank, LowRankPlusDiagonal, MeanField
from bayesdl.infer.gradient_quality import gradient_quality
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.schedules import Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.training import thinned
from bayesdl.infer.variational_engine import GaussianEngine, standard_error
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import MOST_DENSE
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

FEWEST_DRAWS, MOST_DRAWS = 10, 200
"""Draws behind the ELBO that the posterior reports: within these, as many as cost a fraction of the training."""
ESTIMATORS = ("sticking", "reparameterisation")


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
            one: the entropy, or the KL from a prior that is Gaussian in z, in closed form.
        alpha: order of Renyi's divergence behind the bound ``log E[mean w^(1 - alpha)] / (1 - alpha)`` over ``samples``
            draws with weights w = p/q (Li & Turner, 2016): 1 is the ELBO, 0 the importance-weighted bound (IWAE; Burda
            et al., 2016). Smaller orders cover the posterior better. Takes all rows: of mini-batches these bounds would
            be biased.
        kl_weight: beta of the beta-VAE, ``E_q[log p(y | z)] - beta KL(q || p)``: a number, or a Schedule such as
            ``schedules.Warmup(1000)``. What a weight other than 1 at the end finds is no approximation of the Bayesian
            posterior, but of the one with ``likelihood_temperature=beta``. It needs a prior that is Gaussian in z.
    """

    takes_parameters: ClassVar[bool] = True

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
        check.one_of(self.name, ESTIMATORS, estimator=self.estimator)
        if not isinstance(self.random, str):
            object.__setattr__(self, "random", tuple(self.random))
        check.share(self.name, alpha=self.alpha)
        if self.alpha != 1 and (self.batch_size is not None or self.estimator != "sticking"):
            raise MethodError(
                f"{self.name}(alpha={self.alpha!r}) takes all rows (batch_size=None), because of mini-batches the "
                "bound is biased, and estimator='sticking', which is its doubly reparameterised gradient."
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

    @abstractmethod
    def family(self, dim: int) -> Family:
        """The family of Gaussians over ``dim`` random coordinates."""

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
        return torch.cat([mean, self.family(len(sd)).start(sd, stream)])

    def engine(self, problem: Problem, seed: int, begin: Callable[[], Tensor]) -> GaussianEngine:
        """What runs the optimisation, from the parameters ``[P]`` that ``begin`` gives."""
        random = self.where_random(problem.density)
        return GaussianEngine(self, problem, random, self.family(int(random.sum())), seed, begin)

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
        state = run.drive(engine, problem.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        parameters, stream = state["average"], generator(run.seed, "final ELBO", device=problem.density.device)
        log_weights = engine.log_weights(parameters, engine.noise(self._final_draws(problem), stream))
        elbo = float(log_weights.mean())
        if not math.isfinite(elbo):
            raise engine.diverged(state["step"])
        info = {
            "steps": state["step"],
            "elbo": elbo,
            "elbo_error": float(standard_error(log_weights, paired=self.alpha == 1)),
            "elbo_trace": thinned(state["trace"][:1, : state["step"]])[0],
            "elbo_trace_error": thinned(state["trace"][1:, : state["step"]])[0],
            "gradient": gradient_quality(engine, parameters, run.seed),
            "execution": problem.density.execution,
        }
        return engine.law(parameters), info

    def _final_draws(self, problem: Problem) -> int:
        """A draw passes all rows once, without a gradient; so many that training passes them four times a draw."""
        epochs = self.steps if self.batch_size is None else self.steps * self.batch_size // problem.n
        return min(max(epochs * self.samples // 4, FEWEST_DRAWS), MOST_DRAWS)


@dataclass(frozen=True)
class MeanFieldVI(GaussianVI):
    r"""Maximises the ELBO over q = N(mean, diag sd^2): Gaussians with independent coordinates (Blundell et al., 2015).

    The settings are those of ``GaussianVI``. On a Gaussian posterior the optimum has its mean, and the variances
    1 / diag(precision): smaller than the marginal ones wherever coordinates depend on each other.

    With ``fit(..., prior_rows=A)`` the method first runs on the rows A alone; the Gaussian that it finds is the prior
    for the run on the other rows. Scaler and prior then have not seen the rows that a PAC-Bayes bound counts.
    """

    name: ClassVar[str] = "MeanFieldVI"
    learns_prior: ClassVar[bool] = True

    def family(self, dim: int) -> MeanField:
        """Independent coordinates."""
        return MeanField(dim)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        return self._fit_with_learnt_prior(problem, run) if run.learn_prior else super()._fit(problem, run)

    def _fit_with_learnt_prior(self, problem: Problem, run: Run) -> Posterior:
        """The Bayesian update in two stages: q on rows A is the prior of the run on the other rows."""
        if self.temperature != 1:
            raise MethodError(
                f"{self.name}(temperature={self.temperature!r}) with prior_rows would temper the learnt prior twice; "
                "use temperature=1 (likelihood_temperature is possible)."
            )
        if not bool(self.where_random(problem.density).all()):
            raise MethodError(
                f"{self.name} with prior_rows learns a density for every coordinate; it cannot have points. Use "
                "random='*', and give every pyro.param a prior."
            )
        assert problem.rows is not None  # prepare refuses prior_rows otherwise
        assert problem.prior_rows is not None  # likewise
        early = problem.rows.isin(problem.prior_rows)
        if bool(early.all()):
            raise MethodError(
                f"prior_rows holds all {len(early)} rows: none are left to update the prior with. Give a part of them."
            )
        first, second = (problem.restrict(index.nonzero().flatten()) for index in (early, ~early))
        stage = run.stage("prior")
        stage.init = run.init
        prior, prior_info = self.approximate(first, stage, lambda: self._start(first, stage))
        if run.tally.interrupted:
            raise run.too_early("the prior was learnt")
        sd = prior.covariance.variances().sqrt()
        update = replace(second, density=second.density.with_gaussian_prior(prior.mean, sd))
        law, info = self.approximate(update, run, lambda: torch.cat([prior.mean, sd.log()]))
        info["prior"] = {"rows": int(early.sum()), **prior_info}
        # The posterior has seen all rows; what it is compared with is the learnt prior.
        learnt = replace(problem, density=problem.density.with_gaussian_prior(prior.mean, sd))
        return GaussianPosterior(learnt, law, info)


@dataclass(frozen=True)
class LowRankVI(GaussianVI):
    """Maximises the ELBO over q = N(mean, diag sd^2 + F F^T) with F of a few columns (Ong et al., 2018).

    The settings are those of ``GaussianVI``, and the rank. The parameters take D (rank + 2) numbers. With rank D - 1
    the family holds every Gaussian.

    Args:
        rank: columns of F.
    """

    name: ClassVar[str] = "LowRankVI"

    rank: int = 10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, rank=self.rank)

    def family(self, dim: int) -> LowRankPlusDiagonal:
        """Low rank plus diagonal."""
        return LowRankPlusDiagonal(dim, self.rank)


@dataclass(frozen=True)
class FullRankVI(GaussianVI):
    """Maximises the ELBO over all Gaussians q, by their Cholesky factor.

    The settings are those of ``GaussianVI``. On a Gaussian posterior the optimum is the posterior, and the ELBO the
    log evidence. It carries some R x R matrices for R random coordinates, and a draw costs R^2.
    """

    name: ClassVar[str] = "FullRankVI"

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        count = int(self.where_random(density).sum())
        if count > MOST_DENSE:
            gigabytes = 8 * count**2 * density.dtype.itemsize / 2**30
            return (
                f"a full covariance of {count} coordinates takes about {gigabytes:,.0f} GiB with its optimiser; use "
                "LowRankVI, or random='...' for the sites that need it (a last layer, say)"
            )
        return super().applies_to(density)

    def family(self, dim: int) -> FullRank:
        """All Gaussians."""
        return FullRank(dim)
