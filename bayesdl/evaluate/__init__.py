"""How good is a prediction? Scores, calibration, a report of all of them, and pictures."""

from __future__ import annotations

from bayesdl.evaluate import calibration, metrics, plots
from bayesdl.evaluate.detection import detection_auroc
from bayesdl.evaluate.fidelity import agreement, total_variation, wasserstein, wasserstein_by_row
from bayesdl.evaluate.plots import calibration_curve, predictive_bands, reliability_diagram
from bayesdl.evaluate.report import Report, evaluate

__all__ = [
    "Report",
    "agreement",
    "calibration",
    "calibration_curve",
    "detection_auroc",
    "evaluate",
    "metrics",
    "plots",
    "predictive_bands",
    "reliability_diagram",
    "total_variation",
    "wasserstein",
    "wasserstein_by_row",
]
