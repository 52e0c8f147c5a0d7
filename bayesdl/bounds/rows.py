"""Which rows of the data a bound may use: identities of rows against those that the posterior has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.data import Dataset, RowIds
from bayesdl.errors import CertificateError, DataDependentPrior
from bayesdl.posterior import Posterior, Problem


@dataclass(frozen=True)
class Rows:
    """The rows of the data by what the posterior did with them.

    Args:
        bound: ``[n]`` positions of the rows outside the prior's rows A: the rows B that a PAC-Bayes bound uses.
        unseen: Positions of the rows that nothing was fitted on, which a hold-out bound uses.
        fitted: Number of rows of the data that were used in fitting, A included.
        reserved: Number of rows of the data that belong to A.
        copies: Number of rows of the data from another source that equal rows of A.
        total: Number of rows of the data.
    """

    bound: Tensor
    unseen: Tensor
    fitted: int
    reserved: int
    copies: int
    total: int


def select_rows(posterior: Posterior, data: Dataset) -> Rows:
    """Compare the rows of the data with those that the posterior has seen.

    Rows of one source are compared by identity. Rows from another source (arrays cut by hand have a source of their
    own) are compared by their values as well, so that a copy of a training row is not taken for a new one.

    Raises:
        CertificateError: A row occurs twice, or the posterior has no row identities.
        DataDependentPrior: All rows belong to the prior, or the data were standardised with rows of the bound.
    """
    problem, rows = posterior.problem, data.rows
    repeated = len(rows) - len(rows.unique()[0])
    if repeated:
        raise CertificateError(
            f"{repeated} rows of {data.name} occur more than once; the rows of a bound must be independent draws. "
            "Pass each row once."
        )
    if problem.rows is None:
        raise CertificateError(
            "The posterior was fitted on a dict of arguments, whose rows have no identity, so nothing can be said "
            "about which rows it has seen. Fit it on a Dataset."
        )
    prior = RowIds.concat([]) if problem.prior_rows is None else problem.prior_rows
    reserved, fitted = rows.isin(prior), rows.isin(RowIds.concat([problem.rows, prior]))
    copies = ~fitted & _equal_rows(problem, data, torch.ones(len(problem.rows), dtype=torch.bool))
    copies_of_prior = ~reserved & _equal_rows(problem, data, problem.rows.isin(prior))
    if bool(reserved.all()):
        raise DataDependentPrior(
            f"All {len(rows)} rows of {data.name} belong to the rows of the prior and scaler; none is left for the "
            "bound. Pass rows outside prior_rows, or fit with a smaller prior_rows."
        )
    bound = rows.take(~reserved)
    shaped = 0 if data.shaped_by is None else bound.overlap(data.shaped_by)
    if shaped:
        raise DataDependentPrior(
            f"{shaped} of the {len(bound)} rows of the bound gave {data.name} its means and scales "
            "(Dataset.standardised). Standardise by the prior's rows: data.standardised(by=...)."
        )
    return Rows(
        bound=torch.nonzero(~reserved).flatten(),
        unseen=torch.nonzero(~(fitted | copies)).flatten(),
        fitted=int((fitted | copies).sum()),
        reserved=int(reserved.sum()),
        copies=int(copies_of_prior.sum()),
        total=len(rows),
    )


def _equal_rows(problem: Problem, data: Dataset, among: Tensor) -> Tensor:
    """``[N]`` bool: rows of another source that equal, inputs and target, one of the chosen fitted rows.

    A posterior that was loaded from disk keeps a few of its rows only, and only those can be compared.
    """
    origins = () if problem.rows is None else problem.rows.origins
    if problem.x_name is None or problem.y_name is None or set(data.rows.origins) & set(origins):
        return torch.zeros(len(data), dtype=torch.bool)
    seen = [problem.batch[name] for name in (problem.x_name, problem.y_name)]
    seen = [value[among[: len(value)]] for value in seen]
    now = problem.labelled(data.x, data.y)
    new = [now[name] for name in (problem.x_name, problem.y_name)]
    known = set(_bytes(*seen))
    return torch.tensor([row in known for row in _bytes(*new)], dtype=torch.bool)


def _bytes(x: Tensor, y: Tensor) -> list[bytes]:
    """The contents of each row."""
    parts = [value.detach().cpu().reshape(len(value), value.shape[1:].numel()).numpy() for value in (x, y)]
    return [x_.tobytes() + y_.tobytes() for x_, y_ in zip(*parts, strict=True)]


def overlap_error(posterior: Posterior, rows: Rows, kind: type[CertificateError], why: str) -> CertificateError:
    """The error for rows that the posterior has seen, with the two ways out."""
    method = posterior.info.get("method", "the method")
    return kind(
        f"The posterior was fitted on {rows.fitted} of these {rows.total} rows, {why}. Either certify it on rows "
        f"held out from fitting (certify(posterior, data.test) after fit(model, data.train, {method}())), or fit a "
        "variational posterior with fit(..., MeanFieldVI(), prior_rows=0.5), which keeps half of the rows out of the "
        "scaler and the prior, and certify it on the same data."
    )
