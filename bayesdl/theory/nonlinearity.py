"""What signal propagation needs of an activation: Gaussian moments of it and of its derivatives.

All of them come from the dual activations of ``bayesdl.infinite``: closed forms where there are some, else quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesdl.errors import ModelError
from bayesdl.infinite.dual import Dual
from bayesdl.infinite.duals import DUALS, PHI
from bayesdl.infinite.layers import Activation, Scale
from bayesdl.infinite.operations import ACTIVATIONS
from bayesdl.infinite.piecewise import Jump, PiecewiseLinear
from bayesdl.infinite.quadrature import Quadrature, derivative
from bayesdl.infinite.recognise import elementwise

Function = Callable[[Tensor], Tensor]
TINY = 1e-16  # stands for a length of zero, where an activation with a kink there has no derivative of its own


@dataclass(frozen=True)
class Nonlinearity:
    """An activation phi and its dual; z is standard normal, u and v are normal with variance q and covariance c q.

    Attributes:
        phi: the function.
        dual: E[phi(u) phi(v)] and E[phi'(u) phi'(v)].
    """

    phi: Function
    dual: Dual

    @property
    def largest(self) -> float:
        """The largest variance at which the moments are trusted."""
        return 2.0**16 if isinstance(self.dual, Quadrature) else 2.0**40

    def square(self, q: Tensor) -> Tensor:
        """E[phi(sqrt(q) z)^2]."""
        with torch.no_grad():
            return self.dual.variance(q)

    def square_slope(self, q: Tensor) -> Tensor:
        """The derivative of ``square`` by q, which is E[phi'^2 + phi'' phi]; at q = 0 its limit for phi(0) = 0."""
        self._refuse_jumps()
        with torch.enable_grad():
            leaf = q.detach().clamp(min=TINY).requires_grad_()
            (slope,) = torch.autograd.grad(self.dual.variance(leaf).sum(), leaf, materialize_grads=True)
        return slope

    def gain(self, q: Tensor) -> Tensor:
        """E[phi'(sqrt(q) z)^2]; at q = 0 its limit."""
        q = q.clamp(min=TINY)
        return self.pair(q, torch.ones_like(q))[1]

    def pair(self, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """E[phi(u) phi(v)] and E[phi'(u) phi'(v)].

        Raises:
            ModelError: phi jumps, so that the second is infinite at c = 1.
        """
        self._refuse_jumps()
        with torch.no_grad():
            return self.dual.both(q, q, c * q)

    def bend(self, q: Tensor) -> Tensor:
        """E[phi''(sqrt(q) z)^2].

        Raises:
            ModelError: phi has a kink, so that it is infinite.
        """
        try:
            with torch.no_grad():
                return self._derivative.slope(q, q, q)
        except ModelError as error:
            raise ModelError("The activation has a kink: curves through it have infinite curvature.") from error

    @cached_property
    def _derivative(self) -> Quadrature:
        return Quadrature(derivative(self.phi))

    def _refuse_jumps(self) -> None:
        if isinstance(self.dual, Jump):
            raise ModelError(
                "The activation jumps: its correlation map has slope infinity at 1, and gradients through it are zero. "
                "Use the maps alone, or a smooth activation such as 'erf'."
            )


def nonlinearity(activation: str | Function) -> Nonlinearity:
    """Find an activation by its name, or take any elementwise function or module.

    Raises:
        ModelError: the name is unknown, or the function is constant or not elementwise.
    """
    return _named(activation) if isinstance(activation, str) else _recognised(activation)


@lru_cache
def _named(name: str) -> Nonlinearity:
    if name in PHI:
        return Nonlinearity(PHI[name], DUALS[name])
    if name in ACTIVATIONS:
        return _recognised(getattr(F, name))
    known = sorted({*PHI, *ACTIVATIONS})
    raise ModelError(f"There is no activation {name!r}; known are {', '.join(known)}, or pass the function itself.")


def _recognised(phi: Function) -> Nonlinearity:
    layer = elementwise(phi)
    if isinstance(layer, Activation):
        return Nonlinearity(phi, layer.dual)
    factor = layer.factor if isinstance(layer, Scale) else 1.0
    return Nonlinearity(phi, PiecewiseLinear(factor, factor))
