"""The noise of stochastic-gradient samplers: Gaussian numbers, or random signs, which cost a tenth."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

NoiseKind = Literal["normal", "signs"]
KINDS = get_args(NoiseKind)


def draw_noise(kind: NoiseKind, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent numbers with mean 0 and variance 1, in the shape, dtype and device of ``like``.

    Signs have the right mean and covariance, so that every second moment of a linear system is what Gaussian noise
    gives; the excess kurtosis of each increment is -2, not 0. After k steps of SGLD along a direction of curvature a
    with step size h it has shrunk to ``-2 (1 - r^2) / (1 + r^2)``, r = 1 - ah/2: about -ah.

    Args:
        kind: "normal", or "signs" for +1 and -1 with equal probability.
        like: gives shape, dtype and device.
        generator: the stream, on that device.

    Returns:
        A new tensor.
    """
    if kind == "normal":
        return torch.empty_like(like).normal_(generator=generator)
    count = like.numel()
    words = -(-count // 64)
    bits = torch.empty(words, dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=generator)
    # Thirty-two shifts of every half word bring each of its bits, once, to the place of the sign.
    shifts = torch.arange(32, dtype=torch.int32, device=like.device)
    ones = (bits.view(torch.int32)[:, None] << shifts).bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)
    return ones.view(torch.float32).flatten()[:count].view(like.shape).to(like.dtype)
