"""Certificates: upper bounds on the expected loss on new rows, that hold with a stated probability.

``certify`` makes one from a posterior and data; every inequality behind it is also a plain function of numbers.
"""

from __future__ import annotations

from bayesdl.bounds.certificate import Certificate
from bayesdl.bounds.certify import certify
from bayesdl.bounds.compressed import compress
from bayesdl.bounds.concentration import (
    binary_kl,
    chernoff_upper,
    clopper_pearson_upper,
    hoeffding,
    kl_inverse_lower,
    kl_inverse_upper,
)
from bayesdl.bounds.divergence import kl_upper
from bayesdl.bounds.finite import weigh
from bayesdl.bounds.loss import IntervalMiss, Loss, ZeroOne, bounded
from bayesdl.bounds.pac_bayes import kl_divergence_gaussian, mcallester, pac_bayes_kl

__all__ = [
    "Certificate",
    "IntervalMiss",
    "Loss",
    "ZeroOne",
    "binary_kl",
    "bounded",
    "certify",
    "chernoff_upper",
    "clopper_pearson_upper",
    "compress",
    "hoeffding",
    "kl_divergence_gaussian",
    "kl_inverse_lower",
    "kl_inverse_upper",
    "kl_upper",
    "mcallester",
    "pac_bayes_kl",
    "weigh",
]
