from __future__ import annotations

import sys

import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from bayesdl.errors import DataError, MissingExtra, ModelError
from bayesdl.evaluate import calibration_curve, predictive_bands, reliability_diagram
from bayesdl.evaluate.calibration import reliability_bins
from bayesdl.posterior.prediction import Prediction

N = 60
G = torch.Generator().manual_seed(0)
X = 6 * torch.rand(N, 1, generator=G).double() - 3
SLOPES = 1 + 0.3 * torch.randn(20, 1, generator=G).double()
REAL = Prediction(dist.Normal(SLOPES * X[:, 0], 0.5))
Y = X[:, 0] + 0.5 * torch.randn(N, generator=G).double()
LOGITS = 2 * torch.randn(3, N, 3, generator=G).double()
CLASSES = Prediction(dist.Categorical(logits=LOGITS))
LABELS = LOGITS.mean(0).argmax(-1)


def test_reliability_diagram_shows_the_bins(tmp_path):
    axes = reliability_diagram(CLASSES, LABELS)
    bins = reliability_bins(CLASSES, LABELS)
    shown = [int(text.get_text()) for text in axes.texts]
    assert shown == [int(n) for n in bins.count if n > 0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx(bins.accuracy[bins.count > 0].tolist())
    assert "confidence" in axes.get_xlabel()
    assert f"{bins.ece:.3f}" in axes.get_title()
    axes.figure.savefig(tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 5000


def test_calibration_curve():
    axes = calibration_curve(REAL, Y)
    level, coverage = axes.lines[-1].get_data()
    low, high = REAL.interval(0.5)
    inside = ((low <= Y) & (high >= Y)).double().mean()
    assert coverage[list(level).index(0.5)] == pytest.approx(float(inside))
    assert (coverage[0], coverage[-1]) == (0.0, 1.0)
    assert axes.get_ylabel()


def test_predictive_bands_sorts_the_input_and_shades_the_epistemic_part(tmp_path):
    axes = predictive_bands(X, REAL, data=(X, Y), x_label="time [s]", y_label="height [m]")
    across, mean = axes.lines[0].get_data()
    order = X[:, 0].argsort()
    assert across == pytest.approx(X[order, 0].tolist())
    assert mean == pytest.approx(REAL.mean[order].tolist())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["90% interval", "50% interval", "epistemic part (90%)", "mean", "data"]
    assert axes.get_xlabel() == "time [s]"
    axes.figure.savefig(tmp_path / "bands.png")
    one = Prediction(dist.Normal(X.T, 0.5))  # a single draw has no epistemic part to show
    assert len(predictive_bands(X, one).get_legend().get_texts()) == 3


def test_given_axes_are_used_and_no_window_is_opened():
    axes = Figure().subplots(1, 2)
    assert predictive_bands(X, REAL, axes[0]) is axes[0]
    assert reliability_diagram(CLASSES, LABELS, axes[1]) is axes[1]
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_bad_input():
    with pytest.raises(DataError, match="one column"):
        predictive_bands(torch.zeros(N, 2), REAL)
    with pytest.raises(DataError, match="60"):
        predictive_bands(X[:5], REAL)
    with pytest.raises(ModelError, match="one output"):
        predictive_bands(X, Prediction(dist.Normal(torch.zeros(2, N, 2), 1.0).to_event(1)))
    with pytest.raises(ModelError):
        predictive_bands(X, CLASSES)
    with pytest.raises(ModelError):
        reliability_diagram(REAL, Y)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"bayesdl\[plots\]"):
        calibration_curve(REAL, Y)
