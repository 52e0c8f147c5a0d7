"""A network's outputs as a function of its parameters, and the curvature of its likelihood as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp, vmap

from bayesdl.density import Site, program
from bayesdl.errors import MethodError
from bayesdl.models import BayesianNetwork
from bayesdl.posterior.problem import Problem

Curvature = Literal["ggn", "fisher"]

ROWS = 1024
"""Rows of a batch where the caller gives no number."""


class NetworkOutputs:
    """``f(x; z)`` of a ``BayesianNetwork`` around a point, and its likelihood given f.

    Both curvatures of the negative log likelihood that are used in place of its Hessian have the form

        sum_i J_i^T R_i R_i^T J_i,    J_i = d f(x_i) / d z,  [K, D]

    with ``R_i R_i^T`` the Hessian of ``-log p(y_i | f)`` by f (generalised Gauss-Newton; negative eigenvalues, which
    likelihoods have that are not log-concave in f, count as 0), or R_i its gradient (empirical Fisher, one column).
    Everything else in this package is a way to compute or to shorten that sum. Temperatures scale R.

    Attributes:
        problem: the network and its rows.
        model: the network.
        sites: its parameters; the other sites are ``hyper``, parameters of prior and likelihood.
        hyper: see ``sites``.
        z: the point ``[D]``.
    """

    def __init__(self, problem: Problem, z: Tensor) -> None:
        if not isinstance(problem.model, BayesianNetwork):
            raise MethodError(
                "Gauss-Newton and Fisher matrices are those of a network's outputs, and this model is a program of "
                "your own: use curvature='hessian'."
            )
        self.problem, self.model, self.z = problem, problem.model, z
        names = {info.name for info in self.model.sites}
        self.sites = tuple(site for site in problem.density.sites if site.name in names)
        self.hyper = tuple(site for site in problem.density.sites if site.name not in names)

    @property
    def example(self) -> Tensor:
        """One row of inputs, in the model's units."""
        x: Tensor = self.problem.batch["x"][:1]
        return x

    def batches(self, batch_size: int | None = None) -> Iterator[dict[str, Any]]:
        """The training rows in batches, each row once."""
        for index in torch.arange(self.problem.n).split(batch_size or ROWS):
            yield self.problem.minibatch(index)

    def parameters(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the network's parameters by name at ``z [D]``."""
        return {site.name: self._value(site, z[site.start : site.stop]) for site in self.sites}

    def outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``[B, K]`` at inputs in the model's units."""
        return self.model.forward(parameters, x).reshape(len(x), -1)

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        """``[B, K]`` at ``z [D]``."""
        return self.outputs(self.parameters(z), x)

    def latents(self, hyper: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """What the likelihood needs beside the outputs, for given values of its own sites."""
        with program.Substitute(hyper):
            return self.model.likelihood.latents(like)

    def hyper_values(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values of the sites that are no parameters of the network, at ``z [D]``."""
        return {site.name: self._value(site, z[site.start : site.stop]) for site in self.hyper}

    def shaped(self, f: Tensor) -> Tensor:
        """Flat outputs ``[B, K]`` in the shape in which the network gives them."""
        return f.reshape(len(f), *self.event_shape)

    @cached_property
    def event_shape(self) -> torch.Size:
        """Shape of one row's outputs: ``[]`` or ``[K]``."""
        with torch.no_grad():
            return self.model.forward(self.parameters(self.z), self.problem.batch["x"][:1]).shape[1:]

    def roots(self, batch: Mapping[str, Any], curvature: Curvature) -> Tensor:
        """R of every row, ``[B, K, C]`` with C = K (Gauss-Newton) or 1 (Fisher)."""
        with torch.no_grad():
            if curvature == "fisher":
                return self._by_outputs(self.z, batch, grad).unsqueeze(2) * self.problem.density.powers[1] ** 0.5
            matrices = self.bends(self.z, batch, curvature)
            if matrices.shape[1] == 1:
                return matrices.clamp(min=0).sqrt()
            values, vectors = torch.linalg.eigh(matrices)
            return vectors * values.clamp(min=0).sqrt().unsqueeze(1)

    def bends(self, z: Tensor, batch: Mapping[str, Any], curvature: Curvature) -> Tensor:
        """``R R^T`` of every row at ``z [D]``, ``[B, K, K]``, differentiable by z; negative eigenvalues are left in."""
        power = self.problem.density.powers[1]
        if curvature == "fisher":
            slopes = self._by_outputs(z, batch, grad)
            return power * slopes.unsqueeze(2) * slopes.unsqueeze(1)
        return power * self._by_outputs(z, batch, hessian)

    def _by_outputs(self, z: Tensor, batch: Mapping[str, Any], derivative: Callable[..., Any]) -> Tensor:
        """A derivative of every row's negative log likelihood by the row's outputs, ``[B, ...]``."""
        with program.unchecked():
            f = self.at(z, batch["x"])
            latents = self.latents(self.hyper_values(z), f)
            shape, likelihood = self.event_shape, self.model.likelihood

            def loss(one: Tensor, y: Tensor) -> Tensor:
                distribution = likelihood.distribution(one.reshape(1, *shape), latents)
                target = likelihood.target(y[None], distribution, one.dtype)
                value: Tensor = -distribution.log_prob(target).sum()
                return value

            found: Tensor = vmap(derivative(loss))(f, batch["y"])
            return found

    def row_factors(self, x: Tensor, roots: Tensor, sites: tuple[Site, ...] | None = None) -> Tensor:
        """``R_i^T J_i`` of every row, by the given sites, ``[B, C, D']``: for any module, row by row under vmap."""
        chosen = self.sites if sites is None else sites
        fixed = self.parameters(self.z)
        leaves = {site.name: fixed[site.name] for site in chosen}

        def row(one: Tensor, root: Tensor) -> dict[str, Tensor]:
            def function(values: dict[str, Tensor]) -> Tensor:
                return self.outputs({**fixed, **values}, one.unsqueeze(0))[0]

            pull = vjp(function, leaves)[1]
            found: dict[str, Tensor] = vmap(lambda r: pull(r)[0])(root.mT)
            return found

        found = vmap(row)(x, roots)
        return torch.cat([found[site.name].flatten(2) for site in chosen], 2).detach()

    def times(self, rows: Tensor, curvature: Curvature = "ggn", batch_size: int | None = None) -> Tensor:
        """``M v`` for the curvature M and rows v ``[V, D]``; 0 at coordinates of other sites.

        Cost: one forward and one reverse derivative a row and batch (Schraudolph, 2002).
        """
        total = torch.zeros_like(rows)
        for batch in self.batches(batch_size):
            roots = self.roots(batch, curvature)

            def function(z: Tensor, x: Tensor = batch["x"]) -> Tensor:
                return self.at(z, x)

            pull = vjp(function, self.z)[1]

            def product(v: Tensor, roots: Tensor = roots, function: Any = function, pull: Any = pull) -> Tensor:
                along = jvp(function, (self.z,), (v,))[1]
                weighted = (roots @ (roots.mT @ along.unsqueeze(2))).squeeze(2)
                found: Tensor = pull(weighted)[0]
                return found

            total += vmap(product, chunk_size=32)(rows).detach()
        return total

    def _value(self, site: Site, flat: Tensor) -> Tensor:
        value: Tensor = site.transform(flat.reshape(site.unconstrained_shape))
        return value
