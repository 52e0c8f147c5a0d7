"""NumPyro's NUTS: the kernel that its ``MCMC`` drives with ``chain_method="vectorized"``, compiled ahead of time.

``MCMC.run`` compiles inside its first call, so its time cannot be split; the loop below runs the same kernel with the
same adaptation, and its two phases are timed apart. `python numpyro_runs.py` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_programs import PROGRAMS
from jax_tools import compiled, timed
from numpyro.infer import MCMC, NUTS
from numpyro.infer.initialization import init_to_value
from outcome import Outcome, Span, Watch
from works import Work, load

FIELDS = ("z", "num_steps", "diverging")


def nuts(work: Work, seed: int, chains: int, warmup: int, draws: int) -> Outcome:
    """NUTS with its defaults: target 0.8, diagonal metric, depth 10."""
    kernel = NUTS(PROGRAMS[work.name], init_strategy=init_to_value(values={}))
    data = {"x": jnp.asarray(work.x), "y": jnp.asarray(work.y)}
    flat = work.flatten({name: value[:chains] for name, value in work.starts().items()})
    sites = work.unflatten(flat)
    z = {name: jnp.asarray(np.log(sites[name]) if name in work.positive else sites[name]) for name in sites}
    keys = jax.random.split(jax.random.key(seed), chains)
    if chains == 1:
        z, keys = {name: value[0] for name, value in z.items()}, keys[0]
    state, compiling = timed(lambda: kernel.init(keys, warmup, z, (), data))
    chunk = math.gcd(warmup, draws)  # warm-up and sampling are the same program, which adapts while its count says so

    def transitions(state: Any) -> tuple[Any, Any]:
        def one(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, (), data)
            return state, {name: getattr(state, name) for name in FIELDS}

        return jax.lax.scan(one, state, length=chunk)

    advance, more = compiled(transitions, state)
    state, warm, warming = repeat(advance, state, warmup // chunk)
    state, record, sampling = repeat(advance, state, draws // chunk)
    stored = {}
    for name, value in record["z"].items():
        value = np.swapaxes(value[:, None] if chains == 1 else value, 0, 1)
        stored[name] = np.exp(value) if name in work.positive else value
    settings = {"warmup": warmup, "step_size": np.asarray(state.adapt_state.step_size).mean().item()}
    return Outcome(
        stored, compiling + more, warming, sampling, float(warm["num_steps"].sum()), float(record["num_steps"].sum()),
        int(record["diverging"].sum()), settings,
    )  # fmt: skip


def repeat(advance: Callable[[Any], Any], state: Any, times: int) -> tuple[Any, Any, Span]:
    """Several chunks of transitions: the last state, what was recorded, and the time."""
    pieces = []
    watch = Watch()
    for _ in range(times):
        state, piece = jax.block_until_ready(advance(state))
        pieces.append(piece)
    taken = watch.read()
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *pieces), taken


def through_mcmc(work: Work, seed: int, chains: int, warmup: int, draws: int) -> tuple[float, float]:
    """Seconds and gradients of ``MCMC.run`` in its second, already compiled call."""
    mcmc = MCMC(
        NUTS(PROGRAMS[work.name]),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = {"x": jnp.asarray(work.x), "y": jnp.asarray(work.y)}
    for _ in range(2):
        mcmc.warmup(jax.random.key(seed), **data, extra_fields=("num_steps",), collect_warmup=True)
        _, seconds = timed(lambda: (mcmc.run(jax.random.key(seed), **data, extra_fields=("num_steps",)), mcmc._states))
    return seconds.cpu, float(mcmc.get_extra_fields()["num_steps"].sum())


if __name__ == "__main__":
    for name in ("network", "logistic"):
        for count in (1, 4):
            outcome = nuts(load(name), 0, count, 200, 100)
            seconds, gradients = through_mcmc(load(name), 0, count, 200, 100)
            own = 1e6 * outcome.sampling.cpu / outcome.gradients
            print(f"{name}, {count} chains: {own:.1f} us/gradient; MCMC.run {1e6 * seconds / gradients:.1f}")
