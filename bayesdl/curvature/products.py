"""Curvature times vectors, exact and for all members at once: the Hessian, and the Fisher information of any program.

Both are Hessians of a function, and their products are derivatives of its gradient (double reverse; Pearlmutter, 1994).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import vmap

from bayesdl.density import program, sites
from bayesdl.density.log_density import LogDensity, Target
from bayesdl.errors import BayesdlError, MethodError
from bayesdl.posterior.families import CannotUnpack, Spec, pack, unpack
from bayesdl.posterior.problem import Problem

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix of every member times rows, ``[M, D] -> [M, D]``."""
Curvature = Callable[[Problem, Tensor, Target, int | None], Product]
Rows = Mapping[str, Any]
Potential = Callable[[Tensor], Tensor]
"""``[M, D]`` to the sum over members of a function of each."""


def hessian_products(
    problem: Problem, z: Tensor, target: Target = "posterior", batch_size: int | None = None
) -> Product:
    """Products with the Hessian of -(log density) at ``z [M, D]``.

    Args:
        problem: model and rows.
        z: a point for every member.
        target: as in ``LogDensity.value_and_grad``.
        batch_size: rows whose derivatives are held at once; None keeps those of all rows from product to product.

    Cost: a product takes about two gradients, and without ``batch_size`` the program runs once for all of them.
    """
    density = problem.density

    def potentials() -> Iterator[Potential]:
        for rows, share in batches(problem, batch_size):
            one = density.function(rows, target=target)
            # A batch of B rows counts N/B times: with the weight B/N rows and prior count once.
            yield partial(_minus_sum, one, share)

    return _products(potentials, z, keep=batch_size is None)


def fisher_products(
    problem: Problem, z: Tensor, target: Target = "posterior", batch_size: int | None = None
) -> Product:
    r"""Products with ``F + P``: the likelihood's Fisher information at ``z [M, D]``, and the Hessian P of -log prior.

    With ``p_i(. | z)`` the law of row i's targets,

        F = sum_i J_i^T E[-d^2 log p_i / d eta^2] J_i = d^2/dz'^2 sum_i KL(p_i(. | z) || p_i(. | z')) at z' = z,

    J_i the derivative of the law's parameters eta by z. F is positive semi-definite and does not depend on the targets.
    For exponential families in their natural parameters (Gaussian noise of a known size, logits, log rates) it is the
    generalised Gauss-Newton matrix (Martens, 2020, section 9.2), so a step with it is both a Gauss-Newton step and a
    natural gradient; elsewhere (a noise level that is learnt too) it is the latter.

    Arguments and cost are those of ``hessian_products``.

    Raises:
        MethodError: the divergence between two laws of the targets' family has no closed form, or the program has
            latents that F does not know: discrete, or of single rows.
    """
    density = problem.density
    reason = no_information(density)
    if reason is not None:
        raise MethodError(f"The Fisher information: {reason}.")
    powers = density.powers

    def potentials() -> Iterator[Potential]:
        first = True
        for rows, share in batches(problem, batch_size):

            def likelihood(leaf: Tensor, rows: Rows | None = rows, share: float = share) -> Tensor:
                return powers[1] * _divergence(density, rows, share, leaf)

            yield likelihood
            if first and target != "likelihood":
                yield partial(_minus_sum, density.function(rows, target="prior"), 1.0)
                if target == "posterior":
                    yield partial(_minus_sum, density.log_abs_det, 1.0)
            first = False

    return _products(potentials, z, keep=batch_size is None)


def no_information(density: LogDensity) -> str | None:
    """Why a program has no Fisher information in all its unknowns, or None if it has."""
    if density.structure.discrete:
        return f"{sorted(density.structure.discrete)} are discrete latents, summed out; the Hessian serves"
    local = [site.name for site in density.sites if site.scope == "local"]
    if local:
        return f"{local} are latents of single rows; the Hessian serves"
    return None


def batches(problem: Problem, batch_size: int | None) -> Iterator[tuple[Rows | None, float]]:
    """The rows, each once, and the share of each batch; all of them as one (None) without ``batch_size``."""
    if batch_size is None or batch_size >= problem.n:
        yield None, 1.0
        return
    for index in torch.arange(problem.n).split(batch_size):
        yield problem.minibatch(index), len(index) / problem.n


def value_and_grad(
    problem: Problem, z: Tensor, target: Target = "posterior", batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log density ``[M]`` of all rows and its gradient ``[M, D]`` at ``z [M, D]``, rows in batches."""
    values, gradients = z.new_zeros(len(z)), torch.zeros_like(z)
    for rows, share in batches(problem, batch_size):
        value, gradient = problem.density.value_and_grad(z, rows, target=target)
        values, gradients = values.add(value, alpha=share), gradients.add(gradient, alpha=share)
    return values, gradients


def _products(potentials: Callable[[], Iterator[Potential]], z: Tensor, keep: bool) -> Product:
    def slope(potential: Potential) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        with torch.enable_grad(), program.unchecked():
            value = potential(leaf)
            if not value.requires_grad:  # nothing in it depends on z
                return leaf, torch.zeros_like(z)
            return leaf, torch.autograd.grad(value, leaf, create_graph=True, materialize_grads=True)[0]

    kept = [slope(potential) for potential in potentials()] if keep else None

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for leaf, gradient in kept or map(slope, potentials()):
            if gradient.requires_grad:  # elsewhere the function is linear
                total += torch.autograd.grad(gradient, leaf, v, retain_graph=keep, materialize_grads=True)[0]
        return total

    return product


def _minus_sum(one: Callable[[Tensor], Tensor], share: float, z: Tensor) -> Tensor:
    return -share * _each(one, z).sum()


def _each(one: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """A function of one point at each of ``z [M, D]``."""
    try:
        return vmap(one)(z)
    except BayesdlError:
        raise
    except Exception:  # vmap refuses value-dependent control flow with errors of many types
        return torch.stack([one(row) for row in z])


def _divergence(density: LogDensity, rows: Rows | None, share: float, z: Tensor) -> Tensor:
    """``sum_i w_i KL(p_i(. | z as it is) || p_i(. | z))``, summed over members; w are the program's own weights.

    What is observed outside the data plate comes with every batch, and counts by the batch's share of the rows.
    """
    batch = density.batch if rows is None else {**density.batch, **rows}
    specs: dict[str, Spec] = {}

    def laws(point: Tensor) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        values = sites.constrain(density.sites, point)
        nodes = program.run(density.model, batch, values).nodes
        found, weights = {}, {}
        for name, site in nodes.items():
            if not (site["type"] == "sample" and program.has_density(site) and site["is_observed"]):
                continue
            try:
                specs[name], found[name] = unpack(site["fn"])
            except CannotUnpack as error:
                raise MethodError(f"The Fisher information: {error}") from error
            outside = program.plate_frame(site, density.structure.plate) is None
            weight = z.new_full(site["fn"].batch_shape, share if outside else 1.0)
            weights[name] = program.weighed(weight, site, density.structure.plate)
        return found, weights

    new, weights = vmap(laws)(z)
    total = z.new_zeros(())
    for name, spec in specs.items():
        left = pack(spec, {key: value.detach() for key, value in new[name].items()})
        try:
            term = kl_divergence(left, pack(spec, new[name]))
        except NotImplementedError as error:
            raise MethodError(
                f"The Fisher information of {type(left).__name__} at {name!r} has no closed form here; use the "
                "Hessian: optimizer='newton'."
            ) from error
        total = total + (term * weights[name].detach()).sum()
    return total
