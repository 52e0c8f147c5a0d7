r"""How lengths and correlations of signals change with depth in wide random networks.

Pre-activations of layer l are ``h = W phi(h_before) + b`` with weights N(0, w_std^2 / fan_in) and biases N(0, b_std^2).
At great width they are Gaussian, and the length ``q = <h^2>`` and the correlation c of two inputs follow

    q' = V(q) = w_std^2 E[phi(sqrt(q) z)^2] + b_std^2,
    c' = (w_std^2 E[phi(u1) phi(u2)] + b_std^2) / sqrt(V(q1) V(q2)),     (u1, u2) of variances q1, q2, correlation c.

V has a fixed point q*, and at q* the correlation map has fixed points 1 and, where its slope at 1

    chi = w_std^2 E[phi'(sqrt(q*) z)^2]

exceeds 1, another one c* < 1. The network is *ordered* for chi < 1 (inputs grow alike, gradients vanish), *chaotic* for
chi > 1 (like inputs grow apart, gradients explode), and *critical* between.

Sources: Poole et al. (2016), Exponential expressivity in deep neural networks through transient chaos; Schoenholz et
al. (2017), Deep information propagation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.theory.critical import CriticalLine, critical_init, critical_init_, critical_line
from bayesdl.theory.fixed_points import fixed_point, fixed_points
from bayesdl.theory.nonlinearity import Nonlinearity, nonlinearity

__all__ = [
    "CriticalLine",
    "FixedPoint",
    "MeanField",
    "Path",
    "critical_init",
    "critical_init_",
    "critical_line",
    "depth_scale",
]

CRITICAL = 1e-6  # slopes within it of 1 count as 1; quadrature agrees to 1e-7
ROUNDS = 200
CLOSE = 1e-14


class FixedPoint(NamedTuple):
    """A fixed point of the length map, its slope there, and whether small deviations shrink."""

    q: float
    slope: float
    stable: bool


class Path(NamedTuple):
    """Lengths of two signals and their correlation in all layers, each ``[depth + 1, ...]``."""

    q1: Tensor
    q2: Tensor
    c: Tensor


@dataclass(frozen=True)
class MeanField:
    """Signal propagation through a wide random network; tensors of settings give tensors of results.

    Args:
        activation: a name, such as "tanh", or any elementwise function or module.
        w_std: weights have standard deviation ``w_std / sqrt(fan_in)``, ``[...]``.
        b_std: biases have standard deviation ``b_std``, ``[...]``, which broadcasts against ``w_std``.
        start: the length from which q* is sought, which matters where there are several fixed points.

    Raises:
        ModelError: unknown activation, a w_std that is not positive or a b_std that is negative.
    """

    activation: str | Callable[[Tensor], Tensor]
    w_std: float | Tensor
    b_std: float | Tensor = 0.0
    start: float = 1.0

    def __post_init__(self) -> None:
        w, b = _tensor(self.w_std), _tensor(self.b_std)
        if not bool(((w > 0) & w.isfinite()).all() and ((b >= 0) & b.isfinite()).all()):
            raise ModelError("w_std must be positive and b_std not negative, both finite.")
        if not 0 < self.start < float("inf"):
            raise ModelError(f"start={self.start} must be a positive length.")
        w, b = torch.broadcast_tensors(w, b)
        object.__setattr__(self, "w_std", w)
        object.__setattr__(self, "b_std", b)

    @cached_property
    def phi(self) -> Nonlinearity:
        """The activation and its Gaussian moments."""
        return nonlinearity(self.activation)

    @cached_property
    def _w(self) -> Tensor:
        return _tensor(self.w_std).square()

    @cached_property
    def _b(self) -> Tensor:
        return _tensor(self.b_std).square()

    def length_map(self, q: float | Tensor) -> Tensor:
        """V(q), the next layer's length, ``[...]``."""
        return self._w * self.phi.square(_tensor(q)) + self._b

    def correlation_map(self, c: float | Tensor) -> Tensor:
        """C(c), the next layer's correlation where both lengths are q*, ``[...]``; NaN where q* is 0 or infinite."""
        return self._where_proper(
            lambda q, w, b, c: (w * self.phi.dual.covariance(q, q, c * q) + b) / q, self._w, self._b, _tensor(c)
        )

    def propagate(self, depth: int, q1: float | Tensor, c: float | Tensor, q2: float | Tensor | None = None) -> Path:
        """Lengths and correlation of two signals over ``depth`` layers, with the lengths free to change.

        Args:
            depth: number of layers.
            q1: length of the first pre-activations, ``w_std^2 |x|^2 / d + b_std^2`` for an input x, ``[...]``.
            c: correlation at the first layer, ``[...]``.
            q2: length of the other signal, by default the same.
        """
        first, second = _tensor(q1), _tensor(q1 if q2 is None else q2)
        p, q, r, w, b = torch.broadcast_tensors(first, second, _tensor(c), self._w, self._b)
        rows = [(p, q, r)]
        for _ in range(depth):
            with torch.no_grad():
                both = w * self.phi.dual.covariance(p, q, r * p.sqrt() * q.sqrt()) + b
                p, q = w * self.phi.square(p) + b, w * self.phi.square(q) + b
            r = (both / (p.sqrt() * q.sqrt())).clamp(-1, 1)
            rows.append((p, q, r))
        return Path(*(torch.stack(column) for column in zip(*rows, strict=True)))

    @cached_property
    def q_star(self) -> Tensor:
        """The fixed point of the length map next to ``start``, ``[...]``.

        Zero where signals die out, infinity where they grow without bound (for relu where w_std^2 > 2, and where it is
        2 with biases). Where every length is fixed, as for relu with w_std^2 = 2 and no bias, it is ``start``.
        """
        return fixed_point(self.phi.square, self._w, self._b, start=self.start, largest=self.phi.largest)

    def fixed_points(self) -> list[FixedPoint]:
        """All fixed points of one length map in growing order, zero included, infinity not.

        Raises:
            ModelError: the settings are tensors of several entries.
        """
        if self._w.numel() != 1:
            raise ModelError("fixed_points lists those of one map; pass single numbers for w_std and b_std.")
        w, b = float(self._w), float(self._b)
        q = fixed_points(self.phi.square, w, b, largest=self.phi.largest)
        slopes = w * self.phi.square_slope(q)
        return [FixedPoint(*pair, abs(pair[1]) < 1) for pair in zip(q.tolist(), slopes.tolist(), strict=True)]

    @cached_property
    def _proper(self) -> Tensor:
        return (self.q_star > 0) & self.q_star.isfinite()

    @cached_property
    def _q(self) -> Tensor:
        """q*, or the largest trusted length where it is infinite: slopes have their limits there."""
        return self.q_star.clamp(max=self.phi.largest)

    @cached_property
    def alpha(self) -> Tensor:
        """Slope of the length map at q*, ``w_std^2 E[phi'^2 + phi'' phi]``, ``[...]``; a limit where q* is infinite."""
        return self._w * self.phi.square_slope(self._q)

    @cached_property
    def chi(self) -> Tensor:
        """Slope of the correlation map at c = 1, ``[...]``; its limit where q* is 0 or infinite.

        It is also the factor by which squared gradients change from a layer to the one before.
        """
        return self._w * self.phi.gain(self._q)

    @cached_property
    def c_star(self) -> Tensor:
        """The stable fixed point of the correlation map on [0, 1], ``[...]``; NaN where q* is 0 or infinite.

        It is 1 unless chi > 1. C is a power series with coefficients that are not negative, so it is convex on [0, 1],
        and Newton's iteration from 0 climbs to the only fixed point below 1.
        """
        result = torch.where(self._proper, 1.0, torch.nan).to(torch.float64)
        chaotic = self._proper & (self.chi > 1 + CRITICAL)
        q, w, b = self._q[chaotic], self._w[chaotic], self._b[chaotic]
        c = torch.zeros_like(q)
        for _ in range(ROUNDS if len(c) else 0):
            value, slope = self.phi.pair(q, c)
            gap = (w * value + b) / q - c
            c = (c + gap / (1 - w * slope)).clamp(0, 1)
            if bool((gap.abs() <= CLOSE).all()):
                break
        result[chaotic] = c
        return result

    @cached_property
    def chi_star(self) -> Tensor:
        """Slope of the correlation map at c*, ``w_std^2 E[phi'(u1) phi'(u2)]``, ``[...]``: chi unless chaotic."""
        return self._where_proper(lambda q, w, c: w * self.phi.pair(q, c)[1], self._w, self.c_star)

    @cached_property
    def xi_q(self) -> Tensor:
        """Layers in which ``|q - q*|`` falls by a factor e, ``-1 / log |alpha|``; see ``depth_scale``."""
        return depth_scale(self.alpha)

    @cached_property
    def xi_c(self) -> Tensor:
        """Layers in which ``|c - c*|`` falls by a factor e, ``-1 / log chi_star``; NaN where there is no c*.

        At criticality it is infinite, and c approaches 1 as a power of the depth: ``1 - c`` falls like 1 / l for smooth
        activations and like 1 / l^2 for those with a kink.
        """
        return depth_scale(self.chi_star)

    @cached_property
    def xi_gradient(self) -> Tensor:
        """Layers over which squared gradients change by a factor e, ``-1 / log chi``.

        Positive where they vanish towards the input, negative where they explode, infinite at criticality.
        """
        return depth_scale(self.chi)

    @cached_property
    def phase(self) -> str | NDArray[np.str_]:
        """Either "ordered", "critical" or "chaotic", by chi; an array of these for tensors of settings.

        Where q* is infinite the word is about gradients alone.
        """
        words = np.array(["ordered", "critical", "chaotic"])
        index = 1 + (self.chi > 1 + CRITICAL).long() - (self.chi < 1 - CRITICAL).long()
        found = words[index.numpy()]
        return str(found) if index.dim() == 0 else found

    def _where_proper(self, f: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """``f(q*, ...)`` where q* is neither 0 nor infinite, NaN elsewhere."""
        proper, q, *rest = torch.broadcast_tensors(self._proper, self._q, *others)
        result = torch.full_like(q, torch.nan)
        with torch.no_grad():
            result[proper] = f(q[proper], *(other[proper] for other in rest))
        return result


def depth_scale(slope: Tensor) -> Tensor:
    """The depth ``-1 / log |slope|`` in which a deviation falls by a factor e.

    It is infinite where the slope is 1 to within 1e-6 (there the decay is a power of the depth), negative where
    deviations grow, and 0 where the slope is 0.
    """
    size = slope.abs()
    return torch.where((size - 1).abs() <= CRITICAL, torch.inf, -1 / size.log())


def _tensor(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
