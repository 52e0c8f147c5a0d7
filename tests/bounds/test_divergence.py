"""The upper bound on the KL between Gaussians against 60 digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from bayesdl.bounds.divergence import _least_eigenvalue as least_eigenvalue
from bayesdl.bounds.divergence import _log_det as log_det
from bayesdl.bounds.divergence import _square_in as square_in
from bayesdl.bounds.divergence import kl_upper
from bayesdl.errors import MethodError
from bayesdl.posterior.covariance import Blocks, Covariance, Dense, Diagonal, Kronecker, LowRank
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import Spectral

D = 6


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(seed: int, d: int = D) -> Diagonal:
    return Diagonal(normals(seed, d).exp())


def low_rank(seed: int, d: int = D) -> LowRank:
    return LowRank(normals(seed, d).exp(), normals(seed + 1, d, 2))


def dense(seed: int, d: int = D) -> Dense:
    root = normals(seed, d, 2 * d)
    return Dense.of(root @ root.mT / d)


def kronecker(seed: int) -> Kronecker:
    left, right = (torch.linalg.qr(normals(seed + k, n, n))[0] for k, n in enumerate((2, 3)))
    return Kronecker(left, right, normals(seed + 2, 2, 3).exp())


def blocks(seed: int) -> Blocks:
    return Blocks((dense(seed, 2), diagonal(seed, 1), low_rank(seed, 3)))


def other_blocks(seed: int) -> Blocks:
    return Blocks((low_rank(seed, 3), dense(seed, 3)))


KINDS: tuple[Callable[[int], Covariance], ...] = (diagonal, low_rank, dense, kronecker, blocks, other_blocks)


def exact_matrix(covariance: Covariance) -> mpmath.matrix:
    """The covariance that the stored tensors mean, entry by entry in 60 digits."""
    if isinstance(covariance, Blocks):
        whole = mpmath.zeros(covariance.dim)
        for part, block in zip(covariance.parts(), covariance.blocks, strict=True):
            matrix = exact_matrix(block)
            for i, j in itertools.product(range(block.dim), repeat=2):
                whole[part.start + i, part.start + j] = matrix[i, j]
        return whole
    if isinstance(covariance, Diagonal):
        return mpmath.diag([mpmath.mpf(s) ** 2 for s in covariance.sd.tolist()])
    if isinstance(covariance, LowRank):
        factor = mpmath.matrix(covariance.factor.tolist())
        return exact_matrix(Diagonal(covariance.sd)) + factor * factor.T
    if isinstance(covariance, Dense):
        root = mpmath.matrix(covariance.root.tolist())
        return root * root.T
    assert isinstance(covariance, Kronecker)
    (o, i), basis = covariance.spread.shape, mpmath.zeros(covariance.dim)
    for a, b, c, d in itertools.product(range(o), range(i), range(o), range(i)):
        basis[a * i + b, c * i + d] = mpmath.mpf(float(covariance.left[a, c])) * float(covariance.right[b, d])
    return basis * mpmath.diag(covariance.spread.flatten().tolist()) * basis.T


def exact_kl(q: Normal, p: Normal) -> mpmath.mpf:
    with mpmath.workdps(120):
        s, t = exact_matrix(q.covariance), exact_matrix(p.covariance)
        away = mpmath.matrix(q.mean.tolist()) - mpmath.matrix(p.mean.tolist())
        inverse = t**-1
        ratio = inverse * s
        trace = mpmath.fsum(ratio[k, k] for k in range(q.dim))
        square = (away.T * inverse * away)[0]
        return (trace + square - q.dim - mpmath.log(mpmath.det(s)) + mpmath.log(mpmath.det(t))) / 2


@pytest.mark.parametrize("mine", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_bound_is_never_below_the_exact_divergence_and_close_to_it(
    mine: Callable[[int], Covariance], theirs: Callable[[int], Covariance]
) -> None:
    for seed in (0, 10):
        q, p = Normal(normals(seed, D), mine(seed)), Normal(normals(seed + 5, D), theirs(seed + 7))
        bound, exact = kl_upper(q, p), exact_kl(q, p)
        assert bound is not None
        assert bound >= exact
        assert bound <= exact * (1 + 1e-11) + 1e-11
        assert float(q.kl(p)) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_has_divergence_zero_from_itself_up_to_rounding(kind: Callable[[int], Covariance]) -> None:
    law = Normal(normals(1, D), kind(2))
    assert 0 <= kl_upper(law, law) < 1e-11
    if kind is diagonal:
        assert kl_upper(law, law) == 0
    near = Normal(law.mean + 1e-9, law.covariance)
    assert exact_kl(near, law) <= kl_upper(near, law) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theirs", [diagonal, low_rank, dense])
def test_float32_posteriors_are_bounded_as_the_laws_that_their_numbers_mean(
    kind: Callable[[int], Covariance], theirs: Callable[[int], Covariance]
) -> None:
    law, p = Normal(normals(3, D), kind(4)), Normal(normals(5, D), theirs(6))
    stored = law.to(torch.float32, torch.device("cpu"))
    exact = exact_kl(Normal(stored.mean.double(), stored.covariance.double()), p)
    bound = kl_upper(stored, p)
    assert exact <= bound <= exact * (1 + 1e-10)  # a basis that is orthogonal to 1e-7 only counts as it is
    assert kl_upper(law, p) != bound


@pytest.mark.parametrize("kind", [low_rank, dense, kronecker, blocks])
@pytest.mark.parametrize("exponent", [-100, -8, 8, 100])
def test_extreme_variances_keep_the_bound_on_its_side(kind: Callable[[int], Covariance], exponent: int) -> None:
    q = Normal(normals(3, D), kind(4))
    p = Normal(normals(5, D), Diagonal(10.0 ** (exponent * torch.linspace(0.5, 1, D, dtype=torch.float64))))
    bound, exact = kl_upper(q, p), exact_kl(q, p)
    assert exact <= bound
    assert bound <= exact * (1 + 1e-11)


@pytest.mark.parametrize(("exponent", "looseness"), [(-3, 1e-6), (-6, 0.5), (-9, math.inf)])
@pytest.mark.parametrize("kind", [diagonal, low_rank, kronecker])
def test_nearly_singular_priors_are_solved_with_their_residual_counted(
    kind: Callable[[int], Covariance], exponent: int, looseness: float
) -> None:
    """Own noise so far below the columns that double precision can hardly solve: the bound says so by its size."""
    narrow = LowRank(torch.full((D,), 10.0**exponent, dtype=torch.float64), normals(8, D, 3))
    q, p = Normal(normals(3, D), kind(4)), Normal(normals(5, D), narrow)
    bound, exact = kl_upper(q, p), exact_kl(q, p)
    assert exact <= bound
    assert bound <= exact * (1 + looseness)


def test_log_determinants_lie_in_their_intervals() -> None:
    """Nearly parallel columns far above the noise: the factorisation loses digits, more than the logarithms do."""
    for seed in range(40):
        column = normals(seed, D, 1)
        factor = column + 1e-3 * normals(seed + 100, D, 3)
        covariance = LowRank(torch.full((D,), 1e-3, dtype=torch.float64), factor)
        low, high = log_det(covariance)
        with mpmath.workdps(80):
            exact = mpmath.log(mpmath.det(exact_matrix(covariance)))
        assert low <= exact <= high
        assert high - low < 1e-4


def test_solves_are_only_a_guess_whose_residual_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, p = Normal(normals(3, D), low_rank(4)), Normal(normals(5, D), dense(6))
    exact, before, right = exact_kl(q, p), kl_upper(q, p), Dense.solve
    monkeypatch.setattr(Dense, "solve", lambda self, rows: 1.1 * right(self, rows))
    bound = kl_upper(q, p)
    assert before < bound
    assert exact <= bound <= exact * 1.5


def test_products_count_their_rounding() -> None:
    """Squares ``a^T T^-1 a`` in covariances whose eigenvalues lie far apart: half of the plain values are too small."""
    spread = torch.diag(10.0 ** torch.linspace(0, -4, D, dtype=torch.float64))
    for seed in range(25):
        rows, mixing = normals(seed, 1, D), normals(seed + 100, D, D)
        covariance = Dense.of(mixing @ spread @ mixing.mT)
        with mpmath.workdps(60):
            vector = mpmath.matrix(rows[0].tolist())
            exact = (vector.T * exact_matrix(covariance) ** -1 * vector)[0]
        found = square_in(rows, covariance, least_eigenvalue(covariance))
        assert exact <= found <= exact * (1 + 1e-4)


def test_what_has_no_bound_is_told() -> None:
    law = Normal(torch.zeros(D, dtype=torch.float64), diagonal(0))
    points = Normal(law.mean, Diagonal(torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)))
    assert kl_upper(points, law) == math.inf
    singular = Normal(law.mean, Dense(torch.ones(D, D, dtype=torch.float64).tril()))
    root = singular.covariance.root.clone()
    root[2, 2] = 0.0
    assert kl_upper(law, Normal(law.mean, Dense(root))) == math.inf
    basis = torch.linalg.qr(normals(1, D, 2))[0]
    spectral = Spectral(basis, torch.ones(2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    assert kl_upper(Normal(law.mean, spectral), law) is None
    with pytest.raises(MethodError, match="6 and 2 coordinates"):
        kl_upper(law, law.marginal(slice(0, 2)))
