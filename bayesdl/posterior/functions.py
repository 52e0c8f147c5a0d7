"""A posterior over functions at given inputs: of every draw only what the likelihood says there is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.errors import DataError, MethodError
from bayesdl.posterior.diagnostics import ROWS
from bayesdl.posterior.divergences import Place
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.families import Spec, pack
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.predictive import CELLS, parameters
from bayesdl.posterior.problem import Problem
from bayesdl.posterior.shards import InMemory, Shards, Store


class FunctionPosterior(DrawsPosterior):
    """The likelihood's distribution at fixed inputs under every draw (``fit(..., functions_at=x)``), and no weights.

    For networks whose draws are too large to keep: a draw takes as many numbers as the likelihood has parameters at
    these inputs. It predicts there and nowhere else, and tells how well the chains have mixed there.

    Attributes:
        store: parameters of the likelihood, ``[C, S, N, ...]`` by name, in memory or in a folder.
        inputs: the program's arguments there, in model units.
        stats: as of ``DrawsPosterior``.
    """

    kind: ClassVar[str] = "functions"

    def __init__(
        self,
        problem: Problem | None,
        store: Store,
        inputs: Mapping[str, Any],
        stats: dict[str, Tensor],
        info: dict[str, Any],
    ) -> None:
        super().__init__(problem, torch.empty(store.chains, 0, 0), stats, info)
        self.store, self.inputs = store, dict(inputs)

    @property
    def z(self) -> Tensor:
        """There are none.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "This posterior kept functions at given inputs (functions_at=) and no draws of the latents; fit without "
            "functions_at= to keep these."
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Chains C and draws S of each."""
        return self.store.chains, self.store.draws

    @property
    def in_folder(self) -> bool:
        """Whether the functions lie on disk."""
        return isinstance(self.store, Shards)

    def __repr__(self) -> str:
        """Method, chains, draws and where."""
        return f"{type(self).__name__}({self._words()}, at {self._rows} rows)"

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """There are none, see ``z``."""
        return self.z

    def predict(
        self,
        x: Any = None,
        *,
        batch_size: int | None = None,
        max_draws: int = 1000,
        site: str | None = None,
        seed: int = 0,
    ) -> Prediction:
        """The posterior predictive distribution at the inputs that were kept.

        Args:
            x: these inputs once more, or None.
            batch_size: rows whose parameters are held at once.
            max_draws: most draws to use, evenly thinned.
            site: the observed site, of which there is one.
            seed: unused; for the signature of the base class.

        Raises:
            DataError: other inputs.
        """
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        if batch_size is not None and batch_size < 1:
            raise DataError(f"batch_size={batch_size} must be at least 1.")
        self._check(x, site)
        chosen = self._chosen(self._draw_count(max_draws), seed)
        chosen = torch.arange(self.shape[0] * self.shape[1]) if chosen is None else chosen
        size = max(1, CELLS // len(chosen)) if batch_size is None else batch_size

        def block(start: int) -> Distribution:
            return self._pack(self.store.rows(chosen, slice(start, start + size)))

        starts = range(0, self._rows, size)
        if len(chosen) * self._rows <= CELLS:
            return Prediction.concat([Prediction(block(start), **self._units) for start in starts])
        blocks: list[tuple[int, Callable[[], Distribution]]]
        blocks = [(min(size, self._rows - start), partial(block, start)) for start in starts]
        return Prediction.stream(blocks, **self._units)

    def log_likelihood(self, x: Any = None, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of every row under every draw, ``[S, N]``, as a density of the raw targets.

        Args:
            x: the inputs that were kept once more, or None.
            y: raw targets at them; by default those of the training rows, if the inputs are these.
            max_draws: as in ``predict``.
            seed: as in ``predict``.

        Raises:
            DataError: other inputs, or no targets.
        """
        if y is None:
            if not self._at_training_rows:
                raise DataError("The log likelihood needs the targets y at the inputs that were kept.")
            y = self.problem.scaler.unscale_y(self.problem.batch[str(self.problem.y_name)])
        return self.predict(x, max_draws=max_draws, seed=seed).log_prob_by_draw(y)

    def function_draws(self, x: Any = None, *, site: str | None = None, seed: int = 0) -> Tensor:
        """Mean of the likelihood at the inputs that were kept under every draw, ``[C, S, N]`` or ``[C, S, N, K]``."""
        self._check(x, site)
        return self._by_block(lambda prediction: prediction.mean_by_draw)

    def function_means(self, x: Any = None) -> Tensor | None:
        """As ``function_draws``, of at most 200 evenly spaced rows, ``[C, S, P]``."""
        self._check(x, None)
        some = torch.linspace(0, self._rows - 1, min(self._rows, ROWS)).round().long()
        return self._by_block(lambda prediction: prediction[some].mean_by_draw.flatten(1))

    def total_log_likelihood(self) -> Tensor | None:
        """The log likelihood of all training rows at every draw, ``[C, S]``; None if the inputs are others."""
        if not self._at_training_rows:
            return None
        y = self.problem.batch[str(self.problem.y_name)]
        return self._by_block(lambda prediction: prediction.log_prob_by_draw(y).sum(1), raw=False)

    def site_draws(self, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """No latents were kept."""
        return iter(())

    def divergence_places(self) -> tuple[Place, ...]:
        """No latents were kept."""
        return ()

    def frozen(self) -> Tensor:
        """Chains whose functions never change, ``[C]``."""
        still, first = torch.ones(self.shape[0], dtype=torch.bool), None
        for block in self.store.blocks():
            first = {name: value[:, :1] for name, value in block.items()} if first is None else first
            for name, value in block.items():
                still &= (value == first[name]).flatten(1).all(1).cpu()
        return still

    def followed_by(self, more: DrawsPosterior) -> FunctionPosterior:
        """This posterior with the later draws of its chains."""
        store: Store
        if isinstance(more, FunctionPosterior) and isinstance(self.store, Shards) and isinstance(more.store, Shards):
            store = self.store.joined(more.store)
        elif isinstance(more, FunctionPosterior) and isinstance(self.store, InMemory):
            store = self.store.joined(more.store)  # type: ignore[arg-type]  # kept as its predecessor
        else:
            raise MethodError("Functions at given inputs are followed by functions at the same inputs.")
        return self._followed(FunctionPosterior(self.problem, store, self.inputs, {}, {}), more)

    def write_files(self, folder: Path) -> None:
        """Copy the shards, if there are any, unless they are there."""
        if isinstance(self.store, Shards):
            self.store.copy_to(folder)

    def tensors(self) -> dict[str, Tensor]:
        """Inputs, statistics, where the chains stand, and the parameters or the hashes of their shards."""
        kept = {f"inputs/{name}": value for name, value in self.inputs.items() if isinstance(value, Tensor)}
        if isinstance(self.store, Shards):
            return kept | self._chain_tensors() | self.store.tensors()
        assert isinstance(self.store, InMemory)
        parameters = {f"functions/{name}": value for name, value in self.store.tensors.items()}
        return kept | self._chain_tensors() | parameters

    @classmethod
    def open(
        cls, folder: Path, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]
    ) -> FunctionPosterior:
        """A saved posterior, whose shards, if it has any, lie in its folder."""
        held, inputs = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("functions/", "inputs/")
        )
        arguments = inputs if problem is None else inputs | plain_arguments(problem)
        store: Store = InMemory(held) if held else Shards.restore(folder, tensors)
        return cls(problem, store, arguments, {}, info)._restore_chains(tensors)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return next(iter(self.store.shapes.values()))[0]

    @property
    def _units(self) -> dict[str, Any]:
        scaler = self.problem.scaler
        return {"scale": float(scaler.y_scale), "shift": float(scaler.y_mean)}

    @cached_property
    def _spec(self) -> Spec:
        """How the likelihood is put together, which the program tells."""
        return parameters(self.problem, self.problem.density.prior_draws(1, 0), self.inputs)[0]

    def _pack(self, tensors: dict[str, Tensor]) -> Distribution:
        device = self.problem.density.device
        return pack(self._spec, {name: value.to(device) for name, value in tensors.items()})

    def _by_block(self, statistic: Callable[[Prediction], Tensor], raw: bool = True) -> Tensor:
        """``[C, S, ...]`` from a statistic by draw of predictions, in raw units or in the model's."""
        parts = []
        for block in self.store.blocks():
            shape = next(iter(block.values())).shape[:2]
            distribution = self._pack({name: value.flatten(0, 1) for name, value in block.items()})
            value = statistic(Prediction(distribution, **self._units) if raw else Prediction(distribution))
            parts.append(value.reshape(*shape, *value.shape[1:]))
        return torch.cat(parts, 1)

    @property
    def _at_training_rows(self) -> bool:
        problem = self.problem
        return problem.complete and problem.y_name is not None and _same(self.inputs, problem.training_inputs)

    def _check(self, x: Any, site: str | None) -> None:
        problem = self.problem
        if site is not None and site != problem.target:
            raise DataError(f"site={site!r}: only {problem.target!r} was kept.")
        if x is not None and not _same(self.inputs, problem.inputs(x)):
            raise DataError(
                f"This posterior kept the functions at {self._rows} inputs and no weights: it can be asked at these "
                "alone (predict() without x). Fit with functions_at= all inputs of interest, or without it."
            )


def plain_arguments(problem: Problem) -> dict[str, Any]:
    """The arguments of the program, but for the target, that are not tensors."""
    return {name: value for name, value in problem.training_inputs.items() if not isinstance(value, Tensor)}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def equal(left: Any, right: Any) -> bool:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return torch.equal(left.cpu(), right.cpu())
        return type(left) is type(right) and bool(left == right)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
