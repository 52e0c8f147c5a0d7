"""Mean-field variational inference: the best Gaussian with independent coordinates (Blundell et al., 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density.log_density import Target
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.optimisers import slots_like, update
from bayesdl.infer.schedules import Cosine, Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.training import thinned
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

FINAL_PARTICLES = 200  # draws behind the ELBO that the posterior reports


@dataclass(frozen=True)
class MeanFieldVI(Method):
    r"""Maximises the ELBO over q = N(mean, diag sd^2) in unconstrained coordinates.

    ``ELBO = E_q[log p(y | z)] - KL(q || p)`` where the prior is Gaussian there, the KL in closed form, and
    ``E_q[log pi_T(z)] + H(q)`` otherwise. Gradients are reparameterised, z = mean + sd * eps, with antithetic pairs of
    eps. For T other than 1 the target is p(z, y)^(1/T), as everywhere. ``pyro.param`` sites get a mean and sd 0.

    The learning rate falls along a cosine, and the result is the mean of (mean, log sd) over the last quarter of the
    steps, which takes most of the gradient noise out of it.

    With ``fit(..., prior_rows=A)`` the method first runs on the rows A alone; the Gaussian that it finds is the prior
    for the run on the other rows. Scaler and prior then have not seen the rows that a PAC-Bayes bound counts.

    Args:
        steps: updates.
        batch_size: rows in a mini-batch; None takes all rows.
        samples: draws of z for one gradient.
        learning_rate: of Adam, in units of the unconstrained coordinates and of log sd; a number starts a cosine to
            zero, a Schedule is taken as it is.
        initial_scale: sd at the start, relative to the prior's at the coordinates where that is Gaussian; with
            ``prior=`` it is the prior's.
    """

    name: ClassVar[str] = "MeanFieldVI"
    takes_parameters: ClassVar[bool] = True
    learns_prior: ClassVar[bool] = True

    steps: int = 3000
    batch_size: int | None = None
    samples: int = 8
    learning_rate: float | Schedule = 0.02
    initial_scale: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, steps=self.steps, samples=self.samples)
        check.whole_or_none(self.name, batch_size=self.batch_size)
        check.rate(self.name, learning_rate=self.learning_rate)
        check.positive(self.name, initial_scale=self.initial_scale)

    def work(self, problem: Problem) -> Work:
        """One gradient of all particles a step; the search for a start comes on top."""
        return Work(self.samples, self.steps, 2, "and a short MAP to start from")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        if run.learn_prior:
            return self._fit_with_learnt_prior(problem, run)
        mean, sd, info = self.approximate(problem, run, lambda: self._start(problem, run))
        return GaussianPosterior(problem, Normal(mean, Diagonal(sd)), info)

    def _fit_with_learnt_prior(self, problem: Problem, run: Run) -> Posterior:
        """The Bayesian update in two stages: q on rows A is the prior of the run on the other rows."""
        if self.temperature != 1:
            raise MethodError(
                f"{self.name}(temperature={self.temperature!r}) with prior_rows would temper the learnt prior twice; "
                "use temperature=1 (likelihood_temperature is possible)."
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
        prior_mean, prior_sd, prior_info = self.approximate(first, stage, lambda: self._start(first, stage))
        if run.tally.interrupted:
            raise run.too_early("the prior was learnt")
        update = replace(second, density=second.density.with_gaussian_prior(prior_mean, prior_sd))
        mean, sd, info = self.approximate(update, run, lambda: torch.stack([prior_mean, prior_sd.log()]))
        info["prior"] = {"rows": int(early.sum()), **prior_info}
        # The posterior has seen all rows; what it is compared with is the learnt prior.
        learnt = replace(problem, density=problem.density.with_gaussian_prior(prior_mean, prior_sd))
        return GaussianPosterior(learnt, Normal(mean, Diagonal(sd)), info)

    def _start(self, problem: Problem, run: Run) -> Tensor:
        """Mean at a mode, or as ``init`` says; small sd, so that the first gradients are those of training.

        An earlier posterior as the prior has been through training: its own sd is where to go on.
        """
        mean = start(problem, run, 1, default="map", batch_size=self.batch_size)[0]
        scale = self.initial_scale if problem.density.new_prior is None else 1.0
        return torch.stack([mean, (scale * problem.density.prior_scale).log()])

    def approximate(
        self, problem: Problem, run: Run, begin: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Run the optimisation.

        Args:
            problem: the model and the rows to condition on.
            run: how to run.
            begin: gives the start, ``[2, D]``: mean and log sd.

        Returns:
            Mean ``[D]``, sd ``[D]``, and what to tell of the run: the ELBO of the result with its Monte-Carlo error,
            the ELBO's estimates along the way and theirs.

        Raises:
            Divergence: the ELBO or its gradient is not finite.
        """
        engine = MeanFieldEngine(self, problem, run.seed, begin)
        state = run.drive(engine, problem.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        parameters = state["average"]
        noise = _antithetic(FINAL_PARTICLES, parameters, generator(run.seed, "final ELBO"))
        elbo = engine.elbo(parameters, noise)
        info = {
            "steps": state["step"],
            "elbo": float(elbo.mean()),
            "elbo_error": float(_standard_error(elbo)),
            "elbo_trace": thinned(state["trace"][:1, : state["step"]])[0],
            "elbo_trace_error": thinned(state["trace"][1:, : state["step"]])[0],
        }
        return parameters[0], parameters[1].exp() * engine.random, info


@dataclass
class MeanFieldEngine(Engine):
    """One step of stochastic gradient ascent on the ELBO.

    State: parameters ``[2, D]``, mean and log sd; average ``[2, D]`` over the last quarter; slot.* ``[2, D]``; trace
    ``[2, total]``, the ELBO's estimates and their standard errors; noise, the generator of eps; order.*, the data
    order.
    """

    method: MeanFieldVI
    problem: Problem
    seed: int
    begin: Callable[[], Tensor]
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the data order, the learning rates, how the ELBO is written, and which coordinates are random."""
        self.label, self.total = self.method.name, self.method.steps
        self.order = DataOrder(self.problem, self.method.batch_size, 1, self.seed)
        rate = self.method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)
        # Under a temperature the prior's part is tempered too, and the closed form no longer fits.
        self.prior = self.problem.density.gaussian_prior() if self.method.temperature == 1 else None
        self.target: Target = "posterior" if self.prior is None else "likelihood"
        flags = [float(site.scope != "param") for site in self.problem.density.sites for _ in range(site.size)]
        self.random = torch.tensor(flags, dtype=self.problem.density.dtype, device=self.problem.density.device)

    def init(self) -> State:
        """The start, zero moments, fresh generators."""
        parameters = self.begin()
        state: State = {
            "parameters": parameters,
            "average": parameters.clone(),
            "trace": parameters.new_full((2, self.total), math.nan),
            "noise": generator(self.seed, self.label, "noise"),
        }
        return state | slots_like("adam", parameters) | self.order.init()

    def step(self, state: State) -> State:
        """Draw eps, take the gradient, move, average."""
        step, parameters = state["step"], state["parameters"]
        rows, moved = self.order.next(state)
        batch = None if rows is None else self.problem.minibatch(rows[0])
        noise = _antithetic(self.method.samples, parameters, state["noise"])
        elbo, gradient = self.elbo_and_gradient(parameters, noise, batch)
        if not (elbo.isfinite().all() and gradient.isfinite().all()):
            rate = self.schedule(step)
            raise Divergence(
                f"{self.label}: the ELBO left the finite numbers at step {step} of {self.total} (learning rate "
                f"{rate:.3g}); try learning_rate={rate / 10:.1g}, a smaller initial_scale, or check the data's scale."
            )
        direction, slots = update("adam", -gradient, state, step)
        new = state | moved | slots | {"parameters": parameters - self.schedule(step) * direction}
        new["trace"][0, step] = elbo.mean()
        new["trace"][1, step] = _standard_error(elbo)
        tail = max(step + 1 - self.total * 3 // 4, 1)
        new["average"] = state["average"].lerp(new["parameters"], 1 / tail)
        return new

    def status(self, state: State) -> str:
        """The latest estimate of the ELBO."""
        return f"ELBO {float(state['trace'][0, max(state['step'] - 1, 0)]):.5g}"

    def elbo_and_gradient(
        self, parameters: Tensor, noise: Tensor, batch: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor]:
        """One estimate of the ELBO per draw, and the gradient of their mean.

        With z = mean + sd * eps and g = d log density / dz: d/d mean = E[g], d/d log sd = E[g * eps] sd, plus the part
        without noise and the control variate.

        Args:
            parameters: ``[2, D]``.
            noise: eps ``[S, D]``.
            batch: a mini-batch or None.

        Returns:
            ``[S]`` and ``[2, D]``.
        """
        mean, sd = parameters[0], parameters[1].exp()
        noise = noise * self.random
        value, slope = self.problem.density.value_and_grad(mean + sd * noise, batch, target=self.target)
        rest, rest_gradient, curvature = self._closed_form(parameters)
        slope = slope + curvature / sd * noise
        gradient = torch.stack([slope.mean(0), (slope * noise).mean(0) * sd - curvature])
        return value + rest + _control(curvature, noise), gradient + rest_gradient

    def elbo(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Estimates ``[S]`` of the ELBO with all rows, at parameters ``[2, D]`` with eps ``[S, D]``."""
        rest, _, curvature = self._closed_form(parameters)
        noise = noise * self.random
        value = self.problem.density.log_density(parameters[0] + parameters[1].exp() * noise, target=self.target)
        return value + rest + _control(curvature, noise)

    def _closed_form(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ELBO's part without noise, its gradient, and the curvature c ``[D]`` of the control variate.

        The part is -KL(q || p) where p is Gaussian, else the entropy of q. At the optimum the density under the
        expectation has the mean curvature -c / sd^2, c = 1 - (sd / prior sd)^2 (c = 1 with the entropy). So its
        estimate is given c / 2 sum (eps^2 - 1), which has mean zero and takes the curvature's noise out; with c = 1
        this is the path gradient of Roeder et al. (2017).
        """
        mean, log_sd = parameters
        if self.prior is None:
            entropy = (self.random * (log_sd + 0.5 * math.log(2 * math.pi * math.e))).sum()
            return entropy, torch.stack([torch.zeros_like(mean), self.random]), self.random
        centre, scale = self.prior
        away, ratio = (mean - centre) / scale, (log_sd - scale.log()).exp().square()
        kl = 0.5 * (ratio + away.square() - 1) - log_sd + scale.log()
        return -kl.sum(), torch.stack([-away / scale, 1 - ratio]), (1 - ratio).clamp(min=0)


def _control(curvature: Tensor, noise: Tensor) -> Tensor:
    return 0.5 * (curvature * (noise.square() - 1)).sum(-1)


def _antithetic(samples: int, parameters: Tensor, stream: torch.Generator) -> Tensor:
    """Noise eps ``[S, D]`` whose second half is the negative of the first, which cancels its odd powers."""
    shape = (samples + 1) // 2, parameters.shape[1]
    half = torch.randn(shape, dtype=parameters.dtype, generator=stream).to(parameters.device)
    return torch.cat([half, -half])[:samples]


def _standard_error(estimates: Tensor) -> Tensor:
    """Standard error of a mean of estimates whose halves are antithetic pairs; NaN with fewer than two pairs."""
    pairs = len(estimates) // 2
    means = (estimates[:pairs] + estimates[-pairs:]) / 2 if 2 * pairs == len(estimates) else estimates
    return means.std() / math.sqrt(len(means)) if len(means) > 1 else means.new_tensor(math.nan)
