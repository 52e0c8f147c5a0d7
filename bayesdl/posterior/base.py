"""What every posterior can do, whatever it knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bayesdl.errors import DataError, MethodError, ModelRequired, NotFactorised
from bayesdl.posterior.layout import constrain_without_model
from bayesdl.posterior.predictive import predict
from bayesdl.posterior.problem import Problem

if TYPE_CHECKING:
    import arviz

    from bayesdl.posterior.diagnostics import Diagnostics
    from bayesdl.posterior.importance import Importance
    from bayesdl.posterior.prediction import Prediction
    from bayesdl.posterior.summary import Summary


@dataclass(frozen=True)
class Record:
    """What a file holds of a posterior beside its tensors, for what can be said without the model.

    Attributes:
        sites: layout of the latents, see ``layout.describe``.
        units: "scaled" or "raw".
        diagnostics: ``Diagnostics`` of the training rows as JSON values, or None where there are no chains.
    """

    sites: list[dict[str, Any]]
    units: str
    diagnostics: dict[str, Any] | None


class Posterior(ABC):
    """What was learnt about a model's latents.

    Attributes:
        info: method, settings, seed, seconds, gradients, and what else the method reports, as JSON values.
        stats: per-draw statistics ``[C, S]`` by name; empty where the method has none.
    """

    kind: ClassVar[str]

    def __init__(self, problem: Problem | None, info: dict[str, Any]) -> None:
        self._problem = problem
        self.info = info
        self.stats: dict[str, Tensor] = {}
        self._record: Record | None = None  # set by load

    @property
    def problem(self) -> Problem:
        """The model and its data.

        Raises:
            ModelRequired: the posterior was loaded without its model.
        """
        if self._problem is None:
            raise ModelRequired(
                "This posterior was loaded without its model, which is code: bayesdl.load(path, model=...) makes it "
                "whole."
            )
        return self._problem

    @property
    def units(self) -> str:
        """In which units the latents are: "scaled" where the data were standardised for the model, else "raw"."""
        if self._problem is None and self._record is not None:
            return self._record.units
        return "scaled" if self.problem.scaled else "raw"

    @abstractmethod
    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Draws of the flat unconstrained vector, ``[n, D]``; all stored ones, or 1000, if n is None.

        A finite posterior thins evenly for n up to its size and resamples by the seed beyond.
        """

    def unconstrained_by_chain(self) -> Tensor:
        """Draws ``[C, S, D]``: the stored ones, or one chain of independent ones."""
        return self.unconstrained_draws()[None]

    def draws(self, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Constrained draws ``[n, *shape]`` by site name, in the model's units (see ``units``)."""
        return self._constrain(self.unconstrained_draws(n, seed))

    def draws_by_chain(self) -> dict[str, Tensor]:
        """Constrained draws ``[C, S, *shape]`` by site name."""
        return self._constrain(self.unconstrained_by_chain())

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        max_draws: int = 1000,
        site: str | None = None,
        seed: int = 0,
    ) -> Prediction:
        """The posterior predictive distribution at raw inputs.

        Latents inside the data plate are drawn anew from their prior given the others, and so are observed sites
        before the target, unless a dict holds their values. Where that happens, a posterior of fewer than
        ``max_draws`` draws uses each of them several times.

        Args:
            x: inputs ``[N, ...]`` in the data's units, or a dict of the program's arguments without the target.
            batch_size: rows that the program works on at once. It bounds the working memory; the result takes draws x
                rows x parameters of the likelihood, and is computed block by block for every statistic where that is
                too much.
            max_draws: most draws to use, evenly thinned (or, of a posterior with a density, drawn).
            site: observed site to predict; the only one by default.
            seed: seed of the draws of a posterior with a density, and of what is drawn anew.

        Raises:
            DataError: inputs that do not fit the model.
            ModelError: the program has discrete latents that all rows share.
            ModelRequired: loaded without a model.
        """
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        problem = self.problem
        z = self.unconstrained_draws(self._draw_count(max_draws), seed)
        if problem.draws_anew:
            z = z.repeat_interleave(max_draws // len(z), 0)
        return predict(problem, z, problem.inputs(x), site=site, batch_size=batch_size, seed=seed)

    def log_likelihood(self, x: Any, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of every row under every draw, ``[S, N]``, as a density of the raw targets.

        The draws are those of ``predict``. Discrete latents inside the data plate are summed out.

        Args:
            x: raw inputs, or a dict of all arguments of the program.
            y: raw targets.
            max_draws: as in ``predict``.
            seed: as in ``predict``.

        Raises:
            NotFactorised: the program's rows do not separate, or have continuous latents of their own.
            DataError: inputs or targets that do not fit the model.
        """
        problem = self.problem
        if any(site.scope == "local" for site in problem.density.sites):
            raise NotFactorised(
                "The program has latents inside the data plate; those of the training rows say nothing about other "
                "rows. predict(x).log_prob_by_draw(y) draws new ones."
            )
        z = self.unconstrained_draws(self._draw_count(max_draws), seed)
        return row_log_likelihood(problem, z, problem.labelled(x, y))

    def diagnostics(self, x: Any = None) -> Diagnostics:
        """R-hat and its like, for posteriors with chains.

        Raises:
            DataError: there are no chains to compare.
        """
        raise DataError(
            f"Diagnostics compare chains of draws; {self.info.get('method', 'this method')} has none, its draws are "
            "independent. loo() tells by k-hat where its approximation fails."
        )

    def stored_diagnostics(self) -> dict[str, Any] | None:
        """The diagnostics that ``save`` stores, as JSON values; None where there are no chains."""
        return None

    def summary(self) -> Summary:
        """Mean, sd, quantiles, effective sample sizes and R-hat of every latent, as a table."""
        from bayesdl.posterior.summary import summarise

        return summarise(self.draws_by_chain())

    def to_arviz(self, x: Any = None, y: Any = None) -> arviz.InferenceData:
        """ArviZ InferenceData: posterior, log likelihood, posterior predictive, sample statistics, observed data.

        Args:
            x: raw inputs (or a dict of all arguments) of the rows for the groups that have rows. By default the
                training rows; a loaded posterior no longer has these, and leaves such groups out.
            y: their raw targets.
        """
        from bayesdl.posterior.arviz_export import to_arviz

        return to_arviz(self, x, y)

    def loo(self, x: Any = None, y: Any = None) -> Any:
        """PSIS leave-one-out cross-validation with k-hat per row, by ArviZ; densities of the raw targets.

        Args:
            x: raw inputs (or a dict of all arguments) of the training rows, which a loaded posterior no longer has.
            y: their raw targets.
        """
        from bayesdl.posterior.arviz_export import loo

        return loo(self, x, y)

    def draws_and_log_prob(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Fresh draws ``[n, D]`` and the log density of q over z there, ``[n]``; points do not count in it.

        Raises:
            MethodError: the posterior has no density.
        """
        raise MethodError(
            f"{self.info.get('method', 'This method')} gives draws without a density, so there are no importance "
            "weights; only posteriors of variational methods and other Gaussians have them."
        )

    def importance(self, draws: int = 2000, *, seed: int = 0, batch_size: int | None = None) -> Importance:
        """How far the approximation is from the posterior: k-hat, weighted draws, and the evidence (PSIS, by ArviZ).

        Args:
            draws: S, of the approximation.
            seed: of the draws.
            batch_size: rows at which the density is evaluated at once; all if None.

        Raises:
            MethodError: the posterior has no density, or too few draws are asked for.
        """
        from bayesdl.posterior.importance import importance

        return importance(self, draws, seed, batch_size)

    def kl(self) -> float | None:
        """KL(posterior || prior) in nats where it is known in closed form, else None."""
        return None

    def kl_parts(self) -> dict[str, float] | None:
        """The terms that ``kl`` is the sum of, by name; None where it is not known, or known as one number only."""
        return None

    def learnt_prior(self) -> Posterior | None:
        """What was learnt on the rows of the prior alone, as a posterior; None where nothing was."""
        return None

    def why_no_kl(self) -> str:
        """What stands in the way where ``kl`` is None or infinite, to follow "this posterior"."""
        return "has no density" if self.kl() is None else "has an infinite KL divergence from its prior"

    def sampler(self, x: Any) -> Callable[[int, int], Prediction]:
        """How to predict at raw inputs with independent draws: a function of their number and a seed.

        The draws of ``predict`` may be thinned, or spread more evenly than chance; these are independent, as the
        Monte-Carlo step of a certificate needs them. Only for posteriors that draw anew by the seed.
        """
        return lambda draws, seed: self.predict(x, max_draws=draws, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Write the posterior into the folder ``path``: tensors in safetensors, the rest in JSON.

        A few training rows are stored as a probe, by which ``load`` recognises the model.
        """
        from bayesdl.posterior.storage import save

        return save(self, Path(path))

    def rows_by_chain(self, batch: dict[str, Any] | None = None) -> Tensor:
        """Log likelihood of rows ``[C, S, N]`` under ``unconstrained_by_chain``, as a density of the raw targets.

        Args:
            batch: the program's arguments in model units; the training rows if None.
        """
        z = self.unconstrained_by_chain()
        return row_log_likelihood(self.problem, z.flatten(0, 1), batch).unflatten(0, z.shape[:2])

    def prediction_by_chain(self, inputs: dict[str, Any], site: str) -> Prediction:
        """The prediction of a site at inputs in model units, its draws those of ``unconstrained_by_chain`` in order."""
        z = self.unconstrained_by_chain().flatten(0, 1)
        return predict(self.problem, z, inputs, site=site, seed=self.problem.seed)

    def _constrain(self, z: Tensor) -> dict[str, Tensor]:
        if self._problem is None and self._record is not None:
            return constrain_without_model(self._record.sites, z)
        return self.problem.density.constrain(z)

    def _draw_count(self, most: int) -> int:
        """How many draws a prediction with ``max_draws=most`` uses."""
        return most

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""

    def write_files(self, folder: Path) -> None:  # noqa: B027 - most posteriors have no other files
        """Write what is saved in files of its own, beside the tensors: nothing, for most posteriors."""

    @classmethod
    def open(cls, folder: Path, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> Posterior:
        """As ``restore``, for posteriors with files of their own in the folder."""
        return cls.restore(problem, tensors, info)

    @classmethod
    @abstractmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> Posterior:
        """Rebuild what ``tensors`` wrote."""


def row_log_likelihood(problem: Problem, z: Tensor, batch: dict[str, Any] | None = None) -> Tensor:
    """Log density of the raw targets of every row at draws ``z [S, D]``, ``[S, N]``.

    log p(y) = log p(y in model units) - ``problem.log_scale``.

    Args:
        problem: model and units.
        z: draws.
        batch: the program's arguments in model units; the training rows if None.

    Raises:
        NotFactorised: the program's rows do not separate.
    """
    return problem.density.log_likelihood(z, batch) - problem.log_scale
