"""One case with this package: ``python ours.py NAME float32``."""

from __future__ import annotations

import sys

import torch
from cases import B_STD, CASES, W_STD, inputs, measure

from bayesdl import infinite

torch.set_num_threads(1)
case = CASES[sys.argv[1]]
activation = infinite.Activation(case.activation)
if case.kind == "dense":
    layers = infinite.fully_connected(case.depth, activation, W_STD, B_STD)
else:
    convolution = infinite.Conv(W_STD, B_STD, padding=((1, 1), (1, 1)))
    middle = infinite.AvgPool() if case.kind == "mean" else infinite.Flatten()
    layers = (*(convolution, activation) * case.depth, middle, infinite.Flatten(), infinite.Dense(W_STD, B_STD))
kernel = infinite.InfiniteNetwork(layers)
x, other = (None if part is None else torch.from_numpy(part) for part in inputs(case, sys.argv[2]))
assert x is not None
kernel.kernels(x[:20], None if other is None else other[:20])  # imports, and what is made once


def call() -> tuple[object, object]:
    """Both kernels."""
    both = kernel.kernels(x, other)
    return both.nngp.numpy(), both.ntk.numpy()


measure(call)  # type: ignore[arg-type]
