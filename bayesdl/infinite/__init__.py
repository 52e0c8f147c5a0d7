"""Infinitely wide networks: kernels, and the Gaussian processes that they define."""

from bayesdl.infinite.convert import from_module
from bayesdl.infinite.empirical import empirical_nngp, empirical_ntk, ntk_costs
from bayesdl.infinite.kernel import nngp
from bayesdl.infinite.kernels import NNGPKernel
from bayesdl.infinite.layers import Activation, Dense, fully_connected
from bayesdl.infinite.methods import GP, NNGP
from bayesdl.infinite.posterior import GPPosterior

__all__ = [
    "GP",
    "NNGP",
    "Activation",
    "Dense",
    "GPPosterior",
    "NNGPKernel",
    "empirical_nngp",
    "empirical_ntk",
    "from_module",
    "fully_connected",
    "nngp",
    "ntk_costs",
]
