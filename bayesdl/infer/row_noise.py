"""Gradients of the ELBO with weights of its own for every row: local reparameterisation and Flipout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.density.log_density import Target
from bayesdl.density.sites import random_sites
from bayesdl.infer.gaussian_objective import Objective
from bayesdl.models import BayesianNetwork
from bayesdl.models.local_noise import Kind, RowNoise

KINDS: tuple[Kind, ...] = ("local", "flipout")
"""Of the noise; also the names of these estimators."""
ROWS = "noise"
"""The program's argument with the rows' noise."""
SPREAD = " spread"
"""After a site's name, that of the site of its spread."""


class RowNoiseNetwork:
    """The program of a network with noise for each row: beside the sites of the model, one for each spread.

    The model's own sites hold the means of the weights that are drawn for each row.
    """

    def __init__(self, rows: RowNoise) -> None:
        self.rows = rows
        self.shapes = {site.name: site.shape for site in rows.model.sites if site.name in rows.sites}

    def __call__(self, x: Tensor, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Run the network's program with noise ``[N, U]``."""
        assert noise is not None  # it is in every batch
        model = self.rows.model
        like = torch.ones((), dtype=model.dtype, device=model.device)
        spread = {name: pyro.param(f"{name}{SPREAD}", like.expand(shape)) for name, shape in self.shapes.items()}
        with self.rows.drawing(spread, noise):
            return model(x, y)


class RowDraws(NamedTuple):
    """What is random in an estimate: noise of the rows ``[S B, U]``, and normal numbers ``[R]`` for all of them.

    Local reparameterisation takes the latter for the coordinates that the rows do not draw, if there are any; Flipout
    for all.
    """

    rows: Tensor
    shared: Tensor | None


def row_noise(density: LogDensity, random: str | tuple[str, ...], kind: Kind) -> RowNoise | str:
    """The layers that can draw their weights for each row, or why there are none.

    They need a prior that is Gaussian and independent of all else, for the closed form of the KL.
    """
    model = density.model
    if not isinstance(model, BayesianNetwork):
        return (
            f"estimator={kind!r} draws the outputs of a network's layers, and the model is a program of your own; use "
            "bayesdl.BayesianNetwork(net), or estimator='sticking'"
        )
    prior = density.gaussian_prior()
    if density.new_prior is not None and prior is None:
        return f"estimator={kind!r} needs a prior with independent coordinates; use estimator='sticking'"
    names = {s.name for s in random_sites(density.sites, random) if prior is not None or s.gaussian is not None}
    found = RowNoise(model, density.batch["x"], names, kind)
    if not found.layers:
        return (
            f"estimator={kind!r} needs an nn.Linear or nn.Conv layer that runs once a row, whose weights are random, "
            "used by nothing else, and have an independent Gaussian prior; use estimator='sticking'"
        )
    return found


@dataclass
class RowNoiseObjective(Objective):
    """Local reparameterisation or Flipout for the layers that allow it; one draw for all rows of everything else.

    The likelihood's expectation is taken with the rows' own weights; their entropy and their prior are in closed form.
    S draws are a batch in which every row stands S times.
    """

    def __post_init__(self) -> None:
        """Make the density in which the spread of the weights is an argument, and find its coordinates."""
        super().__post_init__()
        problem, like = self.problem, self.problem.density
        self.kind = cast(Kind, self.method.estimator)
        found = row_noise(like, self.method.random, self.kind)
        assert isinstance(found, RowNoise)  # else the method does not apply
        self.rows = found
        # Noise of its own batch takes no memory; every step brings some.
        still = torch.zeros((), dtype=like.dtype, device=like.device).expand(problem.n, found.size)
        self._density = LogDensity(
            RowNoiseNetwork(found),
            {**problem.batch, ROWS: still},
            data_plate=problem.data_plate,
            temperature=like.temperature,
            likelihood_temperature=like.likelihood_temperature,
        )
        self.target: Target = "posterior" if self.prior is None else "likelihood"
        drawn = torch.zeros_like(self.random)
        for site in like.sites:
            drawn[site.start : site.stop] = site.name in found.sites
        self.own, self.rest = _place(drawn[self.random]), _place(~drawn[self.random])
        self.count = int(drawn.sum())
        self.spreads_at = next(site.start for site in self._density.sites if site.name.endswith(SPREAD))
        # Precision of the prior where it is in closed form; elsewhere it is in the density, at the draw for all rows.
        precision = like.prior_scale.pow(-2) / like.temperature
        self.precision = (precision if self.prior is not None else precision * drawn)[self.random]

    @property
    def density(self) -> LogDensity:
        """That of the network with noise for each row."""
        return self._density

    def expect(self, total: int) -> None:
        """See the base class."""
        like = self.problem.density
        batch = None if self.batch_size is None else self.problem.minibatch(torch.arange(self.batch_size))
        data = self._with_noise(batch, self.noise(self.method.samples, torch.Generator(like.device)))
        z = torch.zeros(1, self.density.dim, dtype=like.dtype, device=like.device)
        self.density.expect(total, z, data, target=self.target)

    def noise(self, samples: int, stream: torch.Generator) -> RowDraws:
        """See the base class."""
        rows = self.rows.noise(samples * (self.batch_size or self.problem.n), stream)
        if self.kind == "flipout" or self.family.dim > self.count:
            return RowDraws(rows, self.normals(1, stream)[0])
        return RowDraws(rows, None)

    def estimate(
        self, parameters: Tensor, noise: RowDraws, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See the base class; all draws give one estimate.

        With v the variances of the weights that the rows draw, and g their derivative of the density, the gradient by
        log sd is 2 v g; with Flipout's perturbation d = sd e it is d g.
        """
        mean, log_sd = self.split(parameters)
        sd = log_sd.exp()
        variances = sd.square()
        away = sd if noise.shared is None else sd * noise.shared
        inner = variances[self.own] if self.kind == "local" else away[self.own]
        z = mean
        if self.family.dim > self.count:
            shared = away.clone()
            shared[self.own] = 0.0
            z = self._displaced(mean, shared[None])[0]
        at = torch.cat([z[: self.spreads_at], inner, z[self.spreads_at :]])
        value, slopes = self.density.value_and_grad(at[None], self._with_noise(batch, noise), target=self.target)
        before, by_spread, after = slopes[0].split([self.spreads_at, self.count, len(z) - self.spreads_at])
        slope = torch.cat([before, after]) if len(after) else before
        along = kl_weight * (1.0 - self.precision * variances)
        along[self.own] += by_spread * inner * (2.0 if self.kind == "local" else 1.0)
        if self.family.dim > self.count:
            along[self.rest] += (slope if self.places is None else slope[self.places])[self.rest] * away[self.rest]
        value = value + self._entropy(log_sd) - 0.5 * torch.dot(self.precision, variances)
        if self.prior is not None:
            value = value + self.prior.log_prob(mean)
            slope = slope - kl_weight * self._prior_pull(mean)
        return value, torch.cat([slope, along])

    def _with_noise(self, batch: dict[str, Any] | None, noise: RowDraws) -> dict[str, Any]:
        """A mini-batch, or all rows, as often as there are draws, with their noise."""
        rows = {name: self.problem.batch[name] for name in self.problem.row_names} if batch is None else batch
        times = len(noise.rows) // len(next(iter(rows.values())))
        repeated = rows if times == 1 else {name: torch.cat([value] * times) for name, value in rows.items()}
        return {**repeated, ROWS: noise.rows}


def _place(chosen: Tensor) -> slice | Tensor:
    """The chosen ones of some coordinates, as a slice where they lie together."""
    index = chosen.nonzero().flatten()
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else index
