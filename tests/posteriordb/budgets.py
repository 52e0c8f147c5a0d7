"""How the posteriors are sampled: which methods, and which settings where a posterior needs other than the defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bayesdl as bdl
from bayesdl.infer.sampler import Sampler

SETTINGS: dict[str, dict[str, Any]] = {
    # The reference draws themselves were made with a target of 0.99.
    "gp_pois_regr-gp_pois_regr": {"target_accept": 0.95},
    # The prior is 10,000 times wider than the posterior: chains need long to come in.
    "sblrc-blr": {"warmup": 600},
    "diamonds-diamonds": {"warmup": 600},
}
"""Where a posterior needs other settings."""

METHODS: dict[str, Callable[..., Sampler]] = {
    "NUTS": lambda **settings: bdl.NUTS(**({"chains": 8, "warmup": 300, "metric": "dense", "max_depth": 6} | settings)),
    "ChEES": lambda **settings: bdl.ChEES(**({"chains": 8, "warmup": 400, "metric": "dense"} | settings)),
}
"""Samplers with the settings that suit these posteriors; given ones come before them.

Trees are kept short, because they are long only where there is no metric yet, in the first hundred transitions.
"""


def method(kind: str, posterior: str, **settings: Any) -> Sampler:
    """The sampler for a posterior."""
    return METHODS[kind](**(SETTINGS.get(posterior, {}) | settings))
