"""Several data sets as one batch of chains: each gets its own posterior, its own step size and its own units."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.data import Dataset
from bayesdl.infer.hmc import HMC
from bayesdl.infer.nuts import NUTS
from bayesdl.infer.variational import MeanFieldVI
from bayesdl.models import mlp
from tests.infer.targets import standard_errors

DOUBLE = torch.float64
METHOD = NUTS(chains=4, warmup=100, draws=100)


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 0.5), obs=y)


def line_data(k: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.0, 2.0 * 4.0**-k, rows, dtype=DOUBLE)[:, None]
    return x, 0.7 - k * x[:, 0] + 0.5 * torch.randn(rows, dtype=DOUBLE, generator=generator(k, "y"))


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    design = torch.cat([torch.ones_like(x), x], 1)
    precision = design.T @ design / 0.25 + torch.eye(2, dtype=DOUBLE) / 100.0
    return torch.linalg.solve(precision, design.T @ y / 0.25), torch.linalg.inv(precision)


@pytest.mark.parametrize("method", [METHOD, HMC(chains=8, warmup=100, draws=100)])
def test_every_data_set_gets_its_exact_posterior(method: NUTS | HMC) -> None:
    # scales from 1 to 1/16 and two sizes, so that a shared step size, metric or batch would show
    data = [line_data(0), line_data(1, rows=9), line_data(2), line_data(1), line_data(0, rows=9)]
    posteriors = method.fit_each(line, data, seed=3, progress=False)
    for (x, y), posterior in zip(data, posteriors, strict=True):
        mean, covariance = exact(x, y)
        off = posterior.z - mean  # type: ignore[attr-defined]  # fit_each is annotated with the base class
        errors = [standard_errors(off[..., i], 0.0) for i in range(2)]
        errors += [
            standard_errors(off[..., i] * off[..., j], float(covariance[i, j])) for i, j in ((0, 0), (0, 1), (1, 1))
        ]
        assert max(map(abs, errors)) < 4.0, errors
        assert torch.equal(posterior.problem.batch["y"], y)
    assert len({posterior.info["step_size"] for posterior in posteriors}) == 5


def test_a_replicate_is_the_fit_of_its_data_set_alone() -> None:
    x, y = line_data(0)
    alone = METHOD.fit_each(line, [(x, y)], seed=5, progress=False)[0]
    assert torch.equal(alone.z, METHOD.fit(line, (x, y), seed=5, progress=False).z)  # type: ignore[attr-defined]  # as above


def test_datasets_keep_their_own_units() -> None:
    x = torch.linspace(-1.0, 1.0, 20, dtype=DOUBLE)[:, None]
    y = 1.0 + x[:, 0] + 0.3 * torch.randn(20, dtype=DOUBLE, generator=generator(0, "y"))
    data = [Dataset.from_arrays(x, factor * y) for factor in (1.0, 1000.0)]
    model = mlp(data[0], hidden=(3,))
    small, large = NUTS(chains=2, warmup=100, draws=50).fit_each(model, data, progress=False)
    torch.testing.assert_close(large.predict(x).mean / 1000.0, small.predict(x).mean, rtol=0.3, atol=0.2)
    assert small.problem.rows is not None
    assert large.problem.rows is not None
    assert small.problem.rows.overlap(large.problem.rows) == 0


def test_programs_without_a_data_plate_and_with_local_latents() -> None:
    def schools(sigma: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 5.0))
        with pyro.plate("data", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def single(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    sigma = torch.full((6,), 3.0, dtype=DOUBLE)
    both = METHOD.fit_each(schools, [{"sigma": sigma, "y": sigma * 0 + c} for c in (-6.0, 6.0)], progress=False)
    precision = 1 / 25 + 6 / (4 + 9)
    for posterior, c in zip(both, (-6.0, 6.0), strict=True):
        assert abs(standard_errors(posterior.draws_by_chain()["mu"], 6 * c / 13 / precision)) < 4.0
    two = METHOD.fit_each(single, [{"y": torch.tensor(c, dtype=DOUBLE)} for c in (-2.0, 2.0)], progress=False)
    for posterior, c in zip(two, (-2.0, 2.0), strict=True):
        assert abs(standard_errors(posterior.draws_by_chain()["mu"], c / 2)) < 4.0


def test_other_methods_fit_one_after_the_other() -> None:
    data = [line_data(0), line_data(1)]
    posteriors = MeanFieldVI(steps=30).fit_each(line, data, progress=False)
    assert [torch.equal(p.problem.batch["y"], y) for p, (_, y) in zip(posteriors, data, strict=True)] == [True, True]
