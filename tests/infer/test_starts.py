"""Where chains start: modes, paths, values; what they share with the run that begins there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer.checkpoint import Checkpoint
from bayesdl.infer.loop import InterruptedWarning, Run
from bayesdl.infer.nuts import NUTS
from bayesdl.infer.sgld import SGLD
from bayesdl.infer.starts import start, start_and_scale
from bayesdl.posterior.problem import prepare
from tests.infer.conftest import Linear
from tests.infer.targets import standard_errors

DOUBLE = torch.float64
QUICK = NUTS(chains=4, warmup=50, draws=50)


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(5.0, dtype=DOUBLE)))
    theta = pyro.sample("theta", dist.Normal(torch.zeros(8, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", 8):
        pyro.sample("y", dist.Normal(mu + tau * theta, 10.0), obs=y)


SCHOOLS = {"y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=DOUBLE)}


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1000.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + x[:, 0] * w[1], 0.5), obs=y)


def line_data(level: float) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.0, 1.0, 40, dtype=DOUBLE)[:, None]
    noise = torch.randn(40, dtype=DOUBLE, generator=generator(int(level), "y"))
    return x, level + 3.0 * x[:, 0] + 0.5 * noise


def test_every_start_depends_on_the_seed_and_the_chain_alone(linear: Linear) -> None:
    problem = prepare(linear.model, linear.data)
    for init in ("prior", "map", "pathfinder"):
        many = start(problem, Run(seed=3, init=init, progress=False), 5)
        few = start(problem, Run(seed=3, init=init, progress=False), 2)
        torch.testing.assert_close(many[:2], few, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(start(problem, Run(seed=4, init=init, progress=False), 2), few, atol=1e-6) or (
            init == "map"  # the mode is one
        )


def test_paths_of_a_conjugate_regression_start_at_its_posterior(linear: Linear) -> None:
    problem = prepare(linear.model, linear.data)
    z, scale = start_and_scale(problem, Run(seed=1, init="pathfinder", progress=False), 400)
    mean, precision = linear.posterior()
    root = torch.linalg.cholesky(precision)
    off = (z - mean) @ root
    # 400 independent draws: a mean is off by 0.05, a variance by 0.07 (1 s.e.)
    assert off.mean(0).abs().max() < 0.2
    assert (off.T.cov() - torch.eye(3, dtype=DOUBLE)).abs().max() < 0.3
    assert scale is not None
    torch.testing.assert_close(scale[0], torch.linalg.inv(precision).diagonal().sqrt(), rtol=0.1, atol=0.0)


def test_nuts_from_paths_finds_the_conjugate_posterior(linear: Linear) -> None:
    method = NUTS(chains=16, warmup=60, draws=100)
    posterior: Any = method.fit(linear.model, linear.data, init="pathfinder", progress=False)
    mean, precision = linear.posterior()
    variance = torch.linalg.inv(precision).diagonal()
    off = posterior.z - mean
    errors = [standard_errors(off[..., k], 0.0) for k in range(3)]
    errors += [standard_errors(off[..., k].square(), float(variance[k])) for k in range(3)]
    assert max(map(abs, errors)) < 4.0, errors
    counted = int(posterior.stats["leapfrogs"].sum())
    assert posterior.info["gradients"] > counted  # those of the paths and of warm-up are counted too


def test_paths_give_the_first_metric() -> None:
    data = line_data(2000.0)
    seen: list[dict[str, Any]] = []
    fits = {}
    for init in ("prior", "pathfinder"):
        seen.clear()
        method = NUTS(chains=4, warmup=20, draws=1, max_depth=8)
        fits[init] = method.fit(line, data, init=init, callback=seen.append, progress=False).info["gradients"]  # type: ignore[arg-type]  # the list's append returns None, which goes on
        scale = seen[0]["metric.scale"][0]
        exact = torch.tensor([0.5 / 40**0.5, 0.5 / float(data[0].square().sum()) ** 0.5], dtype=DOUBLE)
        if init == "pathfinder":
            torch.testing.assert_close(scale, exact, rtol=0.2, atol=0.0)
        else:
            assert (scale == 1.0).all()
    given = NUTS(chains=2, warmup=5, draws=1, step_size=0.05)
    given.fit(line, data, init="pathfinder", callback=seen.append, progress=False)  # type: ignore[arg-type]  # as above
    assert (seen[-1]["metric.scale"] == 1.0).all()  # a given step size is in the coordinates of the program


def test_hierarchical_programs_start_in_their_bulk() -> None:
    problem = prepare(schools, SCHOOLS)
    z = start(problem, Run(seed=0, init="pathfinder", progress=False), 50)
    values = problem.density.constrain(z)
    assert z.isfinite().all()
    assert values["tau"].min() > 0.3  # the mode of theta and tau together is at tau = 0
    assert values["tau"].max() < 50.0
    assert float(values["tau"].log().std()) > 0.3
    assert 2.0 < float(values["mu"].std()) < 6.0  # 3.5 in the posterior


def test_replicates_start_at_paths_of_their_own() -> None:
    data = [line_data(level) for level in (0.0, 500.0, -2000.0)]
    posteriors: list[Any] = QUICK.fit_each(line, data, init="pathfinder", progress=False)  # type: ignore[assignment]  # samplers give draws
    for (x, y), posterior in zip(data, posteriors, strict=True):
        design = torch.cat([torch.ones_like(x), x], 1)
        mean = torch.linalg.solve(design.T @ design + 0.25e-6 * torch.eye(2, dtype=DOUBLE), design.T @ y)
        assert max(abs(standard_errors(posterior.z[..., k] - mean[k], 0.0)) for k in range(2)) < 4.0
    with pytest.raises(MethodError, match="init='map' trains on one data set"):
        QUICK.fit_each(line, data, init="map", progress=False)


def test_stochastic_samplers_start_at_paths_too(linear: Linear) -> None:
    posterior: Any = SGLD(chains=3, batch_size=20, warmup=0, draws=2, step_size=1e-9).fit(
        linear.model, linear.data, init="pathfinder", progress=False
    )
    mean, precision = linear.posterior()
    off = (posterior.z[:, 0] - mean) @ torch.linalg.cholesky(precision)
    assert off.abs().max() < 5.0


def test_a_fit_that_is_cut_off_on_its_paths_resumes_bit_for_bit(
    linear: Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(**options: Any) -> Any:
        return QUICK.fit(linear.model, linear.data, init="pathfinder", progress=False, **options)

    whole = fit()
    evaluate, calls = LogDensity.value_and_grad, [0]

    def cut(density: LogDensity, z: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        if calls[0] == 40:
            raise KeyboardInterrupt
        return evaluate(density, z, *args, **options)

    checkpoint = Checkpoint(tmp_path / "fit", every=7)
    with monkeypatch.context() as patch, pytest.warns(InterruptedWarning), pytest.raises(KeyboardInterrupt):  # noqa: PT012, PT031 -- the interrupt is part of the block
        patch.setattr(LogDensity, "value_and_grad", cut)
        fit(checkpoint=checkpoint)
    assert not checkpoint.file.exists()  # of a run whose start was cut off there is nothing to go on from
    assert (tmp_path / "fit.pathfinder.safetensors").exists()
    resumed = fit(checkpoint=checkpoint)
    assert torch.equal(resumed.z, whole.z)


def test_an_unknown_start_names_those_that_there_are(linear: Linear) -> None:
    with pytest.raises(MethodError, match="init='modes' is unknown: use prior, network, map, pathfinder, a dict"):
        QUICK.fit(linear.model, linear.data, init="modes")
