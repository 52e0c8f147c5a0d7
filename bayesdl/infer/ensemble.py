"""Deep ensembles (Lakshminarayanan et al., 2017): the same training from several starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bayesdl.infer import method as check
from bayesdl.infer.loop import Run
from bayesdl.infer.optimise import Optimiser, as_posterior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.problem import Problem


@dataclass(frozen=True)
class DeepEnsemble(Optimiser):
    """Trains ``members`` networks by MAP, side by side, and predicts with the mixture of them.

    Start and data order of member k depend on the seed and k alone: the first members of a larger ensemble, and MAP
    with the same settings for member 0, are the same networks up to rounding. Gradient norms, early stopping and
    divergence are each member's own.

    Args:
        members: number of networks. The other settings are those of ``MAP``.
    """

    name: ClassVar[str] = "DeepEnsemble"

    members: int = 5

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, members=self.members)

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        z, info = self.optimise(problem, run, self.members)
        return as_posterior(problem, z, info, self.target)
