"""Theory that can be run: Markov chains, SGD as one, rates of descent, signals in deep networks, stiff directions.

Nothing on the way from data to certificate needs these modules; they use it.
"""

from __future__ import annotations

from bayesdl.theory import (
    covariate_shift,
    curves,
    gibbs,
    gradient_noise,
    large_deviations,
    markov_chains,
    mean_field,
    optimisation,
    sgd,
    signal_propagation,
    stiffness,
)

__all__ = [
    "covariate_shift",
    "curves",
    "gibbs",
    "gradient_noise",
    "large_deviations",
    "markov_chains",
    "mean_field",
    "optimisation",
    "sgd",
    "signal_propagation",
    "stiffness",
]
