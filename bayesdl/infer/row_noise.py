"""Gradients of the ELBO with weights of its own for every row: local reparameterisation and Flipout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

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

    The model's own sites hold the means of the weights that are drawn for each row; a spread is their log sd, or
    Flipout's perturbation.
    """

    row_arguments: ClassVar[tuple[str, ...]] = (*BayesianNetwork.row_arguments, ROWS)

    def __init__(self, rows: RowNoise) -> None:
        self.rows = rows
        self.shapes = {site.name: site.shape for site in rows.model.sites if site.name in rows.sites}

    def __call__(self, x: Tensor, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Run the network's program with noise ``[N, U]``."""
        assert noise is not None  # it is in every batch
        model = self.rows.model
        like = torch.ones((), dtype=model.dtype, device=model.device)
        spread = {name: pyro.param(f"{name}{SPREAD}", like.expand(shape)) for name, shape in self.shapes.items()}
        if self.rows.kind == "local":
            spread = {name: (2.0 * log_sd).exp() for name, log_sd in spread.items()}
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
        # Then the density's arguments are the parameters as they stand.
        self.aligned = self.kind == "local" and self.count == self.spreads_at == self.family.dim == len(self.random)
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
        return RowDraws(rows, None if self.aligned else self.normals(1, stream)[0])

    def estimate(
        self, parameters: Tensor, noise: RowDraws, batch: dict[str, Any] | None, kl_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See the base class; all draws give one estimate.

        The density's derivative by log sd is the gradient along the path where rows draw the weights locally; by
        Flipout's perturbation d = sd e it is to be multiplied by d.
        """
        mean, log_sd = self.split(parameters)
        at, away = parameters, None
        if noise.shared is not None:
            away = log_sd.exp() * noise.shared
            inner = log_sd[self.own] if self.kind == "local" else away[self.own]
            shared = away.clone()
            shared[self.own] = 0.0
            z = self._displaced(mean, shared[None])[0]
            at = torch.cat([z[: self.spreads_at], inner, z[self.spreads_at :]])
        data = self._with_noise(batch, noise)
        value, slopes = self.density.value_and_grad(at[None], data, target=self.target)
        gradient = slopes[0] if away is None else self._gathered(slopes[0], away)
        slope, along = self.split(gradient)
        variances = (2.0 * log_sd).exp_()
        value = value + self._entropy(log_sd) - 0.5 * torch.dot(self.precision, variances)
        along.addcmul_(self.precision, variances, value=-kl_weight).add_(kl_weight)
        if self.prior is not None:
            log_prior, pull = self._prior_at(mean)
            value = value + log_prior
            slope.sub_(pull, alpha=kl_weight)
        return value, gradient

    def _gathered(self, slopes: Tensor, away: Tensor) -> Tensor:
        """The gradient ``[P]`` of the density's expectation, from its slopes by means, draws and spreads."""
        before, by_spread, after = slopes.split(
            [self.spreads_at, self.count, len(slopes) - self.spreads_at - self.count]
        )
        slope = torch.cat([before, after])
        along = (slope if self.places is None else slope[self.places]) * away
        along[self.own] = by_spread if self.kind == "local" else by_spread * away[self.own]
        return torch.cat([slope, along])

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
