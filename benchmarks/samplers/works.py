"""The two works: data, layout of the unknowns, starting points, and the functions whose draws are judged.

Nothing here depends on a framework, so every sampler gets the same bytes and is judged by the same code.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
STARTS = Path(__file__).parent / "starts"
CHAINS = 64
"""Starting points written for each work; a sampler with C chains takes the first C."""
INPUTS = 20
"""Inputs at which predictive means are judged."""
HIDDEN = 50
INTERCEPT_SD = 2.5


@dataclass(frozen=True)
class Work:
    """A model with its data.

    Attributes:
        name: "network" or "logistic".
        x: inputs ``[N, K]``, float32, standardised.
        y: targets ``[N]``, float32; standardised, or 0 and 1.
        shapes: shape of each site, in the order of the flat vector.
        positive: sites that are sampled on the log scale.
        mean: predictive mean ``[C, S, n]`` of draws ``[C, S, *shape]`` at inputs ``[n, K]``.
        log_likelihood: total log likelihood ``[C, S]`` of draws.
        prior_draw: one draw from the prior.
    """

    name: str
    x: Array
    y: Array
    shapes: Mapping[str, tuple[int, ...]]
    positive: tuple[str, ...]
    mean: Callable[[Mapping[str, Array], Array], Array]
    log_likelihood: Callable[[Mapping[str, Array], Array, Array], Array]
    prior_draw: Callable[[np.random.Generator], dict[str, Array]]

    @property
    def dim(self) -> int:
        """Number of unknowns."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def inputs(self) -> Array:
        """The rows at which predictive means are judged, ``[20, K]``."""
        return self.x[np.linspace(0, len(self.x) - 1, INPUTS).round().astype(int)]

    def starts(self) -> dict[str, Array]:
        """Constrained starting points ``[64, *shape]``, read from the file that is checked in."""
        with np.load(STARTS / f"{self.name}.npz") as stored:
            return {name: stored[name] for name in self.shapes}

    def flatten(self, sites: Mapping[str, Array]) -> Array:
        """Unconstrained flat vectors ``[..., D]`` of constrained sites ``[..., *shape]``."""
        parts = []
        for name, shape in self.shapes.items():
            value = np.log(sites[name]) if name in self.positive else sites[name]
            parts.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        return np.concatenate(parts, -1)

    def unflatten(self, flat: Array) -> dict[str, Array]:
        """Constrained sites ``[..., *shape]`` of unconstrained flat vectors ``[..., D]``."""
        sites, at = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            value = flat[..., at : at + size].reshape(*flat.shape[:-1], *shape)
            sites[name] = np.exp(value) if name in self.positive else value
            at += size
        return sites


def network_mean(draws: Mapping[str, Array], x: Array) -> Array:
    """Output of the 10-50-1 tanh network, ``[C, S, n]``."""
    hidden = np.tanh(x @ np.swapaxes(draws["w1"], -1, -2) + draws["b1"][..., None, :])
    return np.einsum("csnh,csh->csn", hidden, draws["w2"]) + draws["b2"][..., None]


def network_log_likelihood(draws: Mapping[str, Array], x: Array, y: Array) -> Array:
    """Gaussian log likelihood of all rows, ``[C, S]``; chain by chain, because the hidden layer is large."""
    total = np.empty(draws["b2"].shape)
    for chain in range(len(total)):
        one = {name: value[chain : chain + 1] for name, value in draws.items()}
        squares = np.square(network_mean(one, x) - y).sum(-1)[0]
        noise = draws["noise"][chain].astype(float)
        total[chain] = -0.5 * squares / noise**2 - len(y) * (np.log(noise) + 0.5 * np.log(2 * np.pi))
    return total


def network() -> Work:
    """10-50-1 tanh network on ``diabetes``: weights N(0, 1/fan_in), biases N(0, 1), noise HalfNormal(1)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    inputs = x.shape[1]

    def prior_draw(rng: np.random.Generator) -> dict[str, Array]:
        return {
            "w1": rng.normal(size=(HIDDEN, inputs)) / np.sqrt(inputs),
            "b1": rng.normal(size=HIDDEN),
            "w2": rng.normal(size=HIDDEN) / np.sqrt(HIDDEN),
            "b2": rng.normal(size=()),
            "noise": np.abs(rng.normal(size=())),
        }

    shapes = {"w1": (HIDDEN, inputs), "b1": (HIDDEN,), "w2": (HIDDEN,), "b2": (), "noise": ()}
    return Work(
        "network", standardise(x), standardise(y), shapes, ("noise",), network_mean, network_log_likelihood, prior_draw
    )


def logit(draws: Mapping[str, Array], x: Array) -> Array:
    """Linear predictor ``[C, S, n]``."""
    beta = draws["raw"] * draws["scale"][..., None]
    return beta @ x.T + draws["intercept"][..., None]


def logistic_mean(draws: Mapping[str, Array], x: Array) -> Array:
    """Probability of class 1, ``[C, S, n]``."""
    return 1.0 / (1.0 + np.exp(-logit(draws, x)))


def logistic_log_likelihood(draws: Mapping[str, Array], x: Array, y: Array) -> Array:
    """Bernoulli log likelihood of all rows, ``[C, S]``."""
    return -np.logaddexp(0.0, np.where(y > 0.5, -1.0, 1.0) * logit(draws, x)).sum(-1)


def logistic() -> Work:
    """Hierarchical logistic regression on ``breast_cancer``: scale HalfNormal(1), coefficients scale * N(0, 1)."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    inputs = x.shape[1]

    def prior_draw(rng: np.random.Generator) -> dict[str, Array]:
        return {
            "scale": np.abs(rng.normal(size=())),
            "raw": rng.normal(size=inputs),
            "intercept": INTERCEPT_SD * rng.normal(size=()),
        }

    shapes = {"scale": (), "raw": (inputs,), "intercept": ()}
    return Work(
        "logistic",
        standardise(x),
        y.astype(np.float32),
        shapes,
        ("scale",),
        logistic_mean,
        logistic_log_likelihood,
        prior_draw,
    )


def standardise(values: Array) -> Array:
    """Columns with mean 0 and standard deviation 1, in float32."""
    return np.asarray((values - values.mean(0)) / values.std(0), np.float32)


WORKS = {"network": network, "logistic": logistic}


@functools.cache
def load(name: str) -> Work:
    """A work by name."""
    return WORKS[name]()


def digest(name: str) -> str:
    """A short fingerprint of a work's data and starting points, kept with every result."""
    work = load(name)
    arrays = [work.x, work.y, *work.starts().values()]
    return hashlib.blake2b(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays), digest_size=6).hexdigest()


def write_starts(seed: int = 20261122) -> None:
    """Write the starting points: 64 draws from each work's prior, all from one seed.

    Scales start in [1/e, e] instead: a prior draw of the noise near 0 makes gradients so steep that a chain of
    any sampler with a step size shared by all chains would stand still, and the comparison be about that chain.
    """
    STARTS.mkdir(exist_ok=True)
    for name in WORKS:
        work, rng = load(name), np.random.default_rng(seed)
        draws = [work.prior_draw(rng) for _ in range(CHAINS)]
        for draw in draws:
            draw.update({site: np.exp(rng.uniform(-1, 1)) for site in work.positive})
        arrays = {site: np.stack([draw[site] for draw in draws]).astype(np.float32) for site in work.shapes}
        np.savez(STARTS / f"{name}.npz", **arrays)


if __name__ == "__main__":
    write_starts()
