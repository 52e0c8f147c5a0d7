"""A model and its data, made ready for an engine: units, dtypes, row bookkeeping, and the log density."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl import _rng
from bayesdl.data import Dataset, RowIds, Scaler, as_dataset
from bayesdl.data.rows import fingerprint
from bayesdl.density import LogDensity
from bayesdl.errors import DataError, MethodError, ModelError
from bayesdl.models import BayesianNetwork


@dataclass(frozen=True)
class Problem:
    """What every engine and every posterior works on.

    Attributes:
        model: the Pyro program.
        density: its log density over the training batch.
        batch: the program's keyword arguments: rows first, in model units and the model's dtype.
        x_name: argument that holds the inputs, or None for programs fitted on a dict.
        y_name: argument that holds the targets, or None likewise.
        scaler: raw units to model units.
        rows: identities of the rows fitted on, or None where the data are a dict.
        prior_rows: identities of the rows that shaped the scaler or the prior (set A of a certificate); empty if
            nothing was learnt from data; None if no rows were reserved and the scaler saw all of them.
        task: "regression", "classification", or "program".
        classes: class labels of a classification Dataset.
        seed: seed of the fit.
        data_plate: name of the program's plate over rows.
        complete: whether ``batch`` holds all rows fitted on; a loaded posterior has only a few of them.
    """

    model: Any
    density: LogDensity
    batch: Mapping[str, Any]
    x_name: str | None
    y_name: str | None
    scaler: Scaler
    rows: RowIds | None
    prior_rows: RowIds | None
    task: str
    classes: tuple[str, ...]
    seed: int
    data_plate: str = "data"
    complete: bool = True

    @property
    def n(self) -> int:
        """Number of rows N in the data plate.

        Raises:
            NotFactorised: the program has no data plate.
        """
        if self.density.n is None:
            self.density.require_rows()
        return int(self.density.n or 0)

    @property
    def scaled(self) -> bool:
        """Whether model units differ from raw units."""
        return changes_units(self.scaler)

    @property
    def log_scale(self) -> float:
        """By how much a row's log density in model units exceeds that in raw units.

        The number of targets times the log of the scale that was divided out of each; 0 where nothing was.
        """
        if self.y_name is None:
            return 0.0
        return self.batch[self.y_name].shape[1:].numel() * float(self.scaler.y_scale.log())

    @property
    def row_names(self) -> tuple[str, ...]:
        """Arguments of the program that have one entry per row."""
        return self.density.row_names

    @property
    def training_inputs(self) -> dict[str, Any]:
        """The program's arguments without the target, for the training rows."""
        return {name: value for name, value in self.batch.items() if name != self.y_name}

    @property
    def target(self) -> str:
        """The observed site whose distribution ``predict`` returns.

        Raises:
            ModelError: there are none or several.
        """
        observed = self.density.observed
        if len(observed) != 1:
            raise ModelError(
                f"The program observes {len(observed)} sites in its data plate ({', '.join(observed) or 'none'}); say "
                "which one to predict: predict(x, site=...)."
            )
        return observed[0]

    @property
    def draws_anew(self) -> bool:
        """Whether ``predict`` draws more than the target: latents in the data plate, or observed sites before it."""
        density = self.density
        local = any(site.scope == "local" for site in density.sites)
        return local or bool(density.structure.discrete) or len(density.observed) > 1

    def minibatch(self, index: Tensor) -> dict[str, Any]:
        """The rows ``index`` ``[B]``, or ``[C, B]`` for one batch per chain, of every row argument."""
        flat = index.reshape(-1)  # several times faster than indexing with a matrix
        return {name: self.batch[name].index_select(0, flat).unflatten(0, index.shape) for name in self.row_names}

    def restrict(self, index: Tensor) -> Problem:
        """The same problem on some of its rows; units and prior stay."""
        batch = {**self.batch, **self.minibatch(index)}
        density = LogDensity(
            self.model,
            batch,
            data_plate=self.data_plate,
            temperature=self.density.temperature,
            likelihood_temperature=self.density.likelihood_temperature,
        )
        if self.density.new_prior is not None:
            density = density.with_gaussian_prior(*self.density.new_prior)
        rows = None if self.rows is None else self.rows.take(index)
        return replace(self, density=density, batch=batch, rows=rows)

    def of_prior(self) -> Tensor:
        """Which of the rows fitted on are those of the prior, ``[N]`` bool, where some were reserved for it.

        Raises:
            MethodError: they all are.
        """
        assert self.rows is not None  # ``prepare`` refuses prior_rows otherwise
        assert self.prior_rows is not None  # likewise
        found = self.rows.isin(self.prior_rows)
        if bool(found.all()):
            raise MethodError(
                f"prior_rows holds all {len(found)} rows: none are left to update the prior with. Give a part of them."
            )
        return found

    def with_prior_by_rows(self, mean: Tensor, sd: Tensor) -> Problem:
        """The same with a Gaussian prior over z that was chosen by its rows; they are the prior's from then on."""
        parts = [part for part in (self.rows, self.prior_rows) if part is not None]
        seen = None if self.rows is None else RowIds.concat(parts).unique()[0]
        return replace(self, density=self.density.with_gaussian_prior(mean, sd), prior_rows=seen)

    def inputs(self, x: Any) -> dict[str, Any]:
        """The program's arguments, without the target, for raw inputs ``x`` (or a dict of them).

        Raises:
            DataError: wrong columns, arguments of different lengths, or values that are not finite.
        """
        if not isinstance(x, Mapping):
            if self.x_name is None:
                raise DataError("This model was fitted on a dict of arguments; predict takes the same without target.")
            x = {self.x_name: x}
        arguments = {name: self._argument(name, value) for name, value in x.items()}
        lengths = {name: len(arguments[name]) for name in self.row_names if isinstance(arguments.get(name), Tensor)}
        if len(set(lengths.values())) > 1:
            first, *others = lengths
            other = next(name for name in others if lengths[name] != lengths[first])
            raise DataError(f"{first} has {lengths[first]} rows and {other} has {lengths[other]}.")
        if isinstance(self.model, BayesianNetwork) and self.x_name in arguments:
            self.model.check_data(arguments[str(self.x_name)], arguments.get(str(self.y_name)))
        return arguments

    def labelled(self, x: Any, y: Any = None) -> dict[str, Any]:
        """The program's arguments for raw inputs and raw targets, or for one dict of both.

        Raises:
            DataError: missing arguments, lengths differ, wrong columns, or values that are not finite.
        """
        if isinstance(x, Mapping):
            given = dict(x) if y is None or self.y_name is None else {**x, self.y_name: y}
        elif self.y_name is None or self.x_name is None:
            raise DataError("This model was fitted on a dict of arguments; pass them as one dict, with y=None.")
        else:
            given = {self.x_name: x} if y is None else {self.x_name: x, self.y_name: y}
        missing = [name for name in self.row_names if name not in given]
        if missing:
            raise DataError(f"The log likelihood needs {', '.join(missing)} as well: pass x and y, or a dict of all.")
        return self.inputs(given)

    def _argument(self, name: str, value: Any) -> Any:
        """One argument, from raw units to the model's, in the type that it had in the fit."""
        example = self.batch.get(name)
        array = isinstance(value, Tensor | np.ndarray | list) or hasattr(value, "to_numpy")
        if not (array or name in (self.x_name, self.y_name)):
            return value
        value = _finite(_tensor(value), name)
        if not isinstance(example, Tensor):
            return value
        if name == self.y_name and value.dim() == example.dim() + 1 and value.shape[-1] == 1:
            value = value.squeeze(-1)
        if value.dim() != example.dim():
            raise DataError(
                f"{name} has shape {tuple(value.shape)}; the model was fitted on {tuple(example.shape)}: "
                "the number of dimensions must agree (a single row needs its row dimension)."
            )
        if self.scaled and name in (self.x_name, self.y_name):
            value = self.scaler.x(value) if name == self.x_name else self.scaler.y(value)
        if value.is_floating_point() and not example.is_floating_point():
            broken = value[value != value.round()]
            if len(broken):
                raise DataError(f"{name} must hold whole numbers, as in the fit; it holds {float(broken[0]):g}.")
        return value.to(dtype=example.dtype, device=example.device)


def changes_units(scaler: Scaler) -> bool:
    """Whether a scaler does anything."""
    same = (scaler.x_mean == 0).all() and (scaler.x_scale == 1).all() and scaler.y_mean == 0 and scaler.y_scale == 1
    return not bool(same)


def prepare(
    model: Any,
    data: Any,
    *,
    prior_rows: float | RowIds | None = None,
    seed: int = 0,
    data_plate: str = "data",
    temperature: float = 1.0,
    likelihood_temperature: float = 1.0,
    like: LogDensity | None = None,
    scaler: Scaler | None = None,
) -> Problem:
    """Make a model and its data ready.

    A ``Dataset`` is standardised for a ``BayesianNetwork`` (inputs always, targets where their support is the real
    line); hand-written programs state their priors in raw units and get raw numbers. Pairs and dicts are never scaled.

    Args:
        model: a Pyro program.
        data: a ``Dataset``, a pair ``(x, y)``, or a dict of keyword arguments.
        prior_rows: rows A for the scaler (and a learnt prior): their identities, or a fraction to draw by the seed.
        seed: seed of the fit.
        data_plate: name of the plate over rows.
        temperature: T of ``LogDensity``.
        likelihood_temperature: T_L of ``LogDensity``.
        like: the model's density over other data; if the arguments have the same shapes, the program is not looked into
            once more, and recorded graphs are shared.
        scaler: the units of an earlier fit, in which its weights have their meaning; for pairs as well.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be used.
    """
    if not callable(model):
        raise ModelError(f"A model is a callable Pyro program model(x, y=None); got {type(model).__name__}.")
    if isinstance(model, torch.nn.Module) and not _is_program(model):
        raise ModelError(
            f"{type(model).__name__} is a plain network without priors. Lift it: bayesdl.BayesianNetwork(net)."
        )
    task: str
    classes: tuple[str, ...]
    if isinstance(data, Mapping):
        if prior_rows is not None:
            raise DataError("prior_rows needs row identities: pass a Dataset or a pair (x, y) instead of a dict.")
        if scaler is not None and changes_units(scaler):
            raise DataError("The earlier fit standardised its data, and a dict has no names for inputs and targets.")
        batch: dict[str, Any] = {name: _value(value, name) for name, value in data.items()}
        names: tuple[str | None, str | None] = (None, None)
        scaler, rows, shaped = Scaler.identity(torch.empty(1, 0)), None, None
        task, classes = "program", ()
    else:
        names = _argument_names(model)
        network = isinstance(model, BayesianNetwork)
        dataset = _dataset(data, model.task if network else None)
        task, classes, rows = dataset.task, dataset.classes, dataset.rows
        reserved = _reserved(prior_rows, dataset, seed)
        scaled = network and isinstance(data, Dataset) and scaler is None
        scale_y = scaled and dataset.task == "regression" and model.scales_y
        source = dataset if reserved is None else dataset.subset(dataset.rows.isin(reserved))
        if scaled:
            scaler = Scaler.fit(source.x, source.y, scale_y=scale_y)
        elif scaler is None or not changes_units(scaler):
            scaler = Scaler.identity(dataset.x)
        shaped = None
        if reserved is not None or not scaled:
            shaped = RowIds.concat([part for part in (reserved, dataset.shaped_by) if part is not None])
        x, y = scaler.x(dataset.x), scaler.y(dataset.y)
        if network:
            # Whole-number inputs of a pair are indices for an embedding, not a table to standardise.
            given = _tensor(data[0]) if not isinstance(data, Dataset) else x
            x = x if given.is_floating_point() else given
            x, y = (_cast(value, model.dtype, model.device) for value in (x, y))
            model.check_data(x, y)
        elif isinstance(data, Dataset):
            x, y = (_cast(value, torch.get_default_dtype(), value.device) for value in (x, y))
        else:
            x, y = (_value(value, name) for value, name in zip(data, ("x", "y"), strict=True))
        batch = {str(names[0]): x, str(names[1]): y}
    if like is not None and same_shapes(like.batch, batch):
        density = like.with_batch(batch)
    else:
        density = LogDensity(
            model,
            batch,
            data_plate=data_plate,
            temperature=temperature,
            likelihood_temperature=likelihood_temperature,
        )
    return Problem(model, density, batch, names[0], names[1], scaler, rows, shaped, task, classes, seed, data_plate)


def same_shapes(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two batches differ in the values of their tensors alone."""

    def shape(value: Any) -> Any:
        return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value

    return one.keys() == other.keys() and all(shape(one[name]) == shape(other[name]) for name in one)


def _is_program(model: torch.nn.Module) -> bool:
    from pyro.nn import PyroModule

    return isinstance(model, PyroModule)


def _dataset(data: Any, task: str | None) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if task is not None:
        return as_dataset(data, "regression" if task == "regression" else "classification")
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            f"Data are a Dataset, a pair (x, y), or a dict of the program's arguments; got {type(data).__name__}."
        )
    x, y = (_value(value, name) for value, name in zip(data, ("x", "y"), strict=True))
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or len(x) != len(y) or not len(x):
        raise DataError("x and y must be tensors or arrays with the same number of rows, at least one.")
    task = "regression" if y.is_floating_point() else "classification"
    rows = RowIds.of(fingerprint(x.double(), y.double()), len(x))
    names = tuple(f"x{k + 1}" for k in range(x.shape[1])) if x.dim() == 2 else ()
    return Dataset(x, y, "regression" if task == "regression" else "classification", names, "y", (), "data", rows)


def _reserved(prior_rows: float | RowIds | None, dataset: Dataset, seed: int) -> RowIds | None:
    if prior_rows is None:
        return None
    if isinstance(prior_rows, RowIds):
        foreign = len(prior_rows.minus(dataset.rows))
        if foreign:
            raise DataError(f"{foreign} of the prior rows are not among the rows to fit on.")
        return prior_rows
    if not 0 < prior_rows < 1:
        raise DataError(f"prior_rows={prior_rows} must be a fraction between 0 and 1, or row identities.")
    chosen, _ = dataset.rows.unique()
    count = max(1, round(prior_rows * len(chosen)))
    order = torch.randperm(len(chosen), generator=_rng.generator(seed, "prior rows"))
    return chosen.take(order[:count].sort().values)


def _argument_names(model: Any) -> tuple[str, str]:
    parameters = [
        name
        for name, parameter in inspect.signature(model).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
    ]
    if len(parameters) < 2:
        raise ModelError(
            f"For data (x, y) the program takes two arguments, model(x, y=None); this one takes {parameters}. Pass a "
            "dict of keyword arguments for other signatures."
        )
    return parameters[0], parameters[1]


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise DataError(f"Values of type {array.dtype} are no numbers; encode them first (read_csv(encode='onehot')).")
    return torch.as_tensor(array)


def _value(value: Any, name: str) -> Any:
    """A program's argument: arrays become tensors, in torch's default dtype if floating; other objects pass."""
    if isinstance(value, np.ndarray) or hasattr(value, "to_numpy") or (isinstance(value, list) and value):
        tensor = _tensor(value)
        value = tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    return _finite(value, name) if isinstance(value, Tensor) else value


def _finite(value: Tensor, name: str) -> Tensor:
    if value.dim() and not len(value):
        raise DataError(f"{name} has no rows.")
    bad = ~torch.isfinite(value) if value.is_floating_point() else torch.zeros(0, dtype=torch.bool)
    if bad.any():
        first = tuple(int(k) for k in bad.nonzero()[0])
        raise DataError(f"{name} holds {int(bad.sum())} values that are NaN or infinite, the first at {first}.")
    return value


def _cast(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
