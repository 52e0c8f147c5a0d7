"""Models: any torch.nn.Module as a Pyro program, with its priors and likelihoods."""

from bayesdl.models import likelihoods, priors
from bayesdl.models.layers import Erf, RandomFourierFeatures
from bayesdl.models.network import BayesianNetwork
from bayesdl.models.parameters import ParameterInfo
from bayesdl.models.zoo import mlp

__all__ = ["BayesianNetwork", "Erf", "ParameterInfo", "RandomFourierFeatures", "likelihoods", "mlp", "priors"]
