"""BlackJAX: NUTS after window adaptation, ChEES-HMC, and MCLMC after its tuning, as its documentation shows them."""

from __future__ import annotations

from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.adaptation import chees_adaptation
from blackjax.adaptation.base import get_filter_adapt_info_fn
from jax_programs import log_density
from jax_tools import compiled, timed
from outcome import Outcome
from works import CHAINS, Work

Array = jax.Array


def begin(work: Work, chains: int, seed: int) -> tuple[Array, Array, Array]:
    """Flat starting points ``[C, D]`` and one key each for warm-up and sampling."""
    flat = work.flatten({name: value[:chains] for name, value in work.starts().items()})
    warm_key, key = jax.random.split(jax.random.key(seed))
    return jnp.asarray(flat), warm_key, key


def stored(work: Work, positions: Array) -> dict[str, np.ndarray]:
    """Constrained sites ``[C, S, *shape]`` of positions ``[S, C, D]``."""
    return work.unflatten(np.swapaxes(np.asarray(positions), 0, 1))


def nuts(work: Work, seed: int, chains: int, warmup: int, draws: int) -> Outcome:
    """NUTS after Stan's windows (diagonal metric, target 0.8), chains under ``vmap``, each with its own adaptation."""
    z, warm_key, key = begin(work, chains, seed)
    density = log_density(work)
    keep = get_filter_adapt_info_fn(info_keys={"num_integration_steps"})
    adaptation = blackjax.window_adaptation(blackjax.nuts, density, adaptation_info_fn=keep)

    def warm(keys: Array, z: Array) -> Any:
        results, info = jax.vmap(lambda k, p: adaptation.run(k, p, warmup))(keys, z)
        return results.state, results.parameters, info.info.num_integration_steps.sum()

    kernel = blackjax.nuts.build_kernel()

    def sample(state: Any, parameters: Any, keys: Array) -> Any:
        def one(state: Any, key: Array) -> Any:
            step = jax.vmap(
                lambda k, s, p: kernel(k, s, density, p["step_size"], inverse_mass_matrix=p["inverse_mass_matrix"])
            )
            state, info = step(jax.random.split(key, chains), state, parameters)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        return jax.lax.scan(one, state, keys)

    warm_keys = jax.random.split(warm_key, chains)
    warm_up, first = compiled(warm, warm_keys, z)
    (state, parameters, warm_gradients), warm_seconds = timed(warm_up, warm_keys, z)
    keys = jax.random.split(key, draws)
    sampling, second = compiled(sample, state, parameters, keys)
    (_, (positions, steps, divergent)), seconds = timed(sampling, state, parameters, keys)
    settings = {"warmup": warmup, "step_size": float(parameters["step_size"].mean())}
    return Outcome(
        stored(work, positions), first + second, warm_seconds, seconds, float(warm_gradients), float(steps.sum()),
        int(divergent.sum()), settings,
    )  # fmt: skip


def chees(
    work: Work, seed: int, warmup: int, draws: int, metric: str | None, step_size: float, learning_rate: float
) -> Outcome:
    """ChEES-HMC: trajectory length by Adam over 64 chains, target 0.651, Halton jitter.

    With ``metric="diagonal"`` BlackJAX calls ``float`` on a traced flag after its scan, which stops compilation ahead
    of time; the flag is only reported, so it is left as it is.
    """
    chees_adaptation.float = lambda value: value
    z, warm_key, key = begin(work, CHAINS, seed)
    density = log_density(work)
    keep = get_filter_adapt_info_fn(info_keys={"num_integration_steps"})
    adaptation = blackjax.chees_adaptation(density, CHAINS, mass_matrix_estimation=metric, adaptation_info_fn=keep)
    functions = {}

    def warm(key: Array, z: Array) -> Any:
        (state, parameters), info = adaptation.run(
            key, z, step_size, optax.adam(learning_rate), warmup, max_sampling_steps=draws
        )
        functions.update({name: value for name, value in parameters.items() if callable(value)})
        adapted = {name: value for name, value in parameters.items() if not callable(value)}
        return state, adapted, info.info.num_integration_steps.sum()

    def sample(state: Any, adapted: Any, keys: Array) -> Any:
        step = jax.vmap(blackjax.dynamic_hmc(density, **adapted, **functions).step)

        def one(state: Any, key: Array) -> Any:
            state, info = step(jax.random.split(key, CHAINS), state)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        return jax.lax.scan(one, state, keys)

    warm_up, first = compiled(warm, warm_key, z)
    (state, adapted, warm_gradients), warm_seconds = timed(warm_up, warm_key, z)
    keys = jax.random.split(key, draws)
    sampling, second = compiled(sample, state, adapted, keys)
    (_, (positions, steps, divergent)), seconds = timed(sampling, state, adapted, keys)
    settings = {
        "warmup": warmup,
        "step_size": float(adapted["step_size"]),
        "leapfrogs": float(adapted["integration_steps_params"][0]),
        "metric": metric,
        "learning_rate": learning_rate,
    }
    return Outcome(
        stored(work, positions), first + second, warm_seconds, seconds, float(warm_gradients), float(steps.sum()),
        int(divergent.sum()), settings,
    )  # fmt: skip


def mclmc(work: Work, seed: int, chains: int, warmup: int, draws: int, thin: int, diagonal: bool) -> Outcome:
    """Unadjusted MCLMC; every chain is tuned by ``mclmc_find_L_and_step_size``, and all use the median L and step.

    The three tuning phases take a tenth of ``num_steps`` each, so ``num_steps`` is chosen such that they sum to
    ``warmup``. A step of the default integrator (McLachlan's) takes two gradients.
    """
    z, warm_key, key = begin(work, chains, seed)
    density = log_density(work)
    kernel = blackjax.mcmc.mclmc.build_kernel()

    def warm(keys: Array, z: Array) -> Any:
        def one(key: Array, z: Array) -> Any:
            start_key, tune_key = jax.random.split(key)
            state = blackjax.mcmc.mclmc.init(z, density, start_key)
            return blackjax.mclmc_find_L_and_step_size(
                kernel, round(warmup / 0.3), state, tune_key, density, diagonal_preconditioning=diagonal
            )

        return jax.vmap(one)(keys, z)

    def sample(state: Any, length: Array, step_size: Array, metric: Array, keys: Array) -> Any:
        step = jax.vmap(lambda k, s: kernel(k, s, density, metric, length, step_size))

        def one(state: Any, key: Array) -> Any:
            def inner(state: Any, key: Array) -> Any:
                state, info = step(jax.random.split(key, chains), state)
                return state, (jnp.square(info.energy_change), ~info.nonans)

            state, (energy, bad) = jax.lax.scan(inner, state, jax.random.split(key, thin))
            return state, (state.position, energy.mean(), bad.sum())

        return jax.lax.scan(one, state, keys)

    warm_keys = jax.random.split(warm_key, chains)
    warm_up, first = compiled(warm, warm_keys, z)
    (state, tuned, steps), warm_seconds = timed(warm_up, warm_keys, z)
    length, step_size = jnp.median(tuned.L), jnp.median(tuned.step_size)
    metric = jnp.mean(jnp.atleast_2d(tuned.inverse_mass_matrix), 0)
    keys = jax.random.split(key, draws // thin)
    sampling, second = compiled(sample, state, length, step_size, metric, keys)
    (_, (positions, energy, bad)), seconds = timed(sampling, state, length, step_size, metric, keys)
    settings = {
        "warmup": warmup,
        "diagonal": diagonal,
        "length": float(length),
        "step_size": float(step_size),
        "energy_variance_per_dimension": float(energy.mean()) / work.dim,
    }
    return Outcome(
        stored(work, positions), first + second, warm_seconds, seconds, 2.0 * float(np.asarray(steps).sum()),
        2.0 * chains * (draws // thin) * thin, int(bad.sum()), settings, thin,
    )  # fmt: skip
