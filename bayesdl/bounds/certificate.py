"""What a certificate says: the bound, the predictor it holds for, and everything that entered it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any, Literal

Predictor = Literal["gibbs", "mean", "mixture", "majority vote"]

PREDICTORS: Mapping[Predictor, str] = {
    "gibbs": "the Gibbs predictor (a draw from the posterior, made anew for every prediction)",
    "mean": "the network at the posterior's mean",
    "mixture": "posterior.predict (the mixture over draws)",
    "majority vote": "the majority vote over draws",
}

# Each theorem in text and in TeX; the braces take the certificate's fields and the shares of delta.
THEOREMS: Mapping[str, tuple[str, str]] = {
    "PAC-Bayes-kl": (
        "kl(risk || R) <= (KL + log(2 sqrt(n) / delta)) / n",
        r"\mathrm{kl}(\hat R \,\|\, R) \le \frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{n}",
    ),
    "McAllester": (
        "R <= risk + sqrt((KL + log(2 sqrt(n) / delta)) / (2 n))",
        r"R \le \hat R + \sqrt{\frac{\mathrm{KL} + \log(2 \sqrt{n} / \delta)}{2 n}}",
    ),
    "binomial tail": (
        "R <= sup { p : P(Bin(n, p) <= errors) >= delta }",
        r"R \le \sup \{ p : P(\mathrm{Bin}(n, p) \le k) \ge \delta \}",
    ),
    "Chernoff": (
        "kl(risk || R) <= log(1 / delta) / n, R >= risk",
        r"\mathrm{kl}(\hat R \,\|\, R) \le \frac{\log(1 / \delta)}{n},\ R \ge \hat R",
    ),
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
        predictor: Whom the bound holds for: "gibbs", "mean", "mixture" or "majority vote".
        draws: Number of posterior draws that were evaluated.
        assumptions: What must be true of the data for the theorem to apply.
        reason: Why this theorem and these rows were used.
        risk_upper: Upper confidence bound on ``risk`` over Monte-Carlo draws; None when no draw entered by chance.
        kl: KL divergence from prior to posterior in nats; None when the theorem has none.
        errors: Number of wrong rows, when the binomial tail was used.
        method: Name of the method that fitted the posterior.
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
    method: str | None = None

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing: the loss is at most 1 anyway."""
        return self.bound >= 1.0

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
            f"{ceiling(self.bound)}. Theorem: {THEOREMS[self.theorem][0]} [{self.source}], with {self._numbers()}."
        )

    def _tex(self) -> str:
        numbers = [rf"n = {self.n}", rf"\delta = {self.delta_split['bound']:g}"]
        if self.errors is not None:
            numbers.append(rf"k = {self.errors}")
        else:
            numbers.append(rf"\hat R \le {ceiling(self.risk if self.risk_upper is None else self.risk_upper)}")
        if self.kl is not None:
            numbers.append(rf"\mathrm{{KL}} \le {ceiling(self.kl, 2)}")
        return (
            rf"With probability at least ${confidence(self.delta)}$, \[ {THEOREMS[self.theorem][1]}, \] "
            rf"hence for ${', '.join(numbers)}$: \[ R \le {ceiling(self.bound)}. \]"
        )

    def _numbers(self) -> str:
        parts = [f"n = {self.n}", f"delta = {self.delta_split['bound']:g}"]
        parts.append(f"risk = {self.risk:.4f}" if self.errors is None else f"errors = {self.errors}")
        if self.risk_upper is not None:
            share = self.delta_split["monte_carlo"]
            parts.append(f"raised to {ceiling(self.risk_upper)} for {self.draws} draws (delta = {share:g})")
        if self.kl is not None:
            parts.append(f"KL = {ceiling(self.kl, 2)}")
        return ", ".join(parts)

    def __str__(self) -> str:
        rows = {
            "bound": f"{ceiling(self.bound)} with probability {confidence(self.delta)}" + " (vacuous)" * self.vacuous,
            "predictor": PREDICTORS[self.predictor],
            "loss": self.loss,
            "theorem": f"{self.theorem}: {THEOREMS[self.theorem][0]} [{self.source}]",
            "numbers": self._numbers(),
            "delta": " + ".join(f"{share:g} ({step})" for step, share in self.delta_split.items()),
            "why": self.reason,
            "assumes": "; ".join(self.assumptions),
        }
        title = "Certificate" + (f" for {self.method}" if self.method else "")
        return "\n".join([title, *(f"  {name:<10} {text}" for name, text in rows.items())])

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the statement."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        fields |= {"delta_split": dict(self.delta_split), "assumptions": list(self.assumptions)}
        return fields | {"statement": self.statement()}
