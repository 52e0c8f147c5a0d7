"""From an elementwise function to the closed form of its dual, where it has one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.infinite.duals import PHI
from bayesdl.infinite.layers import Activation, Scale

AGREE = 1e-13  # how closely a function must follow a known one everywhere, relative to its size
_GRID = torch.cat([torch.linspace(-6, 6, 101, dtype=torch.float64), torch.tensor([-40.0, -13.5, 0.0, 11.5, 40.0])])


def elementwise(phi: Callable[[Tensor], Tensor]) -> Activation | Scale | None:
    """Return the layer of an elementwise function; None for the identity.

    Known functions are told by their values on a grid, whatever way they are written in: piecewise linear ones,
    ``a erf(b x) + c``, monomials up to the fifth, and the names of ``duals.DUALS``. Any other goes by quadrature.

    Raises:
        ModelError: the function is constant, or not elementwise, or cannot be evaluated in double precision.
    """
    with torch.no_grad():
        try:
            y = phi(_GRID.clone())
        except Exception as error:
            raise ModelError(f"An activation cannot be evaluated on a vector in double precision: {error}") from error
    if y.shape != _GRID.shape:
        raise ModelError("An activation changes the shape of its input; infinite width needs elementwise functions.")
    y = y.double()

    def same(other: Tensor) -> bool:
        return bool(((y - other).abs() <= AGREE * (1 + other.abs())).all())

    above, below = float(y[_GRID == 11.5] / 11.5), float(y[_GRID == -13.5] / -13.5)
    if math.isfinite(above) and math.isfinite(below) and (above, below) != (0.0, 0.0):
        above, below = (round(slope, 14) for slope in (above, below))
        if same(torch.where(_GRID > 0, above * _GRID, below * _GRID)):
            if above == below:
                return None if above == 1 else Scale(above)
            named = {(1.0, 0.0): "relu", (1.0, -1.0): "abs"}.get((above, below))
            return Activation(named) if named else Activation("piecewise_linear", (below, above))
    for name, known in PHI.items():
        if same(known(_GRID)):
            return Activation(name)
    for n in range(2, 6):
        if same(_GRID**n):
            return Activation("monomial", (float(n),))
    return _error_function(phi, y, same) or Activation(phi)


def _error_function(phi: Callable[[Tensor], Tensor], y: Tensor, same: Callable[[Tensor], bool]) -> Activation | None:
    """``a erf(b x) + c``, its numbers read off the value, the derivative and the limit."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        value = phi(x)
        if not value.requires_grad:
            return None
        (slope,) = torch.autograd.grad(value.sum(), x)
    c = value.item()
    with torch.no_grad():
        a = float(phi(torch.full((1,), 1e6, dtype=torch.float64))) - c
    if not (math.isfinite(a) and a != 0):
        return None
    b = float(slope) * math.sqrt(math.pi) / (2 * a)
    return Activation("erf", (a, b, c)) if same(a * torch.erf(b * _GRID) + c) else None
