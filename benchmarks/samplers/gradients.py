"""The bare gradient: a leapfrog loop of C chains and nothing else, in JAX and in bayesdl."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from outcome import Span, Watch, now
from works import Work

STEPS = 100
"""Leapfrog steps in a block; the step size is so small that the chains stay where they began."""
STEP_SIZE = 1e-4


def blocks(run: Callable[[], Any], count: int) -> list[float]:
    """Processor microseconds per gradient call, block by block."""
    times = []
    for _ in range(count):
        began = now()
        run()
        times.append(1e6 * (now() - began).cpu / STEPS)
    return times


def in_jax(work: Work, chains: int, count: int) -> dict[str, Any]:
    """``jit(lax.scan(leapfrog))`` over ``vmap(value_and_grad)``."""
    import jax
    import jax.numpy as jnp
    from jax_programs import log_density
    from jax_tools import compiled

    flat = jnp.asarray(work.flatten({name: value[:chains] for name, value in work.starts().items()}))
    gradient = jax.vmap(jax.value_and_grad(log_density(work)))

    def loop(z: jax.Array, p: jax.Array, grad: jax.Array) -> Any:
        def leapfrog(state: Any, _: None) -> tuple[Any, jax.Array]:
            z, p, grad = state
            p = p + 0.5 * STEP_SIZE * grad
            z = z + STEP_SIZE * p
            value, grad = gradient(z)
            return (z, p + 0.5 * STEP_SIZE * grad, grad), value

        return jax.lax.scan(leapfrog, (z, p, grad), length=STEPS)

    begin = (flat, jax.random.normal(jax.random.key(0), flat.shape), jnp.zeros_like(flat))
    run, span = compiled(loop, *begin)
    jax.block_until_ready(run(*begin))
    return figures(blocks(lambda: jax.block_until_ready(run(*begin)), count), chains, span)


def in_bayesdl(work: Work, chains: int, count: int) -> dict[str, Any]:
    """The leapfrog step that the samplers take, in a loop of Python; beside it, the gradient alone."""
    import torch
    from torch_programs import PROGRAMS, data

    from bayesdl.density import LogDensity
    from bayesdl.infer.hamiltonian import leapfrog
    from bayesdl.infer.metric import Metric
    from bayesdl.infer.target import Target

    torch.set_num_threads(1)
    flat = torch.as_tensor(work.flatten({name: value[:chains] for name, value in work.starts().items()}))
    momentum = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    step = torch.full((chains, 1), STEP_SIZE)
    watch = Watch()
    density, alone = (LogDensity(PROGRAMS[work.name], data(work)) for _ in range(2))
    density.expect(count * STEPS * 100, flat, fused=True)
    target = Target(Metric.diagonal(torch.ones(1, flat.shape[1])), density, None)

    def loop() -> None:
        z, p, grad = flat, momentum, torch.zeros_like(flat)
        for _ in range(STEPS):
            z, p, _, grad = target.advance(leapfrog, z, p, grad, step)

    loop()
    span = watch.read()
    alone.expect(count * STEPS * 100, flat)
    bare = statistics.median(blocks(lambda: [alone.value_and_grad(flat) for _ in range(STEPS)], count)) / chains
    found = figures(blocks(loop, count), chains, span)
    return found | {"execution": density.execution, "us_per_bare_gradient": bare}


def figures(times: list[float], chains: int, compiling: Span) -> dict[str, Any]:
    """What is kept of a run."""
    median = statistics.median(times)
    return {
        "chains": chains,
        "us_per_call": median,
        "us_per_gradient": median / chains,
        "least_us_per_gradient": min(times) / chains,
        "compile_s": compiling.cpu,
        "wall_compile_s": compiling.wall,
    }
