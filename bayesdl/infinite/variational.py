"""Gaussian-process classification: the best Gaussian over the latent functions, by natural-gradient site updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, one_hot

from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Engine
from bayesdl.infinite.evidence import Process
from bayesdl.infinite.inducing import Features
from bayesdl.infinite.sites import Dense, log_normaliser

NODES = 256  # of the one-dimensional expectations
POINTS = 256  # quasi-Monte-Carlo points of the expectations over several classes
TINY = 1e-20  # smallest variance, so that the square root has a derivative
SLACK = 1e-2  # nats; of the order of the quasi-Monte-Carlo error of the bound
SMALLEST = 1e-10  # smallest site precision: rows that are classified with certainty carry no information

Expectation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(mean [C, n], variance [C, n]) -> (E log p(y | f) [n], E d log p / df [C, n], -E d^2 log p / df^2 [C, n])``."""


def bernoulli_expectation(y: Tensor) -> Expectation:
    """Return the expectations of ``log sigmoid((2 y - 1) f)`` under f ~ N(mean, variance), by the trapezoidal rule.

    Its error falls as ``exp(-2 pi^2 / (h sd))`` with the step h = 0.07, because the logistic function's poles lie at
    +-i pi: rounding at sd below 8, 1e-3 at sd 40, where few Gauss-Hermite nodes would miss the whole transition.

    Args:
        y: ``[n]`` of 0 and 1.
    """
    points = torch.linspace(-9, 9, NODES, dtype=torch.float64).view(-1, 1, 1)
    mass = torch.exp(-0.5 * points.square())
    mass = mass / mass.sum()
    sign = 2 * y.double() - 1

    def expectation(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = mean + variance.clamp(min=TINY).sqrt() * points
        p = f.sigmoid()
        value = (mass * logsigmoid(sign * f)).sum(0).squeeze(0)
        return value, (mass * (y - p)).sum(0), (mass * p * (1 - p)).sum(0)

    return expectation


def categorical_expectation(y: Tensor, classes: int) -> Expectation:
    """Return the expectations of ``log softmax(f)_y`` under independent normals, by scrambled Sobol points.

    The points are the same at every call, so the objective is a smooth deterministic function.

    Args:
        y: ``[n]`` of 0..K-1.
        classes: K.
    """
    points = normal_points(POINTS, classes).unsqueeze(-1)
    hot = one_hot(y.long(), classes).T.double()

    def expectation(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = log_softmax(mean + variance.clamp(min=TINY).sqrt() * points, dim=1)
        p = log_p.exp()
        return (log_p * hot).sum(1).mean(0), (hot - p).mean(0), (p * (1 - p)).mean(0)

    return expectation


def normal_points(count: int, dim: int, seed: int = 0) -> Tensor:
    """Return ``[count, dim]`` standard normal quasi-random points: mid-points of equal mass for dim 1, else Sobol's."""
    if dim == 1:
        uniform = (torch.arange(count, dtype=torch.float64).unsqueeze(-1) + 0.5) / count
    else:
        uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
        uniform = uniform.clamp(2.0**-31, 1 - 2.0**-31)
    return torch.special.ndtri(uniform)


class Bounded(NamedTuple):
    """Sites with the evidence bound that they give."""

    a: Tensor
    """``[C, n]`` linear coefficients."""
    b: Tensor
    """``[C, n]`` precisions."""
    bound: Tensor
    """A scalar: E_q log p(y | f) - KL(q | prior), not above the log evidence but for the error of the expectation."""
    target_a: Tensor
    """``[C, n]`` where a full natural-gradient step leads."""
    target_b: Tensor
    """``[C, n]``."""


def bounded(mean: Tensor, prior: Dense | Features, a: Tensor, b: Tensor, expectation: Expectation) -> Bounded:
    """Evaluate the bound at sites, and the next ones (Khan and Lin, 2017, Conjugate-computation VI, eq. 9 and 10).

    With inducing points the sites act on the function's projection on them, which is what the KL divergence is of
    (Adam et al., 2021, Dual parameterization of sparse variational Gaussian processes); the likelihood sees all of it.

    Args:
        mean: ``[n]`` prior mean.
        prior: of the function at the training rows.
        a: ``[C, n]``.
        b: ``[C, n]``.
        expectation: of the likelihood.

    Cost: about 4 C n^3 / 3 operations; 2 C n m^2 with m inducing points.
    """
    at = prior.at(a, b)
    g = at.mean
    value, slope, precision = expectation(mean + g, at.variance + prior.left)
    bound = value.sum() - (a * g - 0.5 * b * (g.square() + at.variance)).sum() + log_normaliser(a, at)
    precision = precision.clamp(min=SMALLEST)
    # The softmax does not see a shift common to all classes, whose best value is 0, but the sites, one per class, damp
    # its decay to a crawl; so it is taken out.
    seen = g - g.mean(0) if len(g) > 1 else g
    return Bounded(a, b, bound, slope + precision * seen, precision)


def first_sites(mean: Tensor, prior: Dense | Features, classes: int, expectation: Expectation) -> tuple[Tensor, Tensor]:
    """Return the sites that match the likelihood's expectations under the prior, ``[C, n]`` each."""
    zero = mean.new_zeros(classes, len(mean))
    _, slope, precision = expectation(mean + zero, prior.diagonal + zero)
    return slope, precision.clamp(min=SMALLEST)


class SiteUpdates(Engine):
    """Natural-gradient steps on the sites; one that lowers the bound by more than ``SLACK`` is taken back and halved.

    The optimum is unique where the likelihood is log-concave, as Bernoulli and Categorical are.
    """

    def __init__(
        self, mean: Tensor, prior: Dense | Features, outputs: int, expectation: Expectation,
        sites: tuple[Tensor, Tensor] | None = None, total: int = 100, tolerance: float = 1e-5,
    ) -> None:  # fmt: skip
        self.mean, self.prior, self.outputs, self.expectation = mean, prior, outputs, expectation
        self.sites, self.total, self.tolerance, self.label = sites, total, tolerance, "variational sites"

    def init(self) -> State:
        """The bound at the first sites.

        Raises:
            Divergence: it is not finite.
        """
        sites = self.sites or first_sites(self.mean, self.prior, self.outputs, self.expectation)
        state = self._state(bounded(self.mean, self.prior, *sites, self.expectation), 1.0)
        if not math.isfinite(state["bound"]):
            raise Divergence("The evidence bound is not finite at the start; scale the inputs or change the kernel.")
        return state

    def done(self, state: State) -> bool:
        """Whether the bound has stopped to move, or all steps are taken."""
        return bool(state["stopped"]) or bool(state["step"] >= self.total)

    def status(self, state: State) -> str:
        """The bound."""
        return f"evidence bound {state['bound']:.3f}"

    def step(self, state: State) -> State:
        """One step towards the sites' targets."""
        rate = state["rate"]
        a = torch.lerp(state["a"], state["target_a"], rate)
        b = torch.lerp(state["b"], state["target_b"], rate)
        new = self._state(bounded(self.mean, self.prior, a, b, self.expectation), rate)
        if not new["bound"] >= state["bound"] - SLACK:
            return {**state, "rate": rate / 2, "stopped": rate < 1e-3}
        return {**new, "stopped": abs(new["bound"] - state["bound"]) < self.tolerance}

    def _state(self, at: Bounded, rate: float) -> State:
        tensors = {"a": at.a, "b": at.b, "target_a": at.target_a, "target_b": at.target_b}
        return {**tensors, "bound": at.bound.item(), "rate": rate, "stopped": False}

    def run(self) -> State:
        """All steps at once, for the inner loop of the hyperparameters' fit."""
        state = self.init() | {"step": 0}
        while not self.done(state):
            state = self.step(state) | {"step": state["step"] + 1}
        return state


class Bound:
    """The evidence bound, maximised over the sites, as a function of the hyperparameters: for ``Maximise``.

    At the best sites the bound's derivative with respect to them is zero, so the gradient is the partial one.
    """

    def __init__(self, process: Process, outputs: int, expectation: Expectation) -> None:
        self.process, self.outputs, self.expectation = process, outputs, expectation

    def start(self) -> Tensor:
        """The kernel's present hyperparameters."""
        return self.process.vector

    def evaluate(self, z: Tensor, warm: Mapping[str, Tensor]) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Value and gradient, and the sites as the next evaluation's start."""
        self.process.assign(z)
        sites = (warm["a"], warm["b"]) if warm else None
        mean, prior = self.process.prior()
        try:
            with torch.no_grad():
                state = SiteUpdates(mean, prior, self.outputs, self.expectation, sites).run()
        except (Divergence, MethodError):  # the line search turns back
            return -math.inf, torch.zeros_like(z), {}
        a, b = state["a"], state["b"]
        value = bounded(mean, prior, a, b, self.expectation).bound + self.process.log_hyperprior()
        return value.item(), self.process.gradient(value), {"a": a, "b": b}
