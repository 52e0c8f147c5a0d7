"""Posteriors on finitely many networks: exact risks, and weights for the members of an ensemble."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.bounds._numbers import EPS, Array, arrays, require, require_delta
from bayesdl.bounds.loss import Loss, default_loss
from bayesdl.bounds.pac_bayes import pac_bayes_kl
from bayesdl.bounds.risk import CELLS, checked
from bayesdl.bounds.rows import select_rows
from bayesdl.data import Dataset, RowIds, as_dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.posterior import DrawsPosterior, FinitePosterior, FunctionPosterior, Posterior

_SHARPNESS = np.geomspace(1e-3, 1e4, 141)  # of the weights, as a multiple of the number of rows


def weigh(
    posterior: Posterior,
    data: Any,
    *,
    delta: float = 0.05,
    loss: Loss | None = None,
    prior: Tensor | None = None,
) -> FinitePosterior:
    r"""Weights for the members of an ensemble that minimise the PAC-Bayes-kl bound on rows that none of them has seen.

    For members fitted on rows A alone, any distribution over them that is fixed in advance is a prior for the rows B,
    and weights may then be chosen on B. Among weights w of one divergence from the prior, the risk is least for the
    Gibbs weights :math:`w_m \propto \pi_m e^{-\lambda \hat r_m}`, which are searched over lambda, from the prior itself
    to the best member alone; the theorem holds for all weights at once, so the search costs nothing. With M members
    the divergence is at most log M for a uniform prior. ``certify(weigh(ensemble, data), data)`` is the certificate,
    and needs no Monte-Carlo step.

    Args:
        posterior: an ensemble, or chains, whose draws are the members: each was fitted on the same rows A.
        data: A Dataset, or a pair ``(x, y)``, in raw units; the rows outside A are B.
        delta: failure probability at which the bound is minimised, as later in ``certify``.
        loss: in [0, 1]; by default that of ``certify``.
        prior: weights ``[M]`` that were fixed without B, as shares of their sum; uniform by default.

    Returns:
        The weighted members, with the divergence of the weights from the prior. Its rows are A and B, its prior's A.

    Raises:
        DataDependentPrior: the members were fitted on all these rows.
        CertificateError: the posterior has no draws of the latents, or an argument is out of its domain.

    Source: Catoni (2007), section 1.1, for the form of the weights; Maurer (2004), Theorem 5, for the bound.
    Cost: M forward passes over B.
    """
    require_delta(arrays(delta=delta)[0])
    if not isinstance(posterior, DrawsPosterior) or isinstance(posterior, FunctionPosterior):
        raise CertificateError(f"weigh needs an ensemble, or chains of draws; got {type(posterior).__name__}.")
    problem = posterior.problem
    if problem.rows is None:
        raise CertificateError("The ensemble was fitted on a dict of arguments, whose rows have no identity.")
    given = as_dataset(data, "regression" if problem.task == "regression" else None)
    fitted = RowIds.concat([rows for rows in (problem.rows, problem.prior_rows) if rows is not None])
    z = posterior.unconstrained_draws()
    start = _weights(prior, len(z))
    before = replace(problem, prior_rows=fitted)
    members = FinitePosterior(before, z, torch.from_numpy(start), 0.0, {})
    counted = unseen(members, given)
    risks = member_risks(members, counted, loss or default_loss(members.by_member(counted.x[:1]).kind))
    weights = best_weights(start, risks.numpy(), len(counted), delta)
    # The rows of the weights have been used as well: no hold-out bound on them is left.
    whole = replace(before, rows=RowIds.concat([problem.rows, counted.rows]), complete=False)
    info = {**posterior.info, "method": f"weighted {posterior.info.get('method', 'ensemble')}"}
    return FinitePosterior(whole, z, torch.from_numpy(weights), divergence(weights, start), info)


def unseen(posterior: FinitePosterior, data: Dataset) -> Dataset:
    """The rows of the data outside those of the posterior's prior.

    Raises:
        DataDependentPrior: there are none, or some of them are copies of the prior's.
    """
    rows = select_rows(posterior, data)
    if rows.copies:
        raise DataDependentPrior(
            f"{rows.copies} rows of {data.name} equal rows that the prior, members or scaler were fitted on but come "
            "from another source, so they are copies. Use parts of one Dataset, which keeps the rows' identities."
        )
    return data.subset(rows.bound)


def member_risks(posterior: FinitePosterior, data: Dataset, loss: Loss) -> Tensor:
    """The average loss of every member over the rows, ``[M]`` in float64.

    Raises:
        CertificateError: a loss is NaN or outside [0, 1], or the program draws latents anew for every prediction.
    """
    if posterior.problem.draws_anew:
        raise CertificateError("The program draws latents anew for every row; a risk over members alone is not exact.")
    count, total = len(posterior.z), torch.zeros(len(posterior.z), dtype=torch.float64)
    size = max(1, CELLS // (count * max(1, data.n_classes)))
    for begin in range(0, len(data), size):
        x, y = data.x[begin : begin + size], data.y[begin : begin + size]
        total += checked(loss.draws(posterior.by_member(x), y), (count, len(y)), loss).sum(1)
    return (total / len(data)).clamp_max(1.0)


def exact_risk(posterior: FinitePosterior, data: Dataset, loss: Loss) -> float:
    """The Gibbs risk over the rows, a finite sum."""
    weights = posterior.weights
    risk = math.fsum((weights * member_risks(posterior, data, loss)).tolist()) / math.fsum(weights.tolist())
    return min(1.0, risk)


def divergence(weights: Array, prior: Array) -> float:
    """KL of weights from a prior, both as shares of their sums: never below the exact value, and about 1e-14 above."""
    shares, start = weights / math.fsum(weights), prior / math.fsum(prior)
    used = shares > 0
    logs = np.log(shares[used] / start[used])
    # A share and a quotient are right to 4 units, a logarithm to 2 of its own and to what its argument was off by.
    allowance = 16 * EPS * math.fsum(shares[used] * (np.abs(logs) + 1))
    return max(0.0, math.fsum(shares[used] * logs)) + allowance


def _weights(prior: Tensor | None, count: int) -> Array:
    if prior is None:
        return np.full(count, 1 / count)
    weights = arrays(prior=prior)[0]
    if weights.shape != (count,):
        raise CertificateError(f"prior has shape {weights.shape}; it needs one weight for each of {count} members.")
    require(np.isfinite(weights) & (weights > 0), "prior", "positive and finite", weights)
    return np.asarray(weights / math.fsum(weights))


def best_weights(prior: Array, risks: Array, n: int, delta: float) -> Array:
    """The Gibbs weights with the smallest bound: the prior, the best member, or in between by a search in two steps."""
    sharpness = n * _SHARPNESS
    values = _bounds(_gibbs(prior, risks, sharpness), prior, risks, n, delta)
    finer = sharpness[int(values.argmin())] * np.geomspace(0.85, 1.18, 67)
    candidates = [prior, np.where(risks == risks.min(), prior, 0.0), *_gibbs(prior, risks, finer)]
    best = candidates[int(_bounds(candidates, prior, risks, n, delta).argmin())]
    return best / math.fsum(best)


def _gibbs(prior: Array, risks: Array, sharpness: Array) -> list[Array]:
    return [prior * np.exp(-s * (risks - risks.min())) for s in sharpness]


def _bounds(candidates: list[Array], prior: Array, risks: Array, n: int, delta: float) -> Array:
    risk = np.array([min(1.0, float(w @ risks / w.sum())) for w in candidates])
    kl = np.array([divergence(w, prior) for w in candidates])
    return np.asarray(pac_bayes_kl(risk=risk, kl=kl, n=n, delta=delta))
