"""Layers that torch.nn lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Erf(nn.Module):
    """The error function, elementwise: ``erf(x) = 2 / sqrt(pi) int_0^x exp(-t^2) dt``.

    Sigmoidal like tanh, and its infinitely wide limit has a closed-form kernel (Williams, 1997, eq. 11), so that the
    finite and the infinite network can be the same model.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to a tensor of any shape."""
        return torch.erf(x)
