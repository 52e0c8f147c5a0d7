"""Concentration inequalities: from the average of independent losses in [0, 1] to their mean.

Each is a function of numbers in float64 and rounded outwards: an upper bound is never below the exact real value of its
formula, a lower bound never above. They hold for a predictor that was fixed before the losses were seen. The tail of
the central limit theorem is an approximation, no bound for any finite n, and is not offered.
"""

from __future__ import annotations

from bayesdl.bounds.concentration.betting import betting_lower, betting_upper
from bayesdl.bounds.concentration.binomial import clopper_pearson_lower, clopper_pearson_upper
from bayesdl.bounds.concentration.events import bonferroni, intersection_lower, union_bound
from bayesdl.bounds.concentration.kl_inversion import binary_kl, kl_inverse_lower, kl_inverse_upper
from bayesdl.bounds.concentration.rates import bernoulli_rate, gaussian_rate, sample_rate
from bayesdl.bounds.concentration.tails import chernoff_lower, chernoff_upper, hoeffding, hoeffding_tail, mcdiarmid
from bayesdl.bounds.concentration.variance import bernstein, empirical_bernstein

__all__ = [
    "bernoulli_rate",
    "bernstein",
    "betting_lower",
    "betting_upper",
    "binary_kl",
    "bonferroni",
    "chernoff_lower",
    "chernoff_upper",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "empirical_bernstein",
    "gaussian_rate",
    "hoeffding",
    "hoeffding_tail",
    "intersection_lower",
    "kl_inverse_lower",
    "kl_inverse_upper",
    "mcdiarmid",
    "sample_rate",
    "union_bound",
]
