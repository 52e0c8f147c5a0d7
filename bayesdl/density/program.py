"""Running a Pyro program with given values: the one place that talks to Pyro's effect handlers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.distribution import Distribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

Program = Callable[..., Any]
Message = dict[str, Any]

# Attributes under which a distribution keeps the distributions that it is made of.
_INNER = ("base_dist", "_mixture_distribution", "_component_distribution", "component0", "component1")


class TargetReached(Exception):
    """Stops a program at the site whose distribution is wanted."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution


def without_validation(distribution: Distribution) -> Distribution:
    """A shallow copy that checks nothing, inner distributions included; the user's object stays as it is.

    ``pyro.validation_enabled(False)`` reaches only distributions that are built inside it, and the checks of the
    others call ``.item()``, which ``torch.func.vmap`` forbids.
    """
    light = copy.copy(distribution)
    light.__dict__["_validate_args"] = False
    for name in _INNER:
        inner = light.__dict__.get(name)
        if isinstance(inner, torch.distributions.Distribution):
            light.__dict__[name] = without_validation(inner)
    return light


class Substitute(Messenger):
    """Gives latent and ``pyro.param`` sites their values and takes the argument checks off every distribution."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if isinstance(msg["fn"], _Subsample):
            # The rows are the caller's: a drawn subsample would be a random number inside the density.
            msg["value"], msg["done"] = torch.arange(msg["fn"].subsample_size or msg["fn"].size), True
            return
        msg["fn"] = without_validation(msg["fn"])
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_param(self, msg: Message) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class StopAt(Messenger):
    """Ends the program at a site, before anything is drawn there."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["name"] == self.site:
            raise TargetReached(msg["fn"])


class Enumerate(Messenger):
    """Marks every discrete latent site for parallel enumeration."""

    def _pyro_sample(self, msg: Message) -> None:
        if is_discrete_latent(msg):
            msg["infer"] = {**msg["infer"], "enumerate": "parallel", "expand": False}


def is_sample(site: Message) -> bool:
    """Whether a site is a sample statement of the program's (Pyro's own subsample sites look like one and are not)."""
    return site["type"] == "sample" and not isinstance(site["fn"], _Subsample)


def is_latent(site: Message) -> bool:
    """Whether a site is an unobserved random variable."""
    return is_sample(site) and not site["is_observed"]


def has_density(site: Message) -> bool:
    """Whether a site adds a term to the log joint; deterministic sites are outputs."""
    return is_sample(site) and not site["infer"].get("_deterministic", False)


def is_discrete_latent(site: Message) -> bool:
    """Whether a site is an unobserved variable with finitely many values."""
    return is_latent(site) and bool(site["fn"].has_enumerate_support)


@contextmanager
def unchecked() -> Iterator[None]:
    """Evaluate without Pyro's and torch's argument checks; the global flags return to what they were."""
    with pyro.validation_enabled(False):
        yield


def run(
    program: Program,
    batch: Mapping[str, Any],
    values: Mapping[str, Tensor],
    *,
    enumerate_from: int | None = None,
) -> Trace:
    """Run the program with ``values`` at its latent sites and return the trace.

    Args:
        program: the Pyro program.
        batch: its keyword arguments.
        values: constrained values by site name; other latent sites are sampled, or enumerated.
        enumerate_from: the first tensor dimension (negative) free for enumeration; None samples discrete sites.
    """
    with poutine.trace() as tracer, Substitute(values):
        if enumerate_from is None:
            program(**batch)
        else:
            with poutine.enum(first_available_dim=enumerate_from), Enumerate():
                program(**batch)
    return tracer.trace


def distribution_at(
    program: Program, batch: Mapping[str, Any], values: Mapping[str, Tensor], site: str
) -> Distribution:
    """The distribution that the program has at ``site``, given values of the latent sites before it.

    Raises:
        KeyError: the program ends without reaching the site.
    """
    try:
        with StopAt(site), Substitute(values):
            program(**batch)
    except TargetReached as reached:
        return reached.distribution
    raise KeyError(site)


def plate_frame(site: Message, plate: str) -> Any | None:
    """The frame of the named plate around a site, or None."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def log_prob(site: Message, plate: str) -> Tensor:
    """The site's log probability under the user's scale and mask, free of the data plate's own factor N/B."""
    return weighed(site["fn"].log_prob(site["value"]), site, plate)


def weighed(term: Tensor, site: Message, plate: str) -> Tensor:
    """A term of a site under the user's scale and mask, free of the data plate's own factor N/B.

    ``plate("data", N, subsample_size=len(x))`` puts N/B into the site's scale; the density multiplies by N/B once,
    so it is taken out here.
    """
    scale = site["scale"]
    frame = plate_frame(site, plate)
    if frame is not None and frame.full_size is not None and frame.full_size != frame.size:
        scale = scale * (frame.size / frame.full_size)
    value: Tensor = scale_and_mask(term, scale, site["mask"])
    return value


def per_row(log_probability: Tensor, frame: Any) -> Tensor:
    """Sum every dimension but the data plate's: ``[..., N, ...] -> [N]``."""
    dim = log_probability.dim() + frame.dim
    others = [d for d in range(log_probability.dim()) if d != dim]
    return log_probability.sum(others) if others else log_probability
