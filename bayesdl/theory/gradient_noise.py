r"""The noise of mini-batch gradients: a loss as a mean over rows, and the covariance of its rows' gradients.

.. math:: \ell(w) = \frac{1}{n} \sum_i \ell^i(w), \qquad
    C(w) = \frac{1}{n} \sum_i (\nabla \ell^i - \nabla \ell)(\nabla \ell^i - \nabla \ell)^T
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from bayesdl.density import LogDensity
from bayesdl.errors import DataError, MethodError


@dataclass(frozen=True)
class EmpiricalLoss:
    """A loss that is a mean over n rows, known by the gradients of its rows.

    Args:
        n: Rows.
        gradients: ``(w [M, D], rows [M]) -> [M, D]``, the gradient of row ``rows[m]``'s loss at ``w[m]``.
        batch_size: Row gradients that are held at once: memory is batch_size x D numbers.
    """

    n: int
    gradients: Callable[[Tensor, Tensor], Tensor]
    batch_size: int = 1024

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.n < 1 or self.batch_size < 1:
            raise MethodError(f"n and batch_size must be at least 1; got n={self.n}, batch_size={self.batch_size}.")

    @classmethod
    def of_function(cls, loss: Callable[..., Tensor], *rows: Tensor, batch_size: int = 1024) -> EmpiricalLoss:
        """Of ``loss(w [D], *row) -> []``, the loss of one row of the tensors ``rows``, each ``[n, ...]``."""
        gradient = vmap(grad(loss))
        return cls(len(rows[0]), lambda w, index: gradient(w, *(data[index] for data in rows)), batch_size)

    @classmethod
    def of_density(cls, density: LogDensity, batch_size: int = 1024) -> EmpiricalLoss:
        """Of ``-log_density(z) / n``, each row with its own likelihood and an nth of the prior.

        At inverse temperature n its Gibbs law is the posterior.

        Raises:
            NotFactorised: the program has no independent term for each row.
        """
        density.require_rows()
        n = int(density.n or 0)

        def gradients(z: Tensor, index: Tensor) -> Tensor:
            # A mini-batch of one row for each chain carries the factor n/1 and the whole prior.
            batch = {name: density.batch[name][index, None] for name in density.row_names}
            return density.value_and_grad(z, batch, per_chain=True)[1] / -n

        return cls(n, gradients, batch_size)

    def weighted(self, w: Tensor, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """``sum_k weights[c, k] grad ell^{rows[c, k]}(w[c])`` for every chain.

        Plain, stochastic and model gradients differ in their weights alone.

        Args:
            w: ``[C, D]``.
            weights: ``[C, K]``.
            rows: ``[C, K]``; all rows in order (K = n) if None.

        Returns:
            ``[C, D]``.
        """
        chains, terms = weights.shape
        total = torch.zeros_like(w)
        index = torch.arange(terms, device=w.device).expand(chains, terms) if rows is None else rows
        for begin in range(0, terms, block := max(1, self.batch_size // chains)):
            part = index[:, begin : begin + block]
            found = self.gradients(w.repeat_interleave(part.shape[1], 0), part.reshape(-1))
            total += torch.einsum("ck,ckd->cd", weights[:, begin : begin + block], found.reshape(*part.shape, -1))
        return total

    def gradient(self, w: Tensor) -> Tensor:
        """The full gradient ``[C, D]`` at ``w [C, D]``."""
        return self.weighted(w, w.new_full((len(w), self.n), 1.0 / self.n))

    def blocks(self, w: Tensor, first: int = 0) -> Iterator[Tensor]:
        """The gradients at ``w [D]`` of the rows from ``first`` on, float64, in blocks ``[at most batch_size, D]``."""
        if w.dim() != 1:
            raise DataError(f"w must be one point [D]; it has shape {tuple(w.shape)}.")
        for index in torch.arange(first, self.n, device=w.device).split(self.batch_size):
            yield self.gradients(w.expand(len(index), -1), index).double()


class Spectrum(NamedTuple):
    """Eigenvalues of a gradient covariance.

    Attributes:
        eigenvalues: The min(n, D) largest in float64, descending; the other D - n are zero.
        n: Rows.
        dim: D.
        precision: Machine epsilon of the gradients that it was made of.
    """

    eigenvalues: Tensor
    n: int
    dim: int
    precision: float

    @property
    def rank(self) -> int:
        """Eigenvalues above rounding; at most n - 1, because the centred gradients sum to zero."""
        return self._above(max(self.n, self.dim) * self.precision)

    def fraction(self, relative: float = 1e-3) -> float:
        """Share of the D eigenvalues that exceed ``relative`` times the largest.

        A small share says that the noise lives in few directions. It does not say that the noise is small there.
        """
        return self._above(relative) / self.dim

    def _above(self, relative: float) -> int:
        return int((self.eigenvalues > relative * self.eigenvalues[0]).sum())


def minibatch_factor(n: int, batch_size: int, *, replace: bool = True) -> float:
    """The covariance of a mini-batch's mean gradient, divided by C: 1/b, without replacement (n-b)/((n-1) b).

    Args:
        n: Rows.
        batch_size: Rows b in a mini-batch; at most n without replacement.
        replace: Whether the rows of a mini-batch are drawn independently (with replacement).

    Raises:
        MethodError: no such mini-batch exists.
    """
    if batch_size < 1 or (not replace and batch_size > n):
        raise MethodError(f"batch_size={batch_size} is not possible: there are {n} rows.")
    finite = 1.0 if replace or n == 1 else (n - batch_size) / (n - 1)
    return finite / batch_size


def gradient_covariance(loss: EmpiricalLoss, w: Tensor) -> Tensor:
    """C ``[D, D]`` in float64 at ``w [D]``: the covariance of the gradient of a row drawn uniformly.

    ``E[(g_b - g)(g_b - g)^T]`` of one mini-batch with itself is ``minibatch_factor`` times this; of two independent
    mini-batches it is zero. Cost: 2n row gradients and n D^2 products.
    """
    mean = _mean(loss, w)
    return torch.stack([(c := block - mean).T @ c for block in loss.blocks(w)]).sum(0) / loss.n


def gradient_spectrum(loss: EmpiricalLoss, w: Tensor) -> Spectrum:
    """Spectrum of C at ``w [D]``: how many directions the noise of mini-batches has.

    Where n < D the Gram matrix of the centred gradients is decomposed instead: its non-zero eigenvalues are the same.
    Cost: 2n row gradients, or about n (2 + n / (2 batch_size)) for the Gram matrix, and O(min(n, D)^3).
    """
    matrix = _gram(loss, w) / loss.n if loss.n < w.shape[0] else gradient_covariance(loss, w)
    values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0.0)
    return Spectrum(values, loss.n, w.shape[0], torch.finfo(w.dtype).eps)


def _mean(loss: EmpiricalLoss, w: Tensor) -> Tensor:
    total = torch.zeros_like(w, dtype=torch.float64)
    for block in loss.blocks(w):
        total += block.sum(0)
    return total / loss.n


def _gram(loss: EmpiricalLoss, w: Tensor) -> Tensor:
    """Products of all pairs of centred row gradients ``[n, n]``, with two blocks of gradients in memory at a time."""
    mean = _mean(loss, w)  # subtracted from the gradients: centring the products would lose the digits of small noise
    gram = torch.empty(loss.n, loss.n, dtype=torch.float64, device=w.device)
    top = 0
    for upper in loss.blocks(w):
        left = top
        for right in loss.blocks(w, first=top):
            part = (upper - mean) @ (right - mean).T
            gram[top : top + len(upper), left : left + len(right)] = part
            gram[left : left + len(right), top : top + len(upper)] = part.T
            left += len(right)
        top += len(upper)
    return gram
