"""Kalman filter and smoother against the joint Gaussian of states and observations, and against Pyro's GaussianHMM."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.statespace import StateSpace

DOUBLE = torch.float64
STREAM = torch.Generator().manual_seed(11)
T = 6


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=STREAM, dtype=DOUBLE)


def positive(*shape: int) -> Tensor:
    root = randn(*shape, shape[-1])
    return root @ root.mT + 0.3 * torch.eye(shape[-1], dtype=DOUBLE)


def model(*batch: int, n: int = 3, m: int = 2) -> StateSpace:
    return StateSpace(randn(*batch, n), positive(*batch, n), 0.6 * randn(*batch, n, n), positive(*batch, n),
                      randn(*batch, m, n), positive(*batch, m))  # fmt: skip


def varying(n: int = 3, m: int = 2) -> StateSpace:
    """Matrices of their own at every time; the transition's noise stays."""
    return StateSpace(randn(n), positive(n), 0.6 * randn(T, n, n), positive(1, n), randn(T, m, n), positive(T, m),
                      varying=True)  # fmt: skip


def joint(space: StateSpace, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and covariances of (h_1..h_T) flat and of (x_1..x_T) given them, by writing the linear maps out."""
    n, m = space.transition.shape[-1], space.observation.shape[-2]

    def all_times(matrix: Tensor) -> list[Tensor]:
        return list((matrix[:steps] if space.varying else matrix).expand(steps, *matrix.shape[-2:]))

    moves, shocks, looks, errors = map(
        all_times, (space.transition, space.transition_noise, space.observation, space.observation_noise)
    )
    drive = torch.zeros(steps * n, (steps + 1) * n, dtype=DOUBLE)  # h = drive (h_0, noise_1, ..., noise_T)
    row = torch.eye(n, (steps + 1) * n, dtype=DOUBLE)
    for t, move in enumerate(moves):
        row = move @ row
        row[:, (t + 1) * n : (t + 2) * n] += torch.eye(n, dtype=DOUBLE)
        drive[t * n : (t + 1) * n] = row
    noise = torch.block_diag(space.initial_covariance, *shocks)
    mean = drive[:, :n] @ space.initial_mean
    return (
        mean,
        drive @ noise @ drive.mT,
        torch.block_diag(*looks),
        torch.block_diag(*errors).reshape(steps * m, steps * m),
    )


def conditioned(space: StateSpace, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of all states given the entries of x that are there, and their log density."""
    mean, covariance, emit, noise = joint(space, len(x))
    there = ~x.flatten().isnan()
    emit, noise, value = emit[there], noise[there][:, there], x.flatten()[there]
    if not len(value):
        return mean, covariance, 0.0
    spread = emit @ covariance @ emit.mT + noise
    gain = covariance @ emit.mT @ torch.linalg.inv(spread)
    law = torch.distributions.MultivariateNormal(emit @ mean, spread)
    return mean + gain @ (value - emit @ mean), covariance - gain @ emit @ covariance, float(law.log_prob(value))


def with_gaps() -> Tensor:
    x = randn(T, 2)
    x[1] = math.nan
    x[3, 0] = math.nan
    return x


@pytest.mark.parametrize("make", [model, varying])
@pytest.mark.parametrize("gaps", [False, True])
def test_filter_smoother_and_evidence_are_joint_gaussian_conditioning(gaps: bool, make: Any) -> None:
    space, x = make(), with_gaps() if gaps else randn(T, 2)
    filtered, smoothed = space.filter(x), space.smooth(x)
    for t in range(1, T + 1):
        mean, covariance, evidence = conditioned(space, x[:t])
        torch.testing.assert_close(filtered.mean[t - 1], mean[-3:], rtol=0, atol=1e-9)
        torch.testing.assert_close(filtered.covariance[t - 1], covariance[-3:, -3:], rtol=0, atol=1e-9)
    assert float(filtered.log_evidence) == pytest.approx(evidence, abs=1e-8)
    for t in range(T):
        here = slice(3 * t, 3 * t + 3)
        torch.testing.assert_close(smoothed.mean[t], mean[here], rtol=0, atol=1e-9)
        torch.testing.assert_close(smoothed.covariance[t], covariance[here, here], rtol=0, atol=1e-9)
    # Later observations never make a state less certain.
    assert torch.linalg.eigvalsh(filtered.covariance - smoothed.covariance).min() > -1e-10


def test_the_scalar_filter_follows_its_recursion() -> None:
    """mu' = a mu + k (x - a mu), P = a^2 s^2 + q^2, k = P / (P + r^2), s'^2 = P (1 - k), for a = .9, q = .5, r = .7."""
    a, q, r = 0.9, 0.5, 0.7
    x = randn(60, 1)
    found = StateSpace.scalar(0.0, 1.0, a, q, r).filter(x)
    mean, variance, gains = 0.0, 1.0, []
    for t in range(60):
        ahead = a**2 * variance + q**2
        k = ahead / (ahead + r**2)
        mean, variance = a * mean + k * (float(x[t]) - a * mean), ahead * (1 - k)
        gains.append(k)
        assert float(found.mean[t]) == pytest.approx(mean, abs=1e-12)
        assert float(found.covariance[t]) == pytest.approx(variance, abs=1e-12)
    assert 0 < min(gains) < max(gains) < 1
    # The variance knows nothing of the data, and settles at the fixed point of Riccati's equation. That is the positive
    # root of P^2 + P (r^2 (1 - a^2) - q^2) - q^2 r^2 = 0 for the variance P one step ahead.
    other = StateSpace.scalar(0.0, 1.0, a, q, r).filter(randn(60, 1))
    assert torch.equal(other.covariance, found.covariance)
    half = (r**2 * (1 - a**2) - q**2) / 2
    ahead = -half + math.sqrt(half**2 + q**2 * r**2)
    assert float(found.covariance[-1]) == pytest.approx(ahead * r**2 / (ahead + r**2), abs=1e-12)
    # The inventory's figure for T = 5.
    assert float(found.covariance[4]) == pytest.approx(0.231274, abs=5e-7)


def test_mean_and_variance_are_sufficient() -> None:
    """Going on from the filtered state gives what all observations together give."""
    space, x = model(), randn(T, 2)
    whole, early = space.filter(x), space.filter(x[:3])
    later = StateSpace(early.mean[-1], early.covariance[-1], space.transition, space.transition_noise,
                       space.observation, space.observation_noise).filter(x[3:])  # fmt: skip
    torch.testing.assert_close(later.mean, whole.mean[3:], rtol=0, atol=1e-12)
    torch.testing.assert_close(early.log_evidence + later.log_evidence, whole.log_evidence, rtol=0, atol=1e-10)


def hmm(space: StateSpace) -> dist.GaussianHMM:
    n, m = space.transition.shape[-1], space.observation.shape[-2]
    return dist.GaussianHMM(
        dist.MultivariateNormal(space.initial_mean, space.initial_covariance),
        space.transition.mT[..., None, :, :],
        dist.MultivariateNormal(torch.zeros(1, n, dtype=DOUBLE), space.transition_noise[..., None, :, :]),
        space.observation.mT[..., None, :, :],
        dist.MultivariateNormal(torch.zeros(1, m, dtype=DOUBLE), space.observation_noise[..., None, :, :]),
        duration=T,
    )


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_pyros_gaussian_hmm_agrees(batch: tuple[int, ...]) -> None:
    space, x = model(*batch), randn(*batch, T, 2)
    theirs, ours = hmm(space), space.filter(x)
    assert ours.log_evidence.shape == batch
    torch.testing.assert_close(ours.log_evidence, theirs.log_prob(x), rtol=0, atol=1e-8)
    last = theirs.filter(x)
    torch.testing.assert_close(ours.mean[..., -1, :], last.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.covariance[..., -1, :, :], last.covariance_matrix, rtol=0, atol=1e-8)


def test_paths_have_the_law_that_conditioning_gives_and_pyros_draws_too() -> None:
    space, x, count = model(n=2), with_gaps(), 20_000
    mean, covariance, _ = conditioned(space, x)
    paths = space.sample(x, count, seed=2)
    assert paths.shape == (count, T, 2)
    assert torch.equal(paths, space.sample(x, count, seed=2))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (paths.flatten(1) - mean).mT, upper=False)
    # Means of 20,000 standard normals, and of their products, have standard errors 1 / sqrt(20,000).
    assert white.mean(1).abs().max() < 4.5 / math.sqrt(count)
    moments = white @ white.mT / count - torch.eye(len(white), dtype=DOUBLE)
    assert moments.abs().max() < 4.5 * math.sqrt(2 / count)
    full = randn(T, 2)
    mean, covariance, _ = conditioned(space, full)
    theirs = hmm(space).rsample_posterior(full, (count,))
    assert ((theirs.flatten(1).mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 5 / math.sqrt(count)


def test_batches_broadcast_and_missing_rows_predict() -> None:
    space, x = model(), randn(5, T, 2)
    together = space.smooth(x)
    for k in range(5):
        alone = space.smooth(x[k])
        torch.testing.assert_close(together.mean[k], alone.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(together.log_evidence[k], alone.log_evidence, rtol=0, atol=1e-11)
    none = space.filter(torch.full((T, 2), math.nan, dtype=DOUBLE))
    mean, covariance, _, _ = joint(space, T)
    torch.testing.assert_close(none.mean.flatten(), mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(none.covariance[-1], covariance[-3:, -3:], rtol=1e-10, atol=1e-10)
    assert float(none.log_evidence) == 0.0


def test_it_stays_positive_where_one_state_is_a_constant_and_noise_is_small() -> None:
    """A level that never moves, measured 2,000 times in single precision to one part in a million."""
    space = StateSpace(torch.zeros(2), 1e4 * torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
                       torch.zeros(2, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1e-4]]))  # fmt: skip
    x = torch.arange(1.0, 2001.0)[:, None]
    found = space.filter(x)
    assert found.mean.isfinite().all()
    assert torch.linalg.eigvalsh(found.covariance[-1].double()).min() > -1e-10
    assert float(found.mean[-1, 1]) == pytest.approx(1.0, abs=1e-3)
    # A line through the points is all that there is: no path may leave it by more than the noise.
    assert (space.sample(x[:50], 3)[..., 0] - x[:50, 0]).abs().max() < 0.1
    sure = StateSpace(
        torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    )
    assert torch.equal(sure.sample(x[:5], 3), torch.ones(3, 5, 1))
    assert torch.equal(sure.smooth(x[:5]).covariance, torch.zeros(5, 1, 1))


def test_the_evidence_has_the_right_gradient() -> None:
    x = randn(T, 1)

    def evidence(a: Tensor, q: Tensor) -> Tensor:
        return StateSpace.scalar(torch.zeros((), dtype=DOUBLE), torch.ones((), dtype=DOUBLE), a, q,
                                 torch.full((), 0.7, dtype=DOUBLE)).log_evidence(x)  # fmt: skip

    leaves = [torch.tensor(value, dtype=DOUBLE, requires_grad=True) for value in (0.9, 0.5)]
    assert torch.autograd.gradcheck(evidence, leaves)


def test_wrong_shapes_are_refused() -> None:
    space = model()
    with pytest.raises(DataError, match=r"\[..., T, 2\]"):
        space.filter(randn(T, 3))
    with pytest.raises(ModelError, match="observation_noise"):
        StateSpace(space.initial_mean, space.initial_covariance, space.transition, space.transition_noise,
                   space.observation, positive(3))  # fmt: skip
    with pytest.raises(DataError, match="those of 6 times; there are 5 observations"):
        varying().filter(randn(5, 2))
    with pytest.raises(ModelError, match="varying=True.*T, rows"):
        StateSpace(space.initial_mean, space.initial_covariance, space.transition, space.transition_noise,
                   space.observation, space.observation_noise, varying=True)  # fmt: skip
