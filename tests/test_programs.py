"""Hand-written programs through every method: it fits and predicts, or it says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl._registry import METHODS, resolve
from bayesdl.errors import MethodError, ModelError
from tests import cases

STREAM = torch.Generator().manual_seed(0)
GROUP = torch.arange(24) % 4
X = torch.randn(24, generator=STREAM)
Y = X * torch.tensor([1.0, 1.5, 2.0, 0.5])[GROUP] + 0.3 * torch.randn(24, generator=STREAM)


def hierarchical(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Slopes per group under a common mean; the group is the second column."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("groups", 4):
        slope = pyro.sample("slope", dist.Normal(mean, spread))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope[x[:, 1].long()] * x[:, 0], noise), obs=y)


def mixture(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Two lines through the origin; which one a row lies on is a discrete latent of its own."""
    slopes = pyro.sample("slopes", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        line = pyro.sample("line", dist.Bernoulli(share)).long()
        return pyro.sample("y", dist.Normal(slopes[line] * x[:, 0], 0.3), obs=y)


PROGRAMS: dict[str, Callable[..., Any]] = {"hierarchical": hierarchical, "mixture": mixture}
REFUSED = {
    **{
        (program, method): "BayesianNetwork"
        for program in PROGRAMS
        for method in ("NNGP", "GP", "LastLayer", "KalmanFilter", "PACBayes")
    },
    **dict.fromkeys([(program, "MCDropout") for program in PROGRAMS], "Dropout"),
    ("hierarchical", "EllipticalSlice"): "independent Gaussian",
    ("mixture", "EllipticalSlice"): "independent Gaussian",
}
"""What the structure of a program does not permit, and a word of the reason."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_method_fits_or_says_why_not(program: str, method: str) -> None:
    x = torch.stack([X, GROUP.float()], 1)
    chosen = resolve(method)(**cases.METHODS[method].settings)
    if (program, method) in REFUSED:
        with pytest.raises((MethodError, ModelError), match=REFUSED[program, method]):
            chosen.fit(PROGRAMS[program], (x, Y), progress=False)
        return
    posterior = chosen.fit(PROGRAMS[program], (x, Y), progress=False)
    prediction = posterior.predict(x[:5])
    assert len(prediction) == 5
    assert prediction.mean.isfinite().all()
    assert prediction.log_prob(Y[:5]).isfinite().all()
    names = {"hierarchical": {"mean", "spread", "noise", "slope"}, "mixture": {"slopes", "share"}}[program]
    assert set(posterior.draws(3)) == names


def test_nuts_finds_the_slopes() -> None:
    x = torch.stack([X, GROUP.float()], 1)
    posterior = bdl.NUTS(chains=4, warmup=200, draws=200).fit(hierarchical, (x, Y), progress=False)
    slope = posterior.draws()["slope"]
    least_squares = torch.stack([(X * Y)[g == GROUP].sum() / X[g == GROUP].square().sum() for g in range(4)])
    # Shrinkage towards the common mean is far smaller than the posterior's own width here.
    assert ((slope.mean(0) - least_squares).abs() < 2 * slope.std(0)).all()
    assert posterior.diagnostics().rhat < 1.05
