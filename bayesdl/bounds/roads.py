"""The two roads to a certificate, hold-out and PAC-Bayes, once it is settled which rows each may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bayesdl.bounds._numbers import down
from bayesdl.bounds.certificate import Certificate
from bayesdl.bounds.concentration import chernoff_upper, clopper_pearson_upper
from bayesdl.bounds.divergence import posterior_kl_upper
from bayesdl.bounds.finite import exact_risk
from bayesdl.bounds.ledger import Ledger
from bayesdl.bounds.loss import IntervalMiss, Loss, ZeroOne, default_loss
from bayesdl.bounds.risk import checked, gibbs_risk, raised
from bayesdl.bounds.row_draws import draws_by_row, row_risk
from bayesdl.bounds.rows import Rows
from bayesdl.bounds.theorems import BINOMIAL, CHERNOFF, Predictor, Theorem
from bayesdl.data import Dataset, RowIds
from bayesdl.errors import CertificateError
from bayesdl.posterior import FinitePosterior, Posterior

PASSES = 20  # draws of each row at least, where rows have draws of their own
LOSSES = 200_000  # rows times draws at least there: a risk of 0.05 is then raised by 0.0015
DRAWS = 10_000  # the Monte-Carlo step then adds less than 0.02 to any risk
MONTE_CARLO_SHARE = 0.2  # of delta; the rest is the theorem's

_COMMON = ("the rows are independent draws from the distribution of the new rows", "the loss lies in [0, 1]")


@dataclass(frozen=True)
class Request:
    """What one candidate is certified for: the arguments of ``certify`` after checking."""

    data: Any
    delta: float
    loss: Loss | None
    draws: int | None
    seed: int
    bound: str
    candidates: int
    progress: bool | None

    @property
    def note(self) -> str:
        """What the reason says about other candidates."""
        if self.candidates == 1:
            return ""
        return f"; one of {self.candidates} candidates on these rows, each at its share of delta, so all hold together"


@dataclass(frozen=True)
class Divergence:
    """KL(posterior || prior), rounded up by more than double precision can lose, and its parts."""

    total: float
    parts: dict[str, float]


def divergence(posterior: Posterior) -> Divergence | None:
    """The posterior's divergence from its prior; None where it does not know any, or only that it is infinite.

    Raises:
        CertificateError: It is NaN or negative.
    """
    parts = posterior.kl_parts()
    kl = posterior.kl() if parts is None else math.fsum(parts.values())
    if kl is None or kl == math.inf:
        return None
    if math.isnan(kl) or kl < -1e-9:
        raise CertificateError(f"The posterior's KL divergence from its prior is {kl:g}; it cannot be certified.")
    derived = posterior_kl_upper(posterior)
    if derived == math.inf:
        return None
    total = raised(max(float(kl), 0.0), 1e-10) + 1e-8 if derived is None else derived
    parts = {"all latents": kl} if parts is None else parts
    return Divergence(total, parts | {"rounding": total - math.fsum(parts.values())})


@dataclass(frozen=True)
class HeldOut:
    """A mixture and rows that it has not seen.

    Args:
        posterior: Its mixture is bounded.
        predictor: What the certificate calls the mixture.
        index: Positions in the data of the rows that the mixture has not seen.
        seen: The rows that it was learnt on.
    """

    posterior: Posterior
    predictor: Predictor
    index: Tensor
    seen: RowIds


def held_out_roads(posterior: Posterior, rows: Rows) -> list[HeldOut]:
    """The hold-out bounds that the rows allow: which they are depends on the identities of the rows alone.

    That of the posterior's mixture on rows that nothing was fitted on, and that of the learnt prior's mixture on the
    rows of the bound, none of which it has seen.
    """
    problem, found = posterior.problem, []
    if len(rows.unseen):
        seen = RowIds.concat([part for part in (problem.rows, problem.prior_rows) if part is not None])
        found.append(HeldOut(posterior, "mixture", rows.unseen, seen))
    prior = posterior.learnt_prior()
    if prior is not None and problem.prior_rows is not None and len(problem.prior_rows):
        found.append(HeldOut(prior, "prior", rows.bound, problem.prior_rows))
    return found


def hold_out(road: HeldOut, data: Dataset, request: Request) -> Certificate:
    """Bound on rows that nothing was fitted on: the predictor is fixed, so a test-set bound is exact."""
    posterior, index = road.posterior, road.index
    rows = data.subset(index)
    loss, x, n = loss_of(posterior, rows, request), rows.x, len(rows)
    prediction = posterior.predict(x) if request.draws is None else posterior.predict(x, max_draws=request.draws)
    values = checked(loss.mixture(prediction, rows.y), (n,), loss)
    risk = math.fsum(values.tolist()) / n
    errors = int(values.sum()) if loss.zero_one else None
    return Certificate(
        **tested(risk, errors, n, request.delta),
        risk=risk,
        n=n,
        loss=loss.name,
        predictor=road.predictor,
        draws=prediction.draws,
        assumptions=(*_COMMON, "nothing about the model, the method or its settings was chosen by these rows"),
        reason=f"none of the {n} rows was used in fitting, so the predictor is fixed{request.note}",
        errors=errors,
        method=posterior.info.get("method"),
        interval=loss.level if isinstance(loss, IntervalMiss) else None,
        ledger=Ledger.of(data, index, road.seen),
    )


def tested(risk: float, errors: int | None, n: int, delta: float) -> dict[str, Any]:
    """What a hold-out certificate concludes from its counts at a delta."""
    if errors is None:
        theorem, bound = CHERNOFF, chernoff_upper(risk=min(1.0, raised(risk)), n=n, delta=delta)
    else:
        theorem, bound = BINOMIAL, clopper_pearson_upper(errors=errors, n=n, delta=delta)
    return {
        "bound": float(bound),
        "delta": delta,
        "delta_split": {"bound": delta},
        "theorem": theorem.name,
        "source": theorem.source,
    }


def pac_bayes(
    posterior: Posterior, data: Dataset, theorem: Theorem, request: Request, rows: Rows, kl: Divergence
) -> Certificate:
    """PAC-Bayes on the rows outside the prior's, with a Monte-Carlo estimate of the Gibbs risk or tandem loss."""
    of_bound = data.subset(rows.bound)
    loss, n, by_row = loss_of(posterior, of_bound, request), len(of_bound), draws_by_row(posterior)
    draws = request.draws or (max(PASSES * n, LOSSES) * theorem.together if by_row else DRAWS)
    if theorem.predictor == "majority vote" and not isinstance(loss, ZeroOne):
        raise CertificateError(f"The majority vote is among classes; bound={request.bound!r} needs the loss ZeroOne().")
    samples = draws // theorem.together
    if not samples:
        raise CertificateError(f"draws={draws}: the tandem loss needs pairs of draws, so at least {theorem.together}.")
    options: dict[str, Any] = {"together": theorem.together, "seed": request.seed, "progress": request.progress}
    exact = isinstance(posterior, FinitePosterior)
    if isinstance(posterior, FinitePosterior):
        if theorem.together > 1:
            raise CertificateError(f"bound={request.bound!r} draws pairs, and the members of an ensemble are few.")
        risk, samples = exact_risk(posterior, of_bound, loss), len(posterior.z)
    elif draws_by_row(posterior):
        passes = math.ceil(samples / n)
        risk, samples = row_risk(posterior, of_bound, loss, passes=passes, **options), passes * n
    else:
        risk = gibbs_risk(posterior, of_bound, loss, draws=samples, **options)
    left_out = f"; {rows.reserved} rows of the prior were left out" if rows.reserved else ""
    return Certificate(
        **concluded(theorem, risk, None if exact else samples, kl.total, n, request.delta),
        risk=risk,
        n=n,
        loss=loss.name,
        draws=samples * theorem.together,
        assumptions=(*_COMMON, "prior, scaler, model, method and its settings were fixed without these rows"),
        reason=f"the posterior knows its KL divergence from a prior fixed without the {n} rows{left_out}{request.note}",
        kl=kl.total,
        errors=round(risk * samples * (1 if by_row else n)) if loss.zero_one and not exact else None,
        by_row=by_row,
        method=posterior.info.get("method"),
        interval=loss.level if isinstance(loss, IntervalMiss) else None,
        kl_parts=kl.parts,
        ledger=Ledger.of(data, rows.bound, posterior.problem.prior_rows or RowIds.concat([])),
    )


def concluded(theorem: Theorem, risk: float, samples: int | None, kl: float, n: int, delta: float) -> dict[str, Any]:
    """What a PAC-Bayes certificate concludes from its numbers at a delta; without samples the risk is exact.

    One draw's average loss over the rows lies in [0, 1], or a row's loss under a draw of its own, and they are
    independent given the rows: so the Chernoff bound, which does not ask for equal means, takes the risk over the draws
    to that of the posterior.
    """
    assert theorem.inequality is not None
    share, split, upper = delta, {}, None
    if samples is not None:
        split = {"monte_carlo": down(MONTE_CARLO_SHARE * delta)}
        share = down(delta - split["monte_carlo"])
        upper = float(chernoff_upper(risk=min(1.0, raised(risk)), n=samples, delta=split["monte_carlo"]))
    safe = min(1.0, raised(risk)) if upper is None else upper
    return {
        "bound": float(theorem.inequality(risk=safe, kl=kl, n=n, delta=share)),
        "delta": delta,
        "delta_split": {"bound": share, **split},
        "theorem": theorem.name,
        "source": theorem.source,
        "predictor": theorem.predictor,
        "risk_upper": upper,
    }


def best(found: Certificate, beside: tuple[Certificate, ...], delta: float) -> Certificate:
    """The smallest of several certificates that share delta, said at the whole of it, with the others beside.

    Args:
        found: A certificate at its share.
        beside: The others at theirs.
        delta: The whole; all of them hold together with probability 1 - delta.
    """
    every = (found, *beside)
    winner = min(every, key=lambda certificate: certificate.bound)
    others = tuple(certificate for certificate in every if certificate is not winner)
    shares = {f"{other.theorem} for {other.predictor}": other.delta for other in others}
    return replace(
        winner,
        delta=delta,
        delta_split={**winner.delta_split, **shares},
        reason=f"{winner.reason}; the best of {len(every)} bounds, which share delta and so hold together",
        beside=others,
    )


def loss_of(posterior: Posterior, data: Dataset, request: Request) -> Loss:
    """The loss asked for, or the default for what the posterior predicts."""
    return request.loss or default_loss(posterior.predict(data.x[:1], max_draws=1).kind)
