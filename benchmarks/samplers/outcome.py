"""What a run of a sampler gives, and the figures that it is judged by."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from works import Array, Work


class Span(NamedTuple):
    """A stretch of time.

    Attributes:
        cpu: seconds of this process on its processor. Every run has one thread, so on a quiet machine this is the
            wall-clock time, and on a busy one it leaves out what others took.
        wall: seconds by the clock.
    """

    cpu: float
    wall: float

    def __add__(self, other: Span) -> Span:  # type: ignore[override]
        """Both, one after the other."""
        return Span(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Span) -> Span:
        """What is left of a stretch without a part of it."""
        return Span(self.cpu - other.cpu, self.wall - other.wall)


class Watch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self.began = now()

    def read(self) -> Span:
        """Time since the start."""
        return now() - self.began


def now() -> Span:
    """Both clocks."""
    return Span(time.process_time(), time.perf_counter())


@dataclass
class Outcome:
    """Draws of one run and what they cost.

    Attributes:
        sites: constrained draws ``[C, S, *shape]`` after warm-up.
        compiling: time of tracing and compiling, in no other figure.
        warming: time of warm-up.
        sampling: time of sampling.
        warmup_gradients: chain-gradients of warm-up, or None where the package does not tell.
        gradients: chain-gradients of sampling that belong to a trajectory; gradients that a chain computes while it
            waits for the others are not counted.
        divergences: divergent transitions after warm-up, or None.
        settings: what the sampler was given and what it adapted to.
        thin: integrator steps or transitions between two stored draws.
    """

    sites: dict[str, Array]
    compiling: Span
    warming: Span
    sampling: Span
    warmup_gradients: float | None
    gradients: float
    divergences: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    thin: int = 1


def judge(work: Work, outcome: Outcome) -> dict[str, Any]:
    """Effective sample sizes in function space, R-hat, and what they cost.

    The functions are the predictive mean f at 20 inputs, (f - mean f)^2, and the log likelihood of all rows. The
    squares are there because trajectories that overshoot to the other side make means look better than they are.
    """
    draws = {name: np.asarray(value, np.float64) for name, value in outcome.sites.items()}
    finite = all(np.isfinite(value).all() for value in draws.values())
    sampling, warming = outcome.sampling.cpu, outcome.warming.cpu
    result: dict[str, Any] = {
        "finite": bool(finite),
        "compile_s": outcome.compiling.cpu,
        "warmup_s": warming,
        "sampling_s": sampling,
        "wall_compile_s": outcome.compiling.wall,
        "wall_warmup_s": outcome.warming.wall,
        "wall_sampling_s": outcome.sampling.wall,
        "warmup_gradients": outcome.warmup_gradients,
        "gradients": outcome.gradients,
        "us_per_gradient": 1e6 * sampling / outcome.gradients,
        "divergences": outcome.divergences,
        "settings": outcome.settings,
        "thin": outcome.thin,
    }
    if not finite:
        return result
    functions = features(work, draws)
    chains, stored = functions["log_likelihood"].shape[:2]
    ess = {name: [effective(values[..., k]) for k in range(values.shape[-1])] for name, values in functions.items()}
    rhat = {name: max(spread(values[..., k]) for k in range(values.shape[-1])) for name, values in functions.items()}
    least = min(min(values) for values in ess.values())
    log_likelihood = functions["log_likelihood"][..., 0]
    result |= {
        "chains": chains,
        "draws": stored,
        "ess": least,
        "ess_f": min(ess["f"]),
        "ess_square": min(ess["square"]),
        "ess_log_likelihood": min(ess["log_likelihood"]),
        "ess_per_s": least / sampling,
        "ess_per_s_with_warmup": least / (sampling + warming),
        "ess_per_s_with_all": least / (sampling + warming + outcome.compiling.wall),
        "ess_per_1000_gradients": 1000 * least / outcome.gradients,
        "rhat": max(rhat.values()),
        "rhat_by": rhat,
        "log_likelihood_mean": float(log_likelihood.mean()),
        "log_likelihood_sd": float(log_likelihood.std()),
        "log_likelihood_se": float(log_likelihood.std() / np.sqrt(ess["log_likelihood"][0])),
        "f_mean": functions["f"].mean((0, 1)).tolist(),
        "f_sd": functions["f"].std((0, 1)).tolist(),
        "f_ess": ess["f"],
    }
    return result


def features(work: Work, draws: Mapping[str, Array]) -> dict[str, Array]:
    """The judged functions ``[C, S, K]`` of each kind."""
    f = work.mean(draws, work.inputs.astype(np.float64))
    log_likelihood = work.log_likelihood(draws, work.x.astype(np.float64), work.y.astype(np.float64))
    return {"f": f, "square": np.square(f - f.mean((0, 1))), "log_likelihood": log_likelihood[..., None]}


def effective(values: Array) -> float:
    """Bulk effective sample size (rank-normalised, split) of draws ``[C, S]``, by ArviZ."""
    return float(_arviz().ess(np.ascontiguousarray(values), method="bulk"))


def spread(values: Array) -> float:
    """Rank-normalised split R-hat of draws ``[C, S]``, by ArviZ, which asks for two chains: one is given as halves."""
    if len(values) == 1:
        values = values[:, : values.shape[1] // 2 * 2].reshape(2, -1)
    return float(_arviz().rhat(np.ascontiguousarray(values), method="rank"))


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
