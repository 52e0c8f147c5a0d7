"""An infinitely wide network: its layers, and the kernels that they define."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from bayesdl.infinite.forecast import KernelForecast, forecast
from bayesdl.infinite.kernel import Kernels, Parameterisation, kernels, nngp, ntk
from bayesdl.infinite.layers import Layer, check_layers


class InfiniteNetwork(tuple[Layer, ...]):
    """The layers of an infinitely wide network, a tuple, with its kernels; ``from_module`` returns it.

    Args:
        layers: see ``bayesdl.infinite.layers``.
        parameterisation: of the tangent kernel. "ntk": weights are ``w_std / sqrt(fan_in)`` times parameters of unit
            variance, which are trained. "standard": the weights themselves are trained, as torch does; the kernel
            grows with the given widths, and a learning rate must fall with them.

    Raises:
        ModelError: the layers have no limit.
    """

    parameterisation: Parameterisation

    def __new__(cls, layers: Iterable[Layer], parameterisation: Parameterisation = "ntk") -> InfiniteNetwork:
        """Check the layers."""
        self = super().__new__(cls, check_layers(tuple(layers)))
        self.parameterisation = parameterisation
        return self

    def nngp(self, x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Tensor:
        """The covariance of an output unit under the prior, ``[N, M]``; see ``bayesdl.infinite.nngp``."""
        return nngp(self, x1, x2, diag=diag)

    def ntk(self, x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Tensor:
        """The tangent kernel, ``[N, M]``; see ``bayesdl.infinite.ntk``."""
        return ntk(self, x1, x2, diag=diag, parameterisation=self.parameterisation)

    def kernels(self, x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Kernels:
        """Both, in one pass."""
        value, tangent = kernels(self, x1, x2, diag=diag, parameterisation=self.parameterisation)
        assert tangent is not None
        return Kernels(value, tangent)

    def forecast(self, x: Tensor, n1: int, n2: int | None = None, *, ntk: bool = True) -> KernelForecast:
        """Time and memory of the kernels of ``n1`` rows like ``x``, with themselves or with ``n2`` others."""
        return forecast(self, x, n1, n2, ntk=ntk)
