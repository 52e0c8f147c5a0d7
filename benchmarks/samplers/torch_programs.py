"""The works as Pyro programs, given alike to Pyro and to bayesdl."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from works import HIDDEN, INTERCEPT_SD, Work


def network(x: Tensor, y: Tensor) -> None:
    """See ``works.network``."""
    inputs = x.shape[-1]
    w1 = pyro.sample("w1", dist.Normal(0.0, 1 / math.sqrt(inputs)).expand([HIDDEN, inputs]).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1 / math.sqrt(HIDDEN)).expand([HIDDEN]).to_event(1))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    f = torch.tanh(x @ w1.T + b1) @ w2 + b2
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, noise), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    """See ``works.logistic``."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    raw = pyro.sample("raw", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SD))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ (raw * scale) + intercept), obs=y)


PROGRAMS: dict[str, Callable[[Tensor, Tensor], None]] = {"network": network, "logistic": logistic}


def data(work: Work) -> dict[str, Tensor]:
    """The program's arguments."""
    return {"x": torch.from_numpy(work.x), "y": torch.from_numpy(work.y)}
