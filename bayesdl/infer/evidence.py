"""The Laplace evidence of refitted modes, and its gradient by the prior's precisions and the noise (MacKay, 1992)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vjp

from bayesdl.curvature.log_det import log_det_slope
from bayesdl.curvature.outputs import NetworkOutputs
from bayesdl.curvature.precision import Choice, precision
from bayesdl.curvature.products import hessian_products, value_and_grad
from bayesdl.curvature.spectrum import Block, covariance_of, log_evidence
from bayesdl.curvature.sums import coordinates
from bayesdl.density import Site
from bayesdl.errors import MethodError
from bayesdl.infer.linear_gaussian import noise_site
from bayesdl.infer.loop import Run
from bayesdl.infer.newton import conjugate_gradients
from bayesdl.posterior.placed import Placed
from bayesdl.posterior.problem import Problem

GROUPS = ("prior", "layers", "parameters")
"""What has a precision of its own: the whole prior, each layer, each weight."""
TRACES = ("full", "functional", "diag")
"""Structures for which ``log_det_slope`` holds; for the others log det P is differenced along the mode's movements."""
STIFFNESS = 100.0
"""Of what holds the noise, in units of the likelihood's own curvature by log sigma."""
MOST_PRODUCTS = 400
"""Hessian products for a mode's movement at most."""
FAR = 1e4
"""Times as far as the approximation foretells: where the search for a mode's movement gives up."""

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
    be worse than where it began. Here it is computed, the mode's movement by implicit differentiation. Where log det P
    has a gradient by z at hand (``TRACES``) that is one system of equations for all numbers together; for the other
    structures there is one for each number, and log det P is differenced along its solution. For linear models the
    drift is 0.

    Args:
        problem: with a Gaussian prior over all unknowns.
        choice: of the precision.
        run: of which every search for a mode is a stage.
        groups: one of ``GROUPS``.
        polish: finds a mode from a point.

    Attributes:
        names: of the numbers: "all", layers, or sites (a number for each entry).
        owner: which number each coordinate belongs to, ``[D]``; -1 for those of none.
        noise: the coordinate of the unknown noise.
    """

    problem: Problem
    choice: Choice
    run: Run
    groups: str
    polish: Polish
    names: list[str] = field(init=False)
    owner: Tensor = field(init=False)
    count: int = field(init=False)
    noise: int | None = field(init=False)
    stages: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Take over the prior, and number the groups."""
        prior = self.problem.density.gaussian_prior()
        if prior is None or not self.choice.network or self.choice.curvature == "hessian":
            raise MethodError(
                "Tuning multiplies the precision of a Gaussian prior of a network: it needs BayesianNetwork with "
                "prior=Normal(...), hyperparameters whose priors are Gaussian too (LogNormal), and 'ggn' or 'fisher'."
            )
        if self.groups == "parameters" and self.choice.structure not in TRACES:
            raise MethodError(
                f"tune='parameters' needs the gradient of the log determinant by every weight, which structure="
                f"{self.choice.structure!r} has not: use structure='diag', 'full' or 'functional', or tune='layers'."
            )
        self.centre, self.sd = prior
        site = noise_site(self.problem.density)
        self.noise = None if site is None else site.start
        self.bend = 0.0 if site is None else 2.0 * self.problem.batch[str(self.problem.y_name)].numel()
        self.held = STIFFNESS * self.bend
        self.names, self.owner, self.count = [], torch.full_like(self.centre, -1, dtype=torch.int64), 0
        for weights in self._weights:
            place, name = coordinates([weights], self.centre), weights.name
            if self.groups != "parameters":
                name = (name.rpartition(".")[0] or name) if self.groups == "layers" else "all"
            if name not in self.names:
                self.names.append(name)
                self.count += weights.size if self.groups == "parameters" else 1
            alone = torch.arange(self.count - weights.size, self.count)
            self.owner[place] = alone if self.groups == "parameters" else self.names.index(name)
        # Recorded once; a density whose prior has changed takes it over.
        self.problem.density.value_and_grad(self.centre[None], target="likelihood")

    def told(self, values: Tensor) -> dict[str, float | list[float]]:
        """Values of the numbers ``[G]`` by name; with a number for each weight, a list for each site."""
        if self.groups != "parameters":
            return dict(zip(self.names, values.tolist(), strict=True))
        sizes = [site.size for site in self._weights]
        return dict(zip(self.names, (part.tolist() for part in values.split(sizes)), strict=True))

    def name(self, number: int) -> str:
        """Of one of the numbers."""
        if self.groups != "parameters":
            return self.names[number]
        place = int((self.owner == number).nonzero())
        site = next(site for site in self._weights if site.start <= place < site.stop)
        return f"{site.name}[{place - site.start}]"

    def first(self, z: Tensor) -> Tensor:
        """The numbers of the prior that the model came with, and the noise at z."""
        return self.joined(torch.zeros(self.count, dtype=torch.float64), z)

    def joined(self, logs: Tensor, z: Tensor) -> Tensor:
        """Logarithms of the factors ``[G]`` and, where it is unknown, the noise at z."""
        return logs if self.noise is None else torch.cat([logs, z[self.noise : self.noise + 1].double()])

    def at(self, numbers: Tensor, near: Point) -> Point:
        """At other numbers, from the mode of a point near by."""
        return self.point(numbers, self.mode(numbers, near))

    def mode(self, numbers: Tensor, near: Point) -> Tensor:
        """The mode at numbers, from that of a point near by, ``[D]``."""
        self.stages += 1
        stage = self.run.stage(f"tune {self.stages}")
        return self.polish(self.working(numbers), near.z, stage, covariance_of(near.blocks, len(near.z)))

    def point(self, numbers: Tensor, z: Tensor) -> Point:
        """At numbers, with z taken for the mode."""
        problem = self.under(numbers)
        blocks = precision(problem, z, self.choice)
        weights = [block for block in blocks if block.prior]
        return Point(numbers, z, blocks, log_evidence(float(problem.density.log_density(z)), weights))

    def fixed(self, point: Point) -> tuple[Tensor, Tensor]:
        """The gradient with the mode held still, and minus its derivatives by the numbers, about, ``[G]`` each."""
        away = ((point.z - self.centre).double() / self.sd_at(point.numbers).double()).square()
        square, gammas = self._summed(away), self.effective(point)
        slope, bend = 0.5 * (gammas - square), 0.5 * (gammas + square)
        if self.noise is None:
            return slope, bend
        by_noise = slope.new_tensor([point.effective + self._slope_by_noise(point)])
        return torch.cat([slope, by_noise]), torch.cat([bend, bend.new_tensor([self.bend])])

    def drift(self, point: Point) -> Tensor:
        """What the fixed mode leaves out of the gradient, ``[G]``."""
        return self._drift_at_once(point) if self.choice.structure in TRACES else self._drift_by_moves(point)

    def _drift_at_once(self, point: Point) -> Tensor:
        """``dz* / d number = C f`` with one C for all forces f, so C is applied to what all moves are multiplied by."""
        network = NetworkOutputs(self.under(point.numbers), point.z)
        spread = covariance_of(point.weights, len(point.z))
        rows = [-0.5 * log_det_slope(network, spread, self.choice.of_outputs, self.choice.batch_size)]
        if self.noise is not None:
            rows.append(torch.zeros_like(point.z))
            rows[1][self.noise] = 1.0
        by_mode, *by_noise = self._moved(point, torch.stack(rows), together=True)
        force = (self.centre - point.z) / self.sd_at(point.numbers).square()
        found = self._summed((by_mode * force).double())
        if self.noise is None:
            return found
        found = found + self._slope_by_noise(point) * self._summed((by_noise[0] * force).double())
        own = float(by_mode[self.noise] / by_noise[0][self.noise]) - point.effective
        return torch.cat([found, found.new_tensor([own])])

    def _drift_by_moves(self, point: Point) -> Tensor:
        """Differences of log det P as the mode moves, number by number."""
        forces = point.z.new_zeros(len(point.numbers), len(point.z))
        force = (self.centre - point.z) / self.sd_at(point.numbers).square()
        tuned = (self.owner >= 0).nonzero().flatten()
        forces[self.owner[tuned], tuned] = force[tuned]
        if self.noise is not None:
            forces[-1, self.noise] = self.held
        size = torch.finfo(point.z.dtype).eps ** 0.25
        found = []
        for k, move in enumerate(self._moved(point, forces)):
            low, high = (self.point(point.numbers, point.z + sign * size * move).log_det for sign in (-1.0, 1.0))
            by_mode = -0.5 * (high - low) / (2.0 * size)
            by_noise = 0.0 if self.noise is None else float(move[self.noise])
            if k == self.count:
                found.append(by_mode / by_noise - point.effective)
            else:
                found.append(by_mode + self._slope_by_noise(point) * by_noise)
        return torch.tensor(found, dtype=torch.float64)

    def _moved(self, point: Point, forces: Tensor, together: bool = False) -> Tensor:
        """``C f`` for rows f ``[V, D]``, with C minus the inverse Hessian: where forces push the mode.

        By conjugate gradients on products with the exact Hessian, in units of the approximation, so that a few dozen
        do. Where the Hessian is not negative along the way, the approximation itself stands for its inverse; for all
        rows ``together`` if they must have been multiplied by one C.
        """
        spread = covariance_of(point.blocks, len(point.z)).filled(self.sd_at(point.numbers))
        z, nowhere = point.z.expand_as(forces), forces.new_zeros(len(forces), spread.noise_dim)
        pull = vjp(spread.scaled, nowhere)[1]
        curved = hessian_products(self.working(point.numbers), z, batch_size=self.choice.batch_size)

        def product(u: Tensor) -> Tensor:
            found: Tensor = pull(curved(spread.scaled(u)))[0]
            return found

        direct = pull(forces)[0]
        edge = FAR * torch.linalg.vector_norm(direct, dim=1)
        solved, _ = conjugate_gradients(product, -direct, edge, MOST_PRODUCTS, progress=0.0)
        lost = torch.linalg.vector_norm(solved, dim=1) > 0.5 * edge
        if together:
            lost = lost.any().expand_as(lost)
        found: Tensor = spread.scaled(torch.where(lost[:, None], direct, solved))
        return found

    def effective(self, point: Point) -> Tensor:
        """Effective number of parameters by number, ``[G]``."""
        total = torch.zeros(self.count, dtype=torch.float64)
        for block in point.weights:
            owner = self.owner[block.place]
            if bool((owner == owner[0]).all()):
                total[owner[0]] += block.effective()
            else:
                total.index_add_(0, owner, block.determined())
        return total

    def under(self, numbers: Tensor) -> Problem:
        """The problem with the prior at numbers."""
        return self._with(self.centre, self.sd_at(numbers))

    def working(self, numbers: Tensor) -> Problem:
        """The same with the noise held."""
        centre, sd = self.centre.clone(), self.sd_at(numbers)
        if self.noise is not None:
            own = float(sd[self.noise]) ** -2
            centre[self.noise] = (own * float(centre[self.noise]) + self.held * float(numbers[-1])) / (own + self.held)
            sd[self.noise] = (own + self.held) ** -0.5
        return self._with(centre, sd)

    def sd_at(self, numbers: Tensor) -> Tensor:
        """The prior's standard deviations at numbers, ``[D]``."""
        factors = torch.cat([numbers[: self.count].mul(-0.5).exp(), numbers.new_ones(1)])
        return self.sd * factors[self.owner].to(self.sd)

    @property
    def _weights(self) -> list[Site]:
        return [site for site in self.choice.random if site not in self.choice.hyper]

    def _summed(self, values: Tensor) -> Tensor:
        """Sums of ``values [D]`` over what belongs to each number, ``[G]``."""
        tuned = self.owner >= 0
        return values.new_zeros(self.count).index_add_(0, self.owner[tuned], values[tuned])

    def _with(self, centre: Tensor, sd: Tensor) -> Problem:
        return self.problem.with_prior_by_rows(centre, sd)

    def _slope_by_noise(self, point: Point) -> float:
        """``d log joint / d log sigma`` at a point; 0 without unknown noise."""
        if self.noise is None:
            return 0.0
        problem = self.under(point.numbers)
        gradient = value_and_grad(problem, point.z[None], batch_size=self.choice.batch_size)[1]
        return float(gradient[0, self.noise])
