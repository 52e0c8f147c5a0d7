r"""Change of measure, and what it says of a quadratic loss: a posterior pays for stiff directions alone.

For laws p and q and any function X, ``E_q X <= KL(q || p) + log E_p e^X``, with equality for q proportional to p e^X
(Donsker & Varadhan, 1975). It is the first step of every PAC-Bayes bound, and it names the best posterior.

Take ``p = N(w0, I / alpha)`` and ``X = -1/2 (w - m)^T H (w - m)`` around some m, H with the eigenvalues lambda: the
curvature of n times the empirical loss. Among the Gaussians around m the one that minimises ``-E_q X + KL`` has the
covariance ``(H + alpha I)^-1`` and

.. math:: KL = \tfrac12 \sum_i \left[\log(1 + \lambda_i / \alpha) - \frac{\lambda_i}{\lambda_i + \alpha}\right]
    + \tfrac{\alpha}{2} |m - w_0|^2, \qquad -E_q X = \tfrac12 \sum_i \frac{\lambda_i}{\lambda_i + \alpha}.

A direction with lambda far below alpha, a sloppy one, costs nothing. In networks almost all are, which is why their
bounds may be below 1 with more weights than rows (Yang, Mao & Chaudhari, 2022). ``Laplace(predictive="sampled")`` is
this posterior, and ``certify`` its certificate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import MethodError


def change_of_measure(values: Tensor, prior: Tensor) -> tuple[float, Tensor]:
    """``log E_p e^X``, an upper bound on ``E_q X - KL(q || p)`` for every q, and the q that attains it.

    Args:
        values: X at the points of a finite set, ``[K]``.
        prior: p, probabilities ``[K]``.

    Returns:
        The bound, and q ``[K]``.

    Raises:
        MethodError: the prior is no distribution.
    """
    if values.shape != prior.shape or not bool((prior >= 0).all()) or abs(float(prior.sum()) - 1) > 1e-9:
        raise MethodError(
            f"prior must be probabilities that sum to 1, one for each of the {tuple(values.shape)} values."
        )
    weights = values + prior.log()
    return float(torch.logsumexp(weights, 0)), torch.softmax(weights, 0)


def effective_dimension(curvatures: Tensor, precision: float) -> float:
    """``sum_i lambda_i / (lambda_i + alpha)``: directions of which the data say more than the prior.

    Args:
        curvatures: lambda ``[D]``, eigenvalues of n times the loss's Hessian or Fisher information; not negative.
        precision: alpha of the prior.

    Raises:
        MethodError: a curvature is negative, or the precision is not positive.
    """
    return float((_checked(curvatures, precision) / (curvatures + precision)).sum())


def divergence(curvatures: Tensor, precision: float, square_distance: float = 0.0) -> float:
    """KL(q || p) in nats of the best Gaussian around a point, see the module; effective dimension and distance.

    With every curvature replaced by their mean it is that of the best isotropic Gaussian.

    Args:
        curvatures: lambda ``[D]``.
        precision: alpha of the prior.
        square_distance: ``|m - w0|^2``.

    Raises:
        MethodError: as ``effective_dimension``.
    """
    ratio = _checked(curvatures, precision) / precision
    return float((ratio.log1p() - ratio / (1 + ratio)).sum() / 2) + precision * square_distance / 2


def free_energy(curvatures: Tensor, precision: float, square_distance: float = 0.0) -> float:
    """``-E_q X + KL(q || p)`` at its smallest: ``1/2 sum log(1 + lambda / alpha) + alpha |m - w0|^2 / 2``.

    Raises:
        MethodError: as ``effective_dimension``.
    """
    ratio = _checked(curvatures, precision) / precision
    return float(ratio.log1p().sum() / 2) + precision * square_distance / 2


def _checked(curvatures: Tensor, precision: float) -> Tensor:
    if not (precision > 0 and bool((curvatures >= 0).all())):
        raise MethodError(f"curvatures must not be negative, and the prior's precision, {precision:g}, be positive.")
    return curvatures
