r"""The geometry of curves on their way through a random network: how a circle of inputs is stretched and bent.

Source: Poole et al. (2016), Exponential expressivity in deep neural networks through transient chaos, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from bayesdl.errors import ModelError
from bayesdl.theory.mean_field import MeanField
from bayesdl.theory.signal_propagation import RandomNetwork


class Curve(NamedTuple):
    r"""Geometry of a curve ``h(theta)`` in all layers, ``[L + 1, T]``, with v and a its first two derivatives.

    Attributes:
        metric: ``g^E = v . v``, the squared speed.
        curvature: ``kappa = sqrt(|v|^2 |a|^2 - (v . a)^2) / |v|^3``, one over the radius of the osculating circle.
    """

    metric: Tensor
    curvature: Tensor

    @property
    def gauss_metric(self) -> Tensor:
        """``g^G = kappa^2 g^E``, the squared speed of the unit tangent."""
        return self.curvature.square() * self.metric


def curve(network: RandomNetwork, h: Tensor, velocity: Tensor, acceleration: Tensor) -> Curve:
    """The geometry of a curve's images in all layers.

    Args:
        network: of any widths.
        h: points of the curve as pre-activations, ``[T, N_0]``.
        velocity: derivatives by the parameter, ``[T, N_0]``.
        acceleration: second derivatives.
    """
    points = (h, velocity, acceleration)
    found = [_geometry(*points[1:])]
    for number in range(1, network.depth + 1):
        w, b = network.layer(number)
        h, velocity, acceleration = (part @ w.T for part in _second_order(network.phi.phi, *points))
        points = (h + b, velocity, acceleration)
        found.append(_geometry(*points[1:]))
    return Curve(*(torch.stack(column) for column in zip(*found, strict=True)))


def great_circle(network: RandomNetwork, q: float, points: int = 32) -> Curve:
    """The geometry of the images of a circle of random directions with ``|h^0|^2 = N_0 q`` (Poole et al., 2016)."""
    theta = (2 * math.pi / points) * torch.arange(points, dtype=torch.float64).unsqueeze(-1)
    one, two = network.start(q, torch.eye(2))
    h, velocity = theta.cos() * one + theta.sin() * two, theta.cos() * two - theta.sin() * one
    return curve(network, h, velocity, -h)


class CurveLaw(NamedTuple):
    """What a great circle becomes at great width, ``[depth + 1]`` each, per unit: ``g^E / N`` and ``N kappa^2``."""

    metric: Tensor
    curvature: Tensor


def great_circle_law(field: MeanField, depth: int) -> CurveLaw:
    r"""Metric and squared curvature of a great circle's images at the length q*.

    ``g' = chi g`` from ``g = q*``, and ``k' = 3 chi_2 / chi^2 + k / chi`` from ``k = 1 / q*``, where
    ``chi_2 = w_std^2 E[phi''(sqrt(q*) z)^2]`` (Poole et al., 2016, section 3). In the chaotic phase lengths grow
    without end while the curvature stays at ``3 chi_2 / (chi (chi - 1))``: the curve fills the sphere.

    Raises:
        ModelError: settings of several entries, a q* that is 0 or infinite, or an activation with a kink.
    """
    if field.q_star.numel() != 1 or not 0 < float(field.q_star) < math.inf:
        raise ModelError("The law is for one network whose length has a fixed point q* that is neither 0 nor infinite.")
    q, chi = float(field.q_star), float(field.chi)
    chi_2 = float(torch.as_tensor(field.w_std)) ** 2 * float(field.phi.bend(field.q_star))
    metric, curvature = [q], [1 / q]
    for _ in range(depth):
        metric.append(chi * metric[-1])
        curvature.append(3 * chi_2 / chi**2 + curvature[-1] / chi)
    return CurveLaw(torch.tensor(metric, dtype=torch.float64), torch.tensor(curvature, dtype=torch.float64))


def _second_order(phi: Callable[[Tensor], Tensor], h: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``phi(h)`` and its first two derivatives along a curve: ``phi' v`` and ``phi'' v^2 + phi' a``."""

    def along(h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = jvp(phi, (h,), (v,))
        return found[0], found[1]

    values, derivatives = jvp(along, (h, v), (v, a))[:2]
    return values[0], values[1], derivatives[1]


def _geometry(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    speed, across = v.square().sum(-1), (v * a).sum(-1)
    area = (speed * a.square().sum(-1) - across.square()).clamp(min=0)
    return speed, area.sqrt() / speed**1.5
