"""The log densities of ../shared/data/posteriordb/*/model.md once more: numpy and scipy, one draw at a time, no Pyro.

Each takes the raw data and the program's sites as arrays. The programs' coordinates differ from the reference's at most
by maps with determinant 1 (a difference of means, the third part of a simplex), so the two densities are the same up to
a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Draw = dict[str, NDArray[np.float64]]


def _half_cauchy(value: Any, scale: float) -> float:
    return float(stats.halfcauchy.logpdf(value, scale=scale))


def _half_normal(value: Any, scale: float) -> float:
    return float(np.sum(stats.halfnorm.logpdf(value, scale=scale)))


def _normal(value: Any, mean: Any, sd: Any) -> float:
    return float(np.sum(stats.norm.logpdf(value, mean, sd)))


def ark(raw: dict[str, Any], v: Draw) -> float:
    y, total = raw["y"], _normal(v["alpha"], 0, 10) + _normal(v["beta"], 0, 10) + _half_cauchy(v["sigma"], 2.5)
    for t in range(raw["K"], raw["T"]):
        mean = v["alpha"] + sum(v["beta"][k - 1] * y[t - k] for k in range(1, raw["K"] + 1))
        total += _normal(y[t], mean, v["sigma"])
    return total


def diamonds(raw: dict[str, Any], v: Draw) -> float:
    x = np.array(raw["X"])[:, 1:]
    x = x - x.mean(0)
    total = _normal(v["b"], 0, 1) + float(stats.t.logpdf(v["intercept"], 3, 8, 10))
    total += float(stats.t.logpdf(v["sigma"], 3, 0, 10))
    return total + _normal(raw["Y"], v["intercept"] + x @ v["b"], v["sigma"])


def eight_schools(raw: dict[str, Any], v: Draw) -> float:
    prior = _normal(v["z"], 0, 1) + _normal(v["mu"], 0, 5) + _half_cauchy(v["tau"], 5)
    return prior + _normal(raw["y"], v["mu"] + v["tau"] * v["z"], raw["sigma"])


def garch(raw: dict[str, Any], v: Draw) -> float:
    total, variance = 0.0, raw["sigma1"] ** 2
    for t in range(raw["T"]):
        if t:
            variance = v["alpha0"] + v["share"][0] * (raw["y"][t - 1] - v["mu"]) ** 2 + v["share"][1] * variance
        total += _normal(raw["y"][t], v["mu"], np.sqrt(variance))
    return total


def gp_pois(raw: dict[str, Any], v: Draw) -> float:
    x = np.array(raw["x"], dtype=float)
    covariance = v["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * v["rho"] ** 2)) + 1e-10 * np.eye(len(x))
    f = np.linalg.cholesky(covariance) @ v["z"]
    prior = float(stats.gamma.logpdf(v["rho"], 25, scale=1 / 4)) + _half_normal(v["alpha"], 2) + _normal(v["z"], 0, 1)
    return prior + float(stats.poisson.logpmf(raw["k"], np.exp(f)).sum())


def hmm(raw: dict[str, Any], v: Draw) -> float:
    mu = np.array([v["low"], v["low"] + v["gap"]])
    weights, total = np.ones(2), _normal(mu, [3, 10], 1)
    for t, y in enumerate(raw["y"]):
        weights = (weights @ v["rows"] if t else weights) * stats.norm.pdf(y, mu, 1)
        total += float(np.log(weights.sum()))
        weights = weights / weights.sum()
    return total


def kidscore_interaction(raw: dict[str, Any], v: Draw) -> float:
    school, iq = np.array(raw["mom_hs"]), np.array(raw["mom_iq"])
    mean = v["beta"][0] + v["beta"][1] * school + v["beta"][2] * iq + v["beta"][3] * school * iq
    return _half_cauchy(v["sigma"], 2.5) + _normal(raw["kid_score"], mean, v["sigma"])


def kidscore_momiq(raw: dict[str, Any], v: Draw) -> float:
    mean = v["beta"][0] + v["beta"][1] * np.array(raw["mom_iq"])
    return _half_cauchy(v["sigma"], 2.5) + _normal(raw["kid_score"], mean, v["sigma"])


def gauss_mix(raw: dict[str, Any], v: Draw) -> float:
    prior = _normal(v["mu"], 0, 2) + _half_normal(v["sigma"], 2) + float(stats.beta.logpdf(v["theta"], 5, 5))
    y = np.array(raw["y"])
    first, second = (stats.norm.pdf(y, v["mu"][k], v["sigma"][k]) for k in range(2))
    return prior + float(np.log(v["theta"] * first + (1 - v["theta"]) * second).sum())


def mesquite(raw: dict[str, Any], v: Draw) -> float:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    mean = v["beta"][0] + sum(v["beta"][k + 1] * np.log(raw[name]) for k, name in enumerate(names))
    return _normal(np.log(raw["weight"]), mean + v["beta"][6] * np.array(raw["group"]), v["sigma"])


def nes(raw: dict[str, Any], v: Draw) -> float:
    age, b = np.array(raw["age_discrete"]), v["beta"]
    mean = b[0] + b[1] * np.array(raw["real_ideo"]) + b[2] * np.array(raw["race_adj"])
    mean = mean + b[3] * (age == 2) + b[4] * (age == 3) + b[5] * (age == 4)
    mean = mean + b[6] * np.array(raw["educ1"]) + b[7] * np.array(raw["gender"]) + b[8] * np.array(raw["income"])
    return _normal(raw["partyid7"], mean, v["sigma"])


def blr(raw: dict[str, Any], v: Draw) -> float:
    prior = _normal(v["beta"], 0, 10) + _half_normal(v["sigma"], 10)
    return prior + _normal(raw["y"], np.array(raw["X"]) @ v["beta"], v["sigma"])


DENSITIES: dict[str, Callable[[dict[str, Any], Draw], float]] = {
    "arK-arK": ark,
    "diamonds-diamonds": diamonds,
    "eight_schools-eight_schools_noncentered": eight_schools,
    "garch-garch11": garch,
    "gp_pois_regr-gp_pois_regr": gp_pois,
    "hmm_example-hmm_example": hmm,
    "kidiq-kidscore_interaction": kidscore_interaction,
    "kidiq-kidscore_momiq": kidscore_momiq,
    "low_dim_gauss_mix-low_dim_gauss_mix": gauss_mix,
    "mesquite-logmesquite": mesquite,
    "nes2000-nes": nes,
    "sblrc-blr": blr,
}
