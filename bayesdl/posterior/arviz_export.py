"""Handing a posterior to ArviZ."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdl.density.discovery import prior_trace
from bayesdl.errors import DataError, MethodError, MissingExtra, ModelError, NotFactorised

if TYPE_CHECKING:
    import arviz

    from bayesdl.posterior.base import Posterior
    from bayesdl.posterior.problem import Problem

Groups = dict[str, dict[str, Any]]

# ArviZ's own names for sampler statistics, so that its plots find them.
_ARVIZ_NAMES = {"divergent": "diverging", "acceptance": "acceptance_rate", "depth": "tree_depth", "log_density": "lp"}
JOINT = "rows"
"""Name of the log likelihood where several observed sites share the rows: it is that of all of them together."""


def to_arviz(posterior: Posterior, x: Any = None, y: Any = None) -> arviz.InferenceData:
    """See ``Posterior.to_arviz``. The log likelihood and the observed data are in raw units."""
    az = require_arviz()
    groups = _latents(posterior)
    problem = posterior._problem
    if problem is not None and (x is not None or problem.complete):
        batch = _rows(problem, x, y)
        with suppress(NotFactorised):  # then there is no such group
            groups |= _log_likelihood(posterior, problem, batch)
        groups |= _targets(posterior, problem, batch)
    return _inference_data(az, groups)


def loo(posterior: Posterior, x: Any = None, y: Any = None) -> Any:
    """See ``Posterior.loo``.

    Raises:
        NotFactorised: the program's rows do not separate.
        DataError: a loaded posterior, without its rows.
        MethodError: a tempered posterior, whose importance weights would be others.
    """
    az = require_arviz()
    problem = posterior.problem
    if x is None and not problem.complete:
        raise DataError("A loaded posterior no longer has its training rows; pass them: loo(x, y).")
    if (problem.density.temperature, problem.density.likelihood_temperature) != (1.0, 1.0):
        raise MethodError("Leave-one-out weights belong to the Bayesian posterior; this one has another temperature.")
    groups = _latents(posterior) | _log_likelihood(posterior, problem, _rows(problem, x, y))
    return az.loo(_inference_data(az, groups), pointwise=True)


def require_arviz() -> Any:
    """ArviZ, which is an extra.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # ArviZ announces its own next major version whenever it is imported; users of bayesdl need not act on it.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError:
        raise MissingExtra("This needs ArviZ: pip install 'bayesdl[arviz]'.") from None
    return arviz


def _inference_data(az: Any, groups: Groups) -> Any:
    with warnings.catch_warnings():
        # An ensemble has more members than draws of each; ArviZ takes that for a transposed array.
        warnings.filterwarnings("ignore", "More chains", UserWarning)
        return az.from_dict(**{name: group for name, group in groups.items() if group})


def _numbers(value: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return value.detach().cpu().numpy()


def _latents(posterior: Posterior) -> Groups:
    return {
        "posterior": {name: _numbers(value) for name, value in posterior.draws_by_chain().items()},
        "sample_stats": {_ARVIZ_NAMES.get(name, name): _numbers(value) for name, value in posterior.stats.items()},
    }


def _rows(problem: Problem, x: Any, y: Any) -> dict[str, Any] | None:
    """The program's arguments in model units, or None for the training rows."""
    return None if x is None else problem.labelled(x, y)


def _log_likelihood(posterior: Posterior, problem: Problem, batch: dict[str, Any] | None) -> Groups:
    if batch is not None and any(site.scope == "local" for site in problem.density.sites):
        raise NotFactorised("The program has latents inside the data plate, which other rows do not share.")
    name = problem.target if len(problem.density.observed) == 1 else JOINT
    return {"log_likelihood": {name: _numbers(posterior.rows_by_chain(batch))}}


def _targets(posterior: Posterior, problem: Problem, batch: dict[str, Any] | None) -> Groups:
    """What was observed, and one replication of it under every draw."""
    arguments = {**problem.batch} if batch is None else batch
    chains = posterior.unconstrained_by_chain().shape[:2]
    nodes = prior_trace(problem.model, arguments, 0).nodes
    observed, replicated = {}, {}
    inputs = {name: value for name, value in arguments.items() if name != problem.y_name}
    # A dict does not say which of its entries are targets; of several sites, later ones would be given the earlier.
    sites = problem.density.observed if problem.y_name is not None or len(problem.density.observed) == 1 else ()
    for site in problem.density.observed:
        value = nodes[site]["value"]
        observed[site] = _numbers(problem.scaler.unscale_y(value) if value.is_floating_point() else value)
    try:
        for site in sites:
            prediction = posterior.prediction_by_chain(inputs, site)
            replicated[site] = _numbers(prediction.sample_by_draw(problem.seed).unflatten(0, chains))
    except ModelError:  # the program cannot be predicted with (see predict)
        replicated = {}
    return {"posterior_predictive": replicated, "observed_data": observed}
