"""All bounds that apply to a posterior side by side, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdl.bounds._numbers import down
from bayesdl.bounds.certificate import PREDICTORS, Certificate, ceiling, confidence
from bayesdl.bounds.certify import certify
from bayesdl.bounds.loss import Loss, ZeroOne
from bayesdl.bounds.roads import concluded, divergence, tested
from bayesdl.bounds.theorems import PAC_BAYES, Theorem
from bayesdl.errors import CertificateError
from bayesdl.evaluate.plots import new_figure
from bayesdl.posterior import Posterior
from bayesdl.posterior.tables import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 60  # points of each curve
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#000000")


@dataclass(frozen=True)
class BoundComparison:
    """Certificates of one posterior by every theorem that applies.

    The theorems of one event hold together at delta. Theorems of different events hold each with probability 1 - delta
    but not all at once: whoever takes the smallest of k events pays for it with delta / k, as in the second column.

    Args:
        each: By the name of the bound: its certificate at the whole of delta.
        shared: The same at delta / k, of which the smallest may be chosen.
        delta: The whole.
    """

    each: Mapping[str, Certificate]
    shared: Mapping[str, Certificate]
    delta: float

    @property
    def events(self) -> tuple[str, ...]:
        """The k events that the bounds rest on."""
        return tuple(dict.fromkeys(_event(name, certificate) for name, certificate in self.each.items()))

    @property
    def best(self) -> Certificate:
        """The smallest bound; it holds at delta, because the k events share delta."""
        return min(self.shared.values(), key=lambda certificate: certificate.bound)

    def __str__(self) -> str:
        """A table, and what it takes to choose from it."""
        rows = []
        for name, certificate in self.each.items():
            kl = "" if certificate.kl is None else f"{certificate.kl:.2f}"
            bounds = [ceiling(each[name].bound) for each in (self.each, self.shared)]
            risk = f"{certificate.risk:.4f}"
            rows.append([name, certificate.predictor, _event(name, certificate), str(certificate.n), kl, risk, *bounds])
        k = len(self.events)
        columns = ["bound", "predictor", "event", "n", "KL", "risk", "at delta", f"at delta/{k}"]
        best = self.best
        return (
            render(f"Bounds at delta = {self.delta:g}", columns, rows, width=130)
            + f"Bounds of one event hold together. The smallest of all, taken after the fact, costs delta / {k}: "
            f"{ceiling(best.bound)} with probability {confidence(self.delta)} ({best.theorem}, for "
            f"{PREDICTORS[best.predictor]})."
        )

    def plot(self) -> Figure:
        """The PAC-Bayes bounds against n, KL and empirical risk, all else as it is in the table.

        Raises:
            MissingExtra: Matplotlib is not installed.
            CertificateError: There is no PAC-Bayes bound to draw.
        """
        drawn = {name: certificate for name, certificate in self.each.items() if name in PAC_BAYES}
        if not drawn:
            raise CertificateError("Only hold-out bounds apply to this posterior; there is no KL to draw them against.")
        figure = new_figure((12, 4.2))
        for axes, (quantity, label) in zip(
            figure.subplots(1, 3, sharey=True),
            (("n", "rows of the bound n"), ("kl", "KL (nats)"), ("risk", "empirical risk")),
            strict=True,
        ):
            for colour, (name, certificate) in zip(COLOURS, drawn.items(), strict=False):
                here = _numbers(certificate)
                reach = _reach(quantity, here[quantity])
                axes.plot(
                    reach, _curve(PAC_BAYES[name], here | {quantity: reach}), color=colour, linewidth=1.6, label=name
                )
                axes.plot([here[quantity]], [certificate.bound], "o", color=colour, markersize=5)
            axes.set(xlabel=label, ylim=(0, 1.02))
            axes.spines[["top", "right"]].set_visible(False)
            if quantity != "risk":
                axes.set_xscale("log")
        figure.axes[0].set_ylabel(f"bound at delta = {self.delta:g}")
        figure.axes[-1].legend(frameon=False, fontsize=9)
        return figure


def compare_bounds(
    posterior: Posterior,
    data: Any,
    *,
    delta: float = 0.05,
    loss: Loss | None = None,
    draws: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> BoundComparison:
    """Certify a posterior by every theorem that applies to it.

    Args:
        posterior: A posterior; one that knows no divergence has the hold-out bound alone.
        data: A Dataset, or a pair ``(x, y)``, in raw units.
        delta: Failure probability of each column of the table.
        loss: As in ``certify``; the bounds of the majority vote appear for the 0-1 loss only.
        draws: As in ``certify``.
        seed: As in ``certify``.
        progress: As in ``certify``.

    Returns:
        Table and picture.

    Raises:
        CertificateError: As in ``certify``.

    Cost: that of one ``certify``, and of one more for the tandem loss of pairs.
    """
    options: dict[str, Any] = {"delta": delta, "loss": loss, "draws": draws, "seed": seed, "progress": progress}
    if divergence(posterior) is None:
        alone = {"holdout, mixture": certify(posterior, data, bound="holdout", **options)}
        return BoundComparison(alone, alone, delta)
    first = certify(posterior, data, bound="kl", **options)
    measured = {1: first}
    if first.loss == ZeroOne().name and first.risk_upper is not None and (draws is None or draws > 1):
        measured[2] = certify(posterior, data, bound="tandem", **options)

    def table(share: float) -> dict[str, Certificate]:
        found: dict[str, Certificate] = {}
        for name, theorem in PAC_BAYES.items():
            if theorem.predictor == "gibbs" or 2 in measured:
                base = measured[theorem.together]
                samples = None if base.risk_upper is None else base.draws // theorem.together
                numbers = concluded(theorem, base.risk, samples, base.kl or 0.0, base.n, share)
                found[name] = replace(base, **numbers, beside=())
        for other in first.beside:
            found[f"holdout, {other.predictor}"] = replace(other, **tested(other.risk, other.errors, other.n, share))
        return found

    each = table(delta)
    events = {_event(name, certificate) for name, certificate in each.items()}
    return BoundComparison(each, table(down(delta / len(events))), delta)


def _event(name: str, certificate: Certificate) -> str:
    return PAC_BAYES[name].event if name in PAC_BAYES else name


def _numbers(certificate: Certificate) -> dict[str, Any]:
    risk = certificate.risk if certificate.risk_upper is None else certificate.risk_upper
    return {"risk": risk, "kl": certificate.kl, "n": certificate.n, "delta": certificate.delta_split["bound"]}


def _curve(theorem: Theorem, numbers: Mapping[str, Any]) -> Any:
    assert theorem.inequality is not None
    return theorem.inequality(**numbers)


def _reach(quantity: str, here: float) -> Any:
    if quantity == "risk":
        return np.linspace(0, 1, STEPS)
    if quantity == "n":
        return np.unique(np.round(np.geomspace(max(2, here / 30), 30 * here, STEPS)))
    return np.geomspace(max(here, 1e-3) / 30, 30 * max(here, 1e-3), STEPS)
