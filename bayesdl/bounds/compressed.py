"""One deterministic network whose weights take few values, so that a prior on short descriptions certifies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.bounds._numbers import arrays, require_count, require_delta
from bayesdl.bounds.coding import decode, encode
from bayesdl.bounds.finite import exact_risk, unseen
from bayesdl.bounds.loss import Loss, default_loss
from bayesdl.bounds.pac_bayes import pac_bayes_kl
from bayesdl.bounds.risk import raised
from bayesdl.data import Dataset, RowIds, as_dataset
from bayesdl.errors import CertificateError
from bayesdl.posterior import DrawsPosterior, FinitePosterior, GaussianPosterior, Posterior

LEVELS = (3, 5, 9, 17, 33)
_ROUNDS = 100  # of Lloyd's iteration; it stops where nothing moves


def compress(
    posterior: Posterior,
    data: Any,
    *,
    levels: Sequence[int] = LEVELS,
    delta: float = 0.05,
    loss: Loss | None = None,
    prior: Posterior | None = None,
) -> FinitePosterior:
    r"""The network of a mode, or of a Gaussian's mean, with its weights rounded to the levels that give the best bound.

    The distance of the weights from a centre that was fixed without the rows of the bound takes K values, found by
    k-means and rounded to bfloat16, and is written as a message of a prefix-free code (``bayesdl.bounds.coding``). A
    prior that gives each message :math:`2^{-bits}` has the divergence :math:`bits \log 2` from the one network that
    the decoder makes of it, and the PAC-Bayes-kl bound holds for that very network, whatever rows it was trained on and
    however the levels were chosen: K is in the message. ``certify(compress(mode, data), data)`` is the certificate; its
    predictor, a draw from a posterior on one network, is that network.

    Args:
        posterior: of one mode (``MAP``), or Gaussian.
        data: A Dataset, or a pair ``(x, y)``, in raw units. As for every PAC-Bayes bound, the rows that shaped the
            scaler or the prior do not count: all rows fitted on, unless some were reserved (``prior_rows=``) or the fit
            was on a pair, which nothing scales.
        levels: numbers K of values that are tried.
        delta: failure probability at which the bound is minimised, as later in ``certify``.
        loss: in [0, 1]; by default that of ``certify``.
        prior: a posterior of the same model from other rows, whose mode or mean is the centre; its rows do not count.
            By default the centre is the mean of the Gaussian prior, the model's or the one that was learnt for the
            bound (``PACBayes``), or else 0.

    Returns:
        A posterior on one network, as the decoder makes it; ``info`` tells bits and levels.

    Raises:
        DataDependentPrior: all rows shaped the scaler or the prior.
        CertificateError: the posterior is neither of one mode nor Gaussian, or an argument is out of its domain.

    Source: Lotfi et al. (2022), "PAC-Bayes compression bounds so tight that they can explain generalization", section 4
    (without their subspace); Maurer (2004), Theorem 5, for the bound.
    Cost: for each K a forward pass over the rows, and a microsecond a weight and level.
    """
    require_delta(arrays(delta=delta)[0])
    if not len(levels):
        raise CertificateError("levels is empty; name at least one number of values, such as levels=(5,).")
    require_count("levels", arrays(levels=torch.tensor(list(levels), dtype=torch.float64))[0], 1)
    problem, point, centre = posterior.problem, _point(posterior), _centre(posterior, prior)
    if problem.rows is None:
        raise CertificateError("The posterior was fitted on a dict of arguments, whose rows have no identity.")
    reserved = [problem.rows if problem.prior_rows is None else problem.prior_rows]
    given = as_dataset(data, "regression" if problem.task == "regression" else None)
    if prior is not None:
        reserved.append(_seen(prior, given))
    before = replace(problem, prior_rows=RowIds.concat(reserved))
    one = torch.ones(1, dtype=torch.float64)
    counted = unseen(FinitePosterior(before, point[None], one, math.inf, {}), given)
    fitted = RowIds.concat([problem.rows, counted.rows.minus(problem.rows)])
    whole = replace(before, rows=fitted, complete=problem.complete and len(fitted) == len(problem.rows))
    found: list[tuple[float, FinitePosterior]] = []
    for k in dict.fromkeys(levels):
        message = encode(quantised(point.double() - centre.double(), k))
        z = (centre.double() + decode(message, len(point)).to(centre.device)).to(point.dtype)
        nats = raised(len(message) * math.log(2.0))
        info = {**posterior.info, "method": f"compressed {posterior.info.get('method', 'network')}"}
        network = FinitePosterior(whole, z[None], one, nats, info | {"bits": len(message), "levels": k})
        risk = raised(exact_risk(network, counted, loss or default_loss(network.by_member(counted.x[:1]).kind)))
        found.append((float(pac_bayes_kl(risk=min(1.0, risk), kl=nats, n=len(counted), delta=delta)), network))
    return min(found, key=lambda pair: (pair[0], pair[1].divergence))[1]


def quantised(values: Tensor, levels: int) -> Tensor:
    """The values, each moved to the nearest of at most so many bfloat16 numbers, in float64: k-means on a line.

    Args:
        values: ``[D]``.
        levels: K.

    Cost: a sort, and D log K.
    """
    values = values.double()
    ordered = values.sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centres = torch.linspace(0, 1, levels + 2, dtype=torch.float64, device=values.device)[1:-1]
    centres = ordered[0] + (ordered[-1] - ordered[0]) * centres
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts = ends.diff()
        moved = torch.where(counts > 0, (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved.sort().values
    centres = centres.bfloat16().double().unique()
    return centres[torch.searchsorted((centres[1:] + centres[:-1]) / 2, values)]


def _point(posterior: Posterior) -> Tensor:
    """The one vector ``[D]`` that a posterior stands for."""
    if isinstance(posterior, GaussianPosterior):
        return posterior.mean
    draws = posterior.unconstrained_draws() if isinstance(posterior, DrawsPosterior) else None
    if draws is None or len(draws) != 1:
        raise CertificateError(
            "compress takes one network: the mode of MAP, or the mean of a Gaussian posterior; this is a "
            f"{type(posterior).__name__}. To certify an ensemble, weigh its members: bounds.weigh(ensemble, data)."
        )
    return draws[0]


def _seen(prior: Posterior, data: Dataset) -> RowIds:
    """All rows that another posterior has seen; none of the data may be a copy of one."""
    problem = prior.problem
    if problem.rows is None:
        raise CertificateError("prior= was fitted on a dict of arguments, whose rows have no identity.")
    rows = RowIds.concat([problem.rows, *([] if problem.prior_rows is None else [problem.prior_rows])])
    unseen(FinitePosterior(replace(problem, prior_rows=rows), _point(prior)[None], torch.ones(1), math.inf, {}), data)
    return rows


def _centre(posterior: Posterior, prior: Posterior | None) -> Tensor:
    """The vector ``[D]`` from which the decoder starts."""
    point = _point(posterior)
    if prior is None:
        law = posterior.problem.density.gaussian_prior()
        return torch.zeros_like(point) if law is None else law[0]
    centre, units = _point(prior), [each.problem.scaler.state() for each in (posterior, prior)]
    if centre.shape != point.shape or any(not torch.equal(units[0][name], units[1][name]) for name in units[0]):
        raise CertificateError("prior= must be a posterior of the same model in the same units (fit both on pairs).")
    return centre
