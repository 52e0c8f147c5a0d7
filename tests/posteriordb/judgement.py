"""Are draws those of the reference posterior? Every scalar, in standard errors of both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesdl.posterior.convergence import mcse_mean, mcse_quantile, mcse_sd, mixing
from bayesdl.posterior.tables import render

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
STATISTICS = ("mean", "sd", *(f"{100 * q:.0f}%" for q in LEVELS))
STANDARD_ERRORS, LEAST_ESS, MOST_RHAT = 4.0, 400.0, 1.01


@dataclass(frozen=True)
class Reference:
    """Mean, sd and quantiles of P scalars, and how well they are known.

    Attributes:
        names: of the scalars.
        values: ``[7, P]``, the rows as in ``STATISTICS``.
        errors: ``[7, P]``, standard errors; 0 where the values are exact.
    """

    names: Sequence[str]
    values: Tensor
    errors: Tensor

    @classmethod
    def of_draws(cls, reference: Mapping[str, NDArray[Any]]) -> Reference:
        """What ``reference.npz`` holds: statistics of the original draws, errors from those that are stored."""
        assert tuple(reference["quantile_probs"]) == LEVELS
        parts = [torch.from_numpy(reference[name]).double() for name in ("mean", "sd", "quantiles")]
        values = torch.cat([parts[0][None], parts[1][None], parts[2].reshape(len(LEVELS), -1)])
        return cls(reference["names"].tolist(), values, _errors(torch.from_numpy(reference["draws"])))


@dataclass(frozen=True)
class Judgement:
    """What the comparison found.

    Attributes:
        names: of the scalars.
        z: ``[7, P]``, differences in standard errors of both sides together.
        rhat, bulk, tail: ``[P]``, R-hat and effective sample sizes.
    """

    names: Sequence[str]
    z: Tensor
    rhat: Tensor
    bulk: Tensor
    tail: Tensor

    @property
    def worst(self) -> str:
        """The statistic that is furthest off, with its number of standard errors."""
        row, column = divmod(int(self.z.abs().nan_to_num(torch.inf).argmax()), self.z.shape[1])
        return f"{STATISTICS[row]} of {self.names[column]}: {float(self.z[row, column]):+.1f}"

    @property
    def largest(self) -> float:
        """The largest number of standard errors."""
        return float(self.z.abs().nan_to_num(torch.inf).max())

    def failures(self) -> list[str]:
        """What is not as it should be; empty for the right posterior, well sampled."""
        found = [f"off by more than {self.allowed:.1f} standard errors, {self.worst}"] if self.wrong else []
        return found + self.unmixed()

    @property
    def wrong(self) -> bool:
        """Whether some statistic is too far from the reference."""
        return not self.largest < self.allowed

    @property
    def allowed(self) -> float:
        """``STANDARD_ERRORS``, or what one right run in a hundred would exceed, if that is more.

        That is so from some 170 comparisons on: the largest of 1,750 standard normals is often above 4.
        """
        return max(STANDARD_ERRORS, NormalDist().inv_cdf(1.0 - 0.005 / self.z.numel()))

    def unmixed(self) -> list[str]:
        """Scalars with too large an R-hat or too few effective draws."""
        checks = {
            "R-hat": (self.rhat, self.rhat < MOST_RHAT),
            "bulk ESS": (self.bulk, self.bulk >= LEAST_ESS),
            "tail ESS": (self.tail, self.tail >= LEAST_ESS),
        }
        return [
            f"{label} of {name} is {float(value):.4g}"
            for label, (values, good) in checks.items()
            for name, value, fine in zip(self.names, values, good, strict=True)
            if not fine
        ]

    def __str__(self) -> str:
        """The table: one row a scalar."""
        rows = []
        for k, name in enumerate(self.names):
            cells = [f"{float(z):+.1f}" for z in self.z[:, k]]
            rows.append([name, *cells, f"{self.bulk[k]:.0f}", f"{self.tail[k]:.0f}", f"{self.rhat[k]:.4f}"])
        columns = ["scalar", *(f"z {s}" for s in STATISTICS), "ess_bulk", "ess_tail", "rhat"]
        return render("Differences from the reference in standard errors", columns, rows)


def judge(x: Tensor, reference: Reference) -> Judgement:
    """Compare draws ``[C, S, P]`` of the reference's scalars with it."""
    pooled = x.flatten(0, 1)
    levels = torch.tensor(LEVELS, dtype=x.dtype)
    values = torch.cat([pooled.mean(0)[None], pooled.std(0)[None], torch.quantile(pooled, levels, dim=0)])
    z = (values - reference.values) / torch.hypot(_errors(x), reference.errors)
    return Judgement(reference.names, z, *mixing(x))


def _errors(x: Tensor) -> Tensor:
    """Monte-Carlo standard errors ``[7, P]`` of the statistics of draws ``[C, S, P]``."""
    return torch.stack([mcse_mean(x), mcse_sd(x), *(mcse_quantile(x, q) for q in LEVELS)])
