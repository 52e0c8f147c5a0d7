"""A Pyro program as a batched, differentiable, unconstrained log density."""

from bayesdl.density.log_density import LogDensity, SlowProgramWarning
from bayesdl.density.sites import Site

__all__ = ["LogDensity", "Site", "SlowProgramWarning"]
