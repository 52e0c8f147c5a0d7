"""The perceptron: how many mistakes it can make, and what its mistakes say about new rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayesdl.bounds._numbers import EPS, Array, Values, arrays, like, require, up
from bayesdl.bounds.concentration.tails import checked
from bayesdl.errors import CertificateError


@dataclass(frozen=True)
class PerceptronRun:
    """What a perceptron did on a stream of rows.

    Args:
        weights: ``[d]`` after the last row.
        mistakes: Number of rows that it got wrong when it saw them.
        mistaken: ``[n]`` whether it got the row wrong, for the first pass over the rows.
        passes: Number of passes over the rows.
        separated: Whether the last pass was without a mistake.
    """

    weights: Array
    mistakes: int
    mistaken: NDArray[np.bool_]
    passes: int
    separated: bool


def run_perceptron(x: Values, y: Values, *, max_passes: int = 1) -> PerceptronRun:
    r"""Run the perceptron from w = 0: at a mistake, :math:`w \leftarrow w + y x`.

    A mistake is :math:`y\, w^T x \le 0`: a tie counts, or the first row could never move w = 0. For a bias, add a
    column of ones.

    Args:
        x: Rows ``[n, d]``, finite.
        y: Labels ``[n]``, -1 or 1.
        max_passes: Most passes over the rows; it stops after one without a mistake.

    Raises:
        CertificateError: When a number is NaN or infinite, or a label is neither -1 nor 1, or shapes do not fit.
    """
    (x_,), (y_,), (passes_,) = arrays(x=x), arrays(y=y), arrays(max_passes=max_passes)
    if x_.ndim != 2 or y_.shape != x_.shape[:1] or not len(y_):
        raise CertificateError(f"x must be [n, d] and y [n] with n >= 1, got {x_.shape} and {y_.shape}")
    require(np.isfinite(x_), "x", "finite", x_)
    require(np.abs(y_) == 1, "y", "-1 or 1", y_)
    require(passes_ >= 1, "max_passes", "at least 1", passes_)
    signed = x_ * y_[:, None]
    w = np.zeros(x_.shape[1])
    history: list[NDArray[np.bool_]] = []
    while len(history) < max_passes and not (history and not history[-1].any()):
        mistaken = np.zeros(len(y_), dtype=bool)
        for i, row in enumerate(signed):
            mistaken[i] = row @ w <= 0
            w = w + row if mistaken[i] else w
        history.append(mistaken)
    return PerceptronRun(
        weights=w,
        mistakes=int(sum(one.sum() for one in history)),
        mistaken=history[0],
        passes=len(history),
        separated=not history[-1].any(),
    )


def mistake_bound(*, radius: Values, margin: Values) -> Values:
    r"""Most mistakes of the perceptron on any stream of rows, however long, that some unit vector separates.

    .. math:: M \le \lfloor R^2 / \gamma^2 \rfloor, \qquad \|x_i\| \le R, \quad y_i\, u^T x_i \ge \gamma
        \text{ for some } \|u\| = 1

    Mistakes, not rows: they may come late, so R^2 / gamma^2 rows do not make it perfect; see ``online_to_batch``.
    Assumption: it starts at w = 0, and ties are mistakes. Source: Novikoff (1962), "On convergence proofs for
    perceptrons".

    Args:
        radius: R, positive and finite.
        margin: gamma, in (0, R].

    Returns:
        The bound as float64, a whole number; never below the exact one.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    radius_, margin_ = arrays(radius=radius, margin=margin)
    require((radius_ > 0) & np.isfinite(radius_), "radius", "positive and finite", radius_)
    require((margin_ > 0) & (margin_ <= radius_), "margin", "positive and at most the radius", margin_)
    return like(np.floor(up(np.square(radius_ / margin_))), radius, margin)


def online_to_batch(*, mistakes: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the mean risk of the hypotheses that an online learner went through in one pass over n rows.

    .. math:: \frac1n \sum_{i=1}^n R(h_{i-1}) \le \frac Mn + \sqrt{\frac{\log(1 / \delta)}{2 n}}
        \quad \text{with probability at least } 1 - \delta

    :math:`h_{i-1}` is the hypothesis that met row i, so the last one is not among them, and the bound is for one of
    them drawn at random. In the mean over the rows it is M / n without the root: at most (R / gamma)^2 / n for a
    perceptron. Assumptions: independent rows, one pass, a 0-1 loss. Source: Cesa-Bianchi, Conconi and Gentile (2004),
    Proposition 1; the constant is that of Hoeffding's lemma for losses in [0, 1] given the past (Azuma).

    Args:
        mistakes: Number M of mistakes in the pass, at most n.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    mistakes_, n_ = arrays(mistakes=mistakes, n=n)
    require((mistakes_ >= 0) & (mistakes_ <= n_), "mistakes", "between 0 and n", mistakes_)
    risk, n_, delta_ = checked(risk=mistakes_ / np.maximum(n_, 1), n=n, delta=delta)
    return like(np.minimum(up(risk + np.sqrt(-np.log(delta_) / (2 * n_)), 16 * EPS), 1.0), mistakes, n, delta)


def margin_bound(*, risk: Values, radius: Values, margin: Values, n: Values, delta: Values) -> Values:
    r"""Upper bound on the risk of every linear classifier with a unit weight vector, by its margins on the rows.

    .. math:: P(y\, w^T x \le 0) \le \hat R_\gamma(w) + \frac{2 R}{\gamma \sqrt n}
        + \sqrt{\frac{\log(1 / \delta)}{2 n}} \quad \text{for all } \|w\| \le 1 \text{, with probability } 1 - \delta

    The dimension does not enter. Assumptions: independent and identically distributed rows with :math:`\|x\| \le R`,
    and a margin gamma that was fixed before them (choosing among k margins costs delta / k). Source: Mohri,
    Rostamizadeh and Talwalkar (2018), Corollary 5.11.

    Args:
        risk: Share of rows with :math:`y\, w^T x < \gamma`, in [0, 1].
        radius: R, positive and finite.
        margin: gamma, positive.
        n: Number of rows, at least 1.
        delta: Failure probability in (0, 1).

    Returns:
        The bound, at most 1, rounded up.

    Raises:
        CertificateError: When an argument is NaN or outside its domain.
    """
    _, radius_, margin_ = arrays(risk=risk, radius=radius, margin=margin)
    require((radius_ > 0) & np.isfinite(radius_), "radius", "positive and finite", radius_)
    require(margin_ > 0, "margin", "positive", margin_)
    risk_, n_, delta_ = checked(risk=risk, n=n, delta=delta)
    with np.errstate(over="ignore"):
        complexity = 2 * radius_ / margin_ / np.sqrt(n_)
    bound = up(risk_ + complexity + np.sqrt(-np.log(delta_) / (2 * n_)), 16 * EPS)
    return like(np.minimum(bound, 1.0), risk, radius, margin, n, delta)
