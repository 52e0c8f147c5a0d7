"""Bayesian deep learning: one model, every posterior, every number certified.

Write the model once as a Pyro program, fit it by any method, and get the same posterior object back::

    import bayesdl as bdl

    data = bdl.data.load("diabetes")
    posterior = bdl.fit(bdl.models.mlp(data), data.train, bdl.NUTS())
    report = bdl.evaluate(posterior.predict(data.test.x), data.test.y)

Names load what they need when they are first used, so importing the package is cheap.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bayesdl._registry import METHODS, MODULES, TABLE, method_class, resolve

if TYPE_CHECKING:
    # What the table of _registry says, once more for type checkers and editors; a test compares the two.
    from bayesdl import bounds as bounds
    from bayesdl import curvature as curvature
    from bayesdl import data as data
    from bayesdl import density as density
    from bayesdl import errors as errors
    from bayesdl import infinite as infinite
    from bayesdl import models as models
    from bayesdl import posterior as posterior
    from bayesdl import statespace as statespace
    from bayesdl import theory as theory
    from bayesdl.bounds import Certificate as Certificate
    from bayesdl.bounds.certify import certify as certify
    from bayesdl.bounds.training import PACBayes as PACBayes
    from bayesdl.compare import Comparison as Comparison
    from bayesdl.compare import compare as compare
    from bayesdl.data import Dataset as Dataset
    from bayesdl.density import LogDensity as LogDensity
    from bayesdl.describe import Description
    from bayesdl.estimators import BayesianClassifier as BayesianClassifier
    from bayesdl.estimators import BayesianRegressor as BayesianRegressor
    from bayesdl.evaluate import Report as Report
    from bayesdl.evaluate import evaluate as evaluate
    from bayesdl.evaluate.cross_validation import bootstrap as bootstrap
    from bayesdl.evaluate.cross_validation import cross_validate as cross_validate
    from bayesdl.evaluate.sbc import simulation_based_calibration as simulation_based_calibration
    from bayesdl.infer import schedules as schedules
    from bayesdl.infer.baoab import BAOAB as BAOAB
    from bayesdl.infer.checkpoint import Checkpoint as Checkpoint
    from bayesdl.infer.chees import ChEES as ChEES
    from bayesdl.infer.elliptical_slice import EllipticalSlice as EllipticalSlice
    from bayesdl.infer.ensemble import DeepEnsemble as DeepEnsemble
    from bayesdl.infer.guide import GuideVI as GuideVI
    from bayesdl.infer.hmc import HMC as HMC
    from bayesdl.infer.ivon import IVON as IVON
    from bayesdl.infer.kalman import KalmanFilter as KalmanFilter
    from bayesdl.infer.laplace import Laplace as Laplace
    from bayesdl.infer.last_layer import LastLayer as LastLayer
    from bayesdl.infer.mala import MALA as MALA
    from bayesdl.infer.mc_dropout import MCDropout as MCDropout
    from bayesdl.infer.mclmc import MCLMC as MCLMC
    from bayesdl.infer.method import Method as Method
    from bayesdl.infer.nuts import NUTS as NUTS
    from bayesdl.infer.optimise import MAP as MAP
    from bayesdl.infer.optimise import MaximumLikelihood as MaximumLikelihood
    from bayesdl.infer.preconditioned import PSGLD as PSGLD
    from bayesdl.infer.random_walk import RandomWalk as RandomWalk
    from bayesdl.infer.sghmc import SGHMC as SGHMC
    from bayesdl.infer.sgld import SGLD as SGLD
    from bayesdl.infer.sgnht import SGNHT as SGNHT
    from bayesdl.infer.snapshots import SnapshotEnsemble as SnapshotEnsemble
    from bayesdl.infer.svgd import SVGD as SVGD
    from bayesdl.infer.swag import SWAG as SWAG
    from bayesdl.infer.variational import FullRankVI as FullRankVI
    from bayesdl.infer.variational import LowRankVI as LowRankVI
    from bayesdl.infer.variational import MatrixNormalVI as MatrixNormalVI
    from bayesdl.infer.variational import MeanFieldVI as MeanFieldVI
    from bayesdl.infinite.methods import GP as GP
    from bayesdl.infinite.methods import NNGP as NNGP
    from bayesdl.models import BayesianNetwork as BayesianNetwork
    from bayesdl.models import likelihoods as likelihoods
    from bayesdl.models import priors as priors
    from bayesdl.posterior import Posterior as Posterior
    from bayesdl.posterior import Prediction as Prediction
    from bayesdl.posterior import load as load
    from bayesdl.posterior.prior_predictive import prior_predictive as prior_predictive

__version__ = "0.1.0"
__all__ = ["__version__", "describe", "extend", "fit", *sorted(TABLE)]


def fit(model: Any, data: Any, method: Method | None = None, **options: Any) -> Posterior:
    """Fit a model to data: ``method.fit(model, data, **options)``.

    Args:
        model: any Pyro program ``model(x, y=None)``; a ``BayesianNetwork`` is one.
        data: a ``Dataset``, a pair ``(x, y)``, or a dict of the program's keyword arguments.
        method: a method with its settings, such as ``NUTS(chains=4)``. Without one: ``MeanFieldVI()``, because it
            works at every size, takes mini-batches, and its posterior can be certified on its training rows.
        **options: ``seed``, ``prior``, ``prior_rows``, ``init``, ``callback``, ``checkpoint``, ``progress``, for
            samplers ``draws_to`` and ``functions_at``, as the method's ``fit`` documents them.

    Returns:
        The posterior.
    """
    chosen = resolve("MeanFieldVI")() if method is None else method
    posterior: Posterior = chosen.fit(model, data, **options)
    return posterior


def extend(posterior: Posterior, draws: int, *, data: Any = None, **options: Any) -> Posterior:
    """Draw more from where a sampler's chains stand, without a new warm-up.

    Args:
        posterior: fitted by a sampler; also one that was saved and loaded.
        draws: more draws per chain.
        data: the training data once more, for a loaded posterior, which no longer has them.
        **options: ``callback``, ``checkpoint``, ``progress``, as in ``fit``.

    Returns:
        A new posterior with all draws, those of one uninterrupted longer run.

    Raises:
        MethodError: the posterior has no chains to go on with.
        ModelMismatch: other data than those of the fit.
    """
    method = method_class(posterior.info["method"]).from_settings(posterior.info["settings"])
    extended: Posterior = method.extend(posterior, draws, data=data, **options)
    return extended


def describe(model: Any, data: Any, methods: Iterable[Method] | None = None, **options: Any) -> Description:
    """Look at a model and its data before fitting: structure, prior predictions, methods and what each would cost.

    Args:
        model: any Pyro program; a ``BayesianNetwork`` is one.
        data: as in ``fit``.
        methods: the methods to forecast; all of them, with their default settings, if None.
        **options: ``seed``, ``data_plate``.

    Returns:
        The description; print it.

    Raises:
        ModelError: the model cannot be used; the message says why.
        DataError: the data cannot be used.
    """
    from bayesdl.describe import describe as look

    return look(model, data, [resolve(name)() for name in METHODS] if methods is None else methods, **options)


def __getattr__(name: str) -> Any:
    if name not in TABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = resolve(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(ModuleType):
    """Keeps ``bdl.evaluate`` and its like functions, although there are modules of the same names.

    The import system binds every submodule to an attribute of its package, which would hide the function of the same
    name; ``from bayesdl.evaluate import metrics`` works all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__ and name not in MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
