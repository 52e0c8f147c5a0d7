"""The works in JAX: as NumPyro programs, and as log densities of a flat unconstrained vector for BlackJAX."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from works import HIDDEN, INTERCEPT_SD, Work

Sites = dict[str, jax.Array]


def network_program(x: jax.Array, y: jax.Array) -> None:
    """See ``works.network``."""
    inputs = x.shape[-1]
    w1 = numpyro.sample("w1", dist.Normal(0.0, 1 / math.sqrt(inputs)).expand([HIDDEN, inputs]).to_event(2))
    b1 = numpyro.sample("b1", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
    w2 = numpyro.sample("w2", dist.Normal(0.0, 1 / math.sqrt(HIDDEN)).expand([HIDDEN]).to_event(1))
    b2 = numpyro.sample("b2", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    f = jnp.tanh(x @ w1.T + b1) @ w2 + b2
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(f, noise), obs=y)


def logistic_program(x: jax.Array, y: jax.Array) -> None:
    """See ``works.logistic``."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    raw = numpyro.sample("raw", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SD))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ (raw * scale) + intercept), obs=y)


PROGRAMS: dict[str, Callable[[jax.Array, jax.Array], None]] = {
    "network": network_program,
    "logistic": logistic_program,
}


def normal(value: jax.Array, sd: float | jax.Array = 1.0) -> jax.Array:
    """Sum of the log densities of N(0, sd^2), up to a constant that depends on neither."""
    return -0.5 * jnp.sum(jnp.square(value / sd)) - value.size * jnp.log(sd)


def network_density(sites: Sites, x: jax.Array, y: jax.Array) -> jax.Array:
    """Log posterior of the network; ``noise`` is on the log scale, its Jacobian is the last term."""
    f = jnp.tanh(x @ sites["w1"].T + sites["b1"]) @ sites["w2"] + sites["b2"]
    noise = jnp.exp(sites["noise"])
    prior = normal(sites["w1"], 1 / math.sqrt(x.shape[-1])) + normal(sites["b1"])
    prior = prior + normal(sites["w2"], 1 / math.sqrt(HIDDEN)) + normal(sites["b2"]) + normal(noise)
    return prior + normal(y - f, noise) + sites["noise"]


def logistic_density(sites: Sites, x: jax.Array, y: jax.Array) -> jax.Array:
    """Log posterior of the logistic regression; ``scale`` is on the log scale."""
    scale = jnp.exp(sites["scale"])
    logits = x @ (sites["raw"] * scale) + sites["intercept"]
    prior = normal(scale) + normal(sites["raw"]) + normal(sites["intercept"], INTERCEPT_SD)
    return prior - jnp.sum(jax.nn.softplus(jnp.where(y > 0.5, -logits, logits))) + sites["scale"]


DENSITIES = {"network": network_density, "logistic": logistic_density}


def log_density(work: Work) -> Callable[[jax.Array], jax.Array]:
    """The log density, up to a constant, of one flat unconstrained vector ``[D]``."""
    x, y = jnp.asarray(work.x), jnp.asarray(work.y)
    of_sites = DENSITIES[work.name]

    def of_flat(z: jax.Array) -> jax.Array:
        sites, at = {}, 0
        for name, shape in work.shapes.items():
            size = math.prod(shape)
            sites[name] = z[at : at + size].reshape(shape)
            at += size
        return of_sites(sites, x, y)

    return of_flat
