"""Whether a function can be a covariance: what one Gram matrix says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.errors import DataError, ModelError


@dataclass(frozen=True)
class GramCheck:
    """The eigenvalues of a Gram matrix; true if none is negative beyond rounding.

    Attributes:
        smallest: eigenvalue.
        largest: eigenvalue.
        rows: n.
        rounding: negative eigenvalues down to ``-rounding`` are rounding.
    """

    smallest: float
    largest: float
    rows: int
    rounding: float

    def __bool__(self) -> bool:
        """Whether this matrix is positive semi-definite."""
        return self.smallest >= -self.rounding

    def __str__(self) -> str:
        """What follows."""
        if self:
            return (
                f"Positive semi-definite on these {self.rows} rows (smallest eigenvalue {self.smallest:.3g}). This "
                "proves nothing about other rows: a function that is no covariance can pass."
            )
        return (
            f"Not a covariance function: the Gram matrix of these {self.rows} rows has the eigenvalue "
            f"{self.smallest:.3g}, beside a largest of {self.largest:.3g}."
        )


def is_psd_on(kernel: Kernel | Callable[[Tensor, Tensor], Tensor], x: Tensor) -> GramCheck:
    """Look at the eigenvalues of a kernel's Gram matrix on given rows: ``u^T G u >= 0`` for all u.

    A negative one refutes: the function is no covariance. **Passing proves nothing**: the box kernel
    ``1{|x - x'| <= 1}`` has the eigenvalue 1 - sqrt(2) on the points 0, 1, 2, and passes on points far apart.

    Args:
        kernel: a GPyTorch kernel, or a function of two sets of rows ``[N, d]``, ``[M, d]`` that gives ``[N, M]``.
        x: rows ``[n, d]``.

    Returns:
        The check, false where the matrix is indefinite; printed, it says by how much.

    Raises:
        DataError: no rows, or numbers that are not finite.
        ModelError: the matrix has a wrong shape, is not finite or not symmetric.

    Source: Schoelkopf and Smola (2002), Learning with kernels, def. 2.4.  Cost: O(n^3).
    """
    if not len(x) or not bool(x.isfinite().all()):
        raise DataError("is_psd_on needs at least one row, of finite numbers.")
    x = x.detach().double()
    with torch.no_grad():
        value = copy.deepcopy(kernel).double()(x).to_dense() if isinstance(kernel, Kernel) else kernel(x, x)
    if value.shape != (len(x), len(x)):
        raise ModelError(f"For {len(x)} rows the kernel gives the shape {list(value.shape)}.")
    scale = value.abs().max()
    if not bool(scale.isfinite()):
        raise ModelError("The Gram matrix holds NaN or infinite values.")
    value = value.double()
    if not bool(((value - value.mT).abs() <= 1e-8 * scale).all()):
        raise ModelError("The Gram matrix is not symmetric: k(x, x') and k(x', x) differ.")
    eigenvalues = torch.linalg.eigvalsh((value + value.mT) / 2)
    rounding = len(x) * torch.finfo(x.dtype).eps * float(eigenvalues.abs().max())
    return GramCheck(float(eigenvalues[0]), float(eigenvalues[-1]), len(x), rounding)
