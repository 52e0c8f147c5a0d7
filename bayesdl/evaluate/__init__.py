"""How good is a prediction? Scores, calibration, a report of all of them, and pictures."""

from __future__ import annotations

from bayesdl.evaluate import calibration, metrics, plots
from bayesdl.evaluate.plots import calibration_curve, predictive_bands, reliability_diagram
from bayesdl.evaluate.report import Report, evaluate

__all__ = [
    "Report",
    "calibration",
    "calibration_curve",
    "evaluate",
    "metrics",
    "plots",
    "predictive_bands",
    "reliability_diagram",
]
