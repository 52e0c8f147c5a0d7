"""A Pyro program as a batched, differentiable, unconstrained log density."""

from bayesdl.density.evaluator import SlowProgramWarning
from bayesdl.density.log_density import LogDensity
from bayesdl.density.sites import Site

__all__ = ["LogDensity", "Site", "SlowProgramWarning"]
