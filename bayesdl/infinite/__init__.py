"""Infinitely wide networks: kernels, and the Gaussian processes that they define."""

from bayesdl.infinite.convert import from_module
from bayesdl.infinite.kernel import Kernels, nngp, ntk
from bayesdl.infinite.kernels import NNGPKernel, NTKKernel
from bayesdl.infinite.layers import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    LayerNorm,
    Scale,
    Sum,
    fully_connected,
)
from bayesdl.infinite.methods import GP, NNGP
from bayesdl.infinite.network import InfiniteNetwork
from bayesdl.infinite.posterior import GPPosterior

__all__ = [
    "GP",
    "NNGP",
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Flatten",
    "GPPosterior",
    "InfiniteNetwork",
    "Kernels",
    "LayerNorm",
    "NNGPKernel",
    "NTKKernel",
    "Scale",
    "Sum",
    "from_module",
    "fully_connected",
    "nngp",
    "ntk",
]
