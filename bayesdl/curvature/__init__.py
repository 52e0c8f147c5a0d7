"""Curvature of a log density at a point: exact Hessians, and for networks Gauss-Newton, Fisher and K-FAC."""

from __future__ import annotations

from bayesdl.curvature.hessian import hessian, hessian_times
from bayesdl.curvature.outputs import NetworkOutputs
from bayesdl.curvature.sums import dense, diagonal, top

__all__ = ["NetworkOutputs", "dense", "diagonal", "hessian", "hessian_times", "top"]
