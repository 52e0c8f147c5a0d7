"""VC dimensions of known classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bayesdl.bounds._numbers import EPS, arrays, require, require_count


def halfspaces(d: int, *, bias: bool = True) -> int:
    """Halfspaces 1[w x + b > 0] in d dimensions: d + 1, or d without the bias b (Radon's theorem)."""
    _check(d=d)
    return d + 1 if bias else d


def rectangles(d: int = 2) -> int:
    """Boxes with sides parallel to the axes in d dimensions: 2 d, so 4 in the plane."""
    _check(d=d)
    return 2 * d


def conjunctions(d: int) -> int:
    """Monotone conjunctions of d Boolean variables: d (they are 2^d classifiers, and log2 of that is attained)."""
    _check(d=d)
    return d


def finite_class(size: int) -> int:
    """Upper bound for a class of so many members: the whole part of log2(size), since V points need 2^V members.

    The logarithm is to base 2: monotone conjunctions of 3 variables are 8 and have dimension 3 > log(8) = 2.08.
    """
    _check(size=size)
    return int(size).bit_length() - 1


def relu_network(widths: Sequence[int]) -> int:
    r"""Upper bound on the VC dimension of the sign of a fully connected ReLU network, with all constants.

    .. math:: V \le L + \bar L W \log_2\big(4 e R \log_2(2 e R)\big), \quad R = \sum_i i k_i, \quad
        \bar L = \frac1W \sum_i W_i

    with L layers of k_i units, the last one the output; W parameters, W_i of them in the layers up to i.
    Source: Bartlett, Harvey, Liaw and Mehrabian (2019), "Nearly-tight VC-dimension and pseudodimension bounds for
    piecewise linear neural networks", JMLR 20, the main upper bound (one breakpoint, degree one).

    Args:
        widths: Inputs, hidden units of each layer, outputs: ``[784, 600, 600, 1]``. At least 3 units in all; one
            output (each further one is a classifier of its own).

    Returns:
        The bound, a whole number.

    Raises:
        CertificateError: When a width is not a positive whole number, or there are fewer than 3 units.
    """
    (k,) = arrays(widths=np.asarray(widths, dtype=np.float64))
    require_count("widths", k, 1)
    units = np.asarray(k[1:].sum())
    require(units >= 3, "the number of units", "at least 3", units)
    layers = len(k) - 1
    up_to = np.cumsum((k[:-1] + 1) * k[1:])
    r = float(np.sum(np.arange(1, layers + 1) * k[1:]))
    bound = layers + float(up_to.sum()) * math.log2(4 * math.e * r * math.log2(2 * math.e * r))
    return math.floor(bound * (1 + 16 * EPS))


def relu_orders(*, parameters: float, layers: float) -> tuple[float, float]:
    r"""The orders :math:`p L \log(p / L)` and :math:`p L \log p` between which the VC dimension of ReLU networks lies.

    Up to constants that are not in them: some network has at least the order of the first, all have at most the order
    of the second. Source: Bartlett et al. (2019), the main lower and upper bounds.

    Args:
        parameters: Number p of weights and biases.
        layers: Number L of layers, at most p.

    Raises:
        CertificateError: When an argument is not a positive whole number, or there are more layers than parameters.

    Example:
        >>> [f"{order:.3g}" for order in relu_orders(parameters=1e6, layers=10)]
        ['1.15e+08', '1.38e+08']
    """
    p, depth = arrays(parameters=parameters, layers=layers)
    require_count("parameters", p, 1)
    require_count("layers", depth, 1)
    require(depth <= p, "layers", "at most the number of parameters", depth)
    return float(p * depth * np.log(p / depth)), float(p * depth * np.log(p))


def _check(**counts: int) -> None:
    for name, value in zip(counts, arrays(**counts), strict=True):
        require_count(name, value, 1)
