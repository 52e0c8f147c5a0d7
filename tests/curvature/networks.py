"""Small networks with their Jacobians and output curvatures in numpy, derived by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl._rng import generator
from bayesdl.curvature import NetworkOutputs
from bayesdl.posterior import prepare

DOUBLE = torch.float64
N, INPUTS, HIDDEN = 13, 3, 4
NOISE = 0.4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=generator(seed, "curvature tests"))


@dataclass(frozen=True)
class Tiny:
    """A tanh network with one hidden layer at a random point, on random rows."""

    kind: str
    copies: int = 1

    @property
    def outputs(self) -> int:
        return {"regression": 2, "classes": 3, "counts": 1}[self.kind]

    @property
    def x(self) -> Tensor:
        return noise(N, INPUTS).repeat(self.copies, 1)

    @property
    def y(self) -> Tensor:
        if self.kind == "regression":
            return noise(N, 2, seed=1).repeat(self.copies, 1)
        return (torch.arange(N) % 3).repeat(self.copies)

    def network(self) -> NetworkOutputs:
        likelihood = {
            "regression": bdl.likelihoods.Gaussian(noise=NOISE),
            "classes": bdl.likelihoods.Categorical(),
            "counts": bdl.likelihoods.Poisson(),
        }[self.kind]
        net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, self.outputs)).double()
        y = self.y.double() if self.kind == "counts" else self.y
        problem = prepare(bdl.BayesianNetwork(net, likelihood=likelihood), (self.x, y))
        return NetworkOutputs(problem, noise(problem.density.dim, seed=2))

    def oracle(self, z: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Jacobians ``[N, K, D]``, output Hessians ``[N, K, K]`` and output gradients ``[N, K]``, written by hand."""
        flat, x, y = z.numpy(), self.x.numpy(), self.y.numpy()
        cuts = np.cumsum([HIDDEN * INPUTS, HIDDEN, self.outputs * HIDDEN])
        w1, b1, w2, b2 = np.split(flat, cuts)
        w1, w2 = w1.reshape(HIDDEN, INPUTS), w2.reshape(self.outputs, HIDDEN)
        h = np.tanh(x @ w1.T + b1)
        f = h @ w2.T + b2
        back = w2[None] * (1 - h**2)[:, None]  # [N, K, H]
        eye = np.broadcast_to(np.eye(self.outputs), (len(x), self.outputs, self.outputs))
        jacobian = np.concatenate(
            [
                (back[..., None] * x[:, None, None]).reshape(len(x), self.outputs, -1),
                back,
                (eye[..., None] * h[:, None, None]).reshape(len(x), self.outputs, -1),
                eye,
            ],
            axis=2,
        )
        if self.kind == "regression":
            return jacobian, eye / NOISE**2, (f - y) / NOISE**2
        if self.kind == "counts":
            rate = np.exp(f)
            return jacobian, rate[..., None], rate - y[:, None]
        p = np.exp(f - f.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return jacobian, eye * p[:, None] - p[:, :, None] * p[:, None], p - np.eye(3)[y]
