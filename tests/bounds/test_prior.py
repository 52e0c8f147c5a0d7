"""The prior of a bound: its mean is trained under the prior's own noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.bounds.prior import UnderNoise
from bayesdl.infer import schedules

SD, NOISE = 2.0, 0.5


@pytest.mark.parametrize(("estimator", "batch_size"), [("local", None), ("reparameterisation", None), ("local", 40)])
def test_noise_does_not_move_the_mode_of_a_quadratic(estimator: str, batch_size: int | None) -> None:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=stream, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + NOISE * torch.randn(200, generator=stream).double()
    model = bdl.BayesianNetwork(
        nn.Linear(3, 1, bias=False).double(), bdl.priors.Normal(SD), bdl.likelihoods.Gaussian(noise=NOISE)
    )
    method = UnderNoise(
        steps=3000,
        batch_size=batch_size,
        learning_rate=0.05,
        average="polyak",
        share=0.2,
        gradients=bdl.MeanFieldVI(estimator=estimator, samples=2),
    )
    found: Any = bdl.fit(model, (x, y), method, progress=False)
    units = found.problem.batch
    x, y = units["x"], units["y"].reshape(-1)
    gram = x.T @ x / NOISE**2 + torch.eye(3, dtype=torch.float64) / SD**2
    mode = torch.linalg.solve(gram, x.T @ y / NOISE**2)
    # Antithetic draws cancel in a quadratic; the rows' own noise, and that of mini-batches, is averaged away.
    exact = estimator == "reparameterisation"
    torch.testing.assert_close(found.z.flatten(), mode, rtol=0, atol=1e-6 if exact else 0.02)


def test_draws_of_a_prior_trained_under_its_noise_err_less() -> None:
    data = bdl.data.load("breast_cancer").train
    model = bdl.models.mlp(data, hidden=(20,), activation="relu").to(torch.float32)
    settings: dict[str, Any] = {"steps": 400, "learning_rate": 0.02}
    plain = bdl.fit(model, data, bdl.MAP(**settings), progress=False)
    share = 1.0
    noisy = bdl.fit(
        model, data, UnderNoise(**settings, share=share, gradients=bdl.MeanFieldVI(estimator="local")), progress=False
    )
    stream = torch.Generator().manual_seed(0)

    def risk(posterior: Any) -> float:
        density = posterior.problem.density
        z = posterior.z.flatten() + share * density.prior_scale * torch.randn(300, density.dim, generator=stream)
        return float(-density.log_likelihood(z).mean())

    assert risk(noisy) < 0.7 * risk(plain)


def test_training_under_noise_resumes_exactly(tmp_path: Any) -> None:
    data = bdl.data.load("breast_cancer").train
    model = bdl.models.mlp(data, hidden=(5,), activation="relu")
    method = UnderNoise(
        steps=30,
        batch_size=32,
        learning_rate=schedules.Constant(0.02),
        gradients=bdl.MeanFieldVI(estimator="local"),
    )
    whole: Any = bdl.fit(model, data, method, progress=False)
    checkpoint = bdl.Checkpoint(tmp_path / "run.ckpt", every=10)
    bdl.fit(model, data, method, progress=False, checkpoint=checkpoint, callback=lambda state: state["step"] == 15)
    resumed: Any = bdl.fit(model, data, method, progress=False, checkpoint=checkpoint)
    assert torch.equal(resumed.z, whole.z)
