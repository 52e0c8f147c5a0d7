"""L-BFGS with a strong Wolfe line search, member by member (its curvature pairs and line search couple coordinates)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from bayesdl.curvature.products import value_and_grad
from bayesdl.density.log_density import Target
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Engine
from bayesdl.posterior.covariance import Covariance
from bayesdl.posterior.problem import Problem

CHUNK = 50  # iterations in one step of the loop; the curvature memory starts anew with each


@dataclass
class LBFGSEngine(Engine):
    """One step is up to 50 iterations of ``torch.optim.LBFGS`` on one member; nothing but values passes between steps.

    With a spread ``S = A A^T`` it moves in coordinates u with ``z = z_0 + A u``: where S is about the inverse of the
    curvature, as of a Laplace approximation near by, these are the ones in which all directions are alike.

    State: z ``[M, D]``; member, the one at work; chunks ``[M]`` steps that each member took; loss ``[M]``.
    """

    label: str
    problem: Problem
    target: Target
    iterations: int
    members: int
    begin: Callable[[], Tensor]
    batch_size: int | None = None
    spread: Covariance | None = None
    total: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the steps; their number is an upper limit, since a member ends when it has converged."""
        self.chunks = math.ceil(self.iterations / CHUNK)
        self.total = self.chunks * self.members
        self.density = self.problem.density

    def init(self) -> State:
        """All members at their starts."""
        z = self.begin()
        chunks = torch.zeros(self.members, dtype=torch.int64)
        return {"z": z, "member": 0, "chunks": chunks, "loss": z.new_full((self.members,), math.inf)}

    def done(self, state: State) -> bool:
        """When the last member has ended."""
        return bool(state["member"] >= self.members)

    def step(self, state: State) -> State:
        """Move the member at work; pass on to the next one when it has converged or used its iterations."""
        k, scale = state["member"], self.problem.density.n or 1
        origin = state["z"][k : k + 1]
        u = self._zeros(origin).requires_grad_()
        pull = vjp(self._moved, self._zeros(origin))[1]
        optimiser: torch.optim.Optimizer = torch.optim.LBFGS(
            [u],
            max_iter=min(CHUNK, self.iterations - CHUNK * int(state["chunks"][k])),
            history_size=20,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            point = origin + self._moved(u.detach())
            value, gradient = value_and_grad(self.problem, point, self.target, self.batch_size)
            u.grad = -pull(gradient)[0] / scale
            return -float(value) / scale

        optimiser.step(closure)
        loss, z = closure(), origin + self._moved(u.detach())
        if not (math.isfinite(loss) and z.isfinite().all()):
            raise Divergence(
                f"{self.label}: L-BFGS left the finite numbers at member {k} of {self.members}, iteration "
                f"{CHUNK * int(state['chunks'][k])} to {CHUNK * int(state['chunks'][k] + 1)}; use optimizer='adam'."
            )
        new = state | {"z": state["z"].clone(), "chunks": state["chunks"].clone(), "loss": state["loss"].clone()}
        new["z"][k], new["loss"][k] = z[0], loss
        new["chunks"][k] += 1
        if state["loss"][k] - loss <= 1e-13 * (1 + abs(loss)) or new["chunks"][k] >= self.chunks:
            new["member"] = k + 1
        return new

    def status(self, state: State) -> str:
        """The member at work."""
        return f"member {min(state['member'] + 1, self.members)} of {self.members}"

    def result(self, state: State) -> Tensor:
        """The values reached, ``[M, D]``."""
        values: Tensor = state["z"]
        return values

    def report(self, state: State) -> dict[str, Any]:
        """Final losses and the steps of 50 iterations that each member took."""
        return {"loss": state["loss"].tolist(), "steps": state["chunks"].tolist()}

    def _zeros(self, origin: Tensor) -> Tensor:
        """The start of u, ``[1, W]``."""
        return torch.zeros_like(origin) if self.spread is None else origin.new_zeros(1, self.spread.noise_dim)

    def _moved(self, u: Tensor) -> Tensor:
        """``A u``."""
        return u if self.spread is None else self.spread.scaled(u)
