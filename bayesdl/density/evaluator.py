"""Value and gradient of all chains at once: compiled, by a recorded graph, by the handlers, or chain after chain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bayesdl.density import forecast, program
from bayesdl.density.blocks import Blocks, FusedStep, Step, difference
from bayesdl.density.compiled import CompilerFailure
from bayesdl.density.gaussian_part import GaussianPart
from bayesdl.density.graph import Graph
from bayesdl.density.sites import Site, split
from bayesdl.errors import BayesdlError, ModelError, TraceMismatch

Execution = Literal["auto", "compile", "replay", "handlers", "loop"]


class SlowProgramWarning(UserWarning):
    """A program could not be recorded as a graph, so every evaluation runs Pyro's handlers (about ten times slower)."""


@dataclass
class Evaluator:
    """A function ``(z [C, D], factors, *tensors) -> (value [C], gradient [C, D])`` and how it came about.

    Attributes:
        function: the function; shapes are fixed.
        way: "compile", "replay", "handlers" or "loop".
        note: why no faster way is gone, or empty.
        fuses: what is compiled are steps of a sampler with the gradient inside; a gradient alone is replayed.
    """

    function: Graph
    way: str
    note: str = ""
    fuses: bool = False
    _steps: dict[Any, FusedStep] = field(default_factory=dict)

    def fused(
        self, step: Step, rows: Sequence[Tensor], shared: Sequence[Tensor], data: Sequence[Tensor]
    ) -> FusedStep | None:
        """The machine code of ``step(*rows, *shared, value_and_grad)``, made on first use; None if there is none.

        Where the compiler fails, the whole evaluator falls back to the replay.
        """
        if not self.fuses or not isinstance(self.function, Blocks):
            return None
        key = (step, *(tensor.shape for tensor in (*rows, *shared)))
        if key not in self._steps:
            try:
                self._steps[key] = FusedStep(step, self.function, rows, shared, data)
            except CompilerFailure as failure:
                self.way, self.note, self.fuses = "replay", f"not compiled: {failure}", False
                return None
        return self._steps[key]


@dataclass(frozen=True)
class Wish:
    """Which way to go, or what to choose it from.

    Attributes:
        execution: the way; "auto" chooses.
        calls: evaluations to come; without any, nothing is compiled.
        fused: they come from within steps of a sampler, which are compiled whole.
    """

    execution: Execution
    calls: int = 0
    fused: bool = False

    def wants_another(self, found: Evaluator) -> bool:
        """Whether an evaluator that went one way should be made anew with this wish."""
        if found.way == "compile" and found.fuses != self.fused:
            return self.calls > 0
        if self.execution == "auto":
            return found.way == "replay" and self.calls > 0
        return found.way != self.execution


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
    wrong = disagreement(recorded, original, inputs)
    if wrong:
        raise TraceMismatch(
            f"The recorded graph's {wrong}: the program does something while it is recorded that it does not "
            "repeat. Make it a function of its inputs."
        )
    on_cpu = inputs[0].device.type == "cpu"
    pays = on_cpu and forecast.pays(recorded.operations, recorded.elements, wish.calls)
    if wish.execution != "compile" and not (wish.execution == "auto" and pays):
        return Evaluator(recorded, "replay")
    if wish.fused:
        return Evaluator(recorded, "compile", fuses=True)
    try:
        recorded.compile(inputs)
        wrong = disagreement(recorded, original, inputs)
        if wrong:
            raise CompilerFailure(f"The compiled graph's {wrong}")
    except CompilerFailure as failure:
        recorded.call = recorded.graph
        return Evaluator(recorded, "replay", f"not compiled: {failure}")
    return Evaluator(recorded, "compile")


def disagreement(found: Graph, original: Graph, inputs: tuple[Tensor, ...]) -> str:
    """By how much a graph differs from the program beyond rounding, in words; empty if it does not.

    At a mode the gradient is a small difference of large numbers, whose rounding it does not show. So the one that
    differs there may still be right, and has to be so elsewhere.
    """
    z, *others = inputs
    for point in (z, z + 0.5):
        moved = (point, *others)
        wrong = difference(found(*moved), original(*moved), ("value", "gradient"))
        if not wrong:
            break
    return wrong


def _works(function: Graph, inputs: tuple[Tensor, ...]) -> bool:
    try:
        function(*inputs)
    except BayesdlError:
        raise
    except Exception:  # vmap refuses value-dependent control flow with errors of many types
        return False
    return True
