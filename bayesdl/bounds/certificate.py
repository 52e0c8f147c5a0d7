"""What a certificate says: the bound, the predictor it holds for, and everything that entered it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any, Literal

from bayesdl.bounds.ledger import Ledger
from bayesdl.bounds.theorems import THEOREMS, Predictor

PREDICTORS: Mapping[Predictor, str] = {
    "gibbs": "the Gibbs predictor (a draw from the posterior, made anew for every prediction)",
    "mean": "the network at the posterior's mean",
    "mixture": "posterior.predict (the mixture over draws)",
    "prior": "the prior's mixture over draws (what was learnt on the rows of the prior alone)",
    "majority vote": "the majority vote of the posterior (the label of most of its mass)",
}
ADVICE: Mapping[str, str] = {
    "risk": "the predictor is wrong too often on the rows of the bound; no theorem mends that",
    "KL": "the posterior is far from its prior for so few rows; learn the prior on others (prior_rows=)",
    "confidence": "there are too few rows for such a small delta",
}


def ceiling(value: float, places: int = 4) -> str:
    """The number with so many decimals, rounded up: a printed bound is never below the bound itself."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING))


def confidence(delta: float) -> str:
    """One minus delta in decimal digits, never more than it is, so that a tiny delta does not print as certainty.

    Delta is rounded up to 6 digits: a share such as 0.05 / 5 lies a little below 0.01, and prints as 0.99.
    """
    raised = Context(prec=6, rounding=ROUND_CEILING).create_decimal(repr(float(delta)))
    # Digits enough for the smallest float; normalize() would round to the 28 of the default context.
    return format(Context(prec=400).subtract(Decimal(1), raised), "f").rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Certificate:
    """An upper bound on the expected loss of one predictor on a new row, with all that it rests on.

    A bound on the Gibbs predictor does not hold for the mixture ``posterior.predict``: averaging probabilities can
    turn correct draws into a wrong mixture.

    Args:
        bound: With probability at least ``1 - delta`` the expected loss is at most this number.
        risk: Average loss on the rows of the bound (for the Gibbs predictor also over the Monte-Carlo draws).
        n: Number of rows of the bound.
        delta: Failure probability of the whole statement.
        delta_split: How delta is divided between the steps that can fail; the shares add up to at most ``delta``.
        theorem: Name of the inequality, a key of ``THEOREMS``.
        source: Where the theorem is proven.
        loss: Name of the loss, which lies in [0, 1].
        predictor: Whom the bound holds for, a key of ``PREDICTORS``.
        draws: Number of posterior draws that were evaluated.
        by_row: Whether every row had draws of its own, so that ``draws`` losses were averaged; else each draw met all
            rows.
        assumptions: What must be true of the data for the theorem to apply.
        reason: Why this theorem and these rows were used.
        risk_upper: Upper confidence bound on ``risk`` over Monte-Carlo draws; None when no draw entered by chance.
        kl: KL divergence from prior to posterior in nats; None when the theorem has none.
        errors: For 0-1 losses the number of errors: of rows, or of draws (pairs of draws) and rows.
        method: Name of the method that fitted the posterior.
        interval: Level of the central interval whose misses are the loss, None for other losses.
        kl_parts: KL of each site (or latent function), of what lies between sites, and of rounding; they add up to KL.
        beside: Hold-out bounds of the same run, each at its own delta.
        ledger: Which rows were counted, and which must not be.
    """

    bound: float
    risk: float
    n: int
    delta: float
    delta_split: Mapping[str, float]
    theorem: str
    source: str
    loss: str
    predictor: Predictor
    draws: int
    assumptions: tuple[str, ...]
    reason: str
    risk_upper: float | None = None
    kl: float | None = None
    errors: int | None = None
    by_row: bool = False
    method: str | None = None
    interval: float | None = None
    kl_parts: Mapping[str, float] | None = None
    beside: tuple[Certificate, ...] = ()
    ledger: Ledger | None = field(default=None, repr=False)

    @property
    def vacuous(self) -> bool:
        """Whether the bound, as it is printed, says nothing: the loss is at most 1 anyway."""
        return Decimal(ceiling(self.bound)) >= 1

    @property
    def terms(self) -> dict[str, float]:
        """What the risk, the KL and the confidence add to the bound in McAllester's form, in which they are comparable.

        ``risk + sqrt(KL / 2n) + sqrt(log(2 sqrt(n) / delta) / 2n)``; without a KL the last logarithm is that of
        ``1 / delta``. Other theorems add less, in the same order.
        """
        held_out = self.kl is None
        logarithm = -math.log(self.delta_split["bound"]) + (0.0 if held_out else math.log(2 * math.sqrt(self.n)))
        terms = {"risk": self.risk if self.risk_upper is None else self.risk_upper}
        if self.kl is not None:
            terms["KL"] = math.sqrt(self.kl / (2 * self.n))
        return terms | {"confidence": math.sqrt(logarithm / (2 * self.n))}

    @property
    def coverage(self) -> str | None:
        """The bound of an interval's misses, said as coverage; None for other losses."""
        if self.interval is None:
            return None
        share = Decimal(1) - Decimal(ceiling(self.bound, 3))
        return (
            f"with confidence {_percent(Decimal(confidence(self.delta)))} at least {_percent(share)} of new cases lie "
            f"in the {_percent(Decimal(repr(self.interval)))} band of {PREDICTORS[self.predictor]}"
        )

    def statement(self, form: Literal["text", "tex"] = "text") -> str:
        """The theorem with its numbers.

        Args:
            form: "text", or "tex" for a sentence with LaTeX formulas.

        Raises:
            ValueError: For another form.
        """
        if form not in ("text", "tex"):
            raise ValueError(f"form must be 'text' or 'tex', got {form!r}")
        return self._text() if form == "text" else self._tex()

    def _text(self) -> str:
        chance = " and of the posterior draws" if self.risk_upper is not None else ""
        return (
            f"With probability at least {confidence(self.delta)} over the choice of the {self.n} rows of the "
            f"bound{chance}, the expected loss ({self.loss}) of {PREDICTORS[self.predictor]} on a new row is at most "
            f"{ceiling(self.bound)}. Theorem: {THEOREMS[self.theorem].text} [{self.source}], with {self._numbers()}."
            + ("" if self.coverage is None else f" That is: {self.coverage}.")
        )

    def _tex(self) -> str:
        numbers = [rf"n = {self.n}", rf"\delta = {self.delta_split['bound']:g}"]
        if self.errors is not None and self.risk_upper is None:
            numbers.append(rf"k = {self.errors}")
        else:
            numbers.append(rf"\hat R \le {ceiling(self.risk if self.risk_upper is None else self.risk_upper)}")
        if self.kl is not None:
            numbers.append(rf"\mathrm{{KL}} \le {ceiling(self.kl, 2)}")
        return (
            rf"With probability at least ${confidence(self.delta)}$, \[ {THEOREMS[self.theorem].tex}, \] "
            rf"hence for ${', '.join(numbers)}$: \[ R \le {ceiling(self.bound)}. \]"
        )

    def _numbers(self) -> str:
        parts = [f"n = {self.n}", f"delta = {self.delta_split['bound']:g}"]
        counted = self.errors is not None and self.risk_upper is None
        parts.append(f"errors = {self.errors}" if counted else f"risk = {self.risk:.4f}")
        if self.risk_upper is not None:
            share, own = self.delta_split["monte_carlo"], ", of each row its own" * self.by_row
            parts.append(f"raised to {ceiling(self.risk_upper)} for {self.draws} draws{own} (delta = {share:g})")
        if self.kl is not None:
            parts.append(f"KL = {ceiling(self.kl, 2)}")
        return ", ".join(parts)

    def __str__(self) -> str:
        rows = {
            "bound": f"{ceiling(self.bound)} with probability {confidence(self.delta)}" + " (vacuous)" * self.vacuous,
            "predictor": PREDICTORS[self.predictor],
            "loss": self.loss,
            "theorem": f"{self.theorem}: {THEOREMS[self.theorem].text} [{self.source}]",
            "numbers": self._numbers(),
            "delta": " + ".join(f"{share:g} ({step})" for step, share in self.delta_split.items()),
            "why": self.reason,
            "assumes": "; ".join(self.assumptions),
        }
        if self.coverage is not None:
            rows["so"] = self.coverage
        if self.vacuous:
            rows["vacuous"] = self._why_vacuous()
        title = "Certificate" + (f" for {self.method}" if self.method else "")
        lines = [title, *(f"  {name:<10} {text}" for name, text in rows.items())]
        return "\n".join([*lines, *(f"  {'beside':<10} {other.brief()}" for other in self.beside)])

    def brief(self) -> str:
        """The bound, for whom it holds and by which theorem, in one line."""
        return (
            f"{ceiling(self.bound)} with probability {confidence(self.delta)} for {PREDICTORS[self.predictor]}, by "
            f"{self.theorem} on {self.n} rows"
        )

    def _why_vacuous(self) -> str:
        terms = self.terms
        worst = max(terms, key=lambda name: terms[name])
        shares = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        return f"the {worst} dominates ({shares} in McAllester's form): {ADVICE[worst]}"

    def to_dict(self) -> dict[str, Any]:
        """All fields but the row ledger as JSON values, with the statement."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "ledger"}
        fields |= {"delta_split": dict(self.delta_split), "assumptions": list(self.assumptions)}
        fields |= {"kl_parts": None if self.kl_parts is None else dict(self.kl_parts)}
        fields |= {"beside": [other.to_dict() for other in self.beside]}
        return fields | {"statement": self.statement()}

    def save(self, path: str | Path) -> Path:
        """Write the certificate, its row ledger and the versions of the software as JSON, for ``bayesdl verify``."""
        from bayesdl.bounds.certificate_file import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what ``save`` wrote, without recomputing anything: that is what ``bayesdl verify`` is for.

        Raises:
            FileError: The file is missing or is no certificate.
        """
        from bayesdl.bounds.certificate_file import load

        return load(Path(path))


def _percent(share: Decimal) -> str:
    """A share as a percentage in as few digits as it has."""
    return format((100 * share).normalize(), "f") + "%"
