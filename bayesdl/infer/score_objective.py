"""The score-function estimator of the ELBO's gradient, for log densities that cannot be differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl.infer.gaussian_objective import Objective


@dataclass
class ScoreObjective(Objective):
    """Gradients from values alone: ``1/(S - 1) sum_s (f_s - mean f) grad log q(z_s)`` with f = log density - log q.

    Each draw's baseline is the mean of f over the other draws, which keeps the estimate unbiased (Mnih & Rezende, 2016;
    Kool et al., 2019), and with log q in f it is VarGrad (Richter et al., 2020): no variance where q is the posterior.
    Far from it the variance grows with the number of coordinates, where that along paths does not.
    """

    fewest: ClassVar[int] = 2

    @property
    def paired(self) -> bool:
        """See the base class: the other draws are a baseline only if they are independent."""
        return False

    def expect(self, total: int) -> None:
        """Nothing: no gradient will be asked for."""

    def estimate(
        self, parameters: Tensor, noise: Tensor, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See the base class.

        By ``log q``'s gradient at a fixed draw, S^-1 A e for the mean and its pull through A less the entropy's
        gradient for the spread; the latter is the same for all draws, whose weights sum to 0.
        """
        mean, spread = self.split(parameters)
        covariance = self.family.covariance(spread)
        away = covariance.scaled(noise)
        score = covariance.solve(away)
        value = self.density.log_density(self._displaced(mean, away), batch) + self._minus_log_q(spread, away, score)
        slope = score * ((value - value.mean()) / (len(value) - 1))[:, None]
        return value, torch.cat([slope.sum(0), self.family.pull(spread, noise, away, slope)])
