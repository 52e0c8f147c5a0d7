"""Certificates: upper bounds on the expected loss on new rows, that hold with a stated probability.

``certify`` makes one from a posterior and data; every inequality behind it is also a plain function of numbers:
``concentration`` for one predictor, ``uniform`` for all of a class, ``pac_bayes`` for a distribution over predictors.
"""

from __future__ import annotations

from bayesdl.bounds import concentration, uniform
from bayesdl.bounds.catoni import catoni
from bayesdl.bounds.certificate import Certificate
from bayesdl.bounds.certify import certify
from bayesdl.bounds.comparison import BoundComparison, compare_bounds
from bayesdl.bounds.compressed import compress
from bayesdl.bounds.concentration import (
    bernstein,
    betting_lower,
    betting_upper,
    binary_kl,
    chernoff_lower,
    chernoff_upper,
    clopper_pearson_lower,
    clopper_pearson_upper,
    empirical_bernstein,
    hoeffding,
    kl_inverse_lower,
    kl_inverse_upper,
)
from bayesdl.bounds.divergence import kl_upper
from bayesdl.bounds.finite import weigh
from bayesdl.bounds.gaussian_kl import kl_divergence_gaussian
from bayesdl.bounds.loss import IntervalMiss, Loss, ZeroOne, bounded
from bayesdl.bounds.majority import majority_vote, tandem
from bayesdl.bounds.pac_bayes import mcallester, pac_bayes_kl, quadratic, thiemann
from bayesdl.bounds.pac_bayes_bernstein import pac_bayes_bernstein
from bayesdl.bounds.single_draw import single_draw

__all__ = [
    "BoundComparison",
    "Certificate",
    "IntervalMiss",
    "Loss",
    "ZeroOne",
    "bernstein",
    "betting_lower",
    "betting_upper",
    "binary_kl",
    "bounded",
    "catoni",
    "certify",
    "chernoff_lower",
    "chernoff_upper",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "compare_bounds",
    "compress",
    "concentration",
    "empirical_bernstein",
    "hoeffding",
    "kl_divergence_gaussian",
    "kl_inverse_lower",
    "kl_inverse_upper",
    "kl_upper",
    "majority_vote",
    "mcallester",
    "pac_bayes_bernstein",
    "pac_bayes_kl",
    "quadratic",
    "single_draw",
    "tandem",
    "thiemann",
    "uniform",
    "weigh",
]
