"""Dropout whose masks are given: uniform numbers go in, so that the network with its masks is a plain function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from bayesdl.errors import ModelError
from bayesdl.models.network import BayesianNetwork

SELU_FLOOR = -1.7580993408473766
"""What alpha dropout puts in the place of a dropped unit: SELU at minus infinity."""


def has_dropout(model: Any) -> bool:
    """Whether a model is a network with a dropout module that drops something."""
    if not isinstance(model, BayesianNetwork):
        return False
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.net.modules())


class Masks(TorchFunctionMode):
    """Inside the block, every active dropout takes its mask from the next of the given uniform numbers.

    A unit is kept where its number is at least p, and what is kept is divided by 1 - p (inverted dropout, as torch's).
    The numbers are used in the order in which the network calls its dropout modules, so that a module that is called
    twice has two masks.

    Args:
        noise: numbers in [0, 1): ``[N, U]`` for a mask of its own for each row, or ``[U]`` for one mask for all rows;
            None keeps everything, and counts.
        rows: N.

    Attributes:
        used: numbers a row that were used so far; U at the end of the block.
    """

    def __init__(self, noise: Tensor | None, rows: int) -> None:
        super().__init__()
        self.noise, self.rows, self.used = noise, rows, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the place of torch's functional dropouts; everything else runs as it is."""
        kwargs = kwargs or {}
        kind = _KINDS.get(function)
        if kind is None or not kwargs.get("training", True):
            return function(*args, **kwargs)
        return self._drop(args[0], kwargs.get("p", 0.5), *kind)

    def _drop(self, units: Tensor, p: float, channels: bool, fill: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        if units.dim() < 2 + channels or units.shape[0] != self.rows:
            raise ModelError(
                f"A dropout module works on a tensor of shape {tuple(units.shape)}, where the first dimension is not "
                f"that of the {self.rows} rows. Put it where the tensor is [rows, ...] (batch_first=True)."
            )
        own = units.shape[1:2] if channels else units.shape[1:]
        count = math.prod(own)
        first, self.used = self.used, self.used + count
        if self.noise is None:
            return units
        shared = self.noise.dim() == 1
        mine = self.noise[..., first : self.used]
        mine = mine.reshape(1 if shared else self.rows, *own, *[1] * (units.dim() - 1 - len(own)))
        return fill(units, mine >= p, p)


def _zero(units: Tensor, kept: Tensor, p: float) -> Tensor:
    return units * (kept.to(units.dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0))


def _floor(units: Tensor, kept: Tensor, p: float) -> Tensor:
    """Alpha dropout (Klambauer et al., 2017): standardised units keep mean 0 and variance 1."""
    if p == 1:
        return units * 0.0
    scale = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
    return torch.where(kept, units, SELU_FLOOR) * scale - scale * p * SELU_FLOOR


_KINDS: dict[Any, tuple[bool, Callable[[Tensor, Tensor, float], Tensor]]] = {
    F.dropout: (False, _zero),
    F.dropout1d: (True, _zero),
    F.dropout2d: (True, _zero),
    F.dropout3d: (True, _zero),
    F.alpha_dropout: (False, _floor),
    F.feature_alpha_dropout: (True, _floor),
}


class DropoutNetwork:
    """A network as a program of its masks as well: ``model(x, y, masks)``.

    Args:
        model: a network with dropout modules.
        x: some inputs, which tell how many numbers a row takes.

    Attributes:
        model: the network with its dropout modules, and nothing else, in training mode.
        units: U, the uniform numbers that a row takes.
    """

    def __init__(self, model: BayesianNetwork, x: Tensor) -> None:
        self.model = model.with_dropout()
        with torch.no_grad(), Masks(None, 1) as counting:
            self.model.forward(model.initial_values(torch.Generator()), x[:1])
        self.units = counting.used

    def __call__(self, x: Tensor, y: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """Run the network's program with masks ``[N, U]`` or ``[U]``, see ``Masks``."""
        with Masks(masks, x.shape[0]):
            return self.model(x, y)
