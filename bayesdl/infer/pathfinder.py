"""Pathfinder: each chain climbs towards a mode and starts at a draw from the best Gaussian that it meets on the way.

L-BFGS knows at every iterate x an inverse Hessian H of the negative log density, a diagonal plus 2 J directions:

    H = diag(a) + B G B^T,  B = [diag(a) Y, S],  G = [[0, -R^-1], [-R^-T, R^-T (diag(S^T Y) + Y^T diag(a) Y) R^-1]]

with the last J steps S and changes of gradient Y, and R the upper triangle of S^T Y. So N(x + H grad, H) approximates
the posterior there. Its evidence lower bound (ELBO) is estimated with K draws at every iterate, and the iterate with
the largest is where the approximation is best: past the tail, not yet in the mode's needle (Zhang, Carpenter, Gelman &
Vehtari, 2022, algorithms 1, 3 and 4; the diagonal of Gilbert & Lemarechal, 1989).

H's diagonal there, pooled over the chains, is the first metric of a sampler that adapts one: on badly scaled targets it
saves most of the gradients of a warm-up, whose first transitions would else go with steps of the narrowest width.

Every chain is a path of its own, from its own draw of the prior, and starts at one of the K draws of its own best
iterate, chosen by their importance weights. The paths are not resampled together: in more than a few dimensions that
would leave copies of one draw, and R-hat needs starts that know nothing of each other. The standard normals behind the
K draws are the same at all iterates of a chain, so that the comparison is one of approximations and not of noise.

All chains are one tensor program. They need different numbers of evaluations, so each has a phase of its own: it tries
a point on its line, evaluates one of its draws, or is done; one step evaluates one point of every chain. A path of I
iterates takes about I (K + 1) gradients, and the run as long as the longest path; the algebra takes O(D J^2) a chain
and iterate. It is done in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.density import LogDensity
from bayesdl.infer.checkpoint import State
from bayesdl.infer.inverse_hessian import inverse_hessian, next_diagonal
from bayesdl.infer.loop import Engine

HISTORY = 6
"""J: steps that the inverse Hessian remembers."""
DRAWS = 5
"""K: draws behind an estimate of the ELBO."""
ITERATES = 1000
"""Iterates of a path at most."""
PATIENCE = 50
"""Iterates without a larger ELBO after which a path ends."""
CONVERGED = 1e-8
"""A path ends where the next step would gain less log density than this."""
TRIES = 30
"""Points on one line at most; a path that finds no better one among them ends."""
ARMIJO, WOLFE = 1e-4, 0.9
"""A step must gain this share of what the slope promises, and leave at most this share of the slope."""
RETREATS = 10
"""How often a start without a finite density is halved."""
DONE, SEARCH = -1, 0
"""Phases of a chain; k >= 1 is the evaluation of its k-th draw."""


@dataclass
class PathfinderEngine(Engine):
    """One evaluation of every chain a step: of a point on its line, or of a draw from its approximation.

    State, all with the chains first. The iterate: z ``[C, D]``, value ``[C]``, grad ``[C, D]``, direction ``[C, D]``
    (H times the gradient), diagonal and variances (of H) ``[C, D]``, steps and changes ``[C, J, D]``, stale and
    iterates ``[C]``. Its line: rate, low, high and tries ``[C]``. Its draws ``[C, K, D]`` with log densities log_q
    ``[C, K]``; elbo ``[C]`` so far, chosen ``[C, D]`` and key ``[C]`` the draw picked so far. The path: phase ``[C]``,
    best_elbo ``[C]``, best and best_variances ``[C, D]``. The noise: normals ``[C, K, D]``, keys ``[C, K]``.

    Attributes:
        density: the target.
        begin: ``[C, D]``, unconstrained.
        seed: chain k's noise depends on it and on k alone.
        rows: batch of its own for every chain, ``[C, B, ...]`` by argument; None if all have the density's own data.
    """

    density: LogDensity
    begin: Tensor
    seed: int
    rows: Mapping[str, Any] | None = None
    label: str = field(init=False, default="Pathfinder")
    total: int = field(init=False, default=ITERATES * (DRAWS + 1))

    def init(self) -> State:
        """Every chain at a point of finite density if halving its start gives one, about to climb the gradient."""
        z = self.begin.double()
        value, grad = self._evaluate(z)
        for _ in range(RETREATS):
            lost = ~_finite(value, grad)
            if not lost.any():
                break
            z = torch.where(lost[:, None], 0.5 * z, z)
            value, grad = self._evaluate(z)
        chains, dim = z.shape
        noise = [generator(self.seed, "pathfinder", k) for k in range(chains)]
        normals = torch.stack([torch.randn(DRAWS, dim, dtype=z.dtype, generator=one) for one in noise]).to(z.device)
        uniforms = torch.stack([torch.rand(DRAWS, dtype=z.dtype, generator=one) for one in noise]).to(z.device)
        diagonal = grad.norm(dim=1, keepdim=True).clamp(min=1.0).reciprocal().expand_as(z)
        counts = torch.zeros(chains, dtype=torch.int64, device=z.device)
        zeros = torch.zeros_like(value)
        return {
            "z": z,
            "value": value,
            "grad": grad,
            "direction": diagonal * grad,
            "diagonal": diagonal.clone(),
            "variances": diagonal.clone(),
            "steps": z.new_zeros(chains, HISTORY, dim),
            "changes": z.new_zeros(chains, HISTORY, dim),
            "stale": counts,
            "iterates": counts,
            **self._new_line(counts),
            "draws": torch.zeros_like(normals),
            "log_q": torch.zeros_like(uniforms),
            "elbo": zeros,
            "chosen": z,
            "key": zeros - math.inf,
            "phase": torch.where(_finite(value, grad), SEARCH, DONE),
            "best": z,
            "best_elbo": zeros - math.inf,
            "best_variances": torch.full_like(z, math.nan),
            "normals": normals,
            "keys": -(-uniforms.log()).log(),
        }

    def step(self, state: State) -> State:
        """Evaluate one point of every chain, and move those that have all they need."""
        phase = state["phase"]
        drawing = phase > SEARCH
        at = (phase - 1).clamp(min=0)
        everyone = torch.arange(len(at), device=at.device)
        trial = state["z"] + state["rate"][:, None] * state["direction"]
        point = torch.where(drawing[:, None], state["draws"][everyone, at], trial)
        point = torch.where((phase == DONE)[:, None], state["z"], point)
        value, grad = self._evaluate(point)
        weight = value - state["log_q"][everyone, at]
        new = self._drawn(state, drawing, point, torch.where(weight.isfinite(), weight, -math.inf), at)
        return self._searched(new, phase == SEARCH, point, value, grad)

    def done(self, state: State) -> bool:
        """When every path has ended."""
        return bool((state["phase"] == DONE).all())

    def status(self, state: State) -> str:
        """Paths that have ended, and the median of the best ELBOs."""
        ended = int((state["phase"] == DONE).sum())
        return f"{ended} of {len(state['phase'])} paths, ELBO {float(state['best_elbo'].median()):.4g}"

    def result(self, state: State) -> Tensor:
        """The starts ``[C, D]``; of a path without any finite ELBO the point that it reached."""
        found = state["best_elbo"].isfinite()[:, None]
        return torch.where(found, state["best"], state["z"]).to(self.begin.dtype)

    def scale(self, state: State, groups: int) -> Tensor:
        """Standard deviations ``[G, D]`` of the best approximations: medians over the chains of each group."""
        dim = self.begin.shape[1]
        deviations = state["best_variances"].sqrt().reshape(groups, -1, dim).nanmedian(1).values
        return deviations.nan_to_num(nan=1.0).to(self.begin.dtype)

    # -- inside ------------------------------------------------------------------------------------------------

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        own = self.rows is not None
        value, grad = self.density.value_and_grad(z.to(self.begin.dtype), self.rows, per_chain=own)
        return value.double(), grad.double()

    def _new_line(self, counts: Tensor) -> State:
        ones = torch.ones_like(counts, dtype=torch.float64)
        return {"rate": ones, "low": 0.0 * ones, "high": math.inf * ones, "tries": torch.zeros_like(counts)}

    def _drawn(self, state: State, drawing: Tensor, point: Tensor, weight: Tensor, at: Tensor) -> State:
        """Count a draw's log weight in the ELBO; keep it with probability proportional to its weight (Gumbel's trick).

        After the last draw the iterate is judged, and its path goes on to the next line or ends.
        """
        key = weight + state["keys"].gather(1, at[:, None])[:, 0]
        chosen = drawing & (key > state["key"])
        new = state | {
            "elbo": state["elbo"] + torch.where(drawing, weight / DRAWS, 0.0),
            "key": torch.where(chosen, key, state["key"]),
            "chosen": torch.where(chosen[:, None], point, state["chosen"]),
        }
        judged = drawing & (state["phase"] == DRAWS)
        better = judged & (new["elbo"] > state["best_elbo"])
        stale = torch.where(better, 0, state["stale"] + judged.long())
        gain = (state["direction"] * state["grad"]).sum(1)
        ended = (stale >= PATIENCE) | (state["iterates"] >= ITERATES) | ~(gain > CONVERGED)
        after = torch.where(ended, DONE, SEARCH)
        return new | {
            "best_elbo": torch.where(better, new["elbo"], state["best_elbo"]),
            "best": torch.where(better[:, None], new["chosen"], state["best"]),
            "best_variances": torch.where(better[:, None], state["variances"], state["best_variances"]),
            "stale": stale,
            "phase": torch.where(judged, after, state["phase"] + drawing.long()),
        }

    def _searched(self, state: State, searching: Tensor, point: Tensor, value: Tensor, grad: Tensor) -> State:
        """Halve or double the step of a chain until it meets the weak Wolfe conditions (Lewis & Overton, 2013)."""
        slope = (state["direction"] * state["grad"]).sum(1)
        rounding = 4.0 * torch.finfo(self.begin.dtype).eps * state["value"].abs()
        enough = value >= state["value"] + ARMIJO * state["rate"] * slope - rounding
        short = ~(_finite(value, grad) & enough)
        steep = ~short & ((state["direction"] * grad).sum(1) > WOLFE * slope)
        low = torch.where(searching & steep, state["rate"], state["low"])
        high = torch.where(searching & short, state["rate"], state["high"])
        rate = torch.where(high.isfinite(), 0.5 * (low + high), 2.0 * low)
        tries = state["tries"] + searching.long()
        lost = searching & (short | steep) & (tries >= TRIES)
        new = state | {
            "low": low,
            "high": high,
            "rate": torch.where(searching, rate, state["rate"]),
            "tries": tries,
            "phase": torch.where(lost, DONE, state["phase"]),
        }
        arrived = searching & ~(short | steep)
        return self._arrived(new, arrived, point, value, grad) if arrived.any() else new

    def _arrived(self, state: State, arrived: Tensor, point: Tensor, value: Tensor, grad: Tensor) -> State:
        """The next iterate of some chains, its inverse Hessian, and the draws from its approximation."""
        step, change = point - state["z"], state["grad"] - grad
        curvature = (step * change).sum(1)
        learns = arrived & (curvature > 1e-12 * change.square().sum(1))
        diagonal = next_diagonal(state["diagonal"], step, change)
        learns &= (diagonal.isfinite() & (diagonal > 0)).all(1)
        diagonal = torch.where(learns[:, None], diagonal, state["diagonal"])
        steps, changes = (
            torch.where(learns[:, None, None], torch.cat([old[:, 1:], last[:, None]], 1), old)
            for old, last in ((state["steps"], step), (state["changes"], change))
        )
        found = inverse_hessian(diagonal, steps, changes)
        direction = found.times(grad)
        draws = (point + direction)[:, None] + found.root(state["normals"])
        squares = state["normals"].square().sum(2)
        log_q = -0.5 * (squares + point.shape[1] * math.log(2.0 * math.pi) + found.log_det()[:, None])
        fresh: State = {
            "z": point,
            "value": value,
            "grad": grad,
            "direction": direction,
            "diagonal": diagonal,
            "variances": found.variances(),
            "steps": steps,
            "changes": changes,
            "iterates": state["iterates"] + 1,
            **self._new_line(state["tries"]),
            "draws": draws,
            "log_q": log_q,
            "elbo": torch.zeros_like(value),
            "key": torch.full_like(value, -math.inf),
            "phase": torch.ones_like(state["phase"]),
        }
        return state | {
            name: torch.where(arrived.reshape(-1, *[1] * (one.dim() - 1)), one, state[name])
            for name, one in fresh.items()
        }


def _finite(value: Tensor, grad: Tensor) -> Tensor:
    return value.isfinite() & grad.isfinite().all(1)
