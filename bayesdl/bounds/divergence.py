r"""KL divergence between two Gaussians of any structure, never below its exact value.

With S = A A^T the covariance of q and T that of p, D coordinates and d the difference of the means,

.. math:: KL = \tfrac12 \left[ tr(T^{-1} S) + d^T T^{-1} d - D + \log\det T - \log\det S \right].

The laws are those of the stored tensors (of float32 ones too, which are float64 numbers without rounding). Every term
is bounded from its safe side: sums of D terms are rounded once (``math.fsum``), products carry the bound
k u / (1 - k u) of Higham (2002, section 3.1) for k operations in any order, which is taken as k eps = 2 k u; and what
a solve or a factorisation loses is measured by its residual and not assumed to be small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesdl.bounds._numbers import EPS
from bayesdl.bounds.gaussian_kl import kl_divergence_gaussian
from bayesdl.errors import MethodError
from bayesdl.posterior import FinitePosterior, Posterior
from bayesdl.posterior.covariance import CHUNK, Blocks, Covariance, Dense, Diagonal, Kronecker, LowRank, restore
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.prior import prior_law

MOST_SOLVED = 2**32
"""Numbers in the columns of q's root that are solved for where p has no diagonal covariance: some minutes."""
_TINY = 1e-290  # more than squares that underflow can add up to
_KINDS = (Diagonal, LowRank, Dense, Kronecker)
Interval = tuple[float, float]


def posterior_kl_upper(posterior: Posterior) -> float | None:
    """``kl_upper`` of a Gaussian posterior from its prior; None where it has no KL, or none with a derived bound."""
    if isinstance(posterior, FinitePosterior):
        return posterior.divergence
    if posterior.kl() is None or not isinstance(posterior, GaussianPosterior):
        return None
    prior = prior_law(posterior.problem.density)
    return None if prior is None else kl_upper(posterior.law, prior)


def kl_upper(q: Normal, p: Normal) -> float | None:
    """An upper bound on KL(q || p) in nats that counts every rounding error, tight to about D eps.

    Args:
        q: the posterior; a covariance that is diagonal, of low rank, dense, Kronecker, or blocks of these.
        p: the prior; likewise.

    Returns:
        The bound; infinite where q is a point, or where a covariance is singular in double precision. None where a
        covariance has another structure, or p couples so many coordinates that the solves would take hours.

    Raises:
        MethodError: the two have different numbers of coordinates.

    Cost: that of one draw from q for each column of its root, and of a solve with T where T is not diagonal.
    """
    if q.dim != p.dim:
        raise MethodError(f"KL between laws of {q.dim} and {p.dim} coordinates.")
    if not (_known(q.covariance) and _known(p.covariance)):
        return None
    q, p = _double(q), _double(p)
    parts = _independent(q.covariance, p.covariance)
    # The marginal of everything would be factorised anew.
    pairs = [(q.marginal(part), p.marginal(part)) for part in parts] if len(parts) > 1 else [(q, p)]
    found = []
    for mine, theirs in pairs:
        bound = _upper(mine, theirs)
        if bound is None:
            return None
        found.append(bound)
    return _sum(found)[1]


def _upper(q: Normal, p: Normal) -> float | None:
    """The bound for coordinates that hang together."""
    mine, theirs, away = q.covariance, p.covariance, q.mean - p.mean
    if not bool(away.isfinite().all()) or not bool((mine.variances() > 0).all()):
        return math.inf
    if isinstance(mine, Diagonal) and isinstance(theirs, Diagonal):
        return kl_divergence_gaussian(q.mean, mine.sd, p.mean, theirs.sd)
    try:
        if isinstance(theirs, Diagonal):
            trace = _trace_in_diagonal(mine, theirs.sd)
            square = _sum((away / theirs.sd).square().tolist(), 6)[1]
        else:
            if mine.noise_dim * q.dim > MOST_SOLVED:
                return None
            least = _least_eigenvalue(theirs)
            trace = _sum([_square_in(rows, theirs, least) for rows in _columns(mine)])[1]
            square = _square_in(away[None], theirs, least)
        parts = [trace, square, -float(q.dim), _log_det(theirs)[1], -_log_det(mine)[0]]
    except torch.linalg.LinAlgError:
        return math.inf
    if not all(math.isfinite(part) for part in parts):
        return math.inf
    total = math.fsum(parts) + 4 * EPS * math.fsum(abs(part) for part in parts) + _TINY
    return math.nextafter(max(total, 0.0) / 2, math.inf)


def _trace_in_diagonal(mine: Covariance, sd: Tensor) -> float:
    """tr(T^-1 S) for ``T = diag(sd^2)``: a sum of squares, each of which is right to a few units."""
    if isinstance(mine, LowRank):
        own = torch.cat([(mine.sd / sd).square()[:, None], (mine.factor / sd[:, None]).square()], 1)
        return _sum(own.sum(1).tolist(), own.shape[1] + 8)[1]
    if isinstance(mine, Dense):
        return _sum((mine.root / sd[:, None]).square().sum(1).tolist(), mine.dim + 8)[1]
    assert isinstance(mine, Kronecker)  # the rest was taken apart
    return _sum((mine.variances() / sd / sd).tolist(), sum(mine.spread.shape) + 12)[1]


def _columns(mine: Covariance) -> list[Tensor] | map[Tensor]:
    """The columns of the root A as rows, some at once; each entry is right to 4 units."""
    like = mine.variances()

    def some(start: int) -> Tensor:
        noise = like.new_zeros(min(CHUNK, mine.noise_dim - start), mine.noise_dim)
        noise[:, start : start + len(noise)].fill_diagonal_(1.0)
        return mine.scaled(noise)

    return map(some, range(0, mine.noise_dim, CHUNK))


def _square_in(rows: Tensor, theirs: Covariance, least: float) -> float:
    """The sum of ``a^T T^-1 a`` over rows a, from any approximate solutions y.

    With the residual ``r = a - T y`` it is ``a^T y + y^T r + r^T T^-1 r``, the last of which is at most
    ``|r|^2 / least``.
    """
    y = theirs.solve(rows)
    y = y + theirs.solve(rows - theirs.times(y))  # which often leaves less
    r = rows - theirs.times(y)
    steps = (2 * (theirs.noise_dim + theirs.dim) + 64) * EPS
    # What r and a may be off by, entry by entry.
    error = steps * (_absolute(theirs).times(y.abs()) + rows.abs())
    spread = y.abs() * (2 * error + steps * (rows.abs() + r.abs()))
    value = math.fsum((y * (rows + r)).sum(-1).tolist())
    extra = math.fsum(spread.sum(-1).tolist()) * (1 + steps)
    rest = math.fsum((r.abs() + error).square().sum(-1).tolist()) * (1 + steps) / least if least > 0 else math.inf
    return (value + extra + rest) * (1 + 8 * EPS)


def _log_det(covariance: Covariance) -> Interval:
    """Between what the log determinant lies."""
    if isinstance(covariance, Diagonal):
        return _sum_of_logs(covariance.sd, 2.0)
    if isinstance(covariance, Dense):
        return _sum_of_logs(covariance.root.diagonal(), 2.0)
    if isinstance(covariance, LowRank):
        own, along = _sum_of_logs(covariance.sd, 2.0), _log_det_of_columns(covariance)
        return _plus(own, along)
    if isinstance(covariance, Kronecker):
        (left, right), own = covariance.spread.shape, _sum_of_logs(covariance.spread.flatten(), 1.0)
        by_left, by_right = _log_det_of_basis(covariance.left), _log_det_of_basis(covariance.right)
        return _plus(own, (right * by_left[0], right * by_left[1]), (left * by_right[0], left * by_right[1]))
    assert isinstance(covariance, Blocks)
    return _plus(*(_log_det(block) for block in covariance.blocks))


def _log_det_of_columns(covariance: LowRank) -> Interval:
    """That of ``C = 1 + F^T diag(sd^-2) F``, which is at least 0 and at most the sum of the diagonal's logs.

    Between these, by the Cholesky factor L: its entries, and those of C, are off by at most ``g s_i s_j`` with
    ``s_i^2 = C_ii`` and g of D operations, so that both norm and trace
    of ``L^-1 (C - L L^T) L^-T`` are at most ``g | |L^-1| s |^2``.
    """
    white = covariance.factor / covariance.sd[:, None]
    inner = torch.eye(white.shape[1], dtype=white.dtype, device=white.device) + white.mT @ white
    scale = inner.diagonal().sqrt()
    gap = (2 * sum(white.shape) + 32) * EPS
    high = _sum_of_logs(inner.diagonal(), 1.0)[1] + len(inner) * gap
    root, failed = torch.linalg.cholesky_ex(inner)
    if failed or not bool(root.isfinite().all()):
        return 0.0, high
    inverse, off = _inverse(root)
    if off >= 1:
        return 0.0, high
    reach = float((inverse.abs() @ scale).norm()) + float(inverse.norm() * scale.norm()) * off / (1 - off)
    lost = gap * reach**2 * (1 + 2 * gap)
    if lost >= 0.5:
        return 0.0, high
    low_, high_ = _sum_of_logs(root.diagonal(), 2.0)
    return max(0.0, low_ - lost - lost**2), min(high, high_ + lost)


def _log_det_of_basis(basis: Tensor) -> Interval:
    """That of ``U^T U = 1 + G`` for a nearly orthogonal U: ``tr G`` less at most ``|G|^2 / (2 - 2 |G|)``."""
    defect = basis.mT @ basis - torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    error = (len(basis) + 8) * EPS * (basis.abs().mT @ basis.abs() + 1)
    size = float((defect.abs() + error).norm()) * (1 + len(basis) * EPS)
    if not size < 0.5:
        return -math.inf, math.inf
    trace, unsure = math.fsum(defect.diagonal().tolist()), math.fsum(error.diagonal().tolist()) * (1 + EPS)
    return trace - unsure - size**2, trace + unsure


def _least_eigenvalue(covariance: Covariance) -> float:
    """At most the smallest eigenvalue, and positive unless it is too small to tell from 0."""
    if isinstance(covariance, Diagonal | LowRank):
        return float(covariance.sd.min()) ** 2 * (1 - 4 * EPS)
    if isinstance(covariance, Blocks):
        return min(_least_eigenvalue(block) for block in covariance.blocks)
    if isinstance(covariance, Kronecker):
        shares = [1 - _defect(basis) for basis in (covariance.left, covariance.right)]
        return float(covariance.spread.min()) * shares[0] * shares[1] * (1 - 8 * EPS) if min(shares) > 0 else 0.0
    assert isinstance(covariance, Dense)
    inverse, off = _inverse(covariance.root)
    return ((1 - off) / float(inverse.norm())) ** 2 * (1 - 16 * EPS * len(inverse)) if off < 1 else 0.0


def _defect(basis: Tensor) -> float:
    """At least the spectral norm of ``U^T U - 1``."""
    defect = basis.mT @ basis - torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    return float(defect.norm()) + (2 * len(basis) + 8) * EPS * float(basis.norm()) ** 2 + 8 * EPS


def _inverse(root: Tensor) -> tuple[Tensor, float]:
    """An approximate inverse Z of a triangular L, and at least the norm of ``1 - Z L``."""
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    steps = (len(root) + 8) * EPS
    off = (eye - inverse @ root).abs() + steps * (inverse.abs() @ root.abs() + eye)
    norm = float(off.norm()) * (1 + 2 * len(root) * EPS)
    return inverse, norm if math.isfinite(norm) else math.inf


def _sum_of_logs(values: Tensor, factor: float) -> Interval:
    """``factor`` times the sum of logarithms, each of which is right to 2 units."""
    if not bool((values > 0).all()):
        return -math.inf, -math.inf
    logs = (factor * values.log()).tolist()
    total, error = math.fsum(logs), 6 * EPS * math.fsum(map(abs, logs))
    return total - error, total + error


def _sum(values: list[float], units: int = 1) -> Interval:
    """Between what a sum of non-negative numbers lies, each of which is right to so many units."""
    total = math.fsum(values)
    return total * (1 - (units + 1) * EPS), total * (1 + (units + 1) * EPS) + (_TINY if total else 0.0)


def _plus(*intervals: Interval) -> Interval:
    """Interval arithmetic: the sum."""
    low, high = (math.fsum(interval[side] for interval in intervals) for side in (0, 1))
    return math.nextafter(low, -math.inf), math.nextafter(high, math.inf)


def _independent(mine: Covariance, theirs: Covariance) -> list[slice]:
    """The finest groups of consecutive coordinates that are independent under both laws."""
    blocks = [own.parts() for own in (mine, theirs) if isinstance(own, Blocks)]
    whole = [own for own in (mine, theirs) if not isinstance(own, Blocks | Diagonal)]
    if not blocks or whole:
        return [slice(0, mine.dim)]
    shared = set.intersection(*({part.stop for part in parts} for parts in blocks))
    ends = sorted(shared)
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _known(covariance: Covariance) -> bool:
    if isinstance(covariance, Blocks):
        return all(_known(block) for block in covariance.blocks)
    return isinstance(covariance, _KINDS)


def _double(law: Normal) -> Normal:
    return Normal(law.mean.detach().double(), law.covariance.double())


def _absolute(covariance: Covariance) -> Covariance:
    """The same parts without their signs: its ``times`` bounds what that of the covariance passes through."""
    return restore({name: part.abs() for name, part in covariance.tensors().items()})
