"""Kernel Stein discrepancy: the kernel by autograd, calibration on exact draws, power against wrong ones."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from torch.func import grad, jacfwd

from bayesdl._rng import generator
from bayesdl.errors import DataError, Divergence
from bayesdl.posterior import DrawsPosterior, prepare, stein
from bayesdl.posterior.stein import kernel_stein, stein_discrepancy

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draws"), dtype=DOUBLE)


def autoregression(chains: int, length: int, dim: int, rho: float, seed: int) -> Tensor:
    noise = normal(length, chains, dim, seed=seed)
    z = [noise[0]]
    for step in noise[1:]:
        z.append(rho * z[-1] + math.sqrt(1 - rho**2) * step)
    return torch.stack(z, 1)


def brute_force(z: Tensor, score: Tensor, scale: Tensor, c: float, b: float) -> Tensor:
    """h of every pair, from its definition, by automatic differentiation."""
    x, s = z.flatten(0, 1) / scale, score.flatten(0, 1) * scale

    def k(a: Tensor, b_: Tensor) -> Tensor:
        return (c**2 + (a - b_).square().sum()) ** b

    def h(i: int, j: int) -> Tensor:
        d_first, d_second = grad(k, 0)(x[i], x[j]), grad(k, 1)(x[i], x[j])
        mixed = jacfwd(grad(k, 1), 0)(x[i], x[j]).trace()
        return s[i] @ s[j] * k(x[i], x[j]) + s[i] @ d_second + s[j] @ d_first + mixed

    return torch.stack([torch.stack([h(i, j) for j in range(len(x))]) for i in range(len(x))])


@pytest.mark.parametrize("cells", [2**22, 7])
def test_statistics_are_those_of_the_definition(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stein, "CELLS", cells)
    z, scale = normal(2, 4, 3), torch.tensor([1.0, 3.0, 0.5], dtype=DOUBLE)
    score = -(z**3)
    h = brute_force(z, score, scale, 1.3, -0.4)
    found = stein_discrepancy(z, score, scale=scale, c=1.3, exponent=-0.4, bootstraps=9)
    assert found.v_statistic == pytest.approx(float(h.mean()), rel=1e-10)
    assert found.u_statistic == pytest.approx(float((h.sum() - h.trace()) / (8 * 7)), rel=1e-10)
    assert found.ksd == pytest.approx(math.sqrt(float(h.mean())))
    assert found.draws == 8
    assert "p = " in str(found)


def test_does_not_depend_on_units_or_place() -> None:
    z = normal(2, 100, 3)
    scale, shift = torch.tensor([1e-3, 1.0, 1e4], dtype=DOUBLE), 50.0
    first = stein_discrepancy(z, -z)
    second = stein_discrepancy(z * scale + shift * scale, -z / scale)
    assert second.v_statistic == pytest.approx(first.v_statistic, rel=1e-8)
    assert second.p_value == first.p_value


def test_exact_draws_have_uniform_p_values() -> None:
    found = [stein_discrepancy(z, -z, bootstraps=199) for z in (normal(2, 100, 2, seed=seed) for seed in range(80))]
    u = np.array([one.u_statistic for one in found])
    assert abs(u.mean()) < 4 * u.std() / math.sqrt(len(u))
    p = np.array([one.p_value for one in found])
    assert kstest(p, "uniform").pvalue > 1e-3
    # Independent draws whose scores look independent keep no sign.
    assert np.median([one.sign_length for one in found]) == 1.0


@pytest.mark.parametrize("wrong", ["narrow", "shifted", "wide"])
def test_wrong_draws_are_found(wrong: str) -> None:
    change = {"narrow": lambda z: 0.85 * z, "shifted": lambda z: z + 0.2, "wide": lambda z: 1.2 * z}[wrong]
    found, exact = [], []
    for seed in range(10):
        z = normal(4, 150, 3, seed=seed)
        exact.append(stein_discrepancy(z, -z, bootstraps=1).ksd)
        found.append(stein_discrepancy(change(z), -change(z), bootstraps=199))
    assert sum(one.p_value <= 0.05 for one in found) >= 8
    assert min(one.ksd for one in found) > np.median(exact)


def test_better_samples_come_first() -> None:
    z = normal(1, 500, 4)
    spreads = [1.0, 0.9, 0.8, 0.6]
    order = [stein_discrepancy(s * z, -s * z, scale=torch.ones(4), bootstraps=1).ksd for s in spreads]
    assert order == sorted(order)
    # Exact draws: E v = E h(x, x) / n.
    times_n = [
        np.mean(
            [
                n * stein_discrepancy(z, -z, bootstraps=1).v_statistic
                for z in (normal(1, n, 4, seed=k) for k in range(20))
            ]
        )
        for n in (50, 400)
    ]
    assert times_n[0] == pytest.approx(times_n[1], rel=0.35)


def test_correlated_draws_need_lasting_signs() -> None:
    rejected = {1.0: 0, None: 0}
    for seed in range(40):
        z = autoregression(4, 100, 2, 0.8, seed)
        for length in rejected:
            rejected[length] += stein_discrepancy(z, -z, bootstraps=99, sign_length=length).p_value <= 0.05
    assert rejected[1.0] >= 15  # signs for independent draws take memory for bias
    assert rejected[None] <= 8


@pytest.mark.parametrize(
    ("z", "score", "settings"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), {}),
        (torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), {}),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 2), {}),
        (torch.full((2, 4, 3), math.nan), torch.zeros(2, 4, 3), {}),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), {"exponent": 0.5}),
    ],
)
def test_bad_input(z: Tensor, score: Tensor, settings: dict[str, float]) -> None:
    with pytest.raises(DataError):
        stein_discrepancy(z, score, **settings)


# -- posteriors ------------------------------------------------------------------------------------------------------

Y = normal(20, seed=9) + 1.0


def program(y: Tensor | None = None) -> None:
    """mu has the posterior N(sum y / 21, 1 / 21); log sigma, of which no datum knows, N(0.5, 0.3)."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 1.0))
    pyro.sample("sigma", dist.LogNormal(torch.tensor(0.5, dtype=DOUBLE), 0.3))
    with pyro.plate("data", 20):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact(chains: int, draws: int, spread: float = 1.0) -> DrawsPosterior:
    problem = prepare(program, {"y": Y})
    noise = spread * normal(chains, draws, 2, seed=3)
    values = {"mu": Y.sum() / 21 + noise[..., 0] / math.sqrt(21), "sigma": (0.5 + 0.3 * noise[..., 1]).exp()}
    return DrawsPosterior(problem, problem.density.unconstrain(values), {}, {})


def test_posterior_against_its_density() -> None:
    good, narrow = kernel_stein(exact(4, 300)), kernel_stein(exact(4, 300, 0.85))
    assert good.draws == narrow.draws == 1000
    assert good.p_value > 0.01
    assert narrow.p_value < 0.01
    assert narrow.ksd > good.ksd
    assert kernel_stein(exact(4, 300), max_draws=100, bootstraps=9).draws == 100


def test_gradients_that_are_not_finite_are_named() -> None:
    posterior = exact(3, 10)
    posterior.z[1, 2, :] = math.inf
    with pytest.raises(Divergence, match=r"chains \[1\]"):
        kernel_stein(posterior)
