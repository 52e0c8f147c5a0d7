"""Uniform convergence: bounds that hold for all predictors of a class at once, so also for the one that fits best.

A bound for a fixed predictor (``bayesdl.bounds.concentration``) does not hold for one that was chosen with the same
rows. These pay for the choice by the size of the class: its number of members, the number of ways it can label the
rows, how well it fits noise, or how long a predictor's description is.
"""

from __future__ import annotations

from bayesdl.bounds.uniform import vc_dimensions
from bayesdl.bounds.uniform.conjunctions import MonotoneConjunction, conjunction_sample_size
from bayesdl.bounds.uniform.cover import cover_count
from bayesdl.bounds.uniform.finite_class import (
    consistent_sample_size,
    finite_class_deviation,
    finite_class_excess_risk,
    finite_class_sample_size,
    occam,
)
from bayesdl.bounds.uniform.perceptron import (
    PerceptronRun,
    margin_bound,
    mistake_bound,
    online_to_batch,
    run_perceptron,
)
from bayesdl.bounds.uniform.rademacher import (
    RademacherComplexity,
    empirical_rademacher,
    linear_rademacher,
    massart,
    rademacher_bound,
)
from bayesdl.bounds.uniform.shattering import fits_conjunction, fits_halfspace, fits_rectangle, labellings, vc_dimension
from bayesdl.bounds.uniform.vc import (
    log_growth,
    vapnik_deviation,
    vc_deviation,
    vc_rule_of_thumb,
    vc_sample_size,
    vc_tail,
)

__all__ = [
    "MonotoneConjunction",
    "PerceptronRun",
    "RademacherComplexity",
    "conjunction_sample_size",
    "consistent_sample_size",
    "cover_count",
    "empirical_rademacher",
    "finite_class_deviation",
    "finite_class_excess_risk",
    "finite_class_sample_size",
    "fits_conjunction",
    "fits_halfspace",
    "fits_rectangle",
    "labellings",
    "linear_rademacher",
    "log_growth",
    "margin_bound",
    "massart",
    "mistake_bound",
    "occam",
    "online_to_batch",
    "rademacher_bound",
    "run_perceptron",
    "vapnik_deviation",
    "vc_deviation",
    "vc_dimension",
    "vc_dimensions",
    "vc_rule_of_thumb",
    "vc_sample_size",
    "vc_tail",
]
