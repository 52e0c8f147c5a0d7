"""Dual activations by name: E[phi(u) phi(v)] and E[phi'(u) phi'(v)] when (u, v) is a zero-mean bivariate normal."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.infinite.dual import Dual
from bayesdl.infinite.piecewise import Jump, PiecewiseLinear
from bayesdl.infinite.smooth import Erf, Gaussian, Gelu, Monomial, Wave

LOGISTIC = 2.4020563531719796  # 0.5 (1 + erf(x / LOGISTIC)) is the nearest such function to the logistic one

DUALS: dict[str, Dual] = {
    "relu": PiecewiseLinear(0.0, 1.0),
    "abs": PiecewiseLinear(-1.0, 1.0),
    "erf": Erf(),
    "sigmoid_like": Erf(0.5, 1 / LOGISTIC, 0.5),
    "gelu": Gelu(),
    "sin": Wave(),
    "cos": Wave(c=math.pi / 2),
    "rbf": Wave(math.sqrt(2), math.sqrt(2), math.pi / 4),
    "gaussian": Gaussian(),
    "sign": Jump(-1.0, 1.0),
    "step": Jump(0.0, 1.0),
    "linear": Monomial(1),
}
"""Activations without parameters."""

FAMILIES: dict[str, tuple[int, Callable[..., Dual]]] = {
    "leaky_relu": (1, lambda slope: PiecewiseLinear(slope, 1.0)),
    "piecewise_linear": (2, PiecewiseLinear),
    "monomial": (1, lambda n: Monomial(int(n))),
    "erf": (3, Erf),
    "sin": (3, Wave),
}
"""Families of activations: the number of their parameters, and the dual for given ones."""

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "erf": torch.erf,
    "sigmoid_like": lambda x: 0.5 * (1 + torch.erf(x / LOGISTIC)),
    "gelu": torch.nn.functional.gelu,
    "sin": torch.sin,
    "cos": torch.cos,
    "rbf": lambda x: math.sqrt(2) * torch.sin(math.sqrt(2) * x + math.pi / 4),
    "gaussian": lambda x: torch.exp(-(x**2)),
    "sign": torch.sign,
    "step": lambda x: (x > 0).to(x.dtype),
    "linear": lambda x: x,
}
"""The functions whose duals ``DUALS`` holds."""

relu = DUALS["relu"].covariance
erf = DUALS["erf"].covariance
