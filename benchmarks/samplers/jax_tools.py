"""Compilation and timing in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from outcome import Span, Watch


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Span]:
    """A function compiled for its arguments ahead of time, and the time that took."""
    watch = Watch()
    executable = jax.jit(function).lower(*arguments).compile()
    return executable, watch.read()


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Span]:
    """A function's result, once it is there, and the time that took."""
    watch = Watch()
    result = jax.block_until_ready(function(*arguments))
    return result, watch.read()
