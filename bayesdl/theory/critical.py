r"""The critical line of an activation, and the initialisation on it.

Gradients keep their size over any depth where ``chi = w_std^2 E[phi'(sqrt(q) z)^2] = 1`` at the length's fixed point
``q = w_std^2 E[phi(sqrt(q) z)^2] + b_std^2``. With the first equation in the second, q is the fixed point of

    q = E[phi^2] / E[phi'^2] + b_std^2,

and then ``w_std = E[phi'^2]^(-1/2)``: 1 for tanh and erf's kin without bias, sqrt(2) for relu (He et al., 2015).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesdl.errors import ModelError
from bayesdl.infinite import from_module
from bayesdl.infinite.layers import Activation, AvgPool, Dense, Flatten, Layer
from bayesdl.theory.fixed_points import fixed_point
from bayesdl.theory.nonlinearity import Nonlinearity, nonlinearity

GROWTH = 1e-6  # relative growth of a length beside the fixed point that is more than rounding


class CriticalLine(NamedTuple):
    """Points of the line, ``[...]`` each.

    Attributes:
        w_std: NaN where there is no critical point with a finite length, and the line has no limit either.
        b_std: as given.
        q_star: the length that stays, which may be 0; infinite for relu and its kin with biases.
    """

    w_std: Tensor
    b_std: Tensor
    q_star: Tensor


def critical_line(activation: str | Callable[[Tensor], Tensor], b_std: float | Tensor) -> CriticalLine:
    """The w_std at which signals neither merge nor part, for given b_std ``[...]``.

    Raises:
        ModelError: the activation is unknown or jumps, or b_std is negative.
    """
    return _line(nonlinearity(activation), torch.as_tensor(b_std, dtype=torch.float64))


def critical_init(activation: str | Callable[[Tensor], Tensor], b_std: float = 0.0) -> float:
    """The w_std on the critical line: weights are then drawn with standard deviation ``w_std / sqrt(fan_in)``.

    For a ``BayesianNetwork`` it goes into ``priors.Normal("fan_in", w_std=..., b_std=b_std)``; ``critical_init_`` draws
    the weights of a plain module.

    Args:
        activation: a name, such as "tanh", or any elementwise function or module.
        b_std: standard deviation of the biases.

    Raises:
        ModelError: there is no critical point with this b_std.

    Warns:
        UserWarning: lengths leave the fixed point there (gelu and silu with small biases): deep networks still lose
            their signals.
    """
    return _critical(nonlinearity(activation), b_std)


def critical_init_(net: nn.Module, b_std: float = 0.0, generator: torch.Generator | None = None) -> nn.Module:
    """Draw all weights and biases of a network on its critical line, in place, and return it.

    Args:
        net: dense layers or convolutions with one kind of activation between them; flattening and average pools pass.
        b_std: standard deviation of the biases; layers without biases need 0.
        generator: of the draws; torch's own by default.

    Raises:
        ModelError: the network has no activation or different ones, sums of branches or normalisation, which have other
            critical points, or a part that infinite width has no rule for; or there is no critical point.
    """
    layers = from_module(net, w_std=1.0, b_std=1.0)
    w_std = _critical(_only_activation(layers), b_std)
    weighted = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    if b_std and any(module.bias is None for module in weighted):
        raise ModelError(f"b_std={b_std} needs biases in every layer; pass b_std=0, or give the layers biases.")
    for module in weighted:
        nn.init.normal_(module.weight, 0.0, w_std / math.sqrt(module.weight[0].numel()), generator=generator)
        if module.bias is not None:
            nn.init.normal_(module.bias, 0.0, b_std, generator=generator)
    return net


def _line(phi: Nonlinearity, b_std: Tensor) -> CriticalLine:
    if not bool(((b_std >= 0) & b_std.isfinite()).all()):
        raise ModelError("b_std must not be negative, and finite.")

    def balance(q: Tensor) -> Tensor:
        return phi.square(q) / phi.gain(q)

    q = fixed_point(balance, torch.ones_like(b_std), b_std.square(), start=1.0, largest=phi.largest)
    finite = q.clamp(max=phi.largest)
    gain = phi.gain(finite)
    # At infinite length the line exists where the gain does not depend on the length: on both sides of zero a line.
    settled = q.isfinite() | ((phi.gain(finite / 2) - gain).abs() <= GROWTH * gain)
    return CriticalLine(torch.where(settled & (gain > 0), gain.rsqrt(), torch.nan), b_std, q)


def _critical(phi: Nonlinearity, b_std: float) -> float:
    line = _line(phi, torch.tensor(b_std, dtype=torch.float64))
    if bool(line.w_std.isnan()):
        raise ModelError(
            f"With b_std={b_std} this activation has no critical point: no w_std keeps both lengths and gradients."
        )
    w_std, q = float(line.w_std), float(line.q_star)
    if math.isfinite(q):
        near = torch.tensor(1.01 * q if q > 0 else 1e-3, dtype=torch.float64)
        grown = w_std**2 * phi.square(near) + b_std**2
        if float(grown - near) > GROWTH * float(near):
            warnings.warn(
                f"With w_std={w_std:.4g}, b_std={b_std:.4g} gradients keep their size at the length {q:.4g}, but "
                "longer signals grow on from layer to layer; a larger b_std may have a stable length.",
                stacklevel=3,
            )
    return w_std


def _only_activation(layers: tuple[Layer, ...]) -> Nonlinearity:
    found = [layer for layer in layers if isinstance(layer, Activation)]
    other = [layer for layer in layers if not isinstance(layer, (Activation, Dense, Flatten, AvgPool))]
    if other:
        raise ModelError(
            f"{type(other[0]).__name__} changes what is critical; critical_init_ takes layers and activations in a row."
        )
    if not found:
        raise ModelError("The network has no activation; a linear one is critical with w_std = 1 and no biases.")
    q = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    duals = [layer.dual for layer in found]
    values = torch.stack([torch.cat([dual.variance(q), dual.covariance(q, q, 0.4 * q)]) for dual in duals])
    if not torch.allclose(values, values[:1].expand_as(values), rtol=1e-6):
        raise ModelError("The network has different activations, and each has a critical line of its own.")
    phi = found[0].name
    return nonlinearity(phi) if callable(phi) else Nonlinearity(nonlinearity("linear").phi, duals[0])
