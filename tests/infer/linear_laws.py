"""The exact stationary law of a sampler on a Gaussian: its step is linear there, so no chain need be run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.cases import Conjugate

Step = Callable[[tuple[Tensor, ...], Tensor, Tensor], tuple[Tensor, ...]]
"""(the state's entries ``[1, 1]``, gradient ``[1, 1]``, noise ``[1, 1]``) -> the new entries."""


def stationary(step: Step, entries: int, curvature: float = 1.0, gradient_noise: float = 0.0) -> Tensor:
    """Covariance of the entries of the state, position first, under ``step`` with gradient ``-a z + sqrt(V) xi``.

    The step's matrices are read off by feeding it unit vectors; then ``S = A S A' + B B'`` is solved.
    """

    def moved(*inputs: float) -> Tensor:
        values = tuple(torch.full((1, 1), value, dtype=torch.float64) for value in inputs)
        state, (error, noise) = values[:entries], values[entries:]
        gradient = -curvature * state[0] + gradient_noise**0.5 * error
        return torch.cat(step(state, gradient, noise), 1)[0]

    matrix = torch.stack([moved(*row) for row in torch.eye(entries + 2).tolist()], 1)
    inner, outer = matrix[:, :entries], matrix[:, entries:]
    assert float(torch.linalg.eigvals(inner).abs().max()) < 1, "the scheme is unstable"
    kron = torch.kron(inner, inner)
    flat = torch.linalg.solve(torch.eye(entries**2, dtype=torch.float64) - kron, (outer @ outer.T).flatten())
    return flat.reshape(entries, entries)


def regression_law(step: Step, entries: int, case: Conjugate, batch_size: int | None = None) -> Tensor:
    """Covariance ``[3, 3]`` of the weights of a ``Conjugate`` under ``step``, with independent mini-batches.

    The step is linear in its state, the gradient and the noise. The gradient on B rows, drawn with replacement, is
    ``-A e + b`` at a distance e from the posterior mean, with a random matrix A and a random b; given e, its covariance
    is N^2/B times that of one row's. So the state's second moments obey a linear equation, which is solved. All of it
    is in units of the prior's sd, as the engine has it.
    """
    x, n, dim = case.x * case.prior, len(case.y), case.x.shape[1]
    eye = torch.eye(dim, dtype=torch.float64)
    precision = case.precision() * case.prior**2
    residual = case.y - case.x @ case.mean()

    def moved(*inputs: float) -> Tensor:
        values = tuple(torch.full((1, 1), value, dtype=torch.float64) for value in inputs)
        return torch.cat(step(values[:entries], values[entries], values[entries + 1]), 1)[0]

    matrix = torch.stack([moved(*row) for row in torch.eye(entries + 2).tolist()], 1)
    inner, kick, noise = (torch.kron(part.contiguous(), eye) for part in matrix.split((entries, 1, 1), dim=1))
    first = torch.kron(torch.eye(1, entries, dtype=torch.float64), eye)
    mean = inner - kick @ precision @ first

    def gradient_noise(law: Tensor) -> Tensor:
        if batch_size is None:
            return torch.zeros_like(precision)
        at = first @ law @ first.T
        spread = torch.einsum("ni,nj,nk,kl,nl->ij", x, x, x, at, x) / n  # E_i of A_i (e e') A_i', A_i = x_i x_i'
        average = x.T @ x / n
        rows = (spread - average @ at @ average) / case.sigma**4
        pulls = x * residual[:, None] / case.sigma**2
        return n**2 / batch_size * (rows + torch.cov(pulls.T, correction=0))

    def after(law: Tensor) -> Tensor:
        return mean @ law @ mean.T + kick @ gradient_noise(law) @ kick.T + noise @ noise.T

    size = entries * dim
    zero = after(torch.zeros(size, size, dtype=torch.float64))
    basis = torch.eye(size**2, dtype=torch.float64).reshape(-1, size, size)
    operator = torch.stack([(after(one) - zero).flatten() for one in basis], 1)
    assert float(torch.linalg.eigvals(operator).abs().max()) < 1, "the scheme is unstable"
    law = torch.linalg.solve(torch.eye(size**2, dtype=torch.float64) - operator, zero.flatten()).reshape(size, size)
    return (first @ law @ first.T) * case.prior**2
