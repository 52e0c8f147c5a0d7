"""Infinitely wide networks: kernels, and the Gaussian processes that they define."""

from bayesdl.infinite.convert import from_module
from bayesdl.infinite.drift import KernelDrift, kernel_alignment, kernel_distance, kernel_drift, width_rate
from bayesdl.infinite.dynamics import GradientFlow, learning_rate_limit
from bayesdl.infinite.empirical import empirical_nngp, empirical_ntk, ntk_costs
from bayesdl.infinite.forecast import KernelForecast
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
from bayesdl.infinite.linearise import LinearisedNetwork, linearize
from bayesdl.infinite.methods import GP, NNGP
from bayesdl.infinite.monte_carlo import MonteCarloKernel, monte_carlo_kernel
from bayesdl.infinite.network import InfiniteNetwork
from bayesdl.infinite.posterior import GPPosterior
from bayesdl.infinite.psd import GramCheck, is_psd_on

__all__ = [
    "GP",
    "NNGP",
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Flatten",
    "GPPosterior",
    "GradientFlow",
    "GramCheck",
    "InfiniteNetwork",
    "KernelDrift",
    "KernelForecast",
    "Kernels",
    "LayerNorm",
    "LinearisedNetwork",
    "MonteCarloKernel",
    "NNGPKernel",
    "NTKKernel",
    "Scale",
    "Sum",
    "empirical_nngp",
    "empirical_ntk",
    "from_module",
    "fully_connected",
    "is_psd_on",
    "kernel_alignment",
    "kernel_distance",
    "kernel_drift",
    "learning_rate_limit",
    "linearize",
    "monte_carlo_kernel",
    "nngp",
    "ntk",
    "ntk_costs",
    "width_rate",
]
