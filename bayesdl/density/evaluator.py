"""Value and gradient of all chains at once: by a recorded graph, by the handlers, or one chain after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bayesdl.density import graph
from bayesdl.density.gaussian_part import GaussianPart
from bayesdl.density.graph import Graph
from bayesdl.density.sites import Site, split
from bayesdl.errors import BayesdlError, ModelError, TraceMismatch

Execution = Literal["auto", "replay", "handlers", "loop"]


class SlowProgramWarning(UserWarning):
    """A program could not be recorded as a graph, so every evaluation runs Pyro's handlers (about ten times slower)."""


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference between two ways of computing the same number that rounding explains."""
    return 1e-9 if dtype == torch.float64 else 1e-4


def build(
    one: Callable[..., Tensor],
    layout: Sequence[Site],
    in_rows: tuple[int | None, ...],
    gaussian: GaussianPart | None,
    inputs: tuple[Tensor, ...],
    asked: Execution,
) -> tuple[Graph, str]:
    """The fastest function ``(z [C, D], factors, *tensors) -> (value [C], gradient [C, D])`` that works.

    Args:
        one: the target of one chain from its leaves, the factors, and the batch's tensors.
        layout: sites of z.
        in_rows: per tensor of the batch, 0 if it carries the chain dimension first, else None.
        gaussian: closed-form part to add, or None.
        inputs: example inputs; shapes are fixed to theirs.
        asked: which way to go; "auto" tries the fast ones first.

    Returns:
        The function, and the way it goes.

    Raises:
        ModelError: "replay" was asked for and the program cannot be recorded.
        TraceMismatch: the recorded graph gives other numbers than the program.
        RandomDensity: the program draws random numbers.
    """

    def add_gaussian(z: Tensor, value: Tensor, gradient: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        return (value, gradient) if gaussian is None else gaussian.add(z, value, gradient, factors[1])

    def batched(z: Tensor, factors: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        # Differentiating the leaves, not z: the backward of a slice writes a zero tensor of full size per site.
        parts, value = vmap(grad_and_value(one), in_dims=(0, None, *in_rows))(split(layout, z), factors, *tensors)
        gradient = torch.cat([part.reshape(len(z), -1) for part in parts], dim=1)
        return add_gaussian(z, value, gradient, factors)

    def looped(z: Tensor, factors: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        for chain, row in enumerate(z):
            own = [t if dim is None else t[chain] for t, dim in zip(tensors, in_rows, strict=True)]
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                value = one(split(layout, leaf), factors, *own)
            values.append(value.detach())
            gradients.append(torch.autograd.grad(value, leaf)[0])
        return add_gaussian(z, torch.stack(values), torch.stack(gradients), factors)

    if asked == "loop":
        return looped, asked
    if asked == "handlers":
        return batched, asked
    try:
        recorded = graph.record(batched, inputs)
    except BayesdlError:
        raise
    except Exception as error:  # torch refuses to record with errors of many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if asked == "replay":
            raise ModelError(f"The program cannot be recorded as a graph ({reason}).") from error
    else:
        _compare(recorded, batched, inputs)
        return recorded, "replay"
    slow: tuple[Graph, str] = (batched, "handlers") if _works(batched, inputs) else (looped, "loop")
    warnings.warn(
        f"The program runs under Pyro's handlers, about ten times slower than a recorded graph: {reason}",
        SlowProgramWarning,
        stacklevel=4,
    )
    return slow


def _works(function: Graph, inputs: tuple[Tensor, ...]) -> bool:
    try:
        function(*inputs)
    except BayesdlError:
        raise
    except Exception:  # vmap refuses value-dependent control flow with errors of many types
        return False
    return True


def _compare(recorded: Graph, original: Graph, inputs: tuple[Tensor, ...]) -> None:
    """Compare replay and program on the inputs at hand.

    Raises:
        TraceMismatch: they differ beyond rounding.
    """
    for name, got, want in zip(("value", "gradient"), recorded(*inputs), original(*inputs), strict=True):
        allowed = tolerance(want.dtype)
        finite = want[want.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if len(finite) else 1.0
        if not torch.allclose(got, want, rtol=allowed, atol=allowed * scale, equal_nan=True):
            raise TraceMismatch(
                f"The recorded graph's {name} differs from the program's by {float((got - want).abs().max()):.3g}: the "
                "program does something while it is recorded that it does not repeat. Make it a function of its inputs."
            )
