"""``certify``: from a posterior and data to a certificate, with the bookkeeping of rows that makes it true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

from bayesdl.bounds._numbers import arrays, down, require_count, require_delta
from bayesdl.bounds.certificate import Certificate
from bayesdl.bounds.concentration import chernoff_upper, clopper_pearson_upper
from bayesdl.bounds.divergence import posterior_kl_upper
from bayesdl.bounds.finite import exact_risk
from bayesdl.bounds.loss import Loss, default_loss
from bayesdl.bounds.pac_bayes import mcallester, pac_bayes_kl
from bayesdl.bounds.risk import checked, gibbs_risk, raised
from bayesdl.bounds.row_draws import draws_by_row, row_risk
from bayesdl.bounds.rows import Rows, overlap_error, select_rows
from bayesdl.data import Dataset, as_dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.posterior import FinitePosterior, Posterior

Bound = Literal["auto", "kl", "mcallester", "holdout"]

PASSES = 20  # draws of each row, where rows have draws of their own
DRAWS = 10_000  # the Monte-Carlo step then adds less than 0.02 to any risk
MONTE_CARLO_SHARE = 0.2  # of delta; the rest is the theorem's

_SOURCES = {
    "PAC-Bayes-kl": "Maurer 2004, Theorem 5",
    "McAllester": "McAllester 1999; Maurer 2004",
    "binomial tail": "Clopper and Pearson 1934; Langford 2005, Theorem 3.3",
    "Chernoff": "Hoeffding 1963, eq. 2.1",
}
_COMMON = ("the rows are independent draws from the distribution of the new rows", "the loss lies in [0, 1]")


@dataclass(frozen=True)
class _Request:
    """What one candidate is certified for: the arguments of ``certify`` after checking."""

    data: Any
    delta: float
    loss: Loss | None
    draws: int | None
    seed: int
    bound: Bound
    candidates: int
    progress: bool | None


@overload
def certify(
    posterior: Posterior,
    data: Any,
    *,
    delta: float = ...,
    loss: Loss | None = ...,
    draws: int | None = ...,
    seed: int = ...,
    bound: Bound = ...,
    progress: bool | None = ...,
) -> Certificate: ...
@overload
def certify(
    posterior: Sequence[Posterior],
    data: Any,
    *,
    delta: float = ...,
    loss: Loss | None = ...,
    draws: int | None = ...,
    seed: int = ...,
    bound: Bound = ...,
    progress: bool | None = ...,
) -> list[Certificate]: ...
def certify(
    posterior: Posterior | Sequence[Posterior],
    data: Any,
    *,
    delta: float = 0.05,
    loss: Loss | None = None,
    draws: int | None = None,
    seed: int = 0,
    bound: Bound = "auto",
    progress: bool | None = None,
) -> Certificate | list[Certificate]:
    r"""Bound the expected loss on new rows, with probability at least 1 - delta.

    Two roads, chosen by the identities of the rows and never by their values:

    - *Hold-out.* None of the rows was used in fitting: an exact binomial tail (for a loss other than 0-1 the Chernoff
      bound in kl form) for the mixture ``posterior.predict``. It needs no density, so it serves every posterior.
    - *PAC-Bayes.* The posterior knows its KL divergence from a prior that was fixed on other rows
      (``fit(..., prior_rows=...)``): the PAC-Bayes-kl bound for the Gibbs predictor on the rows of ``data`` without
      the prior's, on which the posterior itself may have been fitted. The Gibbs risk is estimated with ``draws``
      independent draws from the posterior, which enters through its own upper confidence bound: a fifth of delta goes
      to that step, the rest to the theorem.

    Args:
        posterior: A posterior, or a sequence of k candidates: each is certified at delta / k, so all k certificates
            hold together and the best one may be chosen afterwards.
        data: A Dataset, or a pair ``(x, y)``, in raw units.
        delta: Failure probability in (0, 1).
        loss: A loss in [0, 1]; by default 0-1 for classes, a miss of the central 90% interval for regression.
        draws: Posterior draws. By default 10,000 for PAC-Bayes, and those that ``posterior.predict(x)`` uses for a
            hold-out bound.
        seed: Seed of the Monte-Carlo draws.
        bound: "auto" as above; "kl" or "mcallester" for PAC-Bayes and "holdout" for the other road, which raise where
            it is closed.
        progress: Whether to show a progress bar on stderr; None asks the terminal.

    Returns:
        A certificate, or a list of them for a sequence.

    Raises:
        DataDependentPrior: Rows of the bound shaped the prior or the scaler.
        CertificateError: The posterior was fitted on these rows and has no density, a row occurs twice, the loss
            leaves [0, 1], or an argument is out of its domain.

    Source: Maurer (2004), Theorem 5, for the bound; Langford and Caruana (2001) for the Monte-Carlo step.
    Cost: PAC-Bayes needs ``draws`` x rows evaluations of the network.
    """
    candidates = [posterior] if isinstance(posterior, Posterior) else list(posterior)
    if not candidates:
        raise CertificateError("There is no posterior to certify: the sequence of candidates is empty.")
    require_delta(arrays(delta=delta)[0])
    if draws is not None:
        require_count("draws", arrays(draws=draws)[0], 1)
    if bound not in get_args(Bound):
        raise CertificateError(f"bound={bound!r}: it must be one of {', '.join(map(repr, get_args(Bound)))}.")
    k = len(candidates)
    share = float(delta) if k == 1 else down(delta / k)
    request = _Request(data, share, loss, draws, seed, bound, k, progress)
    certificates = [_certify(candidate, request) for candidate in candidates]
    return certificates[0] if isinstance(posterior, Posterior) else certificates


def _certify(posterior: Posterior, request: _Request) -> Certificate:
    """Choose the road and take it."""
    data = _matching(posterior, request.data)
    rows = select_rows(posterior, data)
    if request.bound == "holdout" or (request.bound == "auto" and not rows.fitted):
        return _hold_out(posterior, data, request, rows)
    kl = _divergence(posterior)
    if kl is None or not math.isfinite(kl):
        what = "has no density" if kl is None else "has an infinite KL divergence from its prior"
        if request.bound == "auto":
            raise overlap_error(posterior, rows, CertificateError, f"and it {what}, so PAC-Bayes does not apply")
        raise CertificateError(f"bound={request.bound!r} needs a KL divergence, and this posterior {what}.")
    if posterior.problem.prior_rows is None and rows.fitted:
        raise overlap_error(posterior, rows, DataDependentPrior, "which shaped its scaler or prior as well")
    if rows.copies:
        raise DataDependentPrior(
            f"{rows.copies} rows of {data.name} equal rows of the prior and scaler but come from another source, so "
            "they are copies. Fit and certify on parts of one Dataset, which keeps the identities of its rows."
        )
    return _pac_bayes(posterior, data.subset(rows.bound), request, rows, kl)


def _matching(posterior: Posterior, given: Any) -> Dataset:
    """The data as a Dataset of the task, and with the classes, that the posterior was fitted for."""
    problem = posterior.problem
    # Whole numbers in a pair are classes or counts; the posterior knows which.
    data = as_dataset(given, "regression" if problem.task == "regression" else None)
    if data.task != problem.task and problem.rows is not None:
        raise CertificateError(f"The posterior was fitted for {problem.task}; {data.name} is {data.task}.")
    # The labels of a pair are codes already; only a Dataset can have coded other classes in the same way.
    if isinstance(given, Dataset) and problem.classes and data.classes != problem.classes:
        raise CertificateError(
            f"{data.name} has the classes {', '.join(data.classes)}, the posterior {', '.join(problem.classes)}: the "
            "codes would not mean the same. Make the Dataset with classes= as in fitting."
        )
    return data


def _hold_out(posterior: Posterior, data: Dataset, request: _Request, rows: Rows) -> Certificate:
    """Bound on rows that nothing was fitted on: the predictor is fixed, so a test-set bound is exact."""
    if rows.fitted:
        raise overlap_error(posterior, rows, CertificateError, "and a hold-out bound needs rows that it has not seen")
    loss, x = _loss(posterior, data, request), data.x
    prediction = posterior.predict(x) if request.draws is None else posterior.predict(x, max_draws=request.draws)
    values = checked(loss.mixture(prediction, data.y), (len(data),), loss)
    risk, n = math.fsum(values.tolist()) / len(data), len(data)
    errors = int(values.sum()) if loss.zero_one else None
    if errors is None:
        theorem, bound = "Chernoff", chernoff_upper(risk=min(1.0, raised(risk)), n=n, delta=request.delta)
    else:
        theorem, bound = "binomial tail", clopper_pearson_upper(errors=errors, n=n, delta=request.delta)
    return Certificate(
        bound=float(bound),
        risk=risk,
        n=n,
        delta=request.delta,
        delta_split={"bound": request.delta},
        theorem=theorem,
        source=_SOURCES[theorem],
        loss=loss.name,
        predictor="mixture",
        draws=prediction.draws,
        assumptions=(*_COMMON, "nothing about the model, the method or its settings was chosen by these rows"),
        reason=f"none of the {n} rows was used in fitting, so the predictor is fixed{_candidates(request)}",
        errors=errors,
        method=posterior.info.get("method"),
    )


def _pac_bayes(posterior: Posterior, data: Dataset, request: _Request, rows: Rows, kl: float) -> Certificate:
    """PAC-Bayes on the rows outside the prior's, with a Monte-Carlo estimate of the Gibbs risk."""
    loss, n = _loss(posterior, data, request), len(data)
    monte_carlo = down(MONTE_CARLO_SHARE * request.delta)
    share = down(request.delta - monte_carlo)
    risk_upper: float | None
    if isinstance(posterior, FinitePosterior):
        risk, share, draws = exact_risk(posterior, data, loss), request.delta, len(posterior.z)
    elif draws_by_row(posterior):
        passes = PASSES if request.draws is None else math.ceil(request.draws / n)
        risk = row_risk(posterior, data, loss, passes=passes, seed=request.seed, progress=request.progress)
        draws = passes * n
    else:
        draws = request.draws or DRAWS
        risk = gibbs_risk(posterior, data, loss, draws=draws, seed=request.seed, progress=request.progress)
    # A row's loss under a draw of its own, or the average over rows under one draw of all, lies in [0, 1], and they are
    # independent given the rows, so the Chernoff bound applies: it does not ask for equal means.
    if isinstance(posterior, FinitePosterior):
        split, risk_upper, safe = {"bound": share}, None, min(1.0, raised(risk))
    else:
        safe = risk_upper = float(chernoff_upper(risk=min(1.0, raised(risk)), n=draws, delta=monte_carlo))
        split = {"bound": share, "monte_carlo": monte_carlo}
    inequality = mcallester if request.bound == "mcallester" else pac_bayes_kl
    theorem = "McAllester" if request.bound == "mcallester" else "PAC-Bayes-kl"
    left_out = f"; {rows.reserved} rows of the prior were left out" if rows.reserved else ""
    return Certificate(
        bound=float(inequality(risk=safe, kl=kl, n=n, delta=share)),
        risk=risk,
        n=n,
        delta=request.delta,
        delta_split=split,
        theorem=theorem,
        source=_SOURCES[theorem],
        loss=loss.name,
        predictor="gibbs",
        draws=draws,
        assumptions=(*_COMMON, "prior, scaler, model, method and its settings were fixed without these rows"),
        reason=f"the posterior knows its KL divergence from a prior fixed without the {n} rows{left_out}"
        + _candidates(request),
        risk_upper=risk_upper,
        kl=kl,
        method=posterior.info.get("method"),
    )


def _divergence(posterior: Posterior) -> float | None:
    """The posterior's KL, rounded up by more than double precision can lose; None without a density."""
    kl = posterior_kl_upper(posterior)
    if kl is not None:
        return kl
    kl = posterior.kl()
    if kl is None:
        return None
    if math.isnan(kl) or kl < -1e-9:
        raise CertificateError(f"The posterior's KL divergence from its prior is {kl:g}; it cannot be certified.")
    return raised(max(float(kl), 0.0), 1e-10) + 1e-8


def _loss(posterior: Posterior, data: Dataset, request: _Request) -> Loss:
    """The loss asked for, or the default for what the posterior predicts."""
    return request.loss or default_loss(posterior.predict(data.x[:1], max_draws=1).kind)


def _candidates(request: _Request) -> str:
    if request.candidates == 1:
        return ""
    return f"; one of {request.candidates} candidates on these rows, each at its share of delta, so all hold together"
