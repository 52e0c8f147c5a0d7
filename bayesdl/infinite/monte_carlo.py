"""Kernels of any network as averages over networks drawn from the prior, with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesdl.errors import MethodError, ModelError
from bayesdl.infinite.empirical import nngp_of, ntk_of
from bayesdl.infinite.finite import FiniteNetwork, Parameterisation
from bayesdl.infinite.readout import Outputs, Readout
from bayesdl.models import BayesianNetwork


@dataclass(frozen=True)
class MonteCarloKernel:
    """Averages over draws, ``[N1, N2]`` each.

    Attributes:
        nngp: the prior covariance of an output.
        nngp_error: its standard errors.
        ntk: the mean tangent kernel; None where it was not asked for.
        ntk_error: its standard errors.
        draws: number of networks.
    """

    nngp: Tensor
    nngp_error: Tensor
    ntk: Tensor | None
    ntk_error: Tensor | None
    draws: int


def monte_carlo_kernel(
    net: nn.Module | BayesianNetwork,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    draws: int = 32,
    ntk: bool = True,
    parameterisation: Parameterisation | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> MonteCarloKernel:
    """Estimate both kernels of a network from random ones of its width: the way where there is no closed form.

    The estimates are unbiased for the means at this width. With one hidden layer these are the infinite network's
    kernels at every width; deeper, they differ from it by a multiple of 1 / width, which no number of draws removes.

    Where the outputs are those of a ``Linear`` with a Gaussian prior about zero, its weights are integrated out
    (``empirical_nngp``); otherwise ``f f^T`` is averaged over the draws and outputs.

    Args:
        net: any module, drawn from its own initialisation, or a ``BayesianNetwork``, drawn from its prior.
        x1: inputs ``[N1, ...]``.
        x2: inputs ``[N2, ...]``; by default ``x1``.
        draws: number of networks, at least 2.
        ntk: whether the tangent kernel is estimated too; it is the dearer one.
        parameterisation: of the tangent kernel; by default "ntk" with a prior and "standard" without.
        batch_size: rows at a time.
        seed: of the draws.

    Raises:
        MethodError: fewer than two draws.
        ModelError: the network is refused, or has no prior for "ntk".
        DataError: inputs that it cannot take.

    Cost: ``draws`` times that of ``empirical_ntk``.
    """
    if draws < 2:
        raise MethodError(f"draws={draws} must be at least 2, for a standard error.")
    chosen = parameterisation or ("ntk" if isinstance(net, BayesianNetwork) else "standard")
    network = FiniteNetwork(net, parameterisation=chosen, x=x1)
    readout = _readout(network)
    first, second = _Moments(), _Moments()
    for number in range(draws):
        network.z = network.draw(seed, number)
        first.add(nngp_of(network, readout, x1, x2, batch_size))
        if ntk:
            second.add(ntk_of(network, x1, x2, batch_size=batch_size))
    tangent, tangent_error = second.summary() if ntk else (None, None)
    return MonteCarloKernel(*first.summary(), tangent, tangent_error, draws)


class _Moments:
    """Mean and sum of squared deviations, one draw at a time (Welford, 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        away = value - self.mean
        self.mean = self.mean + away / self.count
        self.squares = self.squares + away * (value - self.mean)

    def summary(self) -> tuple[Tensor, Tensor]:
        """Mean and its standard error."""
        return self.mean, (self.squares / (self.count - 1) / self.count).sqrt()


def _readout(network: FiniteNetwork) -> Readout | Outputs:
    """The readout, if its weights have a known prior to integrate over."""
    if not network.has_prior:
        return Outputs(network)
    try:
        return Readout(network)
    except ModelError:
        return Outputs(network)
