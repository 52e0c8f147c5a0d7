"""The precision of a Laplace posterior in the structure that was asked for, as blocks of eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.hessian import hessian
from bayesdl.curvature.kernel import places, training_rows
from bayesdl.curvature.kfac import factors, rescaled
from bayesdl.curvature.layers import Layer, layers_of
from bayesdl.curvature.outputs import Curvature, NetworkOutputs
from bayesdl.curvature.spectrum import Block, Few, Full, Functional, Product, Separate
from bayesdl.curvature.sums import coordinates, dense, diagonal, top
from bayesdl.density import Site
from bayesdl.density.sites import random_sites
from bayesdl.errors import MethodError
from bayesdl.models import BayesianNetwork
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.prior import prior_law
from bayesdl.posterior.problem import Problem

STRUCTURES = ("full", "functional", "diag", "kron", "ekfac", "low_rank")
FULL_UP_TO = 1000
"""Unknowns up to which "auto" writes the matrix out, or rows times outputs up to which it takes their kernel."""


@dataclass(frozen=True)
class Choice:
    """What the precision is to be.

    Attributes:
        structure: one of ``STRUCTURES``.
        curvature: "ggn", "fisher" or "hessian".
        network: whether the model is a ``BayesianNetwork``.
        random: the sites that are random.
        hyper: those of them that are no parameters of a network.
        points: names of the other sites.
        rank: of "low_rank".
        batch_size: rows in a batch of the sums.
    """

    structure: str
    curvature: str
    network: bool
    random: tuple[Site, ...]
    hyper: tuple[Site, ...]
    points: tuple[str, ...]
    rank: int
    batch_size: int | None

    @property
    def of_outputs(self) -> Curvature:
        """The curvature by a network's weights."""
        return "fisher" if self.curvature == "fisher" else "ggn"

    def info(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """What to tell of the posterior: structure, what is a point, how many parameters the data determine."""
        exact = any(not block.prior and block.group == site.name for block in blocks for site in self.hyper[:1])
        effective = [block.effective() for block in blocks if block.prior]  # of a written Hessian it is not known
        return {
            "structure": self.structure,
            "curvature": self.curvature,
            "points": list(self.points),
            "hyperparameters": {site.name: "exact Hessian" if exact else "point" for site in self.hyper},
            "effective_parameters": sum(effective) if effective else None,
        }


def choose(
    problem: Problem,
    structure: str,
    curvature: str,
    patterns: str | tuple[str, ...],
    rank: int,
    batch_size: int | None,
) -> Choice:
    """Settle what is "auto", and which sites are random.

    Raises:
        MethodError: a combination that does not exist, or a pattern that matches nothing.
    """
    model, sites = problem.model, random_sites(problem.density.sites, patterns)
    network = isinstance(model, BayesianNetwork)
    names = {info.name for info in model.sites} if network else set()
    kind = curvature if curvature != "auto" else ("ggn" if network else "hessian")
    if kind != "hessian" and not network:
        raise MethodError(
            f"curvature={kind!r} is that of a network's outputs; a program of your own has curvature='hessian'."
        )
    weights = [site for site in sites if site.name in names]
    if kind == "hessian" or structure != "auto":
        found = "full" if kind == "hessian" and structure == "auto" else structure
    elif _is_coupled(problem) or sum(site.size for site in weights) <= FULL_UP_TO:
        found = "full"
    else:
        found = _structure_for_many(problem, weights)
    if found != "full" and kind == "hessian":
        raise MethodError("An exact Hessian is written out: curvature='hessian' has structure='full'.")
    if not sites:
        raise MethodError("No site is random: there is nothing to approximate.")
    random = {site.name for site in sites}
    points = tuple(site.name for site in problem.density.sites if site.name not in random)
    hyper = tuple(site for site in sites if network and site.name not in names)
    return Choice(found, kind, network, tuple(sites), hyper, points, rank, batch_size)


def _structure_for_many(problem: Problem, weights: list[Site]) -> str:
    """What "auto" is where the matrix is too large to be written out."""
    start = problem.density.prior_draws(1)[0]
    network, sd = NetworkOutputs(problem, start), prior_scales(problem, start)
    layers, _ = layers_of(network, weights)
    if problem.n * network.event_shape.numel() <= FULL_UP_TO and bool(sd[coordinates(weights, start)].isfinite().all()):
        return "functional"
    return "kron" if layers and all(_columns(layer, sd) is not None for layer in layers) else "diag"


def precision(problem: Problem, z: Tensor, choice: Choice) -> list[Block]:
    """The blocks of the precision at ``z [D]``.

    Raises:
        MethodError: an exact Hessian that is not that of a maximum, or a structure that does not fit the prior.
    """
    if choice.curvature == "hessian":
        return [_exact(problem, z, choice.random, choice.batch_size)]
    network = NetworkOutputs(problem, z)
    weights = [site for site in choice.random if site not in choice.hyper]
    blocks: list[Block] = []
    if weights and _is_coupled(problem):
        prior = _coupled_precision(problem, weights, choice.structure)
        blocks.append(_with_prior(network, weights, choice, prior))
    elif weights:
        blocks += _of_network(network, weights, choice, prior_scales(problem, z))
    if choice.hyper:
        with suppress(MethodError):  # no maximum of these: points, as ``info`` says
            blocks.append(_exact(problem, z, choice.hyper, choice.batch_size))
    if not blocks:
        raise MethodError("Nothing is random: the curvature by the hyperparameters is not that of a maximum.")
    return blocks


def _is_coupled(problem: Problem) -> bool:
    """Whether the prior is an earlier posterior under which coordinates depend on each other."""
    law = prior_law(problem.density)
    return law is not None and not isinstance(law.covariance, Diagonal)


def _coupled_precision(problem: Problem, weights: list[Site], structure: str) -> Tensor:
    """The precision of a prior that couples coordinates, by some of them, ``[R, R]``."""
    law = prior_law(problem.density)
    assert law is not None  # _is_coupled has looked
    if structure != "full":
        raise MethodError(
            f"structure={structure!r} needs a prior with independent coordinates, and prior= couples them "
            f"({type(law.covariance).__name__}): use structure='full', or structure='diag' in the earlier fit."
        )
    place = coordinates(weights, law.mean)
    rows = torch.zeros(len(place), law.dim, dtype=law.mean.dtype, device=law.mean.device)
    rows[torch.arange(len(place)), place] = 1.0
    return law.covariance.solve(rows)[:, place]


def _with_prior(network: NetworkOutputs, weights: list[Site], choice: Choice, prior: Tensor) -> Full:
    """The precision of likelihood and prior ``[R, R]`` together, in the units of the weights."""
    place = coordinates(weights, network.z)
    matrix = dense(network, weights, choice.of_outputs, choice.batch_size) + prior
    found = Full.of(matrix, place, torch.ones_like(network.z[place]), "weights", False)
    _require_positive(found, weights, "The sum of likelihood and prior")
    return found


def prior_scales(problem: Problem, z: Tensor) -> Tensor:
    """``[D]``: sd of the Gaussian with the prior's curvature at z; inf where that is 0 or negative.

    A network's prior is independent over its weights given its scales, so the product of its Hessian with a vector of
    ones is the diagonal. The coordinates of other sites mean nothing.
    """
    density = problem.density
    batch = problem.minibatch(torch.arange(1)) if density.factorised else None
    prior = density.function(batch, target="prior")
    names = {info.name for info in problem.model.sites}
    ones = torch.zeros_like(z)
    for site in density.sites:
        if site.name in names:
            ones[site.start : site.stop] = 1.0
    # Through the tape, because a constant part has no forward derivative.
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(prior(leaf), leaf, create_graph=True)[0]
        bend = torch.autograd.grad(slope, leaf, ones, materialize_grads=True)[0]
    return (-bend.detach()).clamp(min=0).rsqrt()


def _of_network(network: NetworkOutputs, weights: list[Site], choice: Choice, sd: Tensor) -> list[Block]:
    kind, size, place = choice.of_outputs, choice.batch_size, coordinates(weights, network.z)
    if choice.structure == "full":
        if not bool(sd[place].isfinite().all()):
            return [_with_prior(network, weights, choice, sd[place].square().reciprocal().diag())]
        return [Full.of(dense(network, weights, kind, size), place, sd[place], "weights", True)]
    if choice.structure == "functional":
        _require_proper(sd[place], choice.structure)
        parts = layers_of(network, weights)
        place = places(network, parts)
        return [Functional.of(training_rows(network, parts, sd, kind, size), place, sd[place], "weights")]
    if choice.structure == "low_rank":
        _require_proper(sd[place], choice.structure)
        scale = torch.zeros_like(sd)
        scale[place] = sd[place]
        values, basis = top(lambda v: network.times(v * scale, kind, size) * scale, sd, choice.rank)
        return [Few(place, sd[place], "weights", True, values.double(), basis[place])]
    if choice.structure == "diag":
        layers: list[Layer] = []
        others = weights
    else:
        layers, others = layers_of(network, weights)
    blocks = _kronecker(network, layers, choice, kind, sd) + _diagonals(network, others, kind, size, sd)
    return blocks


def _diagonals(
    network: NetworkOutputs, sites: list[Site], kind: Curvature, batch_size: int | None, sd: Tensor
) -> list[Block]:
    if not sites:
        return []
    values, at = diagonal(network, sites, kind, batch_size), 0
    blocks: list[Block] = []
    for site in sites:
        place, own = coordinates([site], network.z), values[at : at + site.size]
        at += site.size
        scale, proper = sd[place], bool(sd[place].isfinite().all())
        if not proper:
            own, scale = own + scale.square().reciprocal(), torch.ones_like(scale)
        layer = site.name.rpartition(".")[0] or site.name
        block = Separate.of(own, place, scale, layer, proper)
        if not proper:
            _require_positive(block, [site], "The sum of likelihood and prior")
        blocks.append(block)
    return blocks


def _kronecker(
    network: NetworkOutputs, layers: list[Layer], choice: Choice, kind: Curvature, sd: Tensor
) -> list[Block]:
    """``s (G x A) s`` is ``G x (s A s)`` where the prior is the same for all outputs of a layer."""
    if not layers:
        return []
    found, columns = factors(network, layers, kind, choice.batch_size), []
    for layer in layers:
        column = _columns(layer, sd)
        if column is None:
            raise MethodError(
                f"structure={choice.structure!r} needs a prior whose curvature is the same for all outputs of a layer, "
                f"and not 0; that of {layer.name!r} is another: use structure='diag' or 'full'."
            )
        columns.append(column)
    blocks: list[Block] = []
    bases = []
    for factor, column in zip(found, columns, strict=True):
        wide = column.double()
        bases.append(
            (torch.linalg.eigh(factor.left.double()), torch.linalg.eigh(wide[:, None] * factor.right.double() * wide))
        )
    if choice.structure == "ekfac":
        scaled = [
            (g[1].to(sd.dtype), column[:, None] * a[1].to(sd.dtype))
            for (g, a), column in zip(bases, columns, strict=True)
        ]
        spectra = [value.double() for value in rescaled(network, layers, scaled, kind, choice.batch_size)]
    else:
        spectra = [g[0].clamp(min=0)[:, None] * a[0].clamp(min=0) for g, a in bases]
    for layer, values, (g, a) in zip(layers, spectra, bases, strict=True):
        place, left, right = layer.place.flatten(), g[1].to(sd.dtype), a[1].to(sd.dtype)
        blocks.append(Product(place, sd[place], layer.name or "weights", True, values, left, right))
    return blocks


def _columns(layer: Layer, sd: Tensor) -> Tensor | None:
    """The prior's sd of each column of a layer's weights ``[I]``, or None if it is not the same in all rows."""
    scale = sd[layer.place]
    same = bool(torch.isfinite(scale).all()) and torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-5)
    return scale[0] if same else None


def _require_proper(sd: Tensor, structure: str) -> None:
    if not bool(sd.isfinite().all()):
        raise MethodError(
            f"structure={structure!r} needs a prior with curvature at the mode, and that of some weights has none "
            "(a Laplace prior, say): use structure='diag' or 'full'."
        )


def _exact(problem: Problem, z: Tensor, sites: tuple[Site, ...], batch_size: int | None) -> Full:
    place = coordinates(sites, z)
    matrix = -hessian(problem, z, place, batch_size)
    found = Full.of(matrix, place, torch.ones_like(z[place]), sites[0].name, False)
    _require_positive(found, sites, "The exact Hessian")
    return found


def _require_positive(block: Block, sites: Sequence[Site], what: str) -> None:
    """Raise unless all eigenvalues are clearly positive; the message names the worst direction."""
    values = block.values
    least = values.min()
    if bool(least > values.max() * values.numel() * 1e-14) and bool(values.isfinite().all()):
        return
    vector = block.basis[:, 0] if isinstance(block, Full) else (values == least).double()
    best = int(vector.abs().argmax())
    names = [f"{site.name}[{k}]" if site.size > 1 else site.name for site in sites for k in range(site.size)]
    raise MethodError(
        f"{what} shows no maximum here: the curvature is {float(least):.3g} along a direction that is mostly "
        f"{names[best]} ({float(vector[best]) ** 2:.0%} of its square). Either the optimiser has not reached a mode "
        "(more steps=, polish=), or the density has none there (an unidentified or unbounded direction); for a "
        "network curvature='ggn' is never negative."
    )
