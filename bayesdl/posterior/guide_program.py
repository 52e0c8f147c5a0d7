"""A Pyro guide as a function of its parameters: a program that draws the latents of another."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayesdl import _rng
from bayesdl.density import program
from bayesdl.errors import MethodError, ModelMismatch
from bayesdl.posterior.problem import Problem

AUTOGUIDES: dict[str, type[AutoGuide]] = {
    cls.__name__: cls for cls in (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)
}
"""Guides that are made again from the model alone, by their name in a file, and that draw many values at once."""

BLOCK = 256
"""Draws that a guide makes at once."""
FREE = "model parameters"
"""Name of the ``pyro.param`` coordinates of the model among the trained parameters."""


class Guide:
    """A guide as a function of its unconstrained parameters; its parameter store is its own.

    Args:
        source: a name of ``AUTOGUIDES``, an autoguide class (or a ``functools.partial`` of one), or a guide: any Pyro
            program that takes the arguments of the model and samples its continuous latents.
        problem: the model and its data.
        start: constrained values by site name, for guides that ``takes_start``.
        seed: of what the guide draws when it is set up.

    Attributes:
        name: the guide in words; a name of ``AUTOGUIDES`` if it is one of these.
        initial: unconstrained parameters by name as they are before training.

    Raises:
        MethodError: the guide does not cover the model's latents, cannot be differentiated, or has nothing to train.
    """

    def __init__(self, source: Any, problem: Problem, start: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        self.problem = problem
        self.name = guide_name(source)
        self._batched = takes_start(source)
        self._store: Any = {"params": {}, "constraints": {}}
        self._program = _instance(source, problem, start)
        with self._context(seed), pyro.validation_enabled(True):
            self._trace(1)  # an autoguide looks at the model now
            with poutine.trace(param_only=True) as capture:
                trace = self._trace(1)
        self._check(trace)
        self._live: dict[str, Tensor] = {name: self._store["params"][name] for name in capture.trace.nodes}
        self.initial = {name: value.detach().clone() for name, value in self._live.items()}
        free = [site for site in problem.density.sites if site.scope == "param"]
        if free:
            z = problem.density.prior_draws(1)[0]
            self.initial[FREE] = torch.cat([z[site.start : site.stop] for site in free])
            self._live[FREE] = self.initial[FREE].clone().requires_grad_()
        if not self.initial:
            raise MethodError(f"The guide {self.name} has no pyro.param and no module parameters: nothing to train.")

    def set(self, parameters: Mapping[str, Tensor]) -> None:
        """Take over unconstrained parameters by name.

        Raises:
            ModelMismatch: names or shapes are not this guide's.
        """
        got, own = ({n: tuple(v.shape) for n, v in values.items()} for values in (parameters, self.initial))
        if got != own:
            raise ModelMismatch(f"The guide {self.name} has the parameters {own}; the given ones are {got}.")
        with torch.no_grad():
            for name, value in parameters.items():
                self._live[name].copy_(value)

    def gradient(self, scalar: Tensor) -> dict[str, Tensor]:
        """Gradient of a scalar with respect to the parameters, by name."""
        found: tuple[Tensor | None, ...] = torch.autograd.grad(scalar, list(self._live.values()), allow_unused=True)
        return {
            name: torch.zeros_like(live) if part is None else part
            for (name, live), part in zip(self._live.items(), found, strict=True)
        }

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Differentiable draws ``z [n, D]`` and their log density in the constrained space ``[n]``."""
        sizes = [min(BLOCK, n - first) for first in range(0, n, BLOCK)] if self._batched else [1] * n
        with self._context(seed), program.unchecked():
            draws, densities = zip(*(self._values(self._trace(size), size) for size in sizes), strict=True)
        return torch.cat(draws), torch.cat(densities)

    @contextmanager
    def _context(self, seed: int) -> Iterator[None]:
        with _rng.isolated(seed, "guide"), pyro.get_param_store().scope(self._store):
            yield

    def _trace(self, n: int) -> Trace:
        outside = -1 - self.problem.density.structure.nesting
        many = pyro.plate("guide draws", n, dim=outside) if self._batched else nullcontext()
        with poutine.trace() as tracer, many:
            self._program(**self.problem.batch)
        tracer.trace.compute_log_prob()
        return tracer.trace

    def _values(self, trace: Trace, n: int) -> tuple[Tensor, Tensor]:
        density = self.problem.density
        values, position = {}, 0
        for site in density.sites:
            if site.scope == "param":
                coordinates = self._live[FREE][position : position + site.size]
                values[site.name] = site.transform(coordinates.reshape(site.unconstrained_shape)).expand(n, *site.shape)
                position += site.size
            else:
                # Between the draws and the site's own dimensions there may be ones, of plates that it is not in.
                values[site.name] = trace.nodes[site.name]["value"].reshape(n, *site.shape)
        terms = [site["log_prob"].reshape(n, -1).sum(1) for site in _random(trace)]
        return density.unconstrain(values), torch.stack(terms).sum(0).to(density.dtype)

    def _check(self, trace: Trace) -> None:
        wanted = {site.name for site in self.problem.density.sites if site.scope != "param"}
        sampled = {site["name"] for site in _random(trace) if not site["infer"].get("is_auxiliary", False)}
        if sampled != wanted:
            raise MethodError(
                f"The guide {self.name} must sample exactly the model's continuous latents (discrete ones are summed "
                f"out). Missing: {sorted(wanted - sampled) or 'none'}, unknown: {sorted(sampled - wanted) or 'none'}."
            )
        rough = [site["name"] for site in _random(trace) if not site["fn"].has_rsample]
        if rough:
            raise MethodError(
                f"The guide {self.name} draws {rough} from distributions without reparameterised draws, through which "
                "no gradient flows; use a Normal, LogNormal, Beta or the like."
            )


def guide_name(source: Any) -> str:
    """A guide in words: the name in ``AUTOGUIDES`` if it is one of these without options.

    Raises:
        MethodError: it is no guide.
    """
    if isinstance(source, str) and source in AUTOGUIDES:
        return source
    if isinstance(source, AutoGuide):
        kind = type(source).__name__
        raise MethodError(
            f"guide is a finished {kind}, which Pyro cannot copy: pass the class, guide={kind}, or functools.partial "
            "of the class with other options."
        )
    if isinstance(source, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in source.keywords.items())
        return f"{getattr(source.func, '__qualname__', source.func)}({options})"
    if not callable(source):
        raise MethodError(f"guide={source!r}: give one of {', '.join(AUTOGUIDES)}, an autoguide class, or a guide.")
    name = getattr(source, "__qualname__", type(source).__qualname__)
    return name if AUTOGUIDES.get(name) is source else f"{source.__module__}.{name}"


def takes_start(source: Any) -> bool:
    """Whether a guide can be started at given values of the latents."""
    return issubclass(_autoguide(source) or object, tuple(AUTOGUIDES.values()))


def _autoguide(source: Any) -> type[AutoGuide] | None:
    """The autoguide class that a name, a class or a partial of it stands for, or None for another guide."""
    made = AUTOGUIDES.get(source, source) if isinstance(source, str) else source
    made = made.func if isinstance(made, functools.partial) else made
    return made if inspect.isclass(made) and issubclass(made, AutoGuide) else None


def _instance(source: Any, problem: Problem, start: Mapping[str, Tensor] | None) -> Callable[..., Any]:
    made: Callable[..., Any]
    if _autoguide(source) is None:
        # A guide with modules of its own is trained as a copy; the user's object stays as it is.
        made = copy.deepcopy(source) if isinstance(source, torch.nn.Module) else source
        return made
    discrete = list(problem.density.structure.discrete)
    model = poutine.block(problem.model, hide=discrete) if discrete else problem.model
    options = {} if start is None else {"init_loc_fn": init_to_value(values=dict(start))}
    made = (AUTOGUIDES[source] if isinstance(source, str) else source)(model, **options)
    return made


def _random(trace: Trace) -> list[program.Message]:
    """The sites that the guide samples, without Pyro's own subsample sites."""
    return [s for s in trace.nodes.values() if s["type"] == "sample" and not isinstance(s["fn"], _Subsample)]
