"""What a walk through the layers of a wide network carries with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from bayesdl.infinite.windows import equal_pixels


class Units(NamedTuple):
    """What one walk carries from layer to layer: a covariance, and a tangent kernel, which None says is zero."""

    q: Tensor
    ntk: Tensor | None
    spatial: int
    full: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> Units:
        """A linear function of both."""
        return self._replace(q=function(self.q), ntk=None if self.ntk is None else function(self.ntk))

    @property
    def axes(self) -> list[tuple[int, ...]]:
        """For every spatial dimension its axis, or the axes of both pixels."""
        return [(k, self.spatial + k) if self.full else (k,) for k in range(self.spatial)]


class Walk:
    """One walk through the layers, and what they need on their way.

    Args:
        w_var: the variances of weights, layer by layer, shaped to broadcast against pairs of rows.
        b_var: of biases.
        standard: parameterisation of the tangent kernel.
        tangent: whether to compute it.
        variances: those of the first and of the second input where a nonlinear layer asks, in the order of the walk
            before; None for an input with itself, whose variances are seen on the way and recorded.
    """

    def __init__(
        self,
        w_var: Sequence[Tensor],
        b_var: Sequence[Tensor],
        standard: bool = False,
        tangent: bool = False,
        variances: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.weights = iter(zip(w_var, b_var, strict=True))
        self.standard, self.tangent = standard, tangent
        self.known: Iterator[tuple[Tensor, Tensor]] | None = None if variances is None else iter(variances)
        self.recorded: list[Tensor] = []

    def variances(self, units: Units) -> tuple[Tensor, Tensor]:
        """The variances ``[*pixels, ...]`` of both inputs here."""
        if self.known is not None:
            return next(self.known)
        own = equal_pixels(units.q, units.spatial) if units.full else units.q
        self.recorded.append(own)
        return own, own
