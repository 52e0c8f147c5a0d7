"""One case with neural-tangents: ``python theirs.py NAME float32``; compiled first, as one program."""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import numpy as np
from cases import B_STD, CASES, W_STD, inputs, measure

case, precision = CASES[sys.argv[1]], sys.argv[2]
jax.config.update("jax_enable_x64", precision == "float64")

from neural_tangents import stax  # noqa: E402 - its constants take the precision that is set

activation = {"relu": stax.Relu, "erf": stax.Erf}[case.activation]
if case.kind == "dense":
    weights = stax.Dense(1, W_STD, B_STD)
    middle = ()
else:
    weights = stax.Conv(1, (3, 3), padding="SAME", W_std=W_STD, b_std=B_STD)
    middle = (stax.GlobalAvgPool() if case.kind == "mean" else stax.Flatten(),)
_, _, kernel = stax.serial(*(weights, activation()) * case.depth, *middle, stax.Dense(1, W_STD, B_STD))
x, other = (None if part is None else jax.numpy.asarray(np.moveaxis(part, 1, -1)) for part in inputs(case, precision))
program = jax.jit(lambda a, b: tuple(kernel(a, b, ("nngp", "ntk")))).lower(x, other).compile()


def call() -> tuple[jax.Array, jax.Array]:
    """Both kernels."""
    both = program(x, other)
    return both[0].block_until_ready(), both[1].block_until_ready()


measure(call)
