"""Prior precision and noise that maximise the Laplace evidence of refitted modes (MacKay, 1992)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from bayesdl.curvature.precision import Choice, precision
from bayesdl.curvature.products import hessian_products
from bayesdl.curvature.spectrum import Block, covariance_of, log_evidence
from bayesdl.curvature.sums import coordinates
from bayesdl.errors import MethodError
from bayesdl.infer.linear_gaussian import noise_site
from bayesdl.infer.loop import Run
from bayesdl.infer.newton import conjugate_gradients
from bayesdl.posterior.placed import Placed
from bayesdl.posterior.problem import Problem

SETTLED = 1e-3
"""Largest gradient of the log evidence, by the logarithm of a number, at which it counts as maximal."""
MOST = 1e8
"""Largest factor, or its inverse, on the precision of the prior that the model came with."""
NOTHING = 1e-2
"""Nats by which the evidence may fall in a round: about as well as modes of large networks are found."""
LONGEST = 2.0
"""Largest change of a logarithm in one round."""
STIFFNESS = 100.0
"""Of what holds the noise, in units of the likelihood's own curvature by log sigma."""
FAR = 1e4
"""Times as far as the approximation foretells: where the search for a mode's movement gives up."""
HALVINGS = 6
"""Tries to raise the evidence along one direction."""

Polish = Callable[[Problem, Tensor, Run, Placed | None], Tensor]


@dataclass(frozen=True, eq=False)
class Point:
    """A choice of the numbers, and the mode under it.

    Attributes:
        numbers: ``[G]``, logarithms of the factors on the prior's precision; with unknown noise also where it is held.
        z: the mode, ``[D]``.
        blocks: the precision there.
        value: the log evidence there.
    """

    numbers: Tensor
    z: Tensor
    blocks: list[Block]
    value: float

    @property
    def weights(self) -> list[Block]:
        """The blocks whose prior is tuned: all but that of the hyperparameters."""
        return [block for block in self.blocks if block.prior]

    @property
    def log_det(self) -> float:
        """Of the precision of the weights."""
        return sum(block.log_det() for block in self.weights)

    @property
    def effective(self) -> float:
        """gamma: how many parameters the data determine."""
        return sum(block.effective() for block in self.weights)


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        problem: with the tuned prior.
        working: the problem of which z is a mode: the same, but with the pull on the noise.
        z: the mode under it, ``[D]``.
        info: factors on the prior's precision by group, gradients there, effective numbers of parameters, rounds, and
            whether all of it is an interior maximum.
    """

    problem: Problem
    working: Problem
    z: Tensor
    info: dict[str, Any]


@dataclass
class ProfileEvidence:
    r"""The log evidence as a function of the numbers alone: for all of them the mode is found again.

    At a mode, with the curvature's eigenvalues d in units of the prior N(m, s^2 / lambda), and u = (z - m) / s,

        d log evidence / d log lambda = (gamma - lambda |u|^2) / 2 + drift,      gamma = sum d / (d + lambda)
        d log evidence / d log sigma  = gamma + d log joint / d log sigma + drift

    The noise sigma is a coordinate of z. A narrow Gaussian factor in the density whose mode is looked for holds it near
    a number; all else is computed without that factor, at the value that sigma took.

    The drift is what the mode does to the evidence by moving: ``-1/2 d log det P / dz . dz* / d log lambda``. MacKay
    (1992) and Immer et al. (2021) leave it out, and in a strongly nonlinear network what is then called a maximum may
    be worse than where it began. Here it is computed: the mode's movement by implicit differentiation, and log det P by
    central differences along it. For linear models it is 0.

    Args:
        problem: with a Gaussian prior over all unknowns.
        choice: of the precision.
        run: of which every search for a mode is a stage.
        by_layer: a factor for each layer instead of one.
        polish: finds a mode from a point.
    """

    problem: Problem
    choice: Choice
    run: Run
    by_layer: bool
    polish: Polish
    noise: int | None = field(init=False)
    groups: dict[str, Tensor] = field(init=False, default_factory=dict)
    stages: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Take over the prior."""
        prior = self.problem.density.gaussian_prior()
        if prior is None or not self.choice.network or self.choice.curvature == "hessian":
            raise MethodError(
                "Tuning multiplies the precision of a Gaussian prior of a network: it needs BayesianNetwork with "
                "prior=Normal(...), hyperparameters whose priors are Gaussian too (LogNormal), and 'ggn' or 'fisher'."
            )
        self.centre, self.sd = prior
        site = noise_site(self.problem.density)
        self.noise = None if site is None else site.start
        self.bend = 0.0 if site is None else 2.0 * self.problem.batch[str(self.problem.y_name)].numel()
        self.held = STIFFNESS * self.bend

    def first(self, z: Tensor) -> Point:
        """Under the prior that the model came with, at its mode z."""
        # Recorded once; a density whose prior has changed takes it over.
        self.problem.density.value_and_grad(z[None], target="likelihood")
        for site in self.choice.random:
            if site not in self.choice.hyper:
                name = (site.name.rpartition(".")[0] or site.name) if self.by_layer else "all"
                self.groups[name] = torch.cat([self.groups.get(name, z[:0].long()), coordinates([site], z)])
        numbers = torch.zeros(len(self.groups), dtype=torch.float64)
        if self.noise is not None:
            numbers = torch.cat([numbers, z[self.noise : self.noise + 1].double()])
        return self._point(numbers, z)

    def at(self, numbers: Tensor, near: Point) -> Point:
        """At other numbers, from the mode of a point near by."""
        return self._point(numbers, self.mode(numbers, near))

    def mode(self, numbers: Tensor, near: Point) -> Tensor:
        """The mode at numbers, from that of a point near by, ``[D]``."""
        self.stages += 1
        stage = self.run.stage(f"tune {self.stages}")
        return self.polish(self.working(numbers), near.z, stage, covariance_of(near.blocks, len(near.z)))

    def fixed(self, point: Point) -> tuple[Tensor, Tensor]:
        """The gradient with the mode held still, and minus its derivatives by the numbers, about, ``[G]`` each."""
        slopes, bends = [], []
        for log, (name, place) in zip(point.numbers.tolist(), self.groups.items(), strict=False):
            away = (point.z[place] - self.centre[place]).double() / self.sd[place].double()
            square = math.exp(log) * float(away.square().sum())
            slopes.append(0.5 * (self.effective(point, name) - square))
            bends.append(0.5 * (square + self.effective(point, name)))
        if self.noise is not None:
            slopes.append(point.effective + self._slope_by_noise(point))
            bends.append(self.bend)
        return torch.tensor(slopes, dtype=torch.float64), torch.tensor(bends, dtype=torch.float64)

    def drift(self, point: Point) -> Tensor:
        """What the fixed mode leaves out of the gradient, ``[G]``: differences of log det P as the mode moves."""
        moves, size = self.movements(point), torch.finfo(point.z.dtype).eps ** 0.25
        found = []
        for k, move in enumerate(moves):
            low, high = (self._point(point.numbers, point.z + sign * size * move).log_det for sign in (-1.0, 1.0))
            by_mode = -0.5 * (high - low) / (2.0 * size)
            by_noise = 0.0 if self.noise is None else float(move[self.noise])
            if k == len(self.groups):
                found.append(by_mode / by_noise - point.effective)
            else:
                found.append(by_mode + self._slope_by_noise(point) * by_noise)
        return torch.tensor(found, dtype=torch.float64)

    def movements(self, point: Point) -> Tensor:
        """``dz* / d number``, ``[G, D]``: minus the inverse Hessian times the gradient's derivatives by the numbers.

        By conjugate gradients on products with the exact Hessian, in units of the approximation, so that a few dozen
        do. Where the Hessian is not negative along the way, the approximation itself stands for its inverse.
        """
        working, sd = self.working(point.numbers), self._sd(point.numbers)
        forces = point.z.new_zeros(len(point.numbers), len(point.z))
        for k, place in enumerate(self.groups.values()):
            forces[k, place] = (self.centre[place] - point.z[place]) / sd[place].square()
        if self.noise is not None:
            forces[-1, self.noise] = self.held
        spread = covariance_of(point.blocks, len(point.z)).filled(sd)
        z, nowhere = point.z.expand_as(forces), forces.new_zeros(len(forces), spread.noise_dim)
        pull = vjp(spread.scaled, nowhere)[1]
        curved = hessian_products(working, z, batch_size=self.choice.batch_size)

        def product(u: Tensor) -> Tensor:
            found: Tensor = pull(curved(spread.scaled(u)))[0]
            return found

        direct = pull(forces)[0]
        edge = FAR * torch.linalg.vector_norm(direct, dim=1)
        solved, _ = conjugate_gradients(product, -direct, edge)
        lost = torch.linalg.vector_norm(solved, dim=1) > 0.5 * edge
        found: Tensor = spread.scaled(torch.where(lost[:, None], direct, solved))
        return found

    def effective(self, point: Point, name: str) -> float:
        """The part of gamma that belongs to one group."""
        total = 0.0
        for block in point.weights:
            inside = torch.isin(block.place, self.groups[name])
            if bool(inside.all()):
                total += block.effective()
            elif bool(inside.any()):
                total += float(block.determined()[inside].sum())
        return total

    def under(self, numbers: Tensor) -> Problem:
        """The problem with the prior at numbers."""
        return self._with(self.centre, self._sd(numbers))

    def working(self, numbers: Tensor) -> Problem:
        """The same with the noise held."""
        centre, sd = self.centre.clone(), self._sd(numbers)
        if self.noise is not None:
            own = float(sd[self.noise]) ** -2
            centre[self.noise] = (own * float(centre[self.noise]) + self.held * float(numbers[-1])) / (own + self.held)
            sd[self.noise] = (own + self.held) ** -0.5
        return self._with(centre, sd)

    def _sd(self, numbers: Tensor) -> Tensor:
        sd = self.sd.clone()
        for log, place in zip(numbers.tolist(), self.groups.values(), strict=False):
            sd[place] *= math.exp(-0.5 * log)
        return sd

    def _with(self, centre: Tensor, sd: Tensor) -> Problem:
        return self.problem.with_prior_by_rows(centre, sd)

    def _slope_by_noise(self, point: Point) -> float:
        """``d log joint / d log sigma`` at a point; 0 without unknown noise."""
        if self.noise is None:
            return 0.0
        gradient = self.under(point.numbers).density.value_and_grad(point.z[None])[1]
        return float(gradient[0, self.noise])

    def _point(self, numbers: Tensor, z: Tensor) -> Point:
        problem = self.under(numbers)
        blocks = precision(problem, z, self.choice)
        weights = [block for block in blocks if block.prior]
        return Point(numbers, z, blocks, log_evidence(float(problem.density.log_density(z)), weights))


def tune(problem: Problem, z: Tensor, choice: Choice, run: Run, by_layer: bool, rounds: int, polish: Polish) -> Tuned:
    """Change the prior's precision and the noise until the evidence of refitted modes is stationary in them.

    Each round takes a quasi-Newton step (BFGS) up the evidence, from MacKay's second derivatives, and halves it until
    the evidence of the mode that is found there is no lower than before.

    Args:
        problem: with a Gaussian prior over all unknowns.
        z: a mode.
        choice: of the precision.
        run: of which every search for a mode is a stage.
        by_layer: a factor for each layer instead of one.
        rounds: most rounds.
        polish: finds a mode from a point.

    Raises:
        MethodError: the prior is not Gaussian.
    """
    evidence = ProfileEvidence(problem, choice, run, by_layer, polish)
    point = evidence.first(z)
    names = list(evidence.groups)
    slope, bend = evidence.fixed(point)
    inverse = bend.clamp(min=SETTLED).reciprocal().diag()
    gradient = slope + evidence.drift(point)
    edge = math.log(MOST)
    for round_ in range(rounds + 1):
        gammas = {name: evidence.effective(point, name) for name in names}
        # Relative to gamma as well: both vanish where the prior's precision runs to infinity.
        small = [SETTLED * min(1.0, gammas.get(name, 1.0)) for name in (*names, "noise")]
        settled = all(abs(value) < most for value, most in zip(gradient.tolist(), small, strict=False))
        at_bound = [name for name, log in zip(names, point.numbers.tolist(), strict=False) if abs(log) >= edge - 0.01]
        if settled or at_bound or round_ == rounds:
            break
        step = inverse @ gradient
        if float(step @ gradient) <= 0:
            step = gradient / bend.clamp(min=SETTLED)
        step = step * min(1.0, LONGEST / float(step.abs().max()))
        higher = _climb(evidence, point, step, edge)
        if higher is None:
            break
        moved, before = higher.numbers - point.numbers, gradient
        point = higher
        slope, bend = evidence.fixed(point)
        gradient = slope + evidence.drift(point)
        inverse = _bfgs(inverse, moved, before - gradient)
    info = {
        "prior_precision": dict(zip(names, point.numbers[: len(names)].exp().tolist(), strict=True)),
        "evidence_gradient": dict(zip((*names, "noise"), gradient.tolist(), strict=False)),
        "effective_by_group": gammas,
        "rounds": round_,
        "interior": settled and not at_bound,
    }
    if at_bound:
        info["at_bound"] = at_bound
    return Tuned(evidence.under(point.numbers), evidence.working(point.numbers), point.z, info)


def _climb(evidence: ProfileEvidence, point: Point, step: Tensor, edge: float) -> Point | None:
    """The first point along a step, halved again and again, where the evidence is not lower; None if there is none."""
    rounding = NOTHING + 10.0 * torch.finfo(point.z.dtype).eps * (abs(point.value) + len(point.z))
    for _ in range(HALVINGS):
        numbers = point.numbers + step
        numbers[: len(evidence.groups)].clamp_(-edge, edge)
        found = evidence.at(numbers, point)
        if found.value >= point.value - rounding:
            return found
        step = 0.5 * step
    return None


def _bfgs(inverse: Tensor, moved: Tensor, fallen: Tensor) -> Tensor:
    """The inverse of minus the second derivatives, after a move by which the gradient fell (Broyden et al., 1970)."""
    along = float(moved @ fallen)
    if along <= 1e-10 * float(moved.norm() * fallen.norm()):
        return inverse
    left = torch.eye(len(moved), dtype=moved.dtype) - torch.outer(moved, fallen) / along
    return left @ inverse @ left.mT + torch.outer(moved, moved) / along
