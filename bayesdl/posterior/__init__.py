"""What was learnt: posteriors of every kind behind one interface, and their predictions."""

from __future__ import annotations

from bayesdl.posterior.base import Posterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.dropout import DropoutPosterior
from bayesdl.posterior.finite import FinitePosterior
from bayesdl.posterior.functions import FunctionPosterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.guide import GuidePosterior
from bayesdl.posterior.mixture import MixturePosterior
from bayesdl.posterior.prediction import GaussianPrediction, Prediction
from bayesdl.posterior.prior_predictive import prior_predictive
from bayesdl.posterior.problem import Problem, prepare
from bayesdl.posterior.storage import load
from bayesdl.posterior.streamed import StreamedPosterior

__all__ = [
    "DrawsPosterior",
    "DropoutPosterior",
    "FinitePosterior",
    "FunctionPosterior",
    "GaussianPosterior",
    "GaussianPrediction",
    "GuidePosterior",
    "MixturePosterior",
    "Posterior",
    "Prediction",
    "Problem",
    "StreamedPosterior",
    "load",
    "prepare",
    "prior_predictive",
]
