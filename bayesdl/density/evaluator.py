"""Value and gradient of all chains at once: compiled, by a recorded graph, by the handlers, or chain after chain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bayesdl.density import forecast, graph, program
from bayesdl.density.compiled import CompilerFailure, compile_graph
from bayesdl.density.gaussian_part import GaussianPart
from bayesdl.density.graph import Graph
from bayesdl.density.sites import Site, split
from bayesdl.errors import BayesdlError, ModelError, TraceMismatch

Execution = Literal["auto", "compile", "replay", "handlers", "loop"]


class SlowProgramWarning(UserWarning):
    """A program could not be recorded as a graph, so every evaluation runs Pyro's handlers (about ten times slower)."""


@dataclass(frozen=True)
class Evaluator:
    """A function ``(z [C, D], factors, *tensors) -> (value [C], gradient [C, D])`` and how it came about.

    Attributes:
        function: the function; shapes are fixed.
        way: "compile", "replay", "handlers" or "loop".
        note: why no faster way is gone, or empty.
    """

    function: Graph
    way: str
    note: str = ""


@dataclass(frozen=True)
class Wish:
    """Which way to go, or what to choose it from.

    Attributes:
        execution: the way; "auto" chooses.
        calls: evaluations to come; without any, nothing is compiled.
    """

    execution: Execution
    calls: int = 0

    def wants_another(self, found: Evaluator) -> bool:
        """Whether an evaluator that went one way should be made anew with this wish."""
        if self.execution == "auto":
            return found.way == "replay" and self.calls > 0
        return found.way != self.execution


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference between two ways of computing the same number that rounding explains."""
    return 1e-9 if dtype == torch.float64 else 1e-4


class Blocks:
    """A recorded graph that runs over blocks of chains, small enough for the cache.

    What depends on the data alone is computed when the data change, if they are steady; else with every call.
    """

    def __init__(self, function: Graph, inputs: Sequence[Tensor], in_rows: Sequence[int | None], steady: bool) -> None:
        """Record ``function`` for inputs like these."""
        z, *data = inputs
        self.in_rows = (None, *in_rows)  # of the factors, and of the batch's tensors
        self.shared = not any(dim == 0 for dim in in_rows)
        recorded = graph.record(function, inputs)
        self.elements, largest = graph.elements(recorded)
        self.block = forecast.block(len(z), largest, z.dtype)
        if self.block < len(z):
            recorded = graph.record(function, (z[: self.block], *self._cut(data, 0)))
        self.operations = graph.operations(recorded)
        whole = self.block >= len(z) or self.shared
        self.before, self.graph = graph.split_off_data(recorded) if steady and whole else (None, recorded)
        self.call: Callable[..., Any] = self.graph
        self._data: list[Tensor] = []
        self._versions: list[object] = []
        self._bound: Sequence[Tensor] = ()

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Put machine code in the graph's place.

        Raises:
            CompilerFailure: as said; the graph stays.
        """
        z, *data = inputs
        bound = self._bind(data)
        example = (z[: self.block].contiguous(), *(self._cut(bound, 0) if self.block < len(z) else bound))
        self.call = compile_graph(self.graph, example)

    def __call__(self, z: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of all chains."""
        z = z.contiguous()
        bound = self._bind(data)
        chains, block = len(z), self.block
        if block >= chains:
            value, gradient = self.call(z, *bound)
            return value, gradient
        values, gradients = [], []
        for start in range(0, chains, block):
            first = min(start, chains - block)  # the last block overlaps the one before: one graph serves for all
            value, gradient = self.call(z[first : first + block], *self._cut(bound, first))
            values.append(value[start - first :])
            gradients.append(gradient[start - first :])
        return torch.cat(values), torch.cat(gradients)

    def _bind(self, data: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the graph takes besides z, in the strides that machine code was made for."""
        if self.before is None:
            return [tensor.contiguous() for tensor in data]
        # Tensors of inference mode do not count their changes; they are taken for changed.
        versions = [object() if tensor.is_inference() else tensor._version for tensor in data]
        same = len(self._data) == len(data) and all(map(_is, self._data, data))
        if not same or versions != self._versions:
            self._bound = [tensor.contiguous() for tensor in self.before(*data)]
            self._data, self._versions = list(data), versions
        return self._bound

    def _cut(self, data: Sequence[Tensor], first: int) -> Sequence[Tensor]:
        """The part of one block of chains, of the tensors that carry the chain dimension."""
        if self.shared:
            return data
        last = first + self.block
        return [t if dim is None else t[first:last] for t, dim in zip(data, self.in_rows, strict=True)]


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


def build(
    one: Callable[..., Tensor],
    layout: Sequence[Site],
    in_rows: tuple[int | None, ...],
    gaussian: GaussianPart | None,
    inputs: tuple[Tensor, ...],
    wish: Wish,
    *,
    steady: bool,
) -> Evaluator:
    """The fastest function ``(z [C, D], factors, *tensors) -> (value [C], gradient [C, D])`` that works and pays.

    Args:
        one: the target of one chain from its leaves, the factors, and the batch's tensors.
        layout: sites of z.
        in_rows: per tensor of the batch, 0 if it carries the chain dimension first, else None.
        gaussian: closed-form part to add, or None.
        inputs: example inputs; shapes are fixed to theirs.
        wish: which way to go, or what to choose it from.
        steady: the data will be the same on every call (all of them, not mini-batches).

    Raises:
        ModelError: "replay" was asked for and the program cannot be recorded.
        TraceMismatch: the recorded graph gives other numbers than the program.
        RandomDensity: the program draws random numbers.
    """

    def add_gaussian(z: Tensor, value: Tensor, gradient: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        return (value, gradient) if gaussian is None else gaussian.add(z, value, gradient, factors[1])

    def batched(z: Tensor, factors: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        # Differentiating the leaves, not z: the backward of a slice writes a zero tensor of full size per site.
        with program.unchecked():
            parts, value = vmap(grad_and_value(one), in_dims=(0, None, *in_rows))(split(layout, z), factors, *tensors)
        gradient = torch.cat([part.reshape(len(z), -1) for part in parts], dim=1)
        return add_gaussian(z, value, gradient, factors)

    def looped(z: Tensor, factors: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for chain, row in enumerate(z):
            own = [t if dim is None else t[chain] for t, dim in zip(tensors, in_rows, strict=True)]
            leaf = row.detach().requires_grad_()
            with torch.enable_grad(), program.unchecked():
                value = one(split(layout, leaf), factors, *own)
            values.append(value.detach())
            gradients.append(torch.autograd.grad(value, leaf)[0])
        return add_gaussian(z, torch.stack(values), torch.stack(gradients), factors)

    if wish.execution == "loop":
        return Evaluator(looped, "loop")
    if wish.execution == "handlers":
        return Evaluator(batched, "handlers")
    try:
        recorded = Blocks(batched, inputs, in_rows, steady)
    except BayesdlError:
        raise
    except Exception as error:  # torch refuses to record with errors of many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if wish.execution == "replay":
            raise ModelError(f"The program cannot be recorded as a graph ({reason}).") from error
    else:
        return _recorded(recorded, batched, inputs, wish)
    way = "handlers" if _works(batched, inputs) else "loop"
    warnings.warn(
        f"The program runs under Pyro's handlers, about ten times slower than a recorded graph: {reason}",
        SlowProgramWarning,
        stacklevel=4,
    )
    return Evaluator(batched if way == "handlers" else looped, way, reason)


def _recorded(recorded: Blocks, original: Graph, inputs: tuple[Tensor, ...], wish: Wish) -> Evaluator:
    """The replay of a recorded graph, or the compiled graph where that is asked for or pays.

    Raises:
        TraceMismatch: the replay gives other numbers than the program.
    """
    want = original(*inputs)
    difference = _difference(recorded(*inputs), want)
    if difference:
        raise TraceMismatch(
            f"The recorded graph's {difference}: the program does something while it is recorded that it does not "
            "repeat. Make it a function of its inputs."
        )
    on_cpu = inputs[0].device.type == "cpu"
    pays = on_cpu and forecast.pays(recorded.operations, recorded.elements, wish.calls)
    if wish.execution != "compile" and not (wish.execution == "auto" and pays):
        return Evaluator(recorded, "replay")
    try:
        recorded.compile(inputs)
        difference = _difference(recorded(*inputs), want)
        if difference:
            raise CompilerFailure(f"The compiled graph's {difference}")
    except CompilerFailure as failure:
        recorded.call = recorded.graph
        return Evaluator(recorded, "replay", f"not compiled: {failure}")
    return Evaluator(recorded, "compile")


def _works(function: Graph, inputs: tuple[Tensor, ...]) -> bool:
    try:
        function(*inputs)
    except BayesdlError:
        raise
    except Exception:  # vmap refuses value-dependent control flow with errors of many types
        return False
    return True


def _difference(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> str:
    """In words, by how much values or gradients differ beyond rounding; empty if they do not."""
    for name, a, b in zip(("value", "gradient"), got, want, strict=True):
        allowed = tolerance(b.dtype)
        finite = b[b.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if len(finite) else 1.0
        if not torch.allclose(a, b, rtol=allowed, atol=allowed * scale, equal_nan=True):
            return f"{name} differs from the program's by {float((a - b).abs().max()):.3g}"
    return ""
