"""What the walk over a network's graph knows of torch's modules and functions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NO_LIMIT = (
    "For a network that has none, bayesdl.infinite.monte_carlo_kernel estimates the kernel of wide finite networks."
)
PARTS = "There are rules for Linear, Conv1d, Conv2d, average pools, Flatten, LayerNorm, sums and elementwise ones"
REASONS: dict[str, str] = {
    "maxpool": "the maximum of correlated Gaussians has no closed-form covariance",
    "max_pool": "the maximum of correlated Gaussians has no closed-form covariance",
    "attention": "its weights multiply each other at random, so that one head's output is not Gaussian",
    "transformer": "its attention weights multiply each other, so that one head's output is not Gaussian",
    "softmax": "it mixes units, so that they are not exchangeable sums any more",
    "batchnorm": "it makes a row's output depend on the other rows",
    "embedding": "its inputs are indices, not numbers",
    "prelu": "its slope is a parameter; leaky_relu holds it fixed",
    "lstm": "recurrent weights are used again at every step",
    "gru": "recurrent weights are used again at every step",
    "rnn": "recurrent weights are used again at every step",
}
ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
    nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.ReLU6, nn.Threshold,
)  # fmt: skip
NEUTRAL_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
NEUTRAL_FUNCTIONS = {F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, torch.dropout}
NAMES = (
    "abs", "neg", "exp", "expm1", "log1p", "sin", "cos", "sinh", "cosh", "tanh", "atan", "asinh", "erf", "erfc",
    "sigmoid", "relu", "square", "pow", "sign", "clamp", "add", "sub", "mul", "div", "true_divide", "heaviside",
    "where", "gt", "lt", "ge", "le", "maximum", "minimum", "reciprocal", "sqrt", "positive",
)  # fmt: skip
ACTIVATIONS = (
    "relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "logsigmoid", "softplus", "softsign",
    "tanhshrink", "softshrink", "hardshrink", "hardtanh", "hardsigmoid", "hardswish", "relu6", "leaky_relu",
    "threshold",
)  # fmt: skip
METHODS = set(NAMES)
FUNCTIONS: set[Any] = {getattr(torch, name) for name in NAMES} | {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.abs, abs,
    operator.gt, operator.lt, operator.ge, operator.le, operator.pos, torch.special.erf, torch.special.ndtr,
    torch.special.expit, *(getattr(F, name) for name in ACTIVATIONS),
}  # fmt: skip
SUMS = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub", operator.iadd}
