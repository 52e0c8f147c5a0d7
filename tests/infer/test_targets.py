"""Samplers on programs whose marginals are known: one constraint or one difficulty each.

Every program goes through ``fit`` like any other, and every scalar's mean, sd and quantiles are judged as those of the
gold-standard posteriors are (tests/posteriordb), here against exact values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import OrderedTransform
from scipy import integrate, stats
from torch import Tensor

import bayesdl as bdl
from bayesdl.infer.sampler import Sampler
from tests.posteriordb.judgement import LEVELS, Judgement, Reference, judge
from tests.posteriordb.mutations import MUTATIONS

METHODS: dict[str, Callable[..., Sampler]] = {
    "NUTS": lambda **settings: bdl.NUTS(**({"chains": 16, "warmup": 200, "draws": 300} | settings)),
}


def _t(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


@dataclass(frozen=True)
class Known:
    """A program and the laws of some functions of its latents.

    Attributes:
        program: takes ``data`` as keyword arguments.
        scalars: sites ``[C, S, *shape]`` to ``[C, S, P]``.
        laws: of the P scalars, as frozen distributions of scipy or anything with mean, std and ppf.
        data: arguments of the program.
        settings: of the sampler, where it needs others.
    """

    program: Callable[..., Any]
    scalars: Callable[[Mapping[str, Tensor]], Tensor]
    laws: tuple[Any, ...]
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def reference(self) -> Reference:
        rows = [[law.mean(), law.std(), *law.ppf(np.array(LEVELS))] for law in self.laws]
        values = torch.tensor(np.array(rows).T)
        return Reference([f"scalar {k}" for k in range(len(rows))], values, torch.zeros_like(values))


# -- skewed marginals, one support each --------------------------------------------------------------------------------


def skewed() -> None:
    pyro.sample("gamma", dist.Gamma(_t(0.7), _t(2.0)))
    pyro.sample("weibull", dist.Weibull(_t(3.0), _t(1.4)))
    pyro.sample("beta", dist.Beta(_t(0.6), _t(2.5)))
    pyro.sample("normal", dist.LogNormal(_t(-1.0), _t(0.8)))
    pyro.sample("bounded", dist.Uniform(_t(-3.0), _t(5.0)))


def _stack(*names: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda sites: torch.stack([sites[name] for name in names], -1)


# -- conjugate posteriors ----------------------------------------------------------------------------------------------

READINGS = (1.3, -0.4, 2.2, 0.9, 1.7, 0.1, 3.0, 1.1)
COUNTS = (1, 7, 0, 12)


def normal_gamma(y: Tensor) -> None:
    """Precision ~ Gamma(2, 1), mean | precision ~ N(0, 1 / (0.5 precision))."""
    precision = pyro.sample("precision", dist.Gamma(_t(2.0), _t(1.0)))
    mean = pyro.sample("mean", dist.Normal(_t(0.0), (0.5 * precision).rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)


def _normal_gamma_laws() -> tuple[Any, ...]:
    y, n = np.array(READINGS), len(READINGS)
    weight, shape = 0.5 + n, 2.0 + n / 2
    centre = n * y.mean() / weight
    rate = 1.0 + 0.5 * ((y - y.mean()) ** 2).sum() + 0.5 * n * y.mean() ** 2 * 0.5 / weight
    student = stats.t(2 * shape, centre, math.sqrt(rate / (shape * weight)))
    return student, stats.gamma(shape, scale=1 / rate)


def multinomial(counts: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(_t(0.5, 1.0, 1.5, 2.0)))
    pyro.factor("counts", (counts * p.log()).sum())


def _multinomial_laws() -> tuple[Any, ...]:
    after = np.array([0.5, 1.0, 1.5, 2.0]) + np.array(COUNTS)
    return tuple(stats.beta(a, after.sum() - a) for a in after)


# -- structured supports -----------------------------------------------------------------------------------------------


class OrderStatistic:
    """The k-th smallest of n standard normals."""

    def __init__(self, k: int, n: int) -> None:
        self.law = stats.beta(k, n - k + 1)

    def ppf(self, q: Any) -> Any:
        return stats.norm.ppf(self.law.ppf(q))

    def mean(self) -> float:
        return float(integrate.quad(lambda u: stats.norm.ppf(u) * self.law.pdf(u), 0, 1)[0])

    def std(self) -> float:
        square = integrate.quad(lambda u: stats.norm.ppf(u) ** 2 * self.law.pdf(u), 0, 1)[0]
        return math.sqrt(square - self.mean() ** 2)


def ordered() -> None:
    """Four cut points, standard normal but for their order: order statistics."""
    base = dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]).mask(False))
    pyro.factor("prior", -0.5 * cuts.square().sum())


def correlation() -> None:
    pyro.sample("factor", dist.LKJCholesky(3, _t(1.5)))


def _correlations(sites: Mapping[str, Tensor]) -> Tensor:
    matrix = sites["factor"] @ sites["factor"].mT
    row, column = torch.tril_indices(3, 3, -1)
    return matrix[..., row, column]


# -- geometry ----------------------------------------------------------------------------------------------------------


def funnel() -> None:
    """Neal's funnel with a shallower neck: v ~ N(0, 1), five x | v ~ N(0, e^(v/2))."""
    v = pyro.sample("v", dist.Normal(_t(0.0), _t(1.0)))
    pyro.sample("x", dist.Normal(_t(0.0), (v / 2).exp()).expand([5]).to_event(1))


def banana() -> None:
    first = pyro.sample("first", dist.Normal(_t(0.0), _t(1.0)))
    pyro.sample("second", dist.Normal(first.square(), _t(0.5)))


DIM = 250
SCALES = torch.logspace(-1.5, 1.5, DIM, dtype=torch.float64)
DISTANCE = (torch.arange(DIM)[:, None] - torch.arange(DIM)).abs().double()
PRECISION = torch.linalg.inv(0.9**DISTANCE * SCALES * SCALES[:, None])


def gaussian() -> None:
    """250 dimensions; neighbours have correlation 0.9, standard deviations range over three decades."""
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1).mask(False))
    pyro.factor("law", -0.5 * (x @ PRECISION @ x))


KNOWN: dict[str, Known] = {
    "skewed": Known(
        skewed,
        _stack("gamma", "weibull", "beta", "normal", "bounded"),
        (
            stats.gamma(0.7, scale=0.5),
            stats.weibull_min(1.4, scale=3.0),
            stats.beta(0.6, 2.5),
            stats.lognorm(0.8, scale=math.exp(-1.0)),
            stats.uniform(-3.0, 8.0),
        ),
    ),
    "normal-gamma": Known(normal_gamma, _stack("mean", "precision"), _normal_gamma_laws(), {"y": _t(*READINGS)}),
    "simplex": Known(multinomial, lambda sites: sites["p"], _multinomial_laws(), {"counts": _t(*COUNTS)}),
    "ordered": Known(ordered, lambda sites: sites["cuts"], tuple(OrderStatistic(k, 4) for k in range(1, 5))),
    # (1 + r) / 2 ~ Beta(eta + 1/2, eta + 1/2) for the correlations r of LKJ(eta) in three dimensions
    "correlation": Known(
        correlation,
        _correlations,
        (stats.beta(2.0, 2.0, -1.0, 2.0),) * 3,
        settings={"chains": 8, "draws": 400, "max_depth": 5},
    ),
    "funnel": Known(
        funnel,
        lambda sites: torch.cat([sites["v"][..., None], sites["x"] * (-sites["v"] / 2).exp()[..., None]], -1),
        (stats.norm(),) * 6,
        settings={"target_accept": 0.9, "chains": 8, "draws": 1000},
    ),
    "banana": Known(
        banana,
        lambda sites: torch.stack([sites["first"], sites["second"] - sites["first"].square()], -1),
        (stats.norm(), stats.norm(0, 0.5)),
        settings={"target_accept": 0.99, "chains": 8, "draws": 2000},
    ),
    "gaussian": Known(
        gaussian,
        lambda sites: sites["x"],
        tuple(stats.norm(0, scale) for scale in SCALES.tolist()),
        # Standard errors of quantiles are themselves estimates, too rough for 1,750 comparisons with fewer draws.
        settings={"chains": 8, "warmup": 500, "draws": 1500, "metric": "dense", "max_depth": 7},
    ),
}
SLOW = {"banana", "funnel", "gaussian", "correlation"}
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KNOWN]
# The factor of a correlation matrix cannot be recorded: torch fills its triangle through a mask of truth values.
SLOW_PROGRAM = "ignore::bayesdl.density.evaluator.SlowProgramWarning"


def sampled(name: str, sampler: Sampler, seed: int = 0) -> Judgement:
    known = KNOWN[name]
    posterior = bdl.fit(known.program, known.data, sampler, seed=seed, progress=False)
    return judge(known.scalars(posterior.draws_by_chain()), known.reference())


@pytest.mark.filterwarnings(SLOW_PROGRAM)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", METHODS)
def test_a_sampler_finds_the_known_marginals(kind: str, name: str) -> None:
    judgement = sampled(name, METHODS[kind](**KNOWN[name].settings))
    assert not judgement.failures(), f"{judgement.failures()}\n{judgement}"


@pytest.mark.parametrize("name", ["normal-gamma", "simplex", "ordered"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_missing_jacobian_is_noticed(kind: str, name: str) -> None:
    # Some of these laws are no laws without it: their trajectories never turn, so they are kept short.
    wrong = MUTATIONS["no Jacobian"](METHODS[kind](warmup=50, draws=100, max_depth=4))
    assert sampled(name, wrong).wrong


@pytest.mark.parametrize("name", ["normal-gamma", "simplex"])
@pytest.mark.parametrize("kind", METHODS)
def test_stale_momenta_are_noticed(kind: str, name: str) -> None:
    wrong = MUTATIONS["no refreshment"](METHODS[kind](**KNOWN[name].settings))
    assert sampled(name, wrong).failures()
