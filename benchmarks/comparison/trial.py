"""Choose a method's setting on a validation part of the training rows, and fit it to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from catalogue import Candidate

import bayesdl as bdl
from bayesdl.errors import BayesdlError

VALIDATION = 0.2
"""Share of the training rows on which settings are compared."""


def tuned(
    make: Callable[[Candidate], bdl.BayesianNetwork],
    candidates: Sequence[Candidate],
    train: bdl.Dataset,
    seed: int,
    max_draws: int,
) -> tuple[bdl.Posterior, dict[str, Any]]:
    """The posterior at the setting with the best log likelihood of held-out training rows.

    Returns:
        The posterior given all training rows, and what was tried: each setting with its mean log likelihood of a
        validation row (None where the fit failed), the chosen one, and the processor seconds of choosing and fitting.

    Raises:
        BayesdlError: of the last fit; and where no setting can be fitted.
    """
    rest, held = train.holdout(VALIDATION, seed=seed)
    began, tried = time.process_time(), []
    for candidate in candidates:
        try:
            posterior = fitted(make(candidate), candidate, rest, seed)
            score = float(posterior.predict(held.x, max_draws=max_draws).log_prob(held.y).mean())
        except BayesdlError as error:
            tried.append({**candidate.shown, "failed": type(error).__name__})
            continue
        tried.append({**candidate.shown, "validation": score if math.isfinite(score) else None})
    scores = [one.get("validation") for one in tried]
    finite = [k for k, score in enumerate(scores) if score is not None]
    if not finite:
        raise BayesdlError(f"No setting could be fitted: {tried}.")
    best = max(finite, key=lambda k: scores[k] or -math.inf)
    middle = time.process_time()
    posterior = fitted(make(candidates[best]), candidates[best], train, seed)
    end = time.process_time()
    known = {"tried": tried, "chosen": dict(candidates[best].shown)}
    return posterior, known | {"seconds": end - middle, "tuning_seconds": middle - began}


def fitted(model: bdl.BayesianNetwork, candidate: Candidate, data: bdl.Dataset, seed: int) -> bdl.Posterior:
    """The posterior of one candidate, from where its start leads."""
    start = None if candidate.start is None else candidate.start.fit(model, data, seed=seed, progress=False)
    return candidate.method.fit(model, data, seed=seed, init=start, progress=False)
