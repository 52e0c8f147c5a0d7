"""What should a network be trained for, if its certificate is all that counts?

    python examples/bound_training.py --out results/bound_training

A classifier of ``breast_cancer`` and a regression of ``diabetes``. Half of the training rows train a network, which is
the mean of a Gaussian prior; all train the posterior; the other half count in the certificate. Three trainings are
compared: ``PACBayes()``, which goes down the PAC-Bayes-kl bound itself, ``PACBayes(bound="elbo")``, which weighs the
divergence as the variational bound does, and ``MeanFieldVI`` with the same share of rows for its prior.

A certificate depends on two numbers: the risk on the rows that count, and the divergence from the prior. The lines in
the picture join the points of equal certificates; on the axis of risk stands a network that was trained on the prior's
rows alone, whose tail bound has no divergence to pay.

What to look for: on ``breast_cancer`` both kinds of ``PACBayes`` stay where they are, because with 227 rows a nat of
divergence costs more than it brings; ``MeanFieldVI`` moves by five nats, errs less, and is certified worse. On
``diabetes`` it is the other way round. The loss that is certified, a miss of the 90% interval, is not the one that was
trained, and the network in the middle of the prior takes its noise for smaller than it is; the Gaussian that
``MeanFieldVI`` learns as its prior knows better.

Each certificate holds by itself with probability 0.95; to choose among them pass them together, ``certify([...])``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.bounds import pac_bayes_kl
from bayesdl.bounds.certificate import ceiling
from bayesdl.evaluate.plots import tidy
from bayesdl.posterior.tables import render

DELTA = 0.05
COLOURS = {
    "PACBayes": "#0072B2",
    "PACBayes, elbo": "#D55E00",
    "MeanFieldVI": "#009E73",
    "the prior's network": "#555555",
}
LOSSES = {"breast_cancer": "error rate", "diabetes": "rate of misses of the 90% interval"}


def certified(name: str, quick: bool) -> dict[str, bdl.bounds.Certificate]:
    """By label, the certificates on a data set."""
    data = bdl.data.load(name)
    model = bdl.models.mlp(data, hidden=(20,), activation="relu")
    steps = 150 if quick else 2000
    shared = {"steps": steps, "prior_steps": steps, "prior_scale": 0.2}
    methods: dict[str, bdl.Method] = {
        "PACBayes": bdl.PACBayes(**shared),
        "PACBayes, elbo": bdl.PACBayes(bound="elbo", **shared),
        "MeanFieldVI": bdl.MeanFieldVI(steps=steps),
    }
    found = {}
    for label, method in methods.items():
        posterior = bdl.fit(model, data.train, method, prior_rows=0.5, seed=0, progress=False)
        found[label] = bdl.certify(posterior, data.train, delta=DELTA, progress=False)
    early = data.train.rows.isin(posterior.problem.prior_rows)
    network = bdl.fit(model, data.train.subset(early), bdl.MAP(steps=steps, validation=0.1), seed=0, progress=False)
    found["the prior's network"] = bdl.certify(network, data.train.subset(~early), delta=DELTA)
    return found


def plot(ax: Axes, name: str, certificates: dict[str, bdl.bounds.Certificate]) -> None:
    """Risk against divergence, with the lines of equal certificates."""
    share, n = next((c.delta_split["bound"], c.n) for c in certificates.values() if c.kl is not None)
    most = 1.4 * max(c.kl or 0.0 for c in certificates.values()) + 1
    highest = min(1.0, 1.6 * max(c.risk for c in certificates.values()))
    kl, risk = np.meshgrid(np.linspace(0, most, 80), np.linspace(0, highest, 80))
    levels = ax.contour(kl, risk, np.asarray(pac_bayes_kl(risk=risk, kl=kl, n=n, delta=share)), 10, colors="#BBBBBB")
    ax.clabel(levels, fmt="%.2f", fontsize=8)
    for label, c in certificates.items():
        where, mark = (0.0, "s") if c.kl is None else (c.kl, "o")
        text = f"{label}: {ceiling(c.bound, 3)}"
        ax.plot(where, c.risk, mark, color=COLOURS[label], markersize=9, label=text, clip_on=False, zorder=5)
    ax.set(xlim=(0, most), ylim=(0, highest), xlabel="KL(posterior || prior), nats", ylabel=LOSSES[name])
    ax.set_title(f"{name}: n = {n} rows count")
    tidy(ax)
    ax.legend(frameon=True, framealpha=0.9, fontsize=9, title="certificate", loc="upper right")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit, certify, print and draw.

    Returns:
        By data set and label: certificate, risk and divergence.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bound_training"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer steps, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for ax, name in zip(figure.subplots(1, 2), LOSSES, strict=True):
        certificates = certified(name, options.quick)
        plot(ax, name, certificates)
        rows = [
            [label, c.predictor, f"{c.risk:.4f}", "" if c.kl is None else f"{c.kl:.2f}", str(c.n), ceiling(c.bound)]
            for label, c in certificates.items()
        ]
        print(render(f"{name}: delta = {DELTA}", ["training", "predictor", "risk", "KL", "n", "certificate"], rows))
        result[name] = {
            label: {"bound": c.bound, "risk": c.risk, "kl": 0.0 if c.kl is None else c.kl}
            for label, c in certificates.items()
        }
    path = options.out / "bound_training.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
