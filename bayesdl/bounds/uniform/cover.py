"""Cover's counting theorem: in how many ways a hyperplane can divide points."""

from __future__ import annotations

import math

from bayesdl.bounds._numbers import arrays, require_count


def cover_count(n: int, d: int) -> int:
    r"""Number of labellings of n points in d dimensions that a hyperplane through the origin can give.

    .. math:: C(n, d) = 2 \sum_{i=0}^{d-1} \binom{n - 1}{i}

    It is 2^n for n <= d and falls behind from there: at n = 2 d it is half of 2^n, the capacity of a perceptron. The
    share C / 2^n tends to 0 with n, the count itself grows. This is the growth function of halfspaces without a bias;
    with a bias, take d + 1. Assumption: the points are in general position (any d of them are linearly independent);
    otherwise there are fewer. Source: Cover (1965), "Geometrical and statistical properties of systems of linear
    inequalities", Theorem 1.

    Args:
        n: Number of points, at least 1.
        d: Dimension, at least 1.

    Returns:
        The exact count.

    Raises:
        CertificateError: When an argument is not a positive whole number.

    Example:
        >>> cover_count(4, 2), cover_count(20, 5)
        (8, 10072)
    """
    for name, value in zip(("n", "d"), arrays(n=n, d=d), strict=True):
        require_count(name, value, 1)
    return 2 * sum(math.comb(int(n) - 1, i) for i in range(min(int(n), int(d))))
