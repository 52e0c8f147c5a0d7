"""Variational inference with any Pyro guide (Kingma & Welling, 2014; Ranganath et al., 2014)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl._rng import derive_seed, generator
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer import method as check
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Engine, Run
from bayesdl.infer.method import Method, Work
from bayesdl.infer.optimisers import ascend, slots_like
from bayesdl.infer.schedules import Cosine, Schedule
from bayesdl.infer.starts import start
from bayesdl.infer.training import thinned
from bayesdl.posterior.guide import GuidePosterior
from bayesdl.posterior.guide_program import Guide, guide_name, takes_start
from bayesdl.posterior.problem import Problem

FINAL_DRAWS = 200  # draws behind the ELBO that the posterior reports


@dataclass(frozen=True)
class GuideVI(Method):
    r"""Maximises the ELBO over the parameters of a Pyro guide, with all rows at every step.

    ``ELBO = E_q[log p(theta, y)^(1/T) - log q(theta)]`` with reparameterised draws of the guide. The log density is
    LogDensity's, as everywhere: discrete latents of the model are summed out, so the guide samples the continuous ones
    alone. ``pyro.param`` sites of the model become points. As in ``MeanFieldVI`` the learning rate falls along a
    cosine, and the result is the mean of the parameters over the last quarter of the steps.

    Args:
        guide: "AutoNormal" (independent coordinates), "AutoDiagonalNormal" (the same over one flat vector),
            "AutoMultivariateNormal" (full covariance), "AutoLowRankMultivariateNormal"; or an autoguide class, or
            ``functools.partial`` of one with options such as ``rank=3``; or a guide of your own, a Pyro program with
            the model's arguments. These four without options are rebuilt when a posterior is loaded; any other comes
            back through ``posterior.with_guide``.
        steps: updates.
        samples: draws of the guide for one gradient.
        learning_rate: of Adam, in the guide's unconstrained parameters; a number starts a cosine to zero, a Schedule
            is taken as it is.
    """

    name: ClassVar[str] = "GuideVI"
    takes_parameters: ClassVar[bool] = True

    guide: Any = "AutoNormal"
    steps: int = 2000
    samples: int = 8
    learning_rate: float | Schedule = 0.01

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        guide_name(self.guide)
        check.whole(self.name, steps=self.steps, samples=self.samples)
        check.rate(self.name, learning_rate=self.learning_rate)

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values; the guide by its name."""
        return super().settings() | {"guide": guide_name(self.guide)}

    def work(self, problem: Problem) -> Work:
        """One gradient of all draws a step; the guide's handlers and the search for a start come on top."""
        return Work(self.samples, self.steps, 2, "plus the guide's own run under Pyro, and a short MAP")

    def _fit(self, problem: Problem, run: Run) -> GuidePosterior:
        if run.init is not None and not takes_start(self.guide):
            raise MethodError(
                f"{self.name}(guide={guide_name(self.guide)}) starts where the guide's own parameters start; leave out "
                "init=."
            )
        engine = GuideEngine(self, problem, run)
        state = run.drive(engine, problem.density)
        if state["step"] == 0:
            raise run.too_early("the first update")
        elbo = engine.elbo(state["average"], derive_seed(run.seed, "final ELBO"))
        info = {
            "guide": engine.guide.name,
            "steps": state["step"],
            "elbo": float(elbo.mean()),
            "elbo_error": float(elbo.std() / math.sqrt(len(elbo))),
            "elbo_trace": thinned(state["trace"][None, : state["step"]])[0],
        }
        return GuidePosterior(problem, engine.guide, engine.by_name(state["average"]), info)


@dataclass
class GuideEngine(Engine):
    """One step of stochastic gradient ascent on the ELBO.

    State: parameters ``[P]``, those of the guide side by side; average ``[P]`` over the last quarter; slot.* ``[P]``;
    trace ``[total]``, the ELBO's estimates; noise, the generator behind the guide's draws.
    """

    method: GuideVI
    problem: Problem
    run: Run
    label: str = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Set up the guide and the learning rates."""
        self.label, self.total = self.method.name, self.method.steps
        rate = self.method.learning_rate
        self.schedule = rate if isinstance(rate, Schedule) else Cosine(rate, self.total)
        self.guide = Guide(self.method.guide, self.problem, seed=self.run.seed)

    def init(self) -> State:
        """The guide's own start, or around a mode of the density for those that can start anywhere."""
        guide = self.guide
        if takes_start(self.method.guide):
            z = start(self.problem, self.run, 1, default="map")[0]
            guide = Guide(self.method.guide, self.problem, self.problem.density.constrain(z), self.run.seed)
        parameters = self._flat(guide.initial)
        state: State = {
            "parameters": parameters,
            "average": parameters.clone(),
            "trace": parameters.new_full((self.total,), math.nan),
            "noise": generator(self.run.seed, self.label, "noise"),
        }
        return state | slots_like("adam", parameters)

    def step(self, state: State) -> State:
        """Draw from the guide, take the gradient, move, average."""
        step, parameters, rate = state["step"], state["parameters"], self.schedule(state["step"])
        seed = int(torch.randint(2**62, (), generator=state["noise"]))
        elbo, gradient = self.elbo_and_gradient(parameters, seed)
        if not (elbo.isfinite().all() and gradient.isfinite().all()):
            raise Divergence(
                f"{self.label}: the ELBO left the finite numbers at step {step} of {self.total} (learning rate "
                f"{rate:.3g}); try learning_rate={rate / 10:.1g}, a narrower start of the guide, or check the data's "
                "scale."
            )
        moved, slots = ascend("adam", parameters, gradient, state, step, rate)
        new = state | slots | {"parameters": moved}
        new["trace"][step] = elbo.mean()
        tail = max(step + 1 - self.total * 3 // 4, 1)
        new["average"] = state["average"].lerp(new["parameters"], 1 / tail)
        return new

    def status(self, state: State) -> str:
        """The latest estimate of the ELBO."""
        return f"ELBO {float(state['trace'][max(state['step'] - 1, 0)]):.5g}"

    def elbo_and_gradient(self, parameters: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Estimates ``[S]`` of the ELBO and the gradient ``[P]`` of their mean, through the draws of the guide."""
        self.guide.set(self.by_name(parameters))
        z, log_q = self.guide.draw(self.method.samples, seed)
        value, slope = self.problem.density.value_and_grad(z.detach(), target="joint")
        # The density comes with its own gradient; this has the same one with respect to the guide's parameters.
        surrogate = ((z * slope).sum() - log_q.sum()) / len(z)
        return value - log_q.detach(), self._flat(self.guide.gradient(surrogate))

    def elbo(self, parameters: Tensor, seed: int) -> Tensor:
        """Estimates of the ELBO ``[FINAL_DRAWS]``."""
        self.guide.set(self.by_name(parameters))
        with torch.no_grad():
            z, log_q = self.guide.draw(FINAL_DRAWS, seed)
        return self.problem.density.log_density(z, target="joint") - log_q

    def by_name(self, parameters: Tensor) -> dict[str, Tensor]:
        """The flat vector cut into the guide's parameters."""
        shapes = {name: value.shape for name, value in self.guide.initial.items()}
        parts = parameters.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _flat(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.reshape(-1) for value in values.values()]).to(self.problem.density.dtype)
