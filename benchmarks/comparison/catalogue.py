"""The cheap methods, and the settings that each may try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bayesdl as bdl

MEMBERS = 5
"""Of every ensemble."""


@dataclass(frozen=True)
class Candidate:
    """One setting of one method.

    Attributes:
        method: the method.
        w_std: of the fan-in prior.
        dropout: rate behind each hidden layer.
        shown: what distinguishes it from the method's other candidates.
        start: fitted first, to start from; its epochs count.
    """

    method: bdl.Method
    w_std: float
    dropout: float = 0.0
    shown: Mapping[str, Any] = field(default_factory=dict)
    start: bdl.Method | None = None


@dataclass(frozen=True)
class Budget:
    """What every method may spend on one training of one member.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a mini-batch.
        learning_rate: of Adam.
        w_std: scales of the prior that are tried.
        draws: of weights, of methods that keep them.
        last_layer: pattern of the names of its weights.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    w_std: Sequence[float]
    draws: int = 50
    last_layer: str = "*"


Choice = tuple[bdl.Method, Mapping[str, Any], float]
"""A method, what distinguishes it, and the rate of dropout."""

NUMBERS_ONLY = ("LastLayer", "KalmanFilter")
"""Closed forms for Gaussian noise."""
CLASSES_ONLY = ("last-layer Laplace",)
"""For numbers LastLayer is exact."""


def candidates(budget: Budget, rows: int, task: str) -> dict[str, list[Candidate]]:
    """By method: two choices of what matters most to it, at each scale of the prior.

    Args:
        budget: what a training may cost.
        rows: to be trained on.
        task: "regression" or "classification".
    """
    steps = budget.epochs * math.ceil(rows / budget.batch_size)
    batch = {"batch_size": budget.batch_size}
    step: dict[str, Any] = {**batch, "learning_rate": budget.learning_rate}
    full, half, one_draw = (
        {**step, "steps": steps},
        {**step, "steps": steps // 2},
        {**batch, "steps": steps, "samples": 1},
    )
    # Half of the steps lead there (chains: to a mode, and as many again on), the others are spread over the draws.
    every = max(1, steps // (2 * budget.draws))
    snapshots = {"snapshots": budget.draws, "every": every, "optimizer": "adam"}
    chain: dict[str, Any] = {
        "chains": 1,
        **batch,
        "warmup": steps // 4,
        "draws": budget.draws,
        "thin": max(1, every // 2),
    }
    rates = [{"learning_rate": rate} for rate in (budget.learning_rate / 3, budget.learning_rate)]

    def by_steps(kind: Any, **more: Any) -> list[Choice]:
        """Training can be too long where nothing averages."""
        return [(kind(**{**step, "steps": some}, **more), {"steps": some}, 0.0) for some in (steps // 4, steps)]

    found: dict[str, list[Choice]] = {
        "MAP": by_steps(bdl.MAP),
        "DeepEnsemble": by_steps(bdl.DeepEnsemble, members=MEMBERS),
        "anchored ensemble": by_steps(bdl.DeepEnsemble, members=MEMBERS, anchored=True),
        "bootstrap ensemble": by_steps(bdl.DeepEnsemble, members=MEMBERS, bootstrap=True),
        "SnapshotEnsemble": by_steps(bdl.SnapshotEnsemble, cycles=MEMBERS),
        "SVGD": by_steps(bdl.SVGD, particles=MEMBERS),
        "MCDropout": [(bdl.MCDropout(**full), {"p": p}, p) for p in (0.01, 0.1)],
        "SWAG": [(bdl.SWAG(**half, **snapshots, rate=rate["learning_rate"]), rate, 0.0) for rate in rates],
        "Laplace": by_steps(bdl.Laplace, polish=0),
        "last-layer Laplace": by_steps(bdl.Laplace, polish=0, random=budget.last_layer),
        "LastLayer": by_steps(bdl.LastLayer),
        "KalmanFilter": [(bdl.KalmanFilter(noise=sd), {"noise": sd}, 0.0) for sd in (0.15, 0.3)],
        "MeanFieldVI": [(bdl.MeanFieldVI(**one_draw, **rate), rate, 0.0) for rate in rates],
        "LowRankVI": [(bdl.LowRankVI(**one_draw, **rate), rate, 0.0) for rate in rates],
        "IVON": [(bdl.IVON(**one_draw, learning_rate=rate), {"learning_rate": rate}, 0.0) for rate in (0.03, 0.1)],
        "SGLD": [(bdl.SGLD(**chain, temperature=t), {"temperature": t}, 0.0) for t in (0.1, 1.0)],
    }
    return {
        name: [
            Candidate(method, w_std, dropout, {"w_std": w_std, **shown}, bdl.MAP(**half) if name == "SGLD" else None)
            for w_std in budget.w_std
            for method, shown, dropout in choices
        ]
        for name, choices in found.items()
        if name not in (CLASSES_ONLY if task == "regression" else NUMBERS_ONLY)
    }
