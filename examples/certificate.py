"""How many rows should learn the prior? A PAC-Bayes certificate against the hold-out bound on the same rows.

    python examples/certificate.py --out results/certificate

A variational classifier on ``breast_cancer``, 455 training rows. A share of them learns the prior (and the scaler), the
rest counts in the bound. With few prior rows the posterior has far to move and pays for it in KL; with many, few rows
are left to count. ``certify`` keeps the books by the rows' identities.

Beside it stands the plain alternative for the same rows: what was learnt on the share alone, the prior itself, and its
errors on the rest, an exact binomial bound without any KL. It certifies another predictor, one that never learns from
the rest. ``certify`` gives both.

What to look for: both bounds have their minimum in the middle. Five candidates were looked at, so the smallest bound is
one of five chances to be lucky: ``certify([...])`` gives each of them delta / 5, all five hold together, and the best
may be chosen afterwards. The last lines show what that choice costs and what forgetting it would have claimed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.bounds.certificate import ceiling
from bayesdl.posterior.tables import render

DELTA = 0.05
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def gibbs_error(posterior: bdl.Posterior, data: bdl.Dataset) -> float:
    """Share of wrong labels when every prediction is made by a draw of its own."""
    labels = posterior.predict(data.x).mean_by_draw.argmax(-1)  # [S, N]
    return float((labels != data.y).double().mean())


def plot_bounds(ax: Axes, rows: Mapping[float, Mapping[str, float]]) -> None:
    """Risks and bounds against the share of rows in the prior."""
    shares = list(rows)

    def line(key: str, style: str, colour: str, label: str) -> None:
        ax.plot(shares, [rows[share][key] for share in shares], style, color=colour, label=label, linewidth=1.8)

    line("bound", "o-", BLUE, "PAC-Bayes bound, Gibbs predictor")
    line("risk", "o--", BLUE, "  its risk on the rows of the bound")
    line("test risk", "o:", BLUE, "  its risk on the test rows")
    line("hold-out bound", "s-", ORANGE, "hold-out bound, trained on the share alone")
    line("hold-out risk", "s--", ORANGE, "  its risk on the held-out rows")
    best = min(shares, key=lambda share: rows[share]["bound"])
    ax.annotate(
        ceiling(rows[best]["bound"], 3), (best, rows[best]["bound"]), (0, 8), textcoords="offset points",
        ha="center", color=BLUE, fontsize=9,
    )  # fmt: skip
    ax.set(xlabel="share of rows that learn the prior", ylabel="error rate", xticks=shares)
    ax.set(ylim=(0, 1.35 * max(row["bound"] for row in rows.values())))
    ax.set_title(f"All bounds of one colour hold together with probability {1 - DELTA:g}")
    ax.legend(frameon=False, fontsize=9, loc="upper left")


def plot_price(ax: Axes, rows: Mapping[float, Mapping[str, float]]) -> None:
    """The two terms of the bound: what the posterior moved, and what confidence costs, per row."""
    shares = list(rows)
    moved, sure = ([rows[share][key] for share in shares] for key in ("KL / n", "log / n"))
    width = 0.6 * min(b - a for a, b in itertools.pairwise(shares))
    ax.bar(shares, moved, width, color=GREEN, alpha=0.8, label="KL / n: how far it moved from its prior")
    ax.bar(shares, sure, width, bottom=moved, color=GREY, alpha=0.5, label="log(2 sqrt(n) / delta) / n: confidence")
    for share, a, b in zip(shares, moved, sure, strict=True):
        label = f"n = {rows[share]['n']}"
        ax.annotate(label, (share, a + b), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    ax.set(xlabel="share of rows that learn the prior", ylabel="kl(risk || bound), nats per row")
    ax.set(xticks=shares, title="What the bound pays")
    ax.legend(frameon=False, fontsize=9)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit and certify every candidate, print and draw.

    Returns:
        By share: bounds and risks; the best certificate at its share of delta, and what it would claim at all of it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/certificate"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer steps and shares, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = bdl.data.load("breast_cancer")
    model = bdl.models.mlp(data, hidden=(10,))
    method = bdl.MeanFieldVI(steps=250 if options.quick else 2000)
    shares = (0.25, 0.75) if options.quick else (0.2, 0.35, 0.5, 0.65, 0.8)
    progress = False if options.quick else None
    draws = 2000 if options.quick else None

    candidates = {
        share: bdl.fit(model, data.train, method, prior_rows=share, seed=0, progress=progress) for share in shares
    }
    certificates = bdl.certify(list(candidates.values()), data.train, delta=DELTA, draws=draws, progress=progress)
    result: dict[float, dict[str, float]] = {}
    for (share, posterior), certificate in zip(candidates.items(), certificates, strict=True):
        (held_out,) = certificate.beside  # of the prior itself, at the same share of delta
        n, sure = certificate.n, certificate.delta_split["bound"]
        result[share] = {
            "n": n,
            "risk": certificate.risk,
            "test risk": gibbs_error(posterior, data.test),
            "kl": certificate.kl,
            "KL / n": certificate.kl / n,
            "log / n": float(torch.tensor(2 * n**0.5 / sure).log()) / n,
            "bound": certificate.bound,
            "hold-out risk": held_out.risk,
            "hold-out bound": held_out.bound,
        }
    keys = ["risk", "test risk", "bound", "hold-out risk", "hold-out bound"]
    table = []
    for share, r in result.items():
        cells = [ceiling(r[key], 3) if "bound" in key else f"{r[key]:.3f}" for key in keys]  # never below the bound
        table.append([f"{share:g}", str(r["n"]), f"{r['kl']:.1f}", *cells])
    title = f"breast_cancer: delta = {DELTA} for all bounds of one kind together"
    print(render(title, ["share in the prior", "n", "KL", *keys], table))

    best = min(shares, key=lambda share: result[share]["bound"])
    forgotten = bdl.certify(candidates[best], data.train, delta=DELTA, draws=draws, progress=progress)
    chosen = certificates[shares.index(best)]
    print(chosen, "\n")
    k = len(shares)
    print(
        f"Chosen by its bound among {k}: {ceiling(chosen.bound)} holds, because each of the {k} had delta / {k}.\n"
        f"Alone it would have been given {ceiling(forgotten.bound)}, which holds if its share was fixed beforehand."
    )
    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    plot_bounds(left, result)
    plot_price(right, result)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    path = options.out / "certificate.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return {"shares": result, "best": best, "bound": chosen.bound, "alone": forgotten.bound, "delta": chosen.delta}


if __name__ == "__main__":
    main()
