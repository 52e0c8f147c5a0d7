"""SWAG: its moments are those of the iterates, and on a quadratic these follow the known law of SGD."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import MethodError
from bayesdl.infer.schedules import Constant
from bayesdl.infer.swag import NoGradientNoiseWarning
from bayesdl.posterior import GaussianPosterior, MixturePosterior
from tests.cases import conjugate
from tests.infer.linear_laws import regression_law


def iterates(method: bdl.SWAG, **options: Any) -> tuple[bdl.Posterior, np.ndarray]:
    """A fit of the conjugate regression, and every iterate ``[steps, M, D]`` as the callback sees it."""
    path: list[np.ndarray] = []

    def note(state: dict[str, Any]) -> None:
        path.append(state["z"].numpy().copy())

    return method.fit(conjugate().program, conjugate().data, callback=note, **options), np.stack(path)


@pytest.mark.parametrize(("snapshots", "every", "rank"), [(9, 3, 4), (5, None, 20)])
def test_moments_are_those_of_a_naive_loop_over_the_iterates(snapshots: int, every: int | None, rank: int) -> None:
    posterior, path = iterates(
        bdl.SWAG(steps=50, batch_size=10, snapshots=snapshots, every=every, rank=rank, rate=0.01)
    )
    stride = 6 if every is None else every  # 60 rows in batches of 10
    kept = [path[50 + (k + 1) * stride - 1, 0] for k in range(snapshots)]
    assert len(path) == 50 + snapshots * stride
    mean = sum(kept) / snapshots
    variance = sum((z - mean) ** 2 for z in kept) / snapshots
    last = kept[-rank:]
    covariance = np.diag(variance) / 2
    for z in last:
        covariance = covariance + np.outer(z - mean, z - mean) / (2 * (len(last) - 1))
    assert isinstance(posterior, GaussianPosterior)
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(posterior.law.covariance.dense(), covariance, rtol=1e-10, atol=1e-16)
    assert posterior.info["snapshots"] == snapshots


def test_a_member_is_what_it_is_alone() -> None:
    settings = {"steps": 30, "batch_size": 10, "snapshots": 6, "rank": 3}
    one = bdl.SWAG(**settings).fit(conjugate().program, conjugate().data)
    three = bdl.SWAG(members=3, **settings).fit(conjugate().program, conjugate().data)
    assert isinstance(three, MixturePosterior)
    torch.testing.assert_close(three.laws[0].mean, one.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(three.laws[0].covariance.dense(), one.law.covariance.dense(), rtol=1e-7, atol=1e-14)
    assert (three.laws[1].mean - one.mean).abs().max() > 1e-6


def test_on_a_quadratic_the_moments_are_the_stationary_law_of_sgd() -> None:
    case, members, rate = conjugate(), 200, 0.02
    method = bdl.SWAG(
        steps=150, batch_size=10, optimizer="sgd", learning_rate=Constant(rate), rate=rate, replacement=True,
        snapshots=40, every=10, rank=40, members=members,
    )  # fmt: skip
    posterior = method.fit(case.program, case.data, progress=False)
    assert isinstance(posterior, MixturePosterior)
    n, unit = len(case.y), case.prior

    def step(state: tuple[Tensor, ...], gradient: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """SGD with momentum 0.9 on the loss per row, written out once more, in units of the prior's sd."""
        z, velocity = state
        velocity = 0.9 * velocity - gradient / (n * unit)
        return z - rate / unit * velocity, velocity

    law = regression_law(step, 2, case, 10)
    means = torch.stack([one.mean for one in posterior.laws])
    second = torch.stack(
        [one.covariance.dense() + torch.outer(m, m) for one, m in zip(posterior.laws, means - case.mean(), strict=True)]
    )
    # S is half of the covariance and half of its diagonal; with the means' own spread it is the whole second moment.
    within = torch.stack([2 * one.covariance.dense() for one in posterior.laws])
    off = ~torch.eye(3, dtype=torch.bool)
    moment = within + (means - case.mean())[:, :, None] * (means - case.mean())[:, None, :]
    standard_error = moment.std(0) / math.sqrt(members)
    assert ((moment.mean(0) - law).abs()[off] < 4 * standard_error[off]).all()
    diagonal = second.diagonal(dim1=1, dim2=2)
    error = diagonal.std(0) / math.sqrt(members)
    # the diagonal is half of a variance divided by T and half of one divided by K - 1 = T - 1
    assert ((diagonal.mean(0) / law.diagonal() - 1).abs() < 4 * error / law.diagonal() + 0.01).all()
    assert (error / law.diagonal()).max() < 0.05
    assert (law - case.covariance()).abs().max() > 0.3 * law.abs().max()  # and it is not the posterior


def test_mean_and_covariance_are_over_z_where_the_density_has_its_mode() -> None:
    def program(x: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(torch.tensor(0.3, dtype=torch.float64), 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(()) * s, 1.0), obs=x)  # the data say nothing

    with pytest.warns(NoGradientNoiseWarning, match="all 5 rows at every step"):
        posterior = bdl.SWAG(steps=200, batch_size=None, learning_rate=0.1).fit(program, {"x": torch.zeros(5).double()})
    assert float(posterior.mean) == pytest.approx(0.3, abs=1e-3)
    # without mini-batches there is no noise, and no spread beside rounding
    assert float(posterior.sd) < 1e-2
    assert posterior.kl() is not None


def test_mixture_has_the_moments_and_density_of_its_gaussians() -> None:
    settings = {"steps": 5, "batch_size": 10, "optimizer": "adam", "snapshots": 4, "rank": 3, "rate": 0.1}
    posterior = bdl.SWAG(members=3, **settings).fit(conjugate().program, conjugate().data)
    assert isinstance(posterior, MixturePosterior)
    assert posterior.kl() is None
    draws = posterior.unconstrained_draws(30_001, seed=4)
    assert torch.equal(draws, posterior.unconstrained_draws(30_001, seed=4))
    means = torch.stack([law.mean for law in posterior.laws])
    covariances = torch.stack([law.covariance.dense() for law in posterior.laws])
    mean = means.mean(0)
    covariance = covariances.mean(0) + torch.cov(means.T, correction=0)
    error = covariance.diagonal().sqrt() / 30_001**0.5
    assert ((draws.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0.1, atol=0.03 * float(covariance.abs().max()))
    laws = [torch.distributions.MultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True)]
    expected = torch.stack([law.log_prob(draws[:50]) for law in laws]).exp().mean(0).log()
    torch.testing.assert_close(posterior.log_prob(draws[:50]), expected)
    # fewer draws than Gaussians: over seeds, each is as likely as the others
    nearest = [torch.cdist(posterior.unconstrained_draws(1, seed=s), means).argmin() for s in range(60)]
    assert set(map(int, nearest)) == {0, 1, 2}


def test_epochs_without_replacement_spread_less_at_their_ends() -> None:
    settings = {"steps": 100, "batch_size": 10, "optimizer": "sgd", "rate": 0.02, "snapshots": 60, "rank": 2}
    spread = [
        bdl.SWAG(replacement=replacement, members=8, **settings).fit(conjugate().program, conjugate().data)
        for replacement in (False, True)
    ]
    epochs, independent = (torch.stack([law.covariance.variances() for law in found.laws]).mean() for found in spread)
    assert epochs < 0.7 * independent


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"snapshots": 1}, "snapshots=1.*at least 2"),
        ({"rank": 1}, "rank=1.*at least 2"),
        ({"every": 0}, "every=0"),
        ({"rate": 0.0}, r"rate=0\.0"),
        ({"members": 0}, "members=0"),
        ({"optimizer": "lbfgs"}, "lbfgs"),
        ({"temperature": 2.0}, "only temperature=1"),
        ({"replacement": "yes"}, "replacement='yes'"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        bdl.SWAG(**settings)


def test_too_early_to_have_two_snapshots() -> None:
    with pytest.raises(MethodError, match="before the second snapshot"):
        bdl.SWAG(steps=10, batch_size=10).fit(
            conjugate().program, conjugate().data, callback=lambda state: state["step"] == 17
        )
