from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from bayesdl.errors import DataError
from bayesdl.evaluate import Report, evaluate, metrics
from bayesdl.posterior.prediction import Prediction

G = torch.Generator().manual_seed(0)
N = 30
REAL = Prediction(dist.Normal(torch.randn(4, N, generator=G).double(), 0.7), shift=2.0, scale=5.0)
Y = REAL.sample(1, seed=9)[0]
LABELS = torch.arange(N) % 3
CLASSES = Prediction(dist.Categorical(logits=torch.randn(4, N, 3, generator=G).double()))


def test_regression():
    report = evaluate(REAL, Y)
    assert {"nll", "rmse", "mae", "crps", "coverage"} <= set(report)
    for name in ("nll", "rmse", "mae", "crps", "coverage"):
        assert report[name] == getattr(report, name) == getattr(metrics, name)(REAL, Y)
    assert report.to_dict() == dict(report)
    assert report.notes == ()
    text = str(report)
    for words in ("rmse", "units of y", "nats per row", "30 rows, 4 draws", "90%"):
        assert words in text
    assert evaluate(REAL, Y.numpy()).values == evaluate(REAL, Y.tolist()).values == report.values
    assert evaluate(REAL, Y, level=0.5).coverage <= report.coverage


def test_classification():
    report = evaluate(CLASSES, LABELS)
    assert {"nll", "accuracy", "brier", "ece", "auroc", "perplexity", "mutual_information"} <= set(report)
    assert report.perplexity == pytest.approx(math.exp(report.nll))
    parts = report.reliability - report.resolution + report.uncertainty
    assert abs(report.brier - parts) < 0.1  # up to the within-bin terms
    assert "rmse" not in report
    with pytest.raises(AttributeError, match="no score 'rmse' for a categorical target"):
        _ = report.rmse
    with pytest.raises(KeyError, match="did you mean 'accuracy'"):
        _ = report["acuracy"]


def test_every_kind_has_a_report():
    binary = evaluate(Prediction(dist.Bernoulli(torch.full((2, N), 0.3))), (LABELS == 1).long())
    assert binary.kind == "binary"
    several = evaluate(Prediction(dist.Bernoulli(torch.full((2, N, 2), 0.3)).to_event(1)), torch.ones(N, 2))
    assert "perplexity" not in several
    assert "single class" in str(several)
    count = evaluate(Prediction(dist.Poisson(torch.full((2, N), 3.0))), LABELS)
    assert count.notes == ("crps: from 1000 samples a row",)
    heavy = evaluate(Prediction(dist.Cauchy(torch.zeros(2, N), 1.0)), Y)
    assert math.isnan(heavy.rmse)
    assert "does not exist" in str(heavy)
    outputs = evaluate(Prediction(dist.Normal(torch.zeros(2, N, 2), 1.0).to_event(1)), torch.zeros(N, 2))
    assert outputs.rmse == 0.0


def test_a_report_is_a_value():
    report = evaluate(REAL, Y)
    assert copy.deepcopy(report) == report
    with pytest.raises(AttributeError):
        report.nll = 0.0
    assert isinstance(report, Report)
    assert evaluate(REAL, Y, seed=1).crps == report.crps  # exact, so that no seed matters


@pytest.mark.parametrize(
    ("prediction", "y", "words"),
    [
        (REAL, torch.zeros(N - 1), "30 rows"),
        (REAL, torch.zeros(N, 1), r"\(30, 1\)"),
        (REAL, [math.nan] + [0.0] * (N - 1), "not finite"),
        (REAL, [math.inf] + [0.0] * (N - 1), "not finite"),
        (REAL, ["one"] * N, "text"),
        (REAL, np.zeros(N, dtype=complex), "complex"),
        (CLASSES, [3] * N, "from 0 to 2"),
        (CLASSES, [-1] * N, "from 0 to 2"),
        (CLASSES, [0.5] * N, "out of range"),
        (CLASSES, np.eye(3)[LABELS.numpy()], r"\(30, 3\)"),
    ],
)
def test_bad_targets(prediction, y, words):
    with pytest.raises(DataError, match=words):
        evaluate(prediction, y)


def test_import_leaves_the_heavy_parts_alone():
    code = "import sys, bayesdl.evaluate; assert not {'matplotlib', 'sklearn', 'arviz'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
