r"""Signals and gradients in one random network of finite width, beside the maps of ``theory.mean_field``.

Layer l computes ``h^l = W^l phi(h^(l-1)) + b^l`` from pre-activations ``h^0``. Weights are drawn anew, from their own
seed, whenever a layer is passed, so that one matrix is held at a time, whatever the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.errors import DataError, ModelError
from bayesdl.infinite.quadrature import derivative
from bayesdl.theory.mean_field import MeanField
from bayesdl.theory.nonlinearity import Nonlinearity, nonlinearity

Ensemble = Literal["gaussian", "orthogonal"]


@dataclass(frozen=True)
class RandomNetwork:
    """A fully connected network with random weights, the seed's own.

    Args:
        activation: a name, such as "tanh", or any elementwise function.
        widths: units of ``h^0, ..., h^L``.
        w_std: weights have standard deviation ``w_std / sqrt(fan_in)``.
        b_std: biases have standard deviation ``b_std``.
        weights: "gaussian", or "orthogonal": ``w_std`` times a matrix with orthonormal columns or rows, Haar
            distributed, which has the same second moments between equal widths.
        seed: of weights and biases.

    Raises:
        ModelError: fewer than two widths, or an unknown ensemble of weights.
    """

    activation: str | Callable[[Tensor], Tensor]
    widths: Sequence[int]
    w_std: float
    b_std: float = 0.0
    weights: Ensemble = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ModelError(f"widths={self.widths!r} must be at least two positive numbers.")
        if self.weights not in get_args(Ensemble):
            raise ModelError(f"weights={self.weights!r} must be 'gaussian' or 'orthogonal'.")

    @cached_property
    def phi(self) -> Nonlinearity:
        """The activation."""
        return nonlinearity(self.activation)

    @property
    def depth(self) -> int:
        """Number L of layers."""
        return len(self.widths) - 1

    @property
    def field(self) -> MeanField:
        """The limit of great widths."""
        return MeanField(self.activation, self.w_std, self.b_std)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Weights ``[N_l, N_(l-1)]`` and biases ``[N_l]`` of layer l, counted from 1."""
        rows, columns = self.widths[number], self.widths[number - 1]
        stream = generator(self.seed, "random network", number)
        w = torch.randn(rows, columns, generator=stream, dtype=torch.float64)
        b = self.b_std * torch.randn(rows, generator=stream, dtype=torch.float64)
        if self.weights == "gaussian":
            return self.w_std / math.sqrt(columns) * w, b
        q, r = torch.linalg.qr(w if rows >= columns else w.T)
        q = q * r.diagonal().sign()
        return self.w_std * (q if rows >= columns else q.T), b

    def start(self, q: float, c: Tensor | float = 1.0) -> Tensor:
        """Pre-activations ``h^0 [R, N_0]`` with exactly given lengths q and correlations ``c [R, R]``.

        Raises:
            DataError: c is no matrix of correlations of at most N_0 rows.
        """
        c = torch.as_tensor(c, dtype=torch.float64).reshape(-1, round(math.sqrt(torch.as_tensor(c).numel())))
        root, info = torch.linalg.cholesky_ex(c)
        if int(info) or len(c) > self.widths[0] or not torch.allclose(c.diagonal(), torch.ones(()).double()):
            raise DataError(f"c must be a positive definite matrix of correlations of at most {self.widths[0]} rows.")
        stream = generator(self.seed, "first signals")
        frame = torch.linalg.qr(torch.randn(self.widths[0], len(c), generator=stream, dtype=torch.float64))[0]
        return math.sqrt(q * self.widths[0]) * root @ frame.T

    def signals(self, h: Tensor) -> list[Tensor]:
        """Pre-activations of all layers, ``[R, N_l]`` for l = 0, ..., L."""
        found = [h]
        for number in range(1, self.depth + 1):
            w, b = self.layer(number)
            found.append(self.phi.phi(found[-1]) @ w.T + b)
        return found


class Moments(NamedTuple):
    """Second moments over a layer's units, for all layers.

    Attributes:
        q: lengths ``mean h^2``, ``[L + 1, R]``.
        c: correlations ``[L + 1, R, R]``.
    """

    q: Tensor
    c: Tensor


def moments(network: RandomNetwork, h: Tensor) -> Moments:
    """Lengths and correlations of signals in all layers; ``MeanField.propagate`` is their limit.

    Args:
        network: of any widths.
        h: pre-activations ``[R, N_0]``.
    """
    products = torch.stack([layer @ layer.T / layer.shape[1] for layer in network.signals(h)])
    q = products.diagonal(dim1=-2, dim2=-1)
    return Moments(q, products / (q.unsqueeze(-1) * q.unsqueeze(-2)).sqrt())


def gradient_lengths(network: RandomNetwork, h: Tensor, *, seed: int = 0) -> Tensor:
    r"""Total squared gradients ``|dL/dh^l|^2`` of a loss whose gradient at the last layer is random, ``[L + 1, R]``.

    They are multiplied by chi a layer backwards, whatever the widths; the mean over units also by the ratio of the
    widths (Schoenholz et al., 2017, eq. 15).

    Args:
        network: of any widths.
        h: pre-activations ``[R, N_0]``.
        seed: of the standard normal ``dL/dh^L``.
    """
    signals = network.signals(h)
    delta = torch.randn(signals[-1].shape, generator=generator(seed, "last gradient"), dtype=torch.float64)
    slope = derivative(network.phi.phi)
    found = [delta.square().sum(-1)]
    for number in range(network.depth, 0, -1):
        delta = slope(signals[number - 1]).detach() * (delta @ network.layer(number)[0])
        found.append(delta.square().sum(-1))
    return torch.stack(found[::-1])


def squared_singular_values(network: RandomNetwork, h: Tensor) -> Tensor:
    """Squared singular values of the Jacobian ``dh^L / dh^0`` at one signal ``[N_0]``, largest first.

    Their mean is ``chi^L`` between equal widths; how far they spread depends on the ensemble of weights (Pennington,
    Schoenholz and Ganguli, 2017).
    """
    slope = derivative(network.phi.phi)
    jacobian = torch.eye(network.widths[0], dtype=torch.float64)
    for number, layer in enumerate(network.signals(h[None])[:-1], 1):
        jacobian = network.layer(number)[0] @ (slope(layer[0]).detach().unsqueeze(-1) * jacobian)
    return torch.linalg.svdvals(jacobian).square()
