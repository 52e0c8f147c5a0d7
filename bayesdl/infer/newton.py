"""Newton's method, Gauss-Newton and natural gradients without matrices: conjugate gradients inside a trust region.

The trust region is what damps: its step solves ``(C + lambda U^-2) p = -g`` with C the curvature, U the units that
lengths are measured in and a lambda >= 0 that the radius decides (Nocedal and Wright, 2006, theorem 4.1; conjugate
gradients come near it). Levenberg and Marquardt set lambda instead of the radius, by the same ratio of the loss's fall
to the one foretold (Martens, 2010, section 4.1); an indefinite C needs no guess at its least eigenvalue this way. The
units are the prior's standard deviations, smaller where the curvature is large, and precondition the conjugate
gradients too (Steihaug, 1983).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.curvature.products import Curvature, Product, fisher_products, hessian_products, value_and_grad
from bayesdl.density.log_density import Target
from bayesdl.errors import Divergence
from bayesdl.infer.checkpoint import State
from bayesdl.infer.loop import Engine
from bayesdl.posterior.problem import Problem

MOST_PRODUCTS = 100
"""Hessian products in one step at most."""
ACCURACY = 1e-6
"""Of the linear system of a step, relative to the gradient: on a quadratic one step is then all that it takes."""
PROGRESS = 5e-4
"""Relative fall of the quadratic per product, over a tenth of the products and at least ten, below which it is left."""
FIRST_RADIUS, LARGEST_RADIUS = 4.0, 1e6
"""Of the trust region, in the units of a step: about the prior's standard deviations where the prior is Gaussian."""
POWER, MEMORY = 0.75, 0.9
"""Power of the curvature's rows in the preconditioner (Martens, 2010, section 4.7), and the share of them that a step
keeps."""

CURVATURES: dict[str, Curvature] = {"newton": hessian_products, "gauss_newton": fisher_products}
"""What a step divides the gradient by, by the name of the optimiser."""


def conjugate_gradients(
    product: Product, gradient: Tensor, radius: Tensor, most: int = MOST_PRODUCTS, progress: float = PROGRESS
) -> tuple[Tensor, Tensor]:
    """Minimise ``g . p + p . H p / 2`` over ``|p| <= radius``, for each member (Steihaug, 1983).

    Iterations run until the residual is ``ACCURACY`` of the gradient, the edge is reached, or a direction of negative
    curvature is found, along which they go to the edge.

    Args:
        product: H times rows, ``[M, D] -> [M, D]``.
        gradient: g, ``[M, D]``.
        radius: ``[M]``.
        most: products at most.
        progress: see ``PROGRESS``; 0 for a solution that is as accurate as it can be.

    Returns:
        p ``[M, D]``, and how much the quadratic falls, ``[M]``.
    """
    point, along = torch.zeros_like(gradient), -gradient
    residual, image = gradient, torch.zeros_like(gradient)  # image is H p
    square = _dot(residual, residual)
    goal, active = ACCURACY**2 * square, square > 0
    falls: list[Tensor] = []
    for k in range(min(most, 2 * gradient.shape[1])):
        if not bool(active.any()):
            break
        curved = product(along)
        curvature = _dot(along, curved)
        size = square / curvature.where(curvature > 0, torch.ones_like(curvature))
        # The positive root of |p + t d|^2 = radius^2: how far it is to the edge.
        a, b = _dot(along, along), _dot(point, along)
        room = (radius.square() - _dot(point, point)).clamp(min=0.0)
        edge = (-b + (b.square() + a * room).sqrt()) / a.clamp(min=torch.finfo(a.dtype).tiny)
        leaves = (curvature <= 0) | (size > edge)
        size = torch.where(active, torch.where(leaves, edge, size), torch.zeros_like(size))[:, None]
        point, image = point + size * along, image + size * curved
        residual = residual + size * curved
        fresh = _dot(residual, residual)
        active = active & ~leaves & (fresh > goal)
        falls.append(-(_dot(gradient, point) + 0.5 * _dot(point, image)))
        last = max(10, k // 10)
        if k >= last:
            active = active & (falls[-1] - falls[-1 - last] >= last * progress * falls[-1])
        along = torch.where(active[:, None], -residual + (fresh / square)[:, None] * along, along)
        square = fresh
    return point, falls[-1] if falls else torch.zeros_like(square)


@dataclass
class NewtonEngine(Engine):
    """One step solves for the Newton step of every member, and takes it where the loss falls as foretold.

    State: z ``[M, D]``; loss ``[M]`` and its gradient ``[M, D]`` there; radius ``[M]``; arrived ``[M]``, whether the
    member stands at a stationary point; squares ``[M, D]``, of the norms of the curvature's rows; products so far.
    """

    label: str
    problem: Problem
    target: Target
    total: int
    members: int
    begin: Callable[[], Tensor]
    curvature: Curvature
    batch_size: int | None = None
    scale: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """The prior's scale makes coordinates comparable where the data say nothing."""
        self.density = self.problem.density
        self.scale = self.density.prior_scale

    def init(self) -> State:
        """All members at their starts."""
        z = self.begin()
        loss, gradient = self._loss(z)
        return {
            "z": z,
            "loss": loss,
            "gradient": gradient,
            "radius": z.new_full((len(z),), FIRST_RADIUS * math.sqrt(z.shape[1])),
            "arrived": torch.zeros(len(z), dtype=torch.bool),
            "squares": torch.zeros_like(z),
            "products": 0,
        }

    def done(self, state: State) -> bool:
        """After all steps, or when every member has arrived."""
        return bool(state["step"] >= self.total or state["arrived"].all())

    def step(self, state: State) -> State:
        """One trust-region step (Nocedal and Wright, 2006, algorithm 4.1).

        Raises:
            Divergence: the loss or its gradient is not finite where a member stands.
        """
        z, radius, loss, gradient = state["z"], state["radius"], state["loss"], state["gradient"]
        if not bool((loss.isfinite() & gradient.isfinite().all(1)).all()):
            raise Divergence(f"{self.label}: Newton's method started where the density is not finite; pass init=.")
        here = self.curvature(self.problem, z, self.target, self.batch_size)
        n, count = self.density.n or 1, 0

        def product(v: Tensor, units: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return here(v * units) * (units / n)

        squares = self._squares(state, partial(product, units=self.scale))
        units = self._units(squares, state["step"] + 1)
        inside, foretold = conjugate_gradients(partial(product, units=units), gradient * units, radius)
        move = inside * units
        after, slope = self._loss(z + move)
        fell = loss - after
        ratio = (fell / foretold.clamp(min=torch.finfo(z.dtype).tiny)).nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)
        rounding = 10 * torch.finfo(z.dtype).eps * (1 + loss.abs())
        arrived = (foretold <= rounding) | state["arrived"].to(z.device)
        taken = (ratio > 1e-4) & slope.isfinite().all(1) & ~state["arrived"].to(z.device)
        size = torch.linalg.vector_norm(inside, dim=1)
        wider = torch.where((ratio > 0.75) & (size > 0.99 * radius), (2 * radius).clamp(max=LARGEST_RADIUS), radius)
        return state | {
            "z": torch.where(taken[:, None], z + move, z),
            "loss": torch.where(taken, after, loss),
            "gradient": torch.where(taken[:, None], slope, gradient),
            "radius": torch.where(ratio < 0.25, 0.25 * size, wider),
            "arrived": arrived.cpu(),
            "squares": squares,
            "products": state["products"] + count,
        }

    def status(self, state: State) -> str:
        """The mean loss of the members."""
        return f"loss {float(state['loss'].mean()):.4g}"

    def result(self, state: State) -> Tensor:
        """The values reached, ``[M, D]``."""
        values: Tensor = state["z"]
        return values

    def report(self, state: State) -> dict[str, Any]:
        """Steps taken, products with the curvature, final losses, and which members have arrived."""
        taken = {"steps": state["step"], "products": state["products"]}
        return taken | {"loss": state["loss"].tolist(), "converged": state["arrived"].tolist()}

    def _squares(self, state: State, product: Product) -> Tensor:
        """Running mean of ``(v C v)^2`` entry by entry, C in prior units and v of random signs: of ``sum_j C_ij^2``.

        One product for each step, which no cancellation and no sign of C can make small (Yao et al., 2021).
        """
        z = state["z"]
        stream = generator(0, "curvature's rows", state["step"])
        signs = (2.0 * torch.randint(2, (z.shape[1],), generator=stream) - 1.0).to(z).expand_as(z)
        fresh = product(signs).square()
        return MEMORY * state["squares"].to(z) + (1.0 - MEMORY) * fresh

    def _units(self, squares: Tensor, steps: int) -> Tensor:
        """Units of a step ``[M, D]``; the prior's own curvature is what is added to that of the data."""
        rows = (squares / (1.0 - MEMORY**steps)).sqrt() + 1.0 / (self.density.n or 1)
        return self.scale * (rows / rows.mean(1, keepdim=True)).pow(-0.5 * POWER)

    def _loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(self.problem, z, self.target, self.batch_size)
        n = self.density.n or 1
        return -value / n, -gradient / n


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1)
