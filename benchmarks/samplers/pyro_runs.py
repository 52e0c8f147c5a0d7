"""Pyro's NUTS, a short run of one chain: its cost per gradient is the figure, its few draws are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch
from outcome import Outcome, Span, now
from pyro.infer import MCMC, NUTS
from pyro.ops import integrator
from torch_programs import PROGRAMS, data
from works import Work


def nuts(work: Work, seed: int, warmup: int, draws: int, depth: int, jit: bool) -> Outcome:
    """NUTS of one chain; the gradients are counted by watching the kernel's potential.

    Args:
        work: what to sample.
        seed: of Pyro's global generator.
        warmup: transitions of warm-up.
        draws: transitions that are kept.
        depth: doublings of a trajectory at most, to keep the run short.
        jit: Pyro's ``jit_compile``.
    """
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    starts = {name: torch.as_tensor(value[0]) for name, value in work.starts().items()}
    initial = {name: value.log() if name in work.positive else value for name, value in starts.items()}
    kernel = NUTS(PROGRAMS[work.name], jit_compile=jit, ignore_jit_warnings=True, max_tree_depth=depth)
    marks: list[tuple[Span, int]] = []
    calls = 0
    began = now()
    gradient = integrator.potential_grad

    def hook(kernel: Any, sample: Any, stage: str, index: int) -> None:
        marks.append((now(), calls))

    def counted(potential: Any, z: Any) -> Any:
        nonlocal calls
        calls += 1
        return gradient(potential, z)

    integrator.potential_grad = counted
    try:
        mcmc = MCMC(
            kernel, num_samples=draws, warmup_steps=warmup, initial_params=initial, hook_fn=hook, disable_progbar=True
        )
        mcmc.run(*data(work).values())
    finally:
        integrator.potential_grad = gradient
    sites = {name: np.asarray(value)[None] for name, value in mcmc.get_samples().items()}
    (warm_end, warm_calls), (end, total) = marks[warmup - 1], marks[-1]
    first = marks[0][0] - began
    return Outcome(
        sites, first, warm_end - began - first, end - warm_end, float(warm_calls), float(total - warm_calls),
        len(mcmc.diagnostics()["divergences"]["chain 0"]), {"warmup": warmup, "jit": jit, "max_tree_depth": depth},
    )  # fmt: skip
