"""Gaussian processes conditioned on sites, ready to predict: by Cholesky, by iterations, or by inducing points.

The sites are those of ``bayesdl.infinite.sites``; g is the latent function without its prior mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.infinite import inducing
from bayesdl.infinite.conjugate import Preconditioner, half_log_det, pivoted_cholesky, product, solve
from bayesdl.infinite.gram import Gram, gram
from bayesdl.infinite.sites import Factors, as_columns, condition, from_columns, mean_at, shared, whitened

FINE = 1e-8  # relative residual of the weights that make the mean
COARSE = 1e-6  # of the columns of variances, whose error is of the order of its square
PROBING = 1e-3  # of the probes, whose own scatter is larger
PROBES = 16  # of the log determinant
CELLS = 2**23  # numbers of the covariances with the training rows that are held at once


class Conditioned(ABC):
    """A kernel, training rows ``x [n, d]`` and their sites ``a, b [C, n]``."""

    def __init__(self, kernel: Kernel, x: Tensor, a: Tensor, b: Tensor) -> None:
        self.kernel, self.x, self.a, self.b = kernel, x, a, b

    @property
    def rows(self) -> int:
        """How many new rows to handle at once."""
        return max(1, CELLS // len(self.x))

    @abstractmethod
    def moments(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and variances of g at new rows ``[N, d]``, ``[C, N]`` each."""

    @abstractmethod
    def joint(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return means ``[C, N]`` and covariances ``[C, N, N]`` of g at new rows."""


class Exact(Conditioned):
    """By one Cholesky factor per distinct vector of precisions."""

    @cached_property
    def factors(self) -> Factors:
        """Those of the training rows."""
        return condition(gram(self.kernel, self.x), self.a, self.b)

    def moments(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """n^2 operations a row and distinct vector of precisions."""
        cross = self.kernel(self.x, new).to_dense()
        mean, reduction = mean_at(cross, self.factors), whitened(cross, self.factors).square().sum(-2)
        return mean, (self.kernel(new, diag=True) - reduction).clamp(min=0).expand_as(mean)

    def joint(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """n^2 N + n N^2 operations."""
        cross = self.kernel(self.x, new).to_dense()
        mean, reduction = mean_at(cross, self.factors), whitened(cross, self.factors)
        return mean, (gram(self.kernel, new) - reduction.mT @ reduction).expand(len(mean), -1, -1)


class Inducing(Conditioned):
    """By the values at inducing points ``z [m, d]``."""

    def __init__(self, kernel: Kernel, x: Tensor, a: Tensor, b: Tensor, z: Tensor) -> None:
        super().__init__(kernel, x, a, b)
        self.z = z

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return inducing.condition(inducing.features(self.kernel, self.x, self.z).phi, self.a, self.b)

    def moments(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """C m^2 operations a row."""
        at = inducing.features(self.kernel, new, self.z)
        mean, variance = inducing.moments(at.phi, *self._weights)
        return mean, variance + at.left

    def joint(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """C N^2 m operations."""
        phi = inducing.features(self.kernel, new, self.z).phi
        weights, cholesky = self._weights
        spread = torch.linalg.solve_triangular(cholesky, phi.mT.expand(len(cholesky), -1, -1), upper=False)
        return weights @ phi.mT, gram(self.kernel, new) - phi @ phi.mT + spread.mT @ spread


class Iterative(Conditioned):
    """By preconditioned conjugate gradients.

    Args:
        kernel: shared by the outputs.
        x: ``[n, d]``.
        a: ``[C, n]``.
        b: ``[C, n]``.
        weights: ``[C, n]`` where they are known already.
        memory: gigabytes that the kernel matrix may take; beyond, it is computed anew at every product.
        rank: of the preconditioner; by default a twentieth of the rows, at least 100 and at most 1000.
    """

    def __init__(
        self, kernel: Kernel, x: Tensor, a: Tensor, b: Tensor, *,
        weights: Tensor | None = None, memory: float = 8.0, rank: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kernel, x, a, b)
        self._given, self.memory = weights, memory
        self.rank = min(len(x), rank or min(1000, max(100, len(x) // 20)))
        self.root = shared(b).sqrt()
        self.report: dict[str, Any] = {}

    @property
    def rows(self) -> int:
        """Fewer than elsewhere: the iterations hold half a dozen blocks of the size of the right-hand sides."""
        return max(1, CELLS // (8 * len(self.x) * len(self.root)))

    @cached_property
    def _gram(self) -> Gram:
        return Gram(self.kernel, self.x, self.memory)

    @cached_property
    def _preconditioner(self) -> Preconditioner:
        return Preconditioner(pivoted_cholesky(self.kernel, self.x, self.rank)[1], self.root)

    @cached_property
    def weights(self) -> Tensor:
        """``[C, n]`` such that the mean of g at x is ``k(x)^T weights``; ``report`` then has the true residual."""
        if self._given is not None:
            return self._given
        target = as_columns(self.a / self.root, len(self.root))
        found = solve(self._gram, self.root, target, self._preconditioner, FINE)
        left = (target - product(self._gram, self.root, found.value)).norm(dim=1) / target.norm(dim=1).clamp(min=1e-300)
        self.report |= {"cg_steps": found.steps, "cg_residual": float(left.max()), "cg_rank": self.rank}
        return self.root * from_columns(found.value)

    def half_log_det(self, seed: int) -> tuple[float, float]:
        """Half of log det B summed over the outputs, estimated, and the standard error."""
        outputs = len(self.a) // len(self.root)
        value, error = half_log_det(self._gram, self.root, self._preconditioner, PROBES, PROBING, seed)
        return outputs * value, outputs * error

    def moments(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """n^2 operations a row, step and distinct vector of precisions."""
        cross = self.kernel(self.x, new).to_dense()
        scaled = self.root.unsqueeze(-1) * cross
        found = solve(self._gram, self.root, scaled, self._preconditioner, COARSE)
        reduction, mean = (scaled * found.value).sum(1), self.weights @ cross
        return mean, (self.kernel(new, diag=True) - reduction).clamp(min=0).expand_as(mean)

    def joint(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """As the variances, and n N^2 operations."""
        cross = self.kernel(self.x, new).to_dense()
        scaled = self.root.unsqueeze(-1) * cross
        reduction = scaled.mT @ solve(self._gram, self.root, scaled, self._preconditioner, FINE).value
        mean = self.weights @ cross
        return mean, (gram(self.kernel, new) - (reduction + reduction.mT) / 2).expand(len(mean), -1, -1)
