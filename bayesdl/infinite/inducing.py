r"""Inducing points: a Gaussian process seen through its values u at m chosen rows z.

With ``K_zz = L L^T`` and features ``phi(x) = L^-1 k(z, x)`` the process is ``f = mu + phi^T w + rest``, where
``w ~ N(0, I)`` stands for u and the rest is independent of it with variance ``k(x, x) - |phi(x)|^2``. Data inform w
alone; the rest keeps its prior. The best such posterior under Gaussian noise, and its lower bound of the evidence, are
those of Titsias (2009), Variational learning of inducing variables in sparse Gaussian processes; with all training rows
as inducing points it is the exact posterior.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.errors import MethodError
from bayesdl.infinite.sites import AtRows

JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6)  # tried in turn, in units of the mean variance of u


class Features(NamedTuple):
    """A prior over the function at given rows by features of them."""

    phi: Tensor
    """``[n, m]``."""
    left: Tensor
    """``[n]`` variance that the features do not explain, at least 0."""

    @property
    def diagonal(self) -> Tensor:
        """The prior variances, ``[n]``."""
        return self.phi.square().sum(-1) + self.left

    def at(self, a: Tensor, b: Tensor) -> AtRows:
        """Condition the projection on sites ``[C, n]``: 2 C n m^2 operations."""
        weights, cholesky = condition(self.phi, a, b)
        return AtRows(*moments(self.phi, weights, cholesky), cholesky.diagonal(dim1=-2, dim2=-1).log().sum())


def features(kernel: Kernel, x: Tensor, z: Tensor) -> Features:
    """Return the features of rows ``x [n, d]`` at inducing points ``z [m, d]``.

    Where K_zz is singular, as of a linear kernel, a small multiple of the identity is added: the smallest of a few
    that is enough. It is noise on u, so that bounds remain bounds.

    Raises:
        MethodError: K_zz is far from positive semi-definite, or not finite.
    """
    own = kernel(z).to_dense()
    eye = torch.eye(len(z), dtype=z.dtype)
    scale = own.diagonal().mean().detach()
    for jitter in JITTERS:
        cholesky, info = torch.linalg.cholesky_ex(own + jitter * scale * eye)
        if int(info) == 0:
            break
    else:
        raise MethodError(
            "The kernel matrix of the inducing points is not positive semi-definite in float64: either the kernel is "
            "no covariance function, or its values overflow (scale the inputs)."
        )
    phi = torch.linalg.solve_triangular(cholesky, kernel(z, x).to_dense(), upper=False).mT
    return Features(phi, (kernel(x, diag=True) - phi.square().sum(-1)).clamp(min=0))


def condition(phi: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean ``[C, m]`` of w given sites ``[C, n]``, and the lower factor ``[C, m, m]`` of its precision."""
    scaled = b.sqrt().unsqueeze(-1) * phi
    precision = scaled.mT @ scaled + torch.eye(phi.shape[-1], dtype=phi.dtype)
    cholesky = torch.linalg.cholesky(precision)
    return torch.cholesky_solve((a @ phi).unsqueeze(-1), cholesky).squeeze(-1), cholesky


def moments(phi: Tensor, weights: Tensor, cholesky: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances ``[C, N]`` of ``phi^T w`` at rows with features ``phi [N, m]``."""
    spread = torch.linalg.solve_triangular(cholesky, phi.mT.expand(len(cholesky), -1, -1), upper=False)
    return weights @ phi.mT, spread.square().sum(-2)
