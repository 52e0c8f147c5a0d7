"""Data simulated from a program: the truth from its prior, and observations given the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayesdl import _rng
from bayesdl.density.program import Message, has_density
from bayesdl.errors import ModelError

OBSERVED = "observed "
"""Prefix of the arguments that hold the simulated values of observed sites."""


class Simulated:
    """A program whose observed sites take their values from arguments ``"observed <site>"``."""

    def __init__(self, model: Any, sites: tuple[str, ...]) -> None:
        self.model, self.sites = model, sites

    def __call__(self, **arguments: Any) -> Any:
        """Run the program on simulated observations."""
        values = {site: arguments.pop(OBSERVED + site) for site in self.sites}
        with poutine.condition(data=values):
            return self.model(**arguments)


def simulate(
    model: Any, batch: Mapping[str, Any], replicates: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents from the prior and observations from the program given them, by site name ``[R, *shape]``.

    Args:
        model: the program.
        batch: its arguments, observations included, which only say what is observed.
        replicates: R; the program runs so many times.
        seed: seed of the draws.

    Raises:
        ModelError: nothing can be drawn, because the program has factors or scaled terms, or observes nothing.
    """
    truths: list[dict[str, Tensor]] = []
    simulated: list[dict[str, Tensor]] = []
    free = poutine.uncondition(model)
    for k in range(replicates):
        with torch.no_grad(), _rng.isolated(seed, "simulate", k), pyro.get_param_store().scope():
            trace = poutine.trace(free).get_trace(**batch)
        sites = {name: site for name, site in trace.nodes.items() if has_density(site)}
        observed = {name for name, site in sites.items() if site["infer"].get("was_observed")}
        if k == 0:
            _refuse(sites, observed)
        truths.append({name: site["value"] for name, site in sites.items() if name not in observed})
        simulated.append({name: sites[name]["value"] for name in sorted(observed)})
    return _stack(truths), _stack(simulated)


def _refuse(sites: Mapping[str, Message], observed: set[str]) -> None:
    factors = sorted(name for name in observed if _is_factor(sites[name]))
    scaled = sorted(name for name, site in sites.items() if bool((torch.as_tensor(site["scale"]) != 1).any()))
    if factors:
        what = f"has factors ({', '.join(factors)}), which are no laws to draw from"
    elif scaled:
        what = f"scales the log probability of {', '.join(scaled)}, which is then no law to draw from"
    elif not observed:
        what = "observes nothing; give the observations among the data"
    else:
        return
    raise ModelError(f"Data cannot be simulated from this program: it {what}.")


def _is_factor(site: Message) -> bool:
    """Whether a site is a ``pyro.factor``: an observation of nothing."""
    return not site["fn"].event_shape.numel()


def _stack(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
