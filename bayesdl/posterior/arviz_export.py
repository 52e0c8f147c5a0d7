"""Handing a posterior to ArviZ."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdl.errors import MissingExtra
from bayesdl.posterior.predictive import predict

if TYPE_CHECKING:
    import arviz

    from bayesdl.posterior.draws import DrawsPosterior


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            # ArviZ announces its own next major version whenever it is imported; users of bayesdl need not act on it.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError:
        raise MissingExtra("This needs ArviZ: pip install 'bayesdl[arviz]'.") from None
    return arviz


def to_arviz(posterior: DrawsPosterior) -> arviz.InferenceData:
    """InferenceData with posterior, log likelihood, posterior predictive, sample statistics and observed data."""
    az = _arviz()
    problem = posterior.problem
    chains, draws, _ = posterior.z.shape

    def numbers(value: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
        return value.detach().cpu().numpy()

    groups: dict[str, dict[str, Any]] = {
        "posterior": {name: numbers(value) for name, value in posterior.draws_by_chain().items()},
        "sample_stats": {_ARVIZ_NAMES.get(name, name): numbers(value) for name, value in posterior.stats.items()},
    }
    if problem.density.factorised and len(problem.density.observed) == 1:
        site = problem.target
        flat = posterior.z.flatten(0, 1)
        rows = problem.density.log_likelihood(flat)
        groups["log_likelihood"] = {site: numbers(rows.reshape(chains, draws, -1))}
        inputs = {name: value for name, value in problem.batch.items() if name != problem.y_name}
        if problem.y_name is not None:
            prediction = predict(problem, flat, inputs)
            samples = prediction.sample(chains * draws, seed=problem.seed)
            groups["posterior_predictive"] = {site: numbers(samples.reshape(chains, draws, *samples.shape[1:]))}
            target = problem.batch[problem.y_name]
            raw = problem.scaler.unscale_y(target) if target.is_floating_point() else target
            groups["observed_data"] = {site: numbers(raw)}
    return az.from_dict(**{name: group for name, group in groups.items() if group})


def loo(posterior: DrawsPosterior) -> Any:
    """``arviz.loo`` with k-hat per row, on the training rows, in the model's units.

    Raises:
        NotFactorised: the program's rows do not separate.
    """
    posterior.problem.density.require_rows(whole=True)
    az = _arviz()
    return az.loo(to_arviz(posterior), pointwise=True)


# ArviZ's own names for sampler statistics, so that its plots find them.
_ARVIZ_NAMES = {"divergent": "diverging", "acceptance": "acceptance_rate", "depth": "tree_depth", "log_density": "lp"}
