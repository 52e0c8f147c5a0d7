"""Pyro programs with independently written log densities: the oracle for LogDensity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal

DOUBLE = torch.float64


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@dataclass
class Case:
    """A program, its batch, and log p(theta), per-row log-likelihoods and log-Jacobians written by hand.

    ``prior``, ``rows`` and ``jacobian`` take the dict of constrained values (and the batch); ``jacobian`` is
    log |d theta / d z| as a function of the constrained value.
    """

    name: str
    model: Callable[..., Any]
    batch: dict[str, Any]
    prior: Callable[[dict[str, Tensor]], Tensor]
    rows: Callable[[dict[str, Tensor], dict[str, Any]], Tensor] | None
    jacobian: Callable[[dict[str, Tensor]], Tensor]
    outside: Callable[[dict[str, Tensor]], Tensor] = field(default=lambda v: torch.zeros((), dtype=DOUBLE))
    factorised: bool = True


def _data(n: int = 12, d: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=DOUBLE)
    return {"x": x, "y": x.sum(1) + 0.3 * torch.randn(n, generator=g, dtype=DOUBLE)}


def linear(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Linear regression: Normal weights, HalfNormal noise."""
    w = pyro.sample("w", dist.Normal(_t(0, 0, 0), _t(1, 2, 3)).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(_t(2.0)[0]))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def subsampled(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same with a plate that carries N/B itself (N = 12): it must not count twice."""
    w = pyro.sample("w", dist.Normal(_t(0, 0, 0), _t(1, 2, 3)).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(_t(2.0)[0]))
    with pyro.plate("data", 12, subsample_size=len(x)):
        return pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def _linear_prior(v: dict[str, Tensor]) -> Tensor:
    w = Normal(_t(0, 0, 0), _t(1, 2, 3)).log_prob(v["w"]).sum(-1)
    return w + torch.log(_t(2.0)[0]) + Normal(_t(0.0)[0], _t(2.0)[0]).log_prob(v["s"])


def _linear_rows(v: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    mean = torch.einsum("nd,...d->...n", batch["x"], v["w"])
    return Normal(mean, v["s"][..., None]).log_prob(batch["y"])


def simplex(y: Tensor | None = None) -> Tensor:
    """Gaussian mixture with its assignment summed out; Dirichlet weights; ordered by nothing."""
    p = pyro.sample("p", dist.Dirichlet(_t(1.0, 2.0, 3.0)))
    m = pyro.sample("m", dist.Normal(_t(0.0)[0], _t(3.0)[0]).expand([3]).to_event(1))
    n = 10 if y is None else len(y)
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(p))
        return pyro.sample("y", dist.Normal(m[k], _t(0.7)[0]), obs=y)


def _simplex_rows(v: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    terms = v["p"].log()[..., None, :] + Normal(v["m"][..., None, :], 0.7).log_prob(batch["y"][:, None])
    return torch.logsumexp(terms, -1)


def _stick_breaking(p: Tensor) -> Tensor:
    """log |det d p_{1..K-1} / d z| for torch's stick-breaking map, by the chain rule over the sticks."""
    rest = 1 - torch.cat([torch.zeros_like(p[..., :1]), p.cumsum(-1)[..., :-1]], -1)
    fraction, rest = (p / rest)[..., :-1], rest[..., :-1]
    return (fraction.log() + (1 - fraction).log() + rest.log()).sum(-1)


def hierarchical(g: Tensor, y: Tensor | None = None) -> Tensor:
    """Groups in a plate of their own, a correlation matrix's factor, an interval, a local latent."""
    mu = pyro.sample("mu", dist.Uniform(_t(-2.0)[0], _t(5.0)[0]))
    tau = pyro.sample("tau", dist.LogNormal(_t(0.0)[0], _t(0.5)[0]))
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.StudentT(_t(4.0)[0], mu, tau))
    pyro.factor("soft", -(a.sum() ** 2))
    with pyro.plate("data", len(g)):
        u = pyro.sample("u", dist.Gamma(_t(2.0)[0], _t(3.0)[0]))
        return pyro.sample("y", dist.Normal(a[g], u), obs=y)


def _hierarchical_prior(v: dict[str, Tensor]) -> Tensor:
    uniform = -torch.log(torch.tensor(7.0, dtype=DOUBLE))
    log_normal = Normal(_t(0.0)[0], _t(0.5)[0]).log_prob(v["tau"].log()) - v["tau"].log()
    groups = torch.distributions.StudentT(4.0, v["mu"][..., None], v["tau"][..., None]).log_prob(v["a"]).sum(-1)
    local = torch.distributions.Gamma(_t(2.0)[0], _t(3.0)[0]).log_prob(v["u"]).sum(-1)
    return uniform + log_normal + groups + local


def _hierarchical_jacobian(v: dict[str, Tensor]) -> Tensor:
    fraction = (v["mu"] + 2) / 7
    return torch.log(7 * fraction * (1 - fraction)) + v["tau"].log() + v["u"].log().sum(-1)


def global_assignment(y: Tensor | None = None) -> Tensor:
    """One discrete switch for all rows: summed out, but rows are coupled."""
    m = pyro.sample("m", dist.Normal(_t(0.0)[0], _t(1.0)[0]))
    k = pyro.sample("k", dist.Bernoulli(_t(0.3)[0]))
    with pyro.plate("data", 8 if y is None else len(y)):
        return pyro.sample("y", dist.Normal(m + 2 * k, _t(1.0)[0]), obs=y)


def _global_outside(v: dict[str, Tensor]) -> Tensor:
    y = CASES["global_assignment"].batch["y"]
    both = [
        torch.log(_t(p)[0]) + Normal(v["m"][..., None] + 2 * k, 1.0).log_prob(y).sum(-1)
        for k, p in ((0, 0.7), (1, 0.3))
    ]
    return torch.logsumexp(torch.stack(both), 0)


def mixed_supports(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Unit interval, lower bound that is not zero, Poisson counts, scale and mask set by the user."""
    r = pyro.sample("r", dist.Beta(_t(2.0)[0], _t(3.0)[0]))
    b = pyro.sample("b", dist.Pareto(_t(1.5)[0], _t(3.0)[0]))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5), pyro.poutine.mask(mask=x > -1.0):
        return pyro.sample("y", dist.Poisson(r * b + 0.1 * x.exp()), obs=y)


def _mixed_prior(v: dict[str, Tensor]) -> Tensor:
    beta = torch.distributions.Beta(_t(2.0)[0], _t(3.0)[0]).log_prob(v["r"])
    return beta + torch.log(_t(3.0)[0]) + 3 * torch.log(_t(1.5)[0]) - 4 * v["b"].log()


def _mixed_rows(v: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    rate = (v["r"] * v["b"])[..., None] + 0.1 * batch["x"].exp()
    rows = batch["y"] * rate.log() - rate - torch.lgamma(batch["y"] + 1)
    return 0.5 * rows * (batch["x"] > -1.0)


def _counts() -> dict[str, Tensor]:
    x = torch.linspace(-2, 2, 9, dtype=DOUBLE)
    return {"x": x, "y": torch.tensor([0, 1, 0, 2, 1, 3, 2, 5, 4], dtype=DOUBLE)}


CASES: dict[str, Case] = {}
for case in (
    Case("linear", linear, _data(), _linear_prior, _linear_rows, lambda v: v["s"].log()),
    Case("subsampled", subsampled, _data(), _linear_prior, _linear_rows, lambda v: v["s"].log()),
    Case(
        "mixture",
        simplex,
        {"y": torch.linspace(-3, 4, 10, dtype=DOUBLE)},
        lambda v: (
            torch.distributions.Dirichlet(_t(1.0, 2.0, 3.0)).log_prob(v["p"])
            + Normal(_t(0.0)[0], _t(3.0)[0]).log_prob(v["m"]).sum(-1)
        ),
        _simplex_rows,
        lambda v: _stick_breaking(v["p"]),
    ),
    Case(
        "hierarchical",
        hierarchical,
        {"g": torch.tensor([0, 1, 2, 0, 1, 2]), "y": torch.linspace(-1, 2, 6, dtype=DOUBLE)},
        _hierarchical_prior,
        lambda v, b: Normal(v["a"][..., b["g"]], v["u"]).log_prob(b["y"]),
        _hierarchical_jacobian,
        outside=lambda v: -(v["a"].sum(-1) ** 2),
    ),
    Case(
        "global_assignment",
        global_assignment,
        {"y": torch.linspace(-1, 3, 8, dtype=DOUBLE)},
        lambda v: Normal(0.0, 1.0).log_prob(v["m"]),
        None,
        lambda v: torch.zeros_like(v["m"]),
        outside=_global_outside,
        factorised=False,
    ),
    Case(
        "mixed_supports",
        mixed_supports,
        _counts(),
        _mixed_prior,
        _mixed_rows,
        lambda v: (v["r"] * (1 - v["r"])).log() + (v["b"] - 1.5).log(),
    ),
):
    CASES[case.name] = case
