"""What every method shares: settings that are checked, one ``fit``, and where the unknowns start."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pyro
from torch import Tensor

from bayesdl._distributed import Ranks
from bayesdl._rng import isolated
from bayesdl.data.rows import RowIds, fingerprint
from bayesdl.density import LogDensity
from bayesdl.errors import Divergence, MethodError
from bayesdl.infer.checkpoint import Checkpoint, as_checkpoint
from bayesdl.infer.loop import Callback, Run
from bayesdl.infer.record import function_inputs
from bayesdl.infer.schedules import Schedule, as_schedule, as_setting
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.problem import Problem, prepare
from bayesdl.posterior.updating import as_prior, updated

Init = Mapping[str, Tensor] | Posterior | str | None


ASSUMED_LEAPFROGS = 63
"""Leapfrog steps per transition that a forecast assumes where they are not known beforehand."""


def positive(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is not a positive finite number."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise MethodError(f"{method}({name}={value!r}): {name} must be a positive number.")


def whole(method: str, at_least: int = 1, **settings: Any) -> None:
    """Raise MethodError for a setting that is not a whole number of the given least size."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise MethodError(f"{method}({name}={value!r}): {name} must be a whole number, at least {at_least}.")


def whole_or_none(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is neither None nor a whole number of at least 1."""
    whole(method, **{name: value for name, value in settings.items() if value is not None})


def fraction(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is not strictly between 0 and 1."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise MethodError(f"{method}({name}={value!r}): {name} must lie between 0 and 1, both excluded.")


def share(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is not a number from 0 to 1."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise MethodError(f"{method}({name}={value!r}): {name} must lie between 0 and 1, both included.")


def one_of(method: str, allowed: tuple[str | None, ...], **settings: Any) -> None:
    """Raise MethodError for a setting that is not in the list."""
    for name, value in settings.items():
        if value not in allowed:
            choices = ", ".join(repr(choice) for choice in allowed)
            raise MethodError(f"{method}({name}={value!r}): {name} must be one of {choices}.")


def flag(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is neither True nor False."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise MethodError(f"{method}({name}={value!r}): {name} must be True or False.")


def rate(method: str, **settings: Any) -> None:
    """Raise MethodError for a setting that is neither a positive number nor a Schedule."""
    for name, value in settings.items():
        as_schedule(value, f"{method}: {name}")


@dataclass(frozen=True)
class Work:
    """What a fit will evaluate, for a forecast.

    Attributes:
        chains: chains, members or particles in one call of the density's gradient.
        calls: such calls; 0 if the method needs none.
        draws: draws of the whole parameter vector that are kept.
        note: what was assumed, or what the cost is instead.
    """

    chains: int = 1
    calls: int = 0
    draws: int = 1
    note: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """A frozen set of settings, and the verb ``fit``.

    A method is a frozen dataclass with a ``name``, settings with defaults, a ``__post_init__`` that checks them (and
    calls this one), and ``_fit``, which drives one engine and wraps what it reached in a posterior.

    Args:
        temperature: T targets p(theta, y)^(1/T) in the constrained space; 1 is Bayes. Only 1 is accepted by methods
            to which a temperature means nothing.
        likelihood_temperature: tempers the likelihood alone: p(theta) p(y | theta)^(1/T).
    """

    name: ClassVar[str]
    tempered: ClassVar[bool] = True  # whether a temperature other than 1 means something
    takes_parameters: ClassVar[bool] = False  # whether pyro.param sites, which have no prior, can be fitted
    learns_prior: ClassVar[bool] = False  # whether prior_rows= can give it a prior of its own
    takes_prior: ClassVar[bool] = True  # whether prior= means something: the prior over the latents enters
    streams: ClassVar[bool] = False  # whether its draws come one by one: draws_to= and functions_at=

    temperature: float = field(default=1.0, kw_only=True)
    likelihood_temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings that all methods share."""
        positive(self.name, temperature=self.temperature, likelihood_temperature=self.likelihood_temperature)
        if self.temperature != 1 and not self.tempered:
            raise MethodError(
                f"{self.name}(temperature={self.temperature!r}): only temperature=1 means something here, because "
                f"{self.name} looks for maxima; it does not approximate a tempered posterior."
            )

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The method with settings as ``settings()`` gives them."""
        return cls(**{name: as_setting(value) for name, value in settings.items()})

    @property
    def reserved(self) -> float | None:
        """The fraction of the rows that learn the prior where ``fit`` is not told otherwise."""
        return None

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        parameters = [site.name for site in density.sites if site.scope == "param"]
        if parameters and not self.takes_parameters:
            return (
                f"{parameters} are pyro.param sites, which have no prior to sample from; give them a prior with "
                "pyro.sample, or use MAP, MaximumLikelihood or a variational method, which estimate them"
            )
        if getattr(self, "batch_size", None) is not None:
            if not density.factorised:
                return "mini-batches need a log density with one term per row; use batch_size=None (all rows)"
            if any(site.scope == "local" for site in density.sites):
                return "mini-batches need latents that all rows share; use batch_size=None (all rows)"
        return None

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        seed: int = 0,
        prior: Posterior | None = None,
        prior_rows: float | RowIds | None = None,
        init: Init = None,
        callback: Callback | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
        data_plate: str = "data",
        draws_to: str | os.PathLike[str] | None = None,
        functions_at: Any = None,
    ) -> Posterior:
        """Fit a model to data.

        Args:
            model: a BayesianNetwork or any Pyro program with its observed sites in the data plate.
            data: a Dataset, a pair (x, y), or a dict of the program's keyword arguments.
            seed: the result is a function of the seed; global random states are left as they were found.
            prior: a Gaussian posterior of the same model from earlier data: it is the prior of this fit, in its own
                units (its scaler serves these data too), and where the fit starts unless ``init`` says otherwise. The
                rows that it has seen join ``prior_rows`` in what a certificate knows.
            prior_rows: rows for the scaler and for learning the prior, kept apart from the rows of a later PAC-Bayes
                bound: a fraction or the rows' identities.
            init: where to start: "prior", "network" (a module's own initialisation), "map" (a mode for each chain: a
                deep ensemble), "pathfinder" (a draw of a fitted Gaussian for each chain), a dict of site values, or a
                posterior; None is the method's own choice.
            callback: called with the engine's state after each step; returns True to stop early.
            checkpoint: a path or a Checkpoint; a fit that finds one resumes from it.
            progress: whether to show a progress bar on stderr; None asks the terminal.
            data_plate: the name of the program's plate over rows.
            draws_to: for samplers: a folder into which draws are written as they come, so that memory holds a block of
                them. ``posterior.save`` of the same folder makes it one that ``load`` opens.
            functions_at: for samplers: raw inputs (as ``predict`` takes them) at which the likelihood's parameters are
                kept instead of the draws, for networks too large to keep; in the folder, if there is one.

        Returns:
            The posterior; ``info`` tells method, settings, seed, seconds and gradients.

        Raises:
            MethodError: the method does not apply to this model or data, or to this prior.
            DataError, ModelError: the data or the model cannot be used.
            ModelMismatch: the prior is over other sites than the model's.
            Divergence: the numbers left the finite range.
            ResumeMismatch: the checkpoint belongs to another run.
        """
        started = time.perf_counter()
        _whole_seed(seed)
        if prior is None and prior_rows is None:
            prior_rows = self.reserved
        if prior_rows is not None and not self.learns_prior:
            raise MethodError(
                f"{self.name} cannot learn a prior from prior_rows, because its posterior has no density relative to "
                "one; fit it on some rows and certify it on others, or use MeanFieldVI."
            )
        before = None if prior is None else self._as_prior(prior, prior_rows is not None)
        ranks = Ranks.current()
        self._check_streaming(draws_to is not None, functions_at is not None, ranks)
        with isolated(seed, self.name), pyro.get_param_store().scope():
            problem = self._prepare(model, data, before, prior_rows=prior_rows, seed=seed, data_plate=data_plate)
            inputs = None if functions_at is None else function_inputs(problem, functions_at)
            identity = {"method": self.name, "settings": self.settings(), "data": data_fingerprint(problem)}
            if draws_to is not None or inputs is not None:
                identity["kept"] = {"in a folder": draws_to is not None, "functions at": _fingerprints(inputs or {})}
            run = Run(
                seed=seed,
                checkpoint=as_checkpoint(checkpoint),
                callback=callback,
                progress=progress,
                init=before if init is None else init,
                learn_prior=prior_rows is not None,
                identity=identity,
                ranks=ranks,
                draws_to=None if draws_to is None else Path(draws_to),
                functions_at=inputs,
            )
            posterior = self._fit(problem, run)
        self._sign(posterior, run, started)
        if before is not None:
            rows = before.problem.rows
            posterior.info["prior"] = {"method": before.info.get("method"), "rows": None if rows is None else len(rows)}
        return posterior

    def fit_each(
        self,
        model: Any,
        datasets: Sequence[Any],
        *,
        seed: int = 0,
        init: Init = None,
        progress: bool | None = None,
        data_plate: str = "data",
        keep_stuck: bool = False,
    ) -> list[Posterior]:
        """Fit a model to each of several data sets: replicates, folds, bootstrap samples.

        A full-batch sampler runs all data sets of the same shapes as one batch: R of them take about the time of one
        run with R times the chains. Every data set has a step size and a metric of its own. Other methods fit one after
        the other.

        Args:
            model: as in ``fit``.
            datasets: each as in ``fit``.
            seed: the k-th result depends on the seed, on k, and (in rounding) on how many run together.
            init: as in ``fit``; chains of several data sets that run as one batch cannot start at "map".
            progress: as in ``fit``.
            data_plate: as in ``fit``.
            keep_stuck: whether a data set in which chains accept nothing after warm-up is kept, with these chains in
                ``info["stuck"]``; else it is an error, as in ``fit``.

        Returns:
            One posterior a data set, in their order.

        Raises:
            MethodError, DataError, ModelError, Divergence: as ``fit``.
        """
        started = time.perf_counter()
        _whole_seed(seed)
        with isolated(seed, self.name), pyro.get_param_store().scope():
            problems: list[Problem] = []
            for data in datasets:
                like = problems[0].density if problems else None
                problems.append(self._prepare(model, data, seed=seed, data_plate=data_plate, like=like))
            run = Run(seed=seed, progress=progress, init=init, keep_stuck=keep_stuck)
            posteriors = self._fit_each(problems, run)
        for posterior in posteriors:
            self._sign(posterior, run, started)
        return posteriors

    def extend(
        self,
        posterior: Posterior,
        draws: int,
        *,
        data: Any = None,
        callback: Callback | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> Posterior:
        """Draw more from where a posterior's chains stand, without a new warm-up.

        A run of S draws that is extended by n ends with the very draws of a run of S + n.

        Args:
            posterior: made by this method, with these settings; also one that was saved and loaded.
            draws: more draws per chain.
            data: the training data once more, for a posterior that was loaded.
            callback: as in ``fit``.
            checkpoint: as in ``fit``; a file of its own for each extension.
            progress: as in ``fit``.

        Returns:
            A new posterior with all draws; the given one stays as it is.

        Raises:
            MethodError: the posterior has no chains to go on with.
            ModelMismatch: other data than those of the fit.
        """
        started = time.perf_counter()
        whole(self.name, draws=draws)
        if not isinstance(posterior, DrawsPosterior) or posterior.last is None:
            raise MethodError(
                f"This posterior ({posterior.info.get('method', 'of unknown method')}) cannot be extended: only runs "
                "of a sampler on one data set know where their chains stand."
            )
        posterior = posterior if data is None else posterior.with_data(data)
        info = posterior.info
        problem = posterior.problem
        if not problem.complete:
            raise MethodError(
                "A loaded posterior no longer has its training rows. Give them back first: "
                "bayesdl.extend(posterior, draws, data=...)."
            )
        run = Run(
            seed=info["seed"],
            checkpoint=as_checkpoint(checkpoint),
            callback=callback,
            progress=progress,
            identity={
                "method": self.name,
                "settings": self.settings(),
                "data": data_fingerprint(problem),
                "extends": posterior.shape[1],
                "kept": posterior.kind,
            },
            ranks=Ranks.current(),
        )
        self._check_streaming(posterior.in_folder, False, run.ranks)
        with isolated(run.seed, self.name), pyro.get_param_store().scope():
            more = replace(self, draws=draws)._extend(posterior, run)  # type: ignore[call-arg]  # samplers have draws
        whole_run = posterior.followed_by(more)
        if "divergences" in info:
            whole_run.info["divergences"] += info["divergences"]
        self._sign(whole_run, run, started)
        whole_run.info["settings"]["draws"] = whole_run.shape[1]
        for name in ("seconds", "gradients"):
            whole_run.info[name] += info[name]
        return whole_run

    def _check_streaming(self, to_folder: bool, functions: bool, ranks: Ranks) -> None:
        option = "draws_to" if to_folder else "functions_at"
        if (to_folder or functions) and not self.streams:
            raise MethodError(
                f"{self.name} takes no {option}=: it has no draws that come one by one. posterior.save(folder) writes "
                "what it finds, and posterior.predict(x) gives the functions; draws_to= and functions_at= are for "
                "samplers such as NUTS or SGLD."
            )
        if to_folder and ranks.world > 1:
            raise MethodError(
                f"draws_to= does not work with several processes; this is one of {ranks.world}. Use functions_at= "
                "alone, which keeps little in memory, or run the chains in one process."
            )

    def _extend(self, posterior: DrawsPosterior, run: Run) -> DrawsPosterior:
        raise MethodError(f"{self.name} has no chains to extend.")

    def _as_prior(self, prior: Posterior, learns: bool) -> GaussianPosterior:
        if not self.takes_prior:
            raise MethodError(
                f"{self.name} takes no prior=: it does not use the prior over the weights. Use MAP, MeanFieldVI, or a "
                "sampler such as NUTS."
            )
        if learns:
            raise MethodError("prior= gives the prior and prior_rows= learns one: choose one of them.")
        if self.temperature != 1:
            raise MethodError(
                f"{self.name}(temperature={self.temperature!r}) with prior= would temper what was learnt before once "
                "more; use temperature=1 (likelihood_temperature is possible)."
            )
        return as_prior(prior)

    def _prepare(self, model: Any, data: Any, prior: GaussianPosterior | None = None, **options: Any) -> Problem:
        problem = prepare(
            model,
            data,
            temperature=self.temperature,
            likelihood_temperature=self.likelihood_temperature,
            scaler=None if prior is None else prior.problem.scaler,
            **options,
        )
        problem = problem if prior is None else updated(problem, prior)
        reason = self.applies_to(problem.density)
        if reason:
            raise MethodError(f"{self.name} cannot be used here: {reason}.")
        return problem

    def _sign(self, posterior: Posterior, run: Run, started: float) -> None:
        posterior.info.update(
            method=self.name,
            settings=self.settings(),
            seed=run.seed,
            seconds=time.perf_counter() - started,
            gradients=sum(count for (count,) in run.ranks.numbers([run.tally.gradients])),
            gradients_here=run.tally.gradients_here,
            interrupted=run.tally.interrupted,
        )

    def work(self, problem: Problem) -> Work:
        """What a fit of this problem will evaluate; a method that does not say so is not forecast."""
        return Work(note="no forecast")

    @abstractmethod
    def _fit(self, problem: Problem, run: Run) -> Posterior:
        """Drive the engine with ``run.drive`` and make a posterior of its last state."""

    def _fit_each(self, problems: list[Problem], run: Run) -> list[Posterior]:
        """Fit several problems, one after the other unless a method knows better."""
        found = []
        for k, problem in enumerate(problems):
            try:
                found.append(self._fit(problem, replace(run.stage(f"replicate {k}"), init=run.init)))
            except Divergence as error:
                raise Divergence(f"In data set {k}: {error}") from error
        return found


def _whole_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MethodError(f"seed={seed!r}: the seed must be a whole number.")


def data_fingerprint(problem: Problem) -> dict[str, str]:
    """BLAKE2b of each tensor of the batch, and the other arguments as text, by name."""
    return _fingerprints(problem.batch)


def _fingerprints(batch: Mapping[str, Any]) -> dict[str, str]:
    return {name: fingerprint(value) if isinstance(value, Tensor) else repr(value) for name, value in batch.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_json()
    if isinstance(value, Method):
        return {"method": value.name, **value.settings()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
