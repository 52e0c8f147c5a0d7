"""The engine of Gaussian variational inference: one step of stochastic gradient ascent, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density.gaussian_part import GaussianPart
from bayesdl.density.log_density import Target
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.data_order import DataOrder
from bayesdl.infer.gaussian_families import Family
from bayesdl.infer.loop import Engine
from bayesdl.infer.optimisers import slots_like, update
from bayesdl.infer.schedules import Cosine, Schedule, as_schedule
from bayesdl.posterior.covariance import Covariance
from bayesdl.posterior.importance import MOST_NUMBERS, log_density
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import among
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    from bayesdl.infer.variational import GaussianVI


@dataclass
class GaussianEngine(Engine):
    """One gradient estimate and one update of Adam a step.

    State: parameters ``[P]``, the mean ``[D]`` and then the family's spread; average ``[P]`` over the last quarter;
    slot.* ``[P]``; trace ``[2, total]``, the bound's estimates and their standard errors; noise, the generator of the
    draws; order.*, the data order.

    Attributes:
        method: the settings.
        problem: the model and its data.
        random: which coordinates are Gaussian, booleans ``[D]``; the others are points.
        family: of the random coordinates.
        seed: seed of the streams.
        begin: the parameters to start from.
    """

    method: GaussianVI
    problem: Problem
    random: Tensor
    family: Family
    seed: int
    begin: Callable[[], Tensor]
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the data order, the schedules, and how the bound is written."""
        method, density = self.method, self.problem.density
        self.label, self.total = method.name, method.steps
        self.order = DataOrder(self.problem, method.batch_size, 1, self.seed)
        rate = method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)
        self.kl_weight = as_schedule(method.kl_weight, "kl_weight")
        # Under a temperature the prior's part is tempered too, and the closed form no longer fits.
        prior = density.gaussian_prior() if method.temperature == 1 else None
        self.prior = None if prior is None else GaussianPart(frozenset(), prior[0], prior[1].square().reciprocal())
        self.closed = method.estimator == "reparameterisation" and self.prior is not None
        self.target: Target = "likelihood" if self.closed else "posterior"
        self.places = None if bool(self.random.all()) else self.random.nonzero().flatten()

    def expect(self) -> None:
        """Tell the density how many gradients are to come, so that it may compile itself."""
        density = self.problem.density
        z = torch.zeros(self.method.samples, density.dim, dtype=density.dtype, device=density.device)
        batch = None if self.order.size is None else self.problem.minibatch(torch.arange(self.order.size))
        density.expect(self.total, z, batch, target=self.target)

    def init(self) -> State:
        """The start, zero moments, fresh generators."""
        parameters = self.begin()
        state: State = {
            "parameters": parameters,
            "average": parameters,
            "trace": parameters.new_full((2, self.total), math.nan),
            "noise": generator(self.seed, self.label, "noise", device=parameters.device),
        }
        return state | self.slots(parameters) | self.order.init()

    def step(self, state: State) -> State:
        """Draw, take the gradient, move, average."""
        step = state["step"]
        batch, moved = self._next_batch(state)
        noise = self.noise(self.method.samples, state["noise"])
        log_weights, gradient = self.estimate(state["parameters"], noise, batch, self.kl_weight(step))
        bound, error = self.bound(log_weights)
        if not bound.isfinite():  # a gradient that is not finite makes the next one so
            raise self.diverged(step)
        new = state | moved | self.move(state, gradient)
        new["trace"][0, step], new["trace"][1, step] = bound, error
        tail = step + 1 - self.total * 3 // 4
        new["average"] = state["average"].lerp(new["parameters"], 1 / tail) if tail > 1 else new["parameters"]
        return new

    def status(self, state: State) -> str:
        """The latest estimate of the bound."""
        return f"ELBO {float(state['trace'][0, max(state['step'] - 1, 0)]):.5g}"

    def diverged(self, step: int) -> Divergence:
        """The error to raise when the bound is not finite."""
        rate = self.schedule(min(step, self.total - 1))
        return Divergence(
            f"{self.label}: the ELBO left the finite numbers at step {step} of {self.total} (learning rate "
            f"{rate:.3g}); try learning_rate={rate / 10:.1g}, a smaller initial_scale, or check the data's scale."
        )

    # -- how the parameters move -------------------------------------------------------------------------------

    def slots(self, parameters: Tensor) -> State:
        """What ``move`` keeps in the state."""
        return slots_like("adam", parameters)

    def move(self, state: State, gradient: Tensor) -> State:
        """The parameters and slots after one update uphill along a gradient ``[P]``."""
        direction, slots = update("adam", gradient, state, state["step"])
        return slots | {"parameters": state["parameters"].add(direction, alpha=self.schedule(state["step"]))}

    # -- estimates ---------------------------------------------------------------------------------------------

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and spread ``[size]``."""
        return parameters[: len(self.random)], parameters[len(self.random) :]

    def law(self, parameters: Tensor) -> Normal:
        """The Gaussian that parameters stand for."""
        mean, spread = self.split(parameters)
        return Normal(mean, among(self.family.covariance(spread), self.random))

    def noise(self, samples: int, stream: torch.Generator) -> Tensor:
        """Standard normal numbers ``[samples, noise_dim]``.

        The second half is the negative of the first, which cancels odd powers; not for importance-weighted bounds,
        whose gradients take independent draws.
        """
        pairs = (samples + 1) // 2 if self.method.alpha == 1 else samples
        density = self.problem.density
        half = torch.empty(pairs, self.family.noise_dim, dtype=density.dtype, device=density.device)
        half.normal_(generator=stream)
        return half if pairs == samples else torch.cat([half, -half])[:samples]

    def estimate(
        self, parameters: Tensor, noise: Tensor, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Estimates of the ELBO by draw, and the gradient of the objective.

        With z = mean + A e and g the gradient of the density at z, the path's slope is h = g + S^-1 A e ("sticking":
        that of log density - log q, with q held fixed) or h = g ("reparameterisation"; the entropy, or the KL from a
        Gaussian prior, is then added in closed form). The mean moves along the weighted sum of h, the spread along what
        the family pulls back through A.

        Args:
            parameters: ``[P]``.
            noise: e, ``[S, noise_dim]``.
            batch: a mini-batch or None.
            kl_weight: beta; the estimates have beta = 1 all the same.

        Returns:
            ``[S]`` and ``[P]``.
        """
        mean, spread = self.split(parameters)
        covariance = self.family.covariance(spread)
        away = covariance.scaled(noise)
        z = self._displaced(mean, away)
        value, slope = self.problem.density.value_and_grad(z, batch, target=self.target)
        if self.closed:
            value = value + self._expected_log_prior(mean, covariance) + self._entropy(spread)
        elif self.method.estimator == "sticking":
            score = covariance.solve(away)
            value = value + self._entropy(spread) + 0.5 * (torch.linalg.vecdot(away, score) - self.family.dim)
            slope = self._displaced(slope, score, kl_weight)
        else:
            value = value + self._entropy(spread)
        if kl_weight != 1.0 and not self.closed:
            slope = slope + (1.0 - kl_weight) * self._prior_pull(z)
        if len(slope) > 1:
            slope = slope * self._shares(value)[:, None]
        own = slope if self.places is None else slope[:, self.places]
        moved, spread_gradient = (
            slope.sum(0) if len(slope) > 1 else slope[0],
            self.family.pull(spread, noise, away, own),
        )
        if self.method.estimator == "reparameterisation":
            spread_gradient = spread_gradient + kl_weight * self.family.entropy_gradient(spread)
        if self.closed:
            precision = self._prior_precision()
            moved = moved - kl_weight * self._prior_pull(mean)
            spread_gradient = spread_gradient - kl_weight * self.family.trace_gradient(spread, precision)
        return value, torch.cat([moved, spread_gradient])

    def log_weights(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Log density (of all rows) less log q, at the draws that noise ``[S, noise_dim]`` gives; ``[S]``."""
        mean, spread = self.split(parameters)
        covariance, found = self.family.covariance(spread), []
        for part in noise.split(max(1, MOST_NUMBERS // len(mean))):
            away = covariance.scaled(part)
            value = log_density(self.problem, self._displaced(mean, away), self.order.size)
            square = torch.linalg.vecdot(away, covariance.solve(away))
            found.append(value + self._entropy(spread) + 0.5 * (square - self.family.dim))
        return torch.cat(found)

    def bound(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of order alpha, ``log mean w^(1 - alpha) / (1 - alpha)``, and its standard error."""
        order = 1.0 - self.method.alpha
        if order == 0.0:
            return log_weights.mean(), standard_error(log_weights)
        count = len(log_weights)
        bound = (torch.logsumexp(order * log_weights, 0) - math.log(count)) / order
        return bound, standard_error((order * (log_weights - bound)).exp(), paired=False) / order

    # -- inside ------------------------------------------------------------------------------------------------

    def _next_batch(self, state: State) -> tuple[dict[str, Any] | None, State]:
        rows, moved = self.order.next(state)
        return None if rows is None else self.problem.minibatch(rows[0]), moved

    def _displaced(self, base: Tensor, away: Tensor, factor: float = 1.0) -> Tensor:
        """``base [D]`` or ``[S, D]`` plus a multiple of rows ``[S, R]`` at the random coordinates."""
        if self.places is None:
            return torch.add(base, away, alpha=factor)
        return base.expand(len(away), -1).index_add(1, self.places, away, alpha=factor)

    def _shares(self, value: Tensor) -> Tensor:
        """How much each draw's slope counts, ``[S]``: equally in the ELBO.

        In the bound of order alpha it is ``alpha v + (1 - alpha) v^2`` with v the normalised weights w^(1 - alpha)
        (Daudel et al., 2023, theorem 2; with alpha = 0 the gradient of Tucker et al., 2019).
        """
        alpha = self.method.alpha
        if alpha == 1:
            return torch.full_like(value, 1.0 / len(value))
        weights = ((1.0 - alpha) * value).softmax(0)
        return alpha * weights + (1.0 - alpha) * weights.square()

    def _entropy(self, spread: Tensor) -> Tensor:
        return self.family.half_log_det(spread) + 0.5 * self.family.dim * math.log(2.0 * math.pi * math.e)

    def _prior_pull(self, z: Tensor) -> Tensor:
        """Minus the gradient of the log prior, which is Gaussian, at ``z [..., D]``."""
        assert self.prior is not None  # the method refuses a weight of the KL otherwise
        return (z - self.prior.mean) * self.prior.precision

    def _prior_precision(self) -> Tensor:
        """That of the random coordinates, ``[R]``."""
        assert self.prior is not None  # only called with the closed form
        return self.prior.precision if self.places is None else self.prior.precision[self.places]

    def _expected_log_prior(self, mean: Tensor, covariance: Covariance) -> Tensor:
        assert self.prior is not None  # only called with the closed form
        return self.prior.log_prob(mean) - 0.5 * torch.dot(self._prior_precision(), covariance.variances())


def standard_error(estimates: Tensor, *, paired: bool = True) -> Tensor:
    """Standard error of a mean of estimates; NaN with fewer than two, or two pairs.

    Args:
        estimates: ``[S]``.
        paired: whether their halves are antithetic pairs.
    """
    pairs = len(estimates) // 2
    means = (estimates[:pairs] + estimates[-pairs:]) / 2 if paired and 2 * pairs == len(estimates) else estimates
    return means.std() / math.sqrt(len(means)) if len(means) > 1 else means.new_tensor(math.nan)
