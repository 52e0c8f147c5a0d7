"""Shattering by brute force: which labellings of a few points a class can give.

A class is a function ``fits(x [n, d], y [n] bool) -> bool`` that says whether some member labels the points so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from bayesdl.bounds._numbers import Array, Values, arrays
from bayesdl.errors import CertificateError

Fits = Callable[[Array, NDArray[np.bool_]], bool]

POINTS = 20
"""Most points whose 2^n labellings are tried."""


def labellings(x: Values, fits: Fits) -> int:
    """Number of labellings of the points that the class can give: the size of its restriction to them.

    The class shatters the points if this is 2^n. Its growth function is the largest such number over all sets of n
    points.

    Args:
        x: Points ``[n, d]`` (or ``[n]`` numbers), at most 20.
        fits: The class.

    Raises:
        CertificateError: When a number is NaN, or there are more than 20 points.

    Cost: 2^n calls of ``fits``.
    """
    points = _points(x)
    return sum(fits(points, np.array(y)) for y in itertools.product((False, True), repeat=len(points)))


def vc_dimension(x: Values, fits: Fits) -> int:
    """Size of the largest subset of the points that the class shatters: its VC dimension on this domain.

    On a part of the domain it is a lower bound on the VC dimension of the class; no set of n points needs to be tried
    once no set of n - 1 points is shattered.

    Args:
        x: Points ``[N, d]`` (or ``[N]`` numbers), at most 20.
        fits: The class.

    Raises:
        CertificateError: When a number is NaN, or there are more than 20 points.
    """
    points = _points(x)
    for size in range(1, len(points) + 1):
        subsets = itertools.combinations(range(len(points)), size)
        if not any(labellings(points[list(subset)], fits) == 2**size for subset in subsets):
            return size - 1
    return len(points)


def fits_halfspace(x: Array, y: NDArray[np.bool_]) -> bool:
    """Whether a hyperplane, with a bias, has the points with label 1 strictly on one side and the rest on the other.

    For hyperplanes through the origin see ``cover_count``. Solved as a linear program.
    """
    sign = np.where(y, 1.0, -1.0)
    rows = -sign[:, None] * np.column_stack([x, np.ones(len(x))])
    found = linprog(np.zeros(rows.shape[1]), A_ub=rows, b_ub=-np.ones(len(x)), bounds=(None, None))
    return bool(found.status == 0)


def fits_rectangle(x: Array, y: NDArray[np.bool_]) -> bool:
    """Whether some box with sides parallel to the axes holds exactly the points with label 1."""
    if not y.any():
        return True
    inside = ((x >= x[y].min(0)) & (x <= x[y].max(0))).all(1)
    return bool((inside == y).all())


def fits_conjunction(x: Array, y: NDArray[np.bool_]) -> bool:
    """Whether some monotone conjunction of the Boolean variables labels the rows so."""
    variables = x[y].all(0)
    return bool((x.astype(bool) | ~variables).all(1).tolist() == y.tolist())


def _points(x: Values) -> Array:
    (points,) = arrays(x=x)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or len(points) > POINTS:
        raise CertificateError(f"x must be [n, d] with n at most {POINTS}, got {points.shape}")
    return points
