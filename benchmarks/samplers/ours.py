"""bayesdl's own samplers, through ``fit``, with the clock read by a callback at the end of warm-up."""

from __future__ import annotations

from typing import Any

import torch
from outcome import Outcome, Span, now
from torch import Tensor
from torch_programs import PROGRAMS, data
from works import Work

import bayesdl as bdl


class Clock:
    """When each transition ended, and how many gradients had been computed by then."""

    def __init__(self) -> None:
        self.began = now()
        self.ends: list[Span] = []
        self.gradients: list[int] = []

    def __call__(self, state: dict[str, Any]) -> None:
        """The callback of ``fit``."""
        self.ends.append(now())
        self.gradients.append(int(state["gradients"]))


def run(work: Work, seed: int, method: str, warmup: int, **settings: Any) -> Outcome:
    """One fit of a bayesdl sampler.

    What counts as compilation is the time up to the end of the first transition: tracing, the search for a first
    step size, and that transition.

    Args:
        work: what to sample.
        seed: of the fit.
        method: name in bayesdl; LookupError if this version has none of that name.
        warmup: transitions of warm-up.
        settings: other settings of the method.
    """
    if not hasattr(bdl, method):
        raise LookupError(f"bayesdl {bdl.__version__} has no {method}")
    torch.set_num_threads(1)
    sampler = getattr(bdl, method)(warmup=warmup, **settings)
    chains = sampler.chains
    starts = {name: torch.from_numpy(value[:chains].copy()) for name, value in work.starts().items()}
    clock = Clock()
    fitted = sampler.fit(PROGRAMS[work.name], data(work), seed=seed, init=starts, callback=clock, progress=False)
    first = clock.ends[0] - clock.began
    sampling = clock.ends[-1] - clock.ends[warmup - 1]
    computed = clock.gradients[-1] - clock.gradients[warmup - 1]
    leapfrogs = fitted.stats.get("leapfrogs")
    thin = sampler.thin
    # statistics are those of the kept transitions, so with thinning only the counter knows the gradients
    gradients = float(computed if leapfrogs is None or thin > 1 else leapfrogs.sum())
    divergent = fitted.stats.get("divergent")
    return Outcome(
        {name: value.numpy() for name, value in constrained(fitted).items()},
        first,
        clock.ends[warmup - 1] - clock.ends[0],
        sampling,
        float(clock.gradients[warmup - 1]),
        gradients,
        None if divergent is None else int(divergent.sum()),
        {
            "warmup": warmup,
            **{name: value for name, value in sampler.settings().items() if isinstance(value, int | float | str)},
            "step_size": float(fitted.stats["step_size"].mean()) if "step_size" in fitted.stats else None,
            "gradients_computed": computed,
        },
        thin,
    )


def constrained(fitted: Any) -> dict[str, Tensor]:
    """Constrained draws ``[C, S, *shape]`` by site."""
    return fitted.problem.density.constrain(fitted.z)
