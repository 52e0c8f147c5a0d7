from __future__ import annotations

import math

import arviz as az
import numpy as np
import pytest
import torch

from bayesdl.errors import DataError
from bayesdl.posterior import convergence


def autoregressive(rng, chains, draws, rho):
    noise = rng.normal(size=(chains, draws))
    x = np.empty((chains, draws))
    x[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


def inputs():
    rng = np.random.default_rng(0)
    shifted = rng.normal(size=(4, 200))
    shifted[0] += 1.0
    return {
        "independent": rng.normal(size=(4, 250)),
        "odd number of draws": rng.normal(size=(3, 101)),
        "slow": autoregressive(rng, 4, 500, 0.95),
        "antithetic": autoregressive(rng, 4, 300, -0.7),
        "very antithetic": autoregressive(rng, 2, 400, -0.98),
        "Cauchy": rng.standard_cauchy(size=(4, 300)),
        "one chain elsewhere": shifted,
        "wider chain": rng.normal(size=(4, 200)) * np.array([1.0, 1.0, 1.0, 4.0])[:, None],
        "ties": rng.integers(0, 4, size=(4, 150)).astype(float),
        "binary": (rng.random((2, 300)) < 0.03).astype(float),
        "random walk": np.cumsum(rng.normal(size=(2, 300)), axis=1),
        "two chains": rng.normal(size=(2, 60)),
        "five draws": rng.normal(size=(4, 5)),
        "four draws": rng.normal(size=(4, 4)),
        "nine draws": rng.normal(size=(2, 9)),
        "tiny scale": 1e-12 * rng.normal(size=(4, 100)),
        "far from zero": 1e6 + rng.normal(size=(4, 100)),
    }


INPUTS = inputs()


@pytest.mark.parametrize("name", INPUTS)
def test_agrees_with_arviz(name):
    x = INPUTS[name]
    draws = torch.from_numpy(x)
    pairs = {
        "rhat": (convergence.rhat(draws), az.rhat(x, method="rank")),
        "bulk": (convergence.ess_bulk(draws), az.ess(x, method="bulk")),
        "tail": (convergence.ess_tail(draws), az.ess(x, method="tail")),
        "mean": (convergence.ess_mean(draws), az.ess(x, method="mean")),
        "quantile": (convergence.ess_quantile(draws, 0.3), az.ess(x, method="quantile", prob=0.3)),
        "sd": (convergence.ess_sd(draws), az.ess(x, method="sd")),
        "mcse": (convergence.mcse_mean(draws), az.mcse(x, method="mean")),
        "mcse of the sd": (convergence.mcse_sd(draws), az.mcse(x, method="sd")),
        "mcse of the 30% quantile": (convergence.mcse_quantile(draws, 0.3), az.mcse(x, method="quantile", prob=0.3)),
        "mcse of the 95% quantile": (convergence.mcse_quantile(draws, 0.95), az.mcse(x, method="quantile", prob=0.95)),
    }
    # The autocovariances of numbers near 1e6 lose six digits in either programme.
    tolerance = 1e-6 if name == "far from zero" else 1e-8
    for statistic, (ours, theirs) in pairs.items():
        if name == "tiny scale" and "sd" in statistic:
            continue  # ArviZ takes a range below 1e-15, here that of the squares, for a constant
        assert float(ours) == pytest.approx(float(theirs), rel=tolerance), statistic


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_arviz_on_random_shapes(seed):
    rng = np.random.default_rng(100 + seed)
    chains, draws = int(rng.integers(2, 7)), int(rng.integers(4, 90))
    columns = autoregressive(rng, chains, draws, rng.uniform(-0.9, 0.95)), rng.normal(size=(chains, draws)).round(0)
    x = torch.from_numpy(np.stack(columns, axis=-1))
    q = float(rng.uniform(0.02, 0.98))
    found = [*convergence.mixing(x), convergence.ess_quantile(x, q), convergence.ess_sd(x), convergence.mcse_sd(x)]
    for entry, column in enumerate(columns):
        theirs = [
            az.rhat(column),
            az.ess(column, method="bulk"),
            az.ess(column, method="tail"),
            az.ess(column, method="quantile", prob=q),
            az.ess(column, method="sd"),
            az.mcse(column, method="sd"),
        ]
        np.testing.assert_allclose([float(value[entry]) for value in found], theirs, rtol=1e-8)


def test_together_as_one_by_one():
    x = torch.randn(3, 41, 2, 2, generator=torch.Generator().manual_seed(1))
    single = convergence.rhat(x), convergence.ess_bulk(x), convergence.ess_tail(x)
    for together, alone in zip(convergence.mixing(x), single, strict=True):
        assert together.equal(alone)


def test_one_chain_is_judged_by_its_halves():
    rng = np.random.default_rng(1)
    still, moving = rng.normal(size=(1, 400)), rng.normal(size=(1, 400)) + np.linspace(0, 4, 400)
    x = torch.from_numpy(np.stack([still, moving], axis=-1))
    flat, trend = convergence.rhat(x).tolist()
    assert flat < 1.02
    assert trend > 1.3
    assert convergence.ess_mean(x[..., 0]) == pytest.approx(az.ess(x[..., 0].numpy(), method="mean"))
    assert convergence.rhat(x).shape == (2,)


def test_trailing_dimensions_are_separate_quantities(monkeypatch):
    x = torch.randn(3, 40, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(convergence, "_BLOCK", 3 * 40 * 4)  # several blocks
    for statistic in (convergence.rhat, convergence.ess_bulk, convergence.ess_tail, convergence.mcse_mean):
        together = statistic(x)
        assert together.shape == (2, 5)
        torch.testing.assert_close(together[1, 3], statistic(x[:, :, 1, 3]), rtol=1e-12, atol=0)


def test_constants():
    constant = torch.full((4, 50), 3.0)
    assert convergence.rhat(constant) == 1.0
    for statistic in (convergence.ess_bulk, convergence.ess_tail, convergence.ess_mean):
        assert statistic(constant) == 200.0
    assert convergence.ess_sd(constant) == 200.0
    for error in (convergence.mcse_mean, convergence.mcse_sd, lambda x: convergence.mcse_quantile(x, 0.2)):
        assert error(constant) == 0.0
    stuck = torch.arange(4.0)[:, None].expand(4, 50)
    assert convergence.rhat(stuck) == math.inf
    # Folding half ones and half zeros at their median leaves a constant; that is no reason for a NaN.
    coins = torch.tensor([0.0, 1.0]).repeat(4, 50)
    assert 0.9 < convergence.rhat(coins) < 1.1


def test_non_finite_draws_give_nan_for_their_own_entry_only():
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    x[0, 4, 1] = math.nan
    x[1, 7, 2] = math.inf
    assert convergence.rhat(x).isnan().tolist() == [False, True, True]
    assert convergence.ess_mean(x).isnan().tolist() == [False, True, True]
    assert torch.stack(convergence.mixing(x)).isnan().any(0).tolist() == [False, True, True]
    assert convergence.nested_rhat(x[..., 1], 2).isnan()


@pytest.mark.parametrize("shape", [(4, 3), (0, 10), (12,)])
def test_too_few_draws(shape):
    with pytest.raises(DataError, match="at least 4 draws"):
        convergence.rhat(torch.zeros(shape))


# -- nested R-hat ----------------------------------------------------------------------------------------------------


def test_nested_rhat_is_the_ratio_of_the_paper():
    x = np.random.default_rng(5).normal(size=(6, 7)) + np.array([0, 0, 1, 1, 3, 3])[:, None]
    superchains = x.reshape(3, 2, 7)
    between = superchains.mean((1, 2)).var(ddof=1)
    within = np.mean([part.mean(1).var(ddof=1) + part.var(axis=1, ddof=1).mean() for part in superchains])
    expected = math.sqrt(1 + between / within)
    draws = torch.from_numpy(x)
    assert float(convergence.nested_rhat(draws, 3, ranks=False)) == pytest.approx(expected, rel=1e-12)
    mixed = [4, 0, 2, 5, 1, 3]
    labels = [7, 9, 8, 7, 9, 8]
    reordered = draws[[0, 2, 4, 1, 3, 5]]
    for chains, names in (
        (draws[mixed], [m // 2 for m in mixed]),
        (reordered, [labels[k] for k in (0, 1, 2, 0, 1, 2)]),
    ):
        assert float(convergence.nested_rhat(chains, names, ranks=False)) == pytest.approx(expected, rel=1e-12)
    # One chain a superchain is R-hat without splitting, up to its (n - 1) / n.
    one = float(convergence.nested_rhat(draws, 6, ranks=False)) ** 2
    variance = x.mean(1).var(ddof=1) / x.var(axis=1, ddof=1).mean()
    assert one == pytest.approx(1 + variance, rel=1e-12)


def test_nested_rhat_of_single_draws():
    # Stationary independent chains: E nR^2 = 1 + 1/M; its standard deviation with K superchains is about sqrt(2/K)/M.
    stream = torch.Generator().manual_seed(2)
    x = torch.randn(64, 1, 400, generator=stream, dtype=torch.float64)
    squares = convergence.nested_rhat(x, 16, ranks=False).square()
    assert float(squares.mean()) == pytest.approx(1 + 1 / 4, abs=0.02)
    assert convergence.nested_limit(4) > float(convergence.nested_rhat(torch.randn(4096, 1, generator=stream), 1024))
    # Chains that still sit at their superchain's start.
    starts = torch.randn(16, 1, 1, generator=stream).expand(16, 4, 1).reshape(64, 1)
    stuck = starts + 0.05 * torch.randn(64, 1, generator=stream)
    assert convergence.nested_rhat(stuck, 16) > 5 > convergence.nested_limit(4)
    assert convergence.nested_rhat(starts, 16) == math.inf
    assert convergence.nested_rhat(torch.ones(64, 1), 16) == 1.0


def test_ranks_see_a_wider_superchain_and_bear_heavy_tails():
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(32, 100, generator=stream, dtype=torch.float64)
    x[:4] *= 5
    assert convergence.nested_rhat(x, 8) > 1.1 > float(convergence.nested_rhat(x[4:], 7))
    heavy = torch.distributions.StudentT(0.7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert convergence.nested_rhat(heavy.sample((32, 100)), 8) < convergence.nested_limit(4)


@pytest.mark.parametrize(
    ("chains", "superchains"), [(8, 1), (8, 3), (8, [0, 0, 0, 1, 1, 1, 1, 1]), (8, [0, 1]), (4, 4)]
)
def test_bad_superchains(chains, superchains):
    with pytest.raises(DataError, match="superchain"):
        convergence.nested_rhat(torch.zeros(chains, 1), superchains)


def test_quantile_level():
    with pytest.raises(DataError, match="between 0 and 1"):
        convergence.mcse_quantile(torch.zeros(2, 10), 0.0)
    with pytest.raises(DataError, match="between 0 and 1"):
        convergence.ess_quantile(torch.zeros(2, 10), 1.0)


def test_ebfmi():
    energy = torch.from_numpy(autoregressive(np.random.default_rng(3), 4, 300, 0.8))
    ours = convergence.ebfmi(energy)
    np.testing.assert_allclose(ours.numpy(), az.bfmi(energy.numpy()), rtol=1e-12)
    # For an AR(1) energy E[(difference)^2] / variance = 2 (1 - rho); its standard error here is about 0.03.
    assert float(ours.mean()) == pytest.approx(0.4, abs=0.1)


def test_effective_draws_of_an_autoregression():
    x = torch.from_numpy(autoregressive(np.random.default_rng(4), 8, 4000, 0.6))
    # ess / draws = (1 - rho) / (1 + rho) = 0.25
    assert float(convergence.ess_mean(x)) / 32000 == pytest.approx(0.25, rel=0.1)
