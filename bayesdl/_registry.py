"""The table behind ``import bayesdl``: each public name and where it lives, resolved when it is first used.

A new method needs one line in METHODS. The table holds strings only, so importing it imports nothing.
"""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from bayesdl.errors import MethodError

METHODS: dict[str, str] = {
    "MaximumLikelihood": "bayesdl.infer.optimise:MaximumLikelihood",
    "MAP": "bayesdl.infer.optimise:MAP",
    "DeepEnsemble": "bayesdl.infer.ensemble:DeepEnsemble",
    "KalmanFilter": "bayesdl.infer.kalman:KalmanFilter",
    "LastLayer": "bayesdl.infer.last_layer:LastLayer",
    "MCDropout": "bayesdl.infer.mc_dropout:MCDropout",
    "SnapshotEnsemble": "bayesdl.infer.snapshots:SnapshotEnsemble",
    "SWAG": "bayesdl.infer.swag:SWAG",
    "SVGD": "bayesdl.infer.svgd:SVGD",
    "MeanFieldVI": "bayesdl.infer.variational:MeanFieldVI",
    "PACBayes": "bayesdl.bounds.training:PACBayes",
    "LowRankVI": "bayesdl.infer.variational:LowRankVI",
    "MatrixNormalVI": "bayesdl.infer.variational:MatrixNormalVI",
    "FullRankVI": "bayesdl.infer.variational:FullRankVI",
    "IVON": "bayesdl.infer.ivon:IVON",
    "GuideVI": "bayesdl.infer.guide:GuideVI",
    "Laplace": "bayesdl.infer.laplace:Laplace",
    "SGLD": "bayesdl.infer.sgld:SGLD",
    "PSGLD": "bayesdl.infer.preconditioned:PSGLD",
    "SGHMC": "bayesdl.infer.sghmc:SGHMC",
    "SGNHT": "bayesdl.infer.sgnht:SGNHT",
    "BAOAB": "bayesdl.infer.baoab:BAOAB",
    "RandomWalk": "bayesdl.infer.random_walk:RandomWalk",
    "MALA": "bayesdl.infer.mala:MALA",
    "EllipticalSlice": "bayesdl.infer.elliptical_slice:EllipticalSlice",
    "HMC": "bayesdl.infer.hmc:HMC",
    "ChEES": "bayesdl.infer.chees:ChEES",
    "NUTS": "bayesdl.infer.nuts:NUTS",
    "MCLMC": "bayesdl.infer.mclmc:MCLMC",
    "NNGP": "bayesdl.infinite.methods:NNGP",
    "GP": "bayesdl.infinite.methods:GP",
}

NAMES: dict[str, str] = {
    "BayesianClassifier": "bayesdl.estimators:BayesianClassifier",
    "BayesianNetwork": "bayesdl.models:BayesianNetwork",
    "BayesianRegressor": "bayesdl.estimators:BayesianRegressor",
    "Certificate": "bayesdl.bounds:Certificate",
    "Checkpoint": "bayesdl.infer.checkpoint:Checkpoint",
    "Comparison": "bayesdl.compare:Comparison",
    "Dataset": "bayesdl.data:Dataset",
    "LogDensity": "bayesdl.density:LogDensity",
    "Method": "bayesdl.infer.method:Method",
    "Posterior": "bayesdl.posterior:Posterior",
    "Prediction": "bayesdl.posterior:Prediction",
    "Report": "bayesdl.evaluate:Report",
    "bootstrap": "bayesdl.evaluate.cross_validation:bootstrap",
    "certify": "bayesdl.bounds.certify:certify",
    "compare": "bayesdl.compare:compare",
    "cross_validate": "bayesdl.evaluate.cross_validation:cross_validate",
    "evaluate": "bayesdl.evaluate:evaluate",
    "load": "bayesdl.posterior:load",
    "prior_predictive": "bayesdl.posterior.prior_predictive:prior_predictive",
    "simulation_based_calibration": "bayesdl.evaluate.sbc:simulation_based_calibration",
}

MODULES: dict[str, str] = {
    "bounds": "bayesdl.bounds",
    "curvature": "bayesdl.curvature",
    "data": "bayesdl.data",
    "density": "bayesdl.density",
    "errors": "bayesdl.errors",
    "infinite": "bayesdl.infinite",
    "likelihoods": "bayesdl.models.likelihoods",
    "models": "bayesdl.models",
    "posterior": "bayesdl.posterior",
    "priors": "bayesdl.models.priors",
    "schedules": "bayesdl.infer.schedules",
    "statespace": "bayesdl.statespace",
    "theory": "bayesdl.theory",
}

TABLE: Mapping[str, str] = ChainMap(METHODS, NAMES, MODULES)


def resolve(name: str) -> Any:
    """Import what a public name stands for."""
    module, _, attribute = TABLE[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def method_class(name: str) -> type[Any]:
    """The method class of a name in any case: "nuts" and "NUTS" are both ``NUTS``.

    Raises:
        MethodError: there is no such method; the message names the nearest ones.
    """
    by_lower = {known.lower(): known for known in METHODS}
    if name.lower() in by_lower:
        found: type[Any] = resolve(by_lower[name.lower()])
        return found
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise MethodError(f"There is no method {name!r}.{hint} There are: {', '.join(sorted(by_lower))}.")
