"""What the model believes before it has seen the targets."""

from __future__ import annotations

from typing import Any

from bayesdl.errors import MethodError
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.predictive import mixture
from bayesdl.posterior.problem import prepare


def prior_predictive(
    model: Any, data: Any, n: int = 1000, *, site: str | None = None, seed: int = 0, data_plate: str = "data"
) -> Prediction:
    """The prior predictive distribution at the inputs of ``data``, in raw units.

    Args:
        model: a Pyro program.
        data: as in ``fit``: a ``Dataset``, a pair ``(x, y)``, or a dict; targets only give units and shapes.
        n: number of prior draws; the program runs once for each.
        site: observed site to predict; the only one by default.
        seed: seed of the draws.
        data_plate: name of the plate over rows.

    Raises:
        ModelError: the model cannot be used.
        DataError: the data cannot be used.
    """
    if n < 1:
        raise MethodError(f"prior_predictive(n={n}): n must be at least 1.")
    problem = prepare(model, data, seed=seed, data_plate=data_plate)
    z = problem.density.prior_draws(n, seed)
    return mixture(problem, z, problem.training_inputs, site=site, seed=seed)
