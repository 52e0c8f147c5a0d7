r"""How unlikely it is that a mean of many independent variables stays away from its expectation.

By Cramer's theorem ``log P(mean of n >= x) = -n I(x) + o(n)`` for x above the expectation, with the rate function

    I(x) = sup_s (s x - log E exp(s X)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import DataError

ROUNDS = 200
LARGEST = 2.0**40


def rate_function(log_mgf: Callable[[Tensor], Tensor], x: float | Tensor) -> Tensor:
    """The rate function of a variable whose moment-generating function is finite around 0, ``[...]``.

    Args:
        log_mgf: ``s -> log E exp(s X)``, elementwise on double precision, differentiable; not finite where the
            expectation is infinite.
        x: where, ``[...]``, inside the variable's range.

    Raises:
        DataError: the supremum is at infinity: x is not inside the range.

    The derivative of ``log_mgf`` grows, so the best s is where it equals x; it is found by bisection.
    """
    x = torch.as_tensor(x, dtype=torch.float64)

    def tilted_mean(s: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            (mean,) = torch.autograd.grad(log_mgf(leaf).sum(), leaf)
        return mean

    # A mean that is no number lies beyond the end of the generating function's range: far enough, not short of x.
    sign = torch.where(x >= tilted_mean(torch.zeros_like(x)), 1.0, -1.0).to(torch.float64)
    low, high = torch.zeros_like(x), torch.ones_like(x)
    while bool((short := sign * (tilted_mean(sign * high) - x) < 0).any()):
        high = torch.where(short, 2 * high, high)
        if float(high.max()) > LARGEST:
            raise DataError("x is not inside the range of the variable: the rate there is infinite, or a limit.")
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        short = sign * (tilted_mean(sign * middle) - x) < 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    s = sign * (low + high) / 2
    with torch.no_grad():
        return s * x - log_mgf(s)
