"""The Laplace approximation: a Gaussian at a mode, with the curvature there as its precision (MacKay, 1992)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl.curvature.linearised import LinearisedPosterior
from bayesdl.curvature.links import LINKS, link_of
from bayesdl.curvature.precision import STRUCTURES, Choice, choose, precision
from bayesdl.curvature.spectrum import Block, covariance_of, log_evidence
from bayesdl.density.log_density import Target
from bayesdl.errors import MethodError
from bayesdl.infer import method as check
from bayesdl.infer.evidence import GROUPS, ProfileEvidence
from bayesdl.infer.lbfgs import LBFGSEngine
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Work
from bayesdl.infer.online import TuningEngine
from bayesdl.infer.optimise import SECOND_ORDER, Optimiser
from bayesdl.infer.starts import start
from bayesdl.infer.tuning import Tuned, tune
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import Placed
from bayesdl.posterior.problem import Problem

NEWTON = 4  # steps of Newton's method at the end, where the precision is written out
NEAR = 0.1  # distance from the mode, in standard deviations, at which a tuned prior counts as an interior maximum
ASIDE = 0.01  # of Newton's step, over which the slope of a smooth density falls by as little
PREDICTIVES = ("auto", "linearised", "sampled")


@dataclass(frozen=True)
class Laplace(Optimiser):
    r"""q(z) = N(z*, P^-1) at a mode z* of the log density in unconstrained coordinates.

    ``P = curvature of the negative log likelihood + curvature of the negative log prior``, and the evidence is
    ``log p(y, z*) + D/2 log 2 pi - 1/2 log det P``. Exact for linear models with Gaussian noise.

    The mode is found as ``MAP`` finds it (settings of the same names), but with the Jacobian of the unconstrained
    coordinates, and then polished by L-BFGS with all rows. With ``init=`` a posterior or a dict of values, these are
    taken to be near the mode and are only polished. Sites of ``pyro.param`` are points. Sites of a network's likelihood
    and prior (a noise level) are independent of its weights in q, with the exact Hessian of their own block; where that
    is not positive they are points, and ``info["hyperparameters"]`` says which.

    A network's prediction is that of its linearisation by default (``LinearisedPosterior``): a Gauss-Newton precision
    is the exact one of the linearised model, and weights drawn from it often fit worse than any trained network.

    Args:
        structure: of the precision: "full", "functional" (the same by the kernel between the N K outputs of the rows,
            for networks with more weights than that), "diag", "kron" (K-FAC: a block for each linear and convolutional
            layer, a diagonal for other parameters), "ekfac" (with the exact diagonal in K-FAC's basis), "low_rank" (the
            largest directions of the likelihood's curvature in units of the prior), or "auto": "full" up to 1,000
            unknowns, "functional" up to 1,000 outputs, else "kron" if the network has such layers and the prior allows
            it, else "diag".
        curvature: "ggn" (generalised Gauss-Newton), "fisher" (empirical), "hessian" (exact, of any program; "full"
            only), or "auto": "ggn" for a network, "hessian" for a program.
        random: shell-style pattern or patterns on the names of the sites that are random, such as "2.*" for a last
            layer; the others are points at the mode.
        rank: directions of "low_rank".
        polish: most iterations of L-BFGS after the optimiser; 0 leaves the optimiser's result as it is, for networks
            whose training was stopped early (``info["mode_distance"]`` then tells how far from a mode).
        predictive: "linearised", "sampled" (weights drawn from q), or "auto": the first for networks.
        link: how a linearised network's class probabilities are found: "monte_carlo" (draws of the logits; right for
            every covariance), "probit" or "bridge" (closed forms, see ``curvature.links`` for when they are off).
        tune: "prior" multiplies the precision of a Gaussian prior by the number that maximises the evidence, "layers"
            by one number for each layer, "parameters" by one for each weight (automatic relevance determination; needs
            structure "full", "functional" or "diag"). A Gaussian likelihood's unknown noise is set along with it. The
            evidence is that of modes that are found again for every choice, so its gradient counts how the curvature
            moves with the mode, and no round may lower it (``infer.evidence``). ``info["stationary"]`` is true where
            that gradient is below 1e-3 for every number inside its bounds of 1e8 and 1e-8 times the prior's precision;
            ``info["at_bound"]`` names those outside, as weights that the data say nothing of are; and
            ``info["interior"]`` is true if there is none and ``info["mode_distance"]`` is below 0.1. Where it is not,
            ``info["tuning_ended"]`` says why. Cost: a search for a mode a round, and some dozen Hessian products; with
            "kron", "ekfac" and "low_rank" so many for each number.
        rounds: most changes of the prior, each followed by a search for the mode.
        online_rounds: changes of the prior while the network trains, evenly spaced after a tenth of the steps (Immer et
            al., 2021): steps up the same gradient, at the weights that training has reached. ``rounds`` follow, and few
            are left to do; with ``rounds=0`` the prior stays as training left it.

    Source: MacKay (1992, 1994); Immer et al. (2021) for networks, who leave the mode's movement out.
    """

    name: ClassVar[str] = "Laplace"
    tempered: ClassVar[bool] = True
    target: ClassVar[Target] = "posterior"

    structure: str = "auto"
    curvature: str = "auto"
    random: str | tuple[str, ...] = "*"
    rank: int = 20
    polish: int = 200
    predictive: str = "auto"
    link: str = "monte_carlo"
    tune: str | None = None
    rounds: int = 100
    online_rounds: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.one_of(self.name, ("auto", *STRUCTURES), structure=self.structure)
        check.one_of(self.name, ("auto", "ggn", "fisher", "hessian"), curvature=self.curvature)
        check.one_of(self.name, PREDICTIVES, predictive=self.predictive)
        check.one_of(self.name, LINKS, link=self.link)
        check.one_of(self.name, (None, *GROUPS), tune=self.tune)
        check.whole(self.name, rank=self.rank)
        check.whole(self.name, at_least=0, polish=self.polish, rounds=self.rounds, online_rounds=self.online_rounds)
        if not isinstance(self.random, str):  # a list, from a file
            object.__setattr__(self, "random", tuple(self.random))
        if self.curvature == "hessian" and self.structure not in ("auto", "full"):
            raise MethodError(f"{self.name}(curvature='hessian') is written out: structure must be 'full'.")
        if self.tune is not None and (self.temperature, self.likelihood_temperature) != (1, 1):
            raise MethodError(f"{self.name}(tune={self.tune!r}) maximises an evidence, which has temperature 1.")
        if self.online_rounds and (self.tune is None or self.optimizer in SECOND_ORDER or self.validation is not None):
            raise MethodError(
                f"{self.name}(online_rounds={self.online_rounds}) tunes a prior while it trains: it takes a tune=, an "
                "optimizer that goes step by step (adam, rmsprop, sgd), and no validation=."
            )
        if self.validation is not None and self.polish:
            raise MethodError(f"{self.name}(validation=...) stops before the mode: it takes polish=0.")

    def work(self, problem: Problem) -> Work:
        """The optimiser, its polish, and the curvature, which costs about a gradient for each output of a row."""
        return replace(super().work(problem), note="and L-BFGS, and the curvature at the mode")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        choice = choose(problem, self.structure, self.curvature, self.random, self.rank, self.batch_size)
        linearised = choice.network if self.predictive == "auto" else self.predictive == "linearised"
        self._require_link(problem, linearised)
        if self.tune is None:
            z, info = self._mode(problem, run)
            tuned = Tuned(problem, problem, z, {})
        else:
            evidence = ProfileEvidence(problem, choice, run, self.tune, self.polished)
            numbers, z, info = self._start(evidence, run)
            tuned = tune(evidence, numbers, z, self.rounds)
        z, blocks, distance = self._refined(tuned.working, tuned.z, choice)
        law = Normal(z, covariance_of(blocks, len(z)))
        info |= choice.info(blocks) | tuned.info
        info |= {"mode_distance": distance, "log_evidence": self._log_evidence(tuned.problem, z, blocks)}
        if self.tune is not None and distance >= NEAR:  # stationary in the prior means little away from a mode
            info |= {"interior": False, "tuning_ended": self._why_no_mode(tuned.working, z, law, distance)}
        if linearised:
            info["link"] = self.link
        kind = LinearisedPosterior if linearised else GaussianPosterior
        return kind(tuned.problem, law, info)

    def _require_link(self, problem: Problem, linearised: bool) -> None:
        if self.link != LINKS[0]:
            if not linearised:
                raise MethodError(f"{self.name}(link={self.link!r}) is of a linearised network's predictions.")
            link_of(self.link, problem.model.likelihood)

    def _mode(self, problem: Problem, run: Run) -> tuple[Tensor, dict[str, Any]]:
        """Near a mode, ``[D]``, and what to tell of the run.

        Raises:
            MethodError: the callback ended the run before.
        """
        if run.init is None or isinstance(run.init, str):
            z, info = self.optimise(problem, run, 1)
            self._require_all(run)
            return self.polished(problem, z[0], run.stage("polish")), info
        z = start(problem, run, 1)[0]
        return self.polished(problem, z, run), {}

    def _start(self, evidence: ProfileEvidence, run: Run) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Where tuning begins, a mode there, and what to tell of the run."""
        problem = evidence.problem
        if not self.online_rounds:
            z, info = self._mode(problem, run)
            return evidence.first(z), z, info
        if not (run.init is None or isinstance(run.init, str)):
            raise MethodError(f"{self.name}(online_rounds={self.online_rounds}) tunes while it trains: no init= then.")
        engine = TuningEngine(
            self, problem, run.seed, 1, self.begin(problem, run, 1), None, evidence, self.online_rounds
        )
        state = run.drive(engine, engine.density)
        self._require_all(run)
        z = engine.result(state)[0]
        numbers = evidence.joined(state["logs"], z)
        return numbers, self.polished(evidence.working(numbers), z, run.stage("polish")), engine.report(state)

    def polished(self, problem: Problem, z: Tensor, run: Run, spread: Placed | None = None) -> Tensor:
        """``z [D]`` after L-BFGS with all rows, in the units of a Laplace covariance from near by, if there is one."""
        if not self.polish:
            return z
        units = None if spread is None else spread.filled(problem.density.prior_scale)
        engine = LBFGSEngine(self.name, problem, self.target, self.polish, 1, lambda: z[None], self.batch_size, units)
        state = run.drive(engine, problem.density)
        self._require_all(run)
        return engine.result(state)[0]

    def _require_all(self, run: Run) -> None:
        if run.tally.stopped or run.tally.interrupted:
            raise run.too_early("the mode was found")

    def _refined(self, problem: Problem, z: Tensor, choice: Choice) -> tuple[Tensor, list[Block], float]:
        """The mode after Newton's steps where they cost little, the precision there, and the distance that is left.

        The distance is ``sqrt(g^T P^-1 g)`` with g the gradient: that from the mode in standard deviations of q, as a
        step of Newton's method sees it.
        """
        density = problem.density
        enough = torch.finfo(z.dtype).eps ** 2
        for attempt in range(NEWTON + 1):
            blocks = precision(problem, z, choice)
            value, slope = density.value_and_grad(z[None], target=self.target)
            step = covariance_of(blocks, len(z)).times(slope[0])
            square = float((slope[0] * step).sum())
            # Newton's method is trusted near the mode alone, and only along random coordinates.
            if attempt == NEWTON or not (self.polish and choice.structure == "full" and enough < square < 1):
                break
            better = density.log_density(z + step, target=self.target)
            if not float(better) >= float(value[0]) - 1e-9 * (1 + abs(float(value[0]))):
                break
            z = z + step
        return z, blocks, math.sqrt(max(square, 0.0))

    def _why_no_mode(self, problem: Problem, z: Tensor, law: Normal, distance: float) -> str:
        """Whether the mode was missed, or has no gradient that could vanish.

        Where the density is smooth its slope along Newton's step falls over the length of that step; on a kink, as
        networks of relu units have wherever a unit switches at some row, it jumps at once.
        """
        density = problem.density
        slope = density.value_and_grad(z[None], target=self.target)[1][0]
        step = law.covariance.times(slope)
        beyond = density.value_and_grad((z + ASIDE * step)[None], target=self.target)[1][0]
        if float(beyond @ step) < 0.5 * float(slope @ step):
            return (
                "the mode is on a kink of the network (relu, perhaps), where gradients do not vanish: neither that of "
                "the evidence nor mode_distance says how near a maximum is; smooth activations have no kinks"
            )
        return f"the mode is {distance:.2g} standard deviations away: more polish= may reach it"

    def _log_evidence(self, problem: Problem, z: Tensor, blocks: list[Block]) -> float:
        """As a density of the raw targets."""
        found = log_evidence(float(problem.density.log_density(z, target=self.target)), blocks)
        rows = 0 if problem.density.n is None else problem.density.n
        return found - problem.density.powers[1] * rows * problem.log_scale
