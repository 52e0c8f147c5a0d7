"""Layers that torch.nn lacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesdl._rng import generator
from bayesdl.errors import ModelError


class Erf(nn.Module):
    """The error function, elementwise: ``erf(x) = 2 / sqrt(pi) int_0^x exp(-t^2) dt``.

    Sigmoidal like tanh, and its infinitely wide limit has a closed-form kernel (Williams, 1997, eq. 11), so that the
    finite and the infinite network can be the same model.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to a tensor of any shape."""
        return torch.erf(x)


class RandomFourierFeatures(nn.Module):
    r"""Fixed random features whose inner products approximate the Gaussian kernel (Rahimi and Recht, 2007).

    ``phi(x) = sqrt(2 / p) cos(W x / lengthscale + b)`` with the p rows of W from N(0, I) and the phases b from
    U[0, 2 pi]. Then ``E[phi(x) . phi(x')] = exp(-|x - x'|^2 / (2 lengthscale^2))``, with an error of order
    ``p^(-1/2)``. Without the phase the mean would be ``(k(x - x') + k(x + x')) / 2``, which is not stationary; without
    ``sqrt(2 / p)`` it would grow with p. Under a linear layer with weights N(0, s^2) the network is approximately a
    Gaussian process with the kernel s^2 k.

    Args:
        in_features: columns of x.
        out_features: p, the number of features.
        lengthscale: of the kernel, in the units that the network sees (standardised inputs).
        seed: of W and b, which are buffers and are never learnt.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, in_features: int, out_features: int, lengthscale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if not (in_features >= 1 and out_features >= 1 and 0 < lengthscale < math.inf):
            raise ModelError(
                f"RandomFourierFeatures({in_features}, {out_features}, lengthscale={lengthscale}) needs at least one "
                "input and one feature, and a positive lengthscale."
            )
        self.in_features, self.out_features = in_features, out_features
        self.lengthscale, self.seed = lengthscale, seed
        stream = generator(seed, "random Fourier features")
        self.register_buffer("frequencies", torch.randn(out_features, in_features, generator=stream))
        self.register_buffer("phases", 2 * math.pi * torch.rand(out_features, generator=stream))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., out_features]`` of inputs ``[..., in_features]``."""
        angles = nn.functional.linear(x / self.lengthscale, self.frequencies, self.phases)
        return math.sqrt(2.0 / self.out_features) * angles.cos()
