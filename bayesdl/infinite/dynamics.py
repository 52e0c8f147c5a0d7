r"""What training does to an infinite ensemble of infinitely wide networks, in closed form.

With the tangent kernel Theta constant, gradient flow on the squared loss is linear in the functions:

    f_t(X) = y + exp(-eta t Theta / c) (f_0(X) - y)
    f_t(x) = f_0(x) + A_t (y - f_0(X)),    A_t = Theta(x, X) Theta^-1 (I - exp(-eta t Theta / c))

and with f_0 ~ GP(0, K) over the ensemble the law of f_t stays Gaussian, with

    mean A_t y,    covariance K(x, x') - A_t K(X, x') - K(x, X) A_t'^T + A_t K(X, X) A_t'^T.

c is the number of targets for the mean loss and 1 for the sum. Where only the readout is trained, Theta = K, and the
limit of t is the posterior of the Gaussian process; otherwise it is no posterior of anything.

Source: Lee et al. (2019), Wide neural networks of any depth evolve as linear models, eqs. 9-11 and 13-16.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from bayesdl.errors import DataError, MethodError

Loss = Literal["mean", "sum"]
Times = float | Tensor


def learning_rate_limit(kernel: Tensor, *, loss: Loss = "mean", outputs: int = 1) -> float:
    """The learning rate ``2 c / lambda_max`` from which on gradient descent without momentum diverges.

    Args:
        kernel: tangent kernel of the training rows, ``[N, N]``.
        loss: "mean" for ``sum (f - y)^2 / (2 N K)``, c = N K; "sum" for ``sum (f - y)^2 / 2``, c = 1. With torch's
            ``MSELoss``, which has no half, the limit is half of this.
        outputs: K.
    """
    return _limit(_count(loss, len(_square(kernel)) * outputs), torch.linalg.eigvalsh(kernel))


class GradientFlow:
    """Training on N rows with a constant tangent kernel; the kernel is taken apart once, for all times.

    Directions in which the kernel is zero (repeated rows, fewer parameters than rows) are never learnt, and no
    division by zero happens there.

    Args:
        kernel: what drives the training, ``[N, N]``: the NTK, or the NNGP kernel where only the readout is trained.
        y: targets ``[N]`` or ``[N, K]``.
        prior: covariance K(X, X) of the functions at the start, ``[N, N]``: the NNGP kernel. By default it is
            ``kernel``, which is right where only the readout is trained.
        learning_rate: eta.
        loss: "mean" for ``sum (f - y)^2 / (2 N K)``; "sum" for ``sum (f - y)^2 / 2``.
        ridge: added to the diagonal of ``kernel``, relative to its mean; it is weight decay towards the start.
        discrete: count time in steps of gradient descent, ``(I - eta Theta / c)^t`` in place of the exponential.

    Attributes:
        eigenvalues: of the kernel with its ridge, ascending, ``[N]``.
        learning_rate_limit: see the function of this name.

    Raises:
        DataError: shapes that do not fit, numbers that are not finite, or a kernel with a negative eigenvalue.
        MethodError: a setting that is out of range.

    Cost: O(N^3) once, then O(M N^2) for M new rows and each time.
    """

    def __init__(
        self,
        kernel: Tensor,
        y: Tensor,
        prior: Tensor | None = None,
        *,
        learning_rate: float = 1.0,
        loss: Loss = "mean",
        ridge: float = 0.0,
        discrete: bool = False,
    ) -> None:
        if not learning_rate > 0:
            raise MethodError(f"learning_rate={learning_rate} must be positive.")
        if not ridge >= 0:
            raise MethodError(f"ridge={ridge} must not be negative.")
        self.n = len(_square(kernel))
        if y.dim() not in (1, 2) or len(y) != self.n:
            raise DataError(f"y must be [N] or [N, K] with N = {self.n}, got {list(y.shape)}.")
        for name, value in (("kernel", kernel), ("y", y)):
            if not bool(value.isfinite().all()):
                raise DataError(f"{name} holds NaN or infinite values.")
        self.ridge = ridge * kernel.diagonal().mean()
        driving = kernel + self.ridge * torch.eye(self.n).to(kernel)
        self.y = y.to(kernel).reshape(self.n, -1)
        self.shape = y.shape[1:]
        # Noise of the targets of a readout is in the covariance at the rows that it is trained on, and nowhere else.
        self.prior, self.start = (driving, kernel) if prior is None else (_square(prior), prior)
        self.discrete = discrete
        self.eigenvalues, self.vectors = torch.linalg.eigh(driving)
        tolerance = self.n * torch.finfo(kernel.dtype).eps * float(self.eigenvalues[-1])
        if float(self.eigenvalues[0]) < -100 * tolerance:
            raise DataError(
                f"The kernel has the eigenvalue {float(self.eigenvalues[0]):.3g}, so it is no covariance; is it the "
                "kernel of one set of rows with itself, in double precision?"
            )
        self.alive = self.eigenvalues > tolerance
        count = _count(loss, self.y.numel())
        self.speeds = learning_rate * self.eigenvalues / count
        self.learning_rate_limit = _limit(count, self.eigenvalues)

    def learnt(self, times: Times) -> Tensor:
        """The share of each eigenvector's error that is gone, ``1 - exp(-eta t lambda / c)``, ``[..., N]``.

        Args:
            times: a number or ``[T]``, not negative; infinity is allowed.

        Raises:
            MethodError: a negative time, part of a step, or steps that diverge.
        """
        t = torch.as_tensor(times, dtype=self.y.dtype, device=self.y.device)[..., None]
        if not bool((t >= 0).all()):
            raise MethodError(f"times must not be negative, got {times}.")
        if not self.discrete:
            # Where a kernel is zero nothing is learnt, in infinite time either.
            return torch.where(self.alive, -torch.expm1(-torch.where(self.alive, self.speeds, 1.0) * t), 0.0)
        if not bool(((t == t.round()) | t.isinf()).all()):
            raise MethodError(f"With discrete=True times are numbers of steps, got {times}.")
        if bool(t.isinf().any()) and float(self.speeds[-1]) >= 2:
            raise MethodError("Gradient descent diverges: the learning rate is beyond learning_rate_limit.")
        return torch.where(self.alive, 1 - (1 - torch.where(self.alive, self.speeds, 1.0)) ** t, 0.0)

    def mean(self, times: Times, cross: Tensor | None = None, start: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Mean of the ensemble, or the function of one network.

        Args:
            times: a number, or ``[T]``; infinity is allowed.
            cross: ``kernel`` between M new rows and the training rows, ``[M, N]``; by default the training rows.
            start: outputs of one network at the start, at the new rows and at the training rows, in the shape of y;
                by default both 0, the mean over the ensemble.

        Returns:
            ``[M]`` or ``[M, K]`` as y; with ``[T]`` times, one more dimension in front.
        """
        error = self.y if start is None else self.y - start[1].to(self.y).reshape(self.n, -1)
        moved = self._operator(times, cross) @ error
        if start is not None:
            moved = moved + start[0].to(self.y).reshape(-1, self.y.shape[1])
        return moved.reshape(*moved.shape[:-1], *self.shape)

    def covariance(
        self,
        times: Times,
        cross: Tensor | None = None,
        prior_cross: Tensor | None = None,
        prior_new: Tensor | None = None,
    ) -> Tensor:
        """Covariance of the ensemble's functions, the same for each output.

        Args:
            times: a number, or ``[T]``; infinity is allowed.
            cross: ``kernel`` between M new rows and the training rows, ``[M, N]``; by default the training rows.
            prior_cross: ``prior`` between them, ``[M, N]``; by default ``cross``, for training of the readout.
            prior_new: ``prior`` of the new rows, ``[M, M]``.

        Returns:
            ``[M, M]``, or ``[T, M, M]``.

        Raises:
            DataError: only some of the matrices for new rows are given.
        """
        operator = self._operator(times, cross)
        if cross is None:
            between, new = self.start, self.start
        elif prior_new is None:
            raise DataError("The covariance at new rows needs prior_new, their covariance [M, M] at the start.")
        else:
            between, new = self._rows(cross if prior_cross is None else prior_cross), _square(prior_new)
        both = operator @ between.mT
        return new - both - both.mT + operator @ self.prior @ operator.mT

    def _operator(self, times: Times, cross: Tensor | None) -> Tensor:
        """A_t, ``[..., M, N]``."""
        learnt = self.learnt(times).unsqueeze(-2)
        inverse = torch.where(self.alive, 1 / torch.where(self.alive, self.eigenvalues, 1.0), 0.0)
        if cross is None:
            return (self.vectors * (learnt * (1 - self.ridge * inverse))) @ self.vectors.mT
        return ((self._rows(cross) @ self.vectors) * (learnt * inverse)) @ self.vectors.mT

    def _rows(self, cross: Tensor) -> Tensor:
        if cross.dim() != 2 or cross.shape[1] != self.n:
            raise DataError(f"A kernel between new and training rows must be [M, {self.n}], got {list(cross.shape)}.")
        return cross.to(self.y)


def _square(kernel: Tensor) -> Tensor:
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
        raise DataError(f"The kernel of one set of rows must be [N, N] with N > 0, got {list(kernel.shape)}.")
    return kernel


def _count(loss: Loss, targets: int) -> int:
    if loss not in ("mean", "sum"):
        raise MethodError(f"loss={loss!r} must be 'mean' or 'sum'.")
    return targets if loss == "mean" else 1


def _limit(count: int, eigenvalues: Tensor) -> float:
    largest = float(eigenvalues[-1])
    return 2 * count / largest if largest > 0 else math.inf
