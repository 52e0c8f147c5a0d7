"""``certify``: from a posterior and data to a certificate, with the bookkeeping of rows that makes it true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, overload

from bayesdl.bounds._numbers import arrays, down, require_count, require_delta
from bayesdl.bounds.certificate import Certificate
from bayesdl.bounds.loss import Loss
from bayesdl.bounds.roads import Divergence, Request, best, divergence, held_out_roads, hold_out, pac_bayes
from bayesdl.bounds.rows import Rows, overlap_error, select_rows
from bayesdl.bounds.theorems import PAC_BAYES, Theorem
from bayesdl.data import Dataset, as_dataset
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.posterior import Posterior

MOST_BESIDE, FEWEST_BESIDE = 1000, 10  # draws of a mixture whose bound stands beside another
NUMBERS_BESIDE = 2**24  # in these draws

Bound = Literal["auto", "best", "kl", "quadratic", "mcallester", "catoni", "bernstein", "vote", "tandem", "holdout"]


@overload
def certify(
    posterior: Posterior,
    data: Any,
    *,
    delta: float = ...,
    loss: Loss | None = ...,
    draws: int | None = ...,
    seed: int = ...,
    bound: Bound = ...,
    progress: bool | None = ...,
) -> Certificate: ...
@overload
def certify(
    posterior: Sequence[Posterior],
    data: Any,
    *,
    delta: float = ...,
    loss: Loss | None = ...,
    draws: int | None = ...,
    seed: int = ...,
    bound: Bound = ...,
    progress: bool | None = ...,
) -> list[Certificate]: ...
def certify(
    posterior: Posterior | Sequence[Posterior],
    data: Any,
    *,
    delta: float = 0.05,
    loss: Loss | None = None,
    draws: int | None = None,
    seed: int = 0,
    bound: Bound = "auto",
    progress: bool | None = None,
) -> Certificate | list[Certificate]:
    r"""Bound the expected loss on new rows, with probability at least 1 - delta.

    Two roads, chosen by the identities of the rows and never by their values:

    - *Hold-out.* None of the rows was used in fitting: an exact binomial tail (for a loss other than 0-1 the Chernoff
      bound in kl form) for the mixture ``posterior.predict``. It needs no density, so it serves every posterior.
    - *PAC-Bayes.* The posterior knows its KL divergence from a prior that was fixed on other rows
      (``fit(..., prior_rows=...)``): the PAC-Bayes-kl bound for the Gibbs predictor on the rows of ``data`` without
      the prior's, on which the posterior itself may have been fitted. The Gibbs risk is estimated with ``draws``
      independent draws from the posterior, which enters through its own upper confidence bound: a fifth of delta goes
      to that step, the rest to the theorem. Where the prior was learnt, or some of the rows were never fitted, a
      hold-out bound of the same run stands beside, at a delta of its own (``certificate.beside``).

    Args:
        posterior: A posterior, or a sequence of k candidates: each is certified at delta / k, so all k certificates
            hold together and the best one may be chosen afterwards.
        data: A Dataset, or a pair ``(x, y)``, in raw units.
        delta: Failure probability in (0, 1).
        loss: A loss in [0, 1]; by default 0-1 for classes, a miss of the central 90% interval for regression.
        draws: Posterior draws. By default 10,000 for PAC-Bayes, where rows have draws of their own 20 for each row, and
            those that ``posterior.predict(x)`` uses for a hold-out bound. One that stands beside another has a number
            of its own: 1,000, and down to 10 for networks of more than 17,000 weights.
        seed: Seed of the Monte-Carlo draws.
        bound: "auto" as above; "holdout" for the first road. For the second "kl", or its relaxations "quadratic" and
            "mcallester", "catoni", "bernstein" (all for the Gibbs predictor), or for the majority vote of the
            posterior "vote" (twice the Gibbs bound) and "tandem" (second order). They raise where their road is
            closed. "best" takes every road that is open, PAC-Bayes-kl and hold-out, gives each an equal share of
            delta, and returns the smallest bound; ``certificate.predictor`` says for whom.
        progress: Whether to show a progress bar on stderr; None asks the terminal.

    Returns:
        A certificate, or a list of them for a sequence.

    Raises:
        DataDependentPrior: Rows of the bound shaped the prior or the scaler.
        CertificateError: The posterior was fitted on these rows and has no density, a row occurs twice, the loss
            leaves [0, 1], or an argument is out of its domain.

    Source: Maurer (2004), Theorem 5, for the bound; Langford and Caruana (2001) for the Monte-Carlo step.
    Cost: PAC-Bayes needs ``draws`` x rows evaluations of the network.
    """
    candidates = [posterior] if isinstance(posterior, Posterior) else list(posterior)
    if not candidates:
        raise CertificateError("There is no posterior to certify: the sequence of candidates is empty.")
    require_delta(arrays(delta=delta)[0])
    if draws is not None:
        require_count("draws", arrays(draws=draws)[0], 1)
    if bound not in get_args(Bound):
        raise CertificateError(f"bound={bound!r}: it must be one of {', '.join(map(repr, get_args(Bound)))}.")
    k = len(candidates)
    share = float(delta) if k == 1 else down(delta / k)
    request = Request(data, share, loss, draws, seed, bound, k, progress)
    certificates = [_certify(candidate, request) for candidate in candidates]
    return certificates[0] if isinstance(posterior, Posterior) else certificates


def _certify(posterior: Posterior, request: Request) -> Certificate:
    """Choose the road and take it."""
    data = _matching(posterior, request.data)
    rows = select_rows(posterior, data)
    if request.bound == "holdout" or (request.bound == "auto" and not rows.fitted):
        return _on_unseen(posterior, data, request, rows)
    if request.bound == "best":
        return _best(posterior, data, request, rows)
    kl = _allowed(posterior, data, request, rows)
    found = pac_bayes(posterior, data, _theorem(request), request, rows, kl)
    return replace(found, beside=_beside(posterior, data, request, rows))


def _on_unseen(posterior: Posterior, data: Dataset, request: Request, rows: Rows) -> Certificate:
    if rows.fitted:
        raise overlap_error(posterior, rows, CertificateError, "and a hold-out bound needs rows that it has not seen")
    return hold_out(held_out_roads(posterior, rows)[0], data, request)


def _best(posterior: Posterior, data: Dataset, request: Request, rows: Rows) -> Certificate:
    """All open roads at equal shares of delta; which are open depends on identities of rows and not on the losses."""
    if divergence(posterior) is None and not rows.fitted:
        return _on_unseen(posterior, data, request, rows)
    kl = _allowed(posterior, data, request, rows)
    roads = len(held_out_roads(posterior, rows))
    share = replace(request, delta=down(request.delta / (1 + roads)) if roads else request.delta)
    found = pac_bayes(posterior, data, PAC_BAYES["kl"], share, rows, kl)
    return best(found, _beside(posterior, data, share, rows), request.delta) if roads else found


def _beside(posterior: Posterior, data: Dataset, request: Request, rows: Rows) -> tuple[Certificate, ...]:
    """Hold-out bounds of the same run, of mixtures of fewer draws where networks are large."""
    draws = min(MOST_BESIDE, max(FEWEST_BESIDE, NUMBERS_BESIDE // max(1, posterior.problem.density.dim)))
    few = replace(request, draws=draws)
    return tuple(hold_out(road, data, few) for road in held_out_roads(posterior, rows))


def _allowed(posterior: Posterior, data: Dataset, request: Request, rows: Rows) -> Divergence:
    """The divergence, after making sure that PAC-Bayes applies."""
    kl = divergence(posterior)
    if kl is None:
        what = posterior.why_no_kl()
        if request.bound in ("auto", "best"):
            raise overlap_error(posterior, rows, CertificateError, f"and it {what}, so PAC-Bayes does not apply")
        raise CertificateError(f"bound={request.bound!r} needs a KL divergence, and this posterior {what}.")
    if posterior.problem.prior_rows is None and rows.fitted:
        raise overlap_error(posterior, rows, DataDependentPrior, "which shaped its scaler or prior as well")
    if rows.copies:
        raise DataDependentPrior(
            f"{rows.copies} rows of {data.name} equal rows of the prior and scaler but come from another source, so "
            "they are copies. Fit and certify on parts of one Dataset, which keeps the identities of its rows."
        )
    return kl


def _theorem(request: Request) -> Theorem:
    return PAC_BAYES["kl" if request.bound == "auto" else request.bound]


def _matching(posterior: Posterior, given: Any) -> Dataset:
    """The data as a Dataset of the task, and with the classes, that the posterior was fitted for."""
    problem = posterior.problem
    # Whole numbers in a pair are classes or counts; the posterior knows which.
    data = as_dataset(given, "regression" if problem.task == "regression" else None)
    if data.task != problem.task and problem.rows is not None:
        raise CertificateError(f"The posterior was fitted for {problem.task}; {data.name} is {data.task}.")
    # The labels of a pair are codes already; only a Dataset can have coded other classes in the same way.
    if isinstance(given, Dataset) and problem.classes and data.classes != problem.classes:
        raise CertificateError(
            f"{data.name} has the classes {', '.join(data.classes)}, the posterior {', '.join(problem.classes)}: the "
            "codes would not mean the same. Make the Dataset with classes= as in fitting."
        )
    return data
