"""Average losses in which every row has weights of its own: cheap, and many independent draws at once.

One draw of the weights for all n rows gives n losses that stand or fall together: m draws tell the Gibbs risk to about
1 / sqrt(m). With a draw for each row the n m losses are independent, given the rows, and Hoeffding's bound in kl form
(1963, theorem 1, which does not ask for equal means) holds with n m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from pyro.distributions.distribution import Distribution
from torch import Tensor, nn
from torch.func import vmap

from bayesdl._rng import generator, isolated
from bayesdl.bounds.loss import Loss
from bayesdl.bounds.risk import checked
from bayesdl.data import Dataset
from bayesdl.density import program
from bayesdl.infer.progress import Bar
from bayesdl.models import BayesianNetwork
from bayesdl.models.local_noise import RowNoise
from bayesdl.posterior import Posterior, Prediction
from bayesdl.posterior.covariance import Diagonal
from bayesdl.posterior.families import pack, unpack
from bayesdl.posterior.gaussian import GaussianPosterior

NUMBERS = 2**23
"""Numbers of weights and inputs that a block of rows holds."""


def draws_by_row(posterior: Posterior) -> TypeGuard[GaussianPosterior]:
    """Whether ``row_risk`` takes a posterior: independent Gaussian weights, rows that do not depend on each other."""
    if not isinstance(posterior, GaussianPosterior) or not isinstance(posterior.law.covariance, Diagonal):
        return False
    density = posterior.problem.density
    shared = all(site.scope == "global" for site in density.sites)
    return density.factorised and shared and not posterior.problem.draws_anew


class RowSampler:
    """Predictions at rows that each have weights of their own.

    The outputs of linear layers are drawn instead of their weights, which is exact for a layer that sees a row once
    (``models.local_noise``); all other unknowns are drawn.

    Args:
        posterior: one that ``draws_by_row`` takes.
        inputs: the program's arguments in the model's units, all rows.
        seed: of the draws.
    """

    def __init__(self, posterior: GaussianPosterior, inputs: Mapping[str, Any], seed: int) -> None:
        self.posterior, self.problem, self.inputs = posterior, posterior.problem, inputs
        density = self.problem.density
        self.mean, self.sd = posterior.mean, posterior.sd
        self.stream = generator(seed, "row draws", device=self.mean.device)
        self.noise = self._linear_layers()
        local = () if self.noise is None else self.noise.sites
        self.drawn = torch.ones(density.dim, dtype=torch.bool, device=self.mean.device)
        for site in density.sites:
            self.drawn[site.start : site.stop] = site.name not in local
        values = density.constrain(self.mean[None])
        variances = density.constrain(self.sd.square()[None])  # weights of a network are unconstrained: the identity
        self.means = {name: values[name][0] for name in local}
        self.variances = {name: variances[name][0] for name in local}

    @property
    def width(self) -> int:
        """Numbers that a row takes."""
        own = sum(self.inputs[name][0].numel() for name in self.problem.row_names if name in self.inputs)
        return own + int(self.drawn.sum()) + (0 if self.noise is None else self.noise.size)

    def predict(self, rows: Tensor) -> Prediction:
        """The prediction at some rows, by their places; S = 1."""
        problem = self.problem
        part = {name: self.inputs[name][rows] for name in problem.row_names if name in self.inputs}
        count = len(next(iter(part.values())))
        with isolated(0, "predict", 0), torch.no_grad(), program.unchecked():
            law = self._with_layers(part, count) if not self.drawn.any() else self._with_weights(part, count)
        return Prediction(law, shift=float(problem.scaler.y_mean), scale=float(problem.scaler.y_scale))

    def _with_layers(self, part: Mapping[str, Tensor], count: int) -> Distribution:
        """The likelihood's distribution where layers draw all that is random, ``[1, N]``."""
        assert self.noise is not None  # else there would be weights to draw
        with self.noise.drawing(self.variances, self._normals(count, self.noise.size)):
            law = program.distribution_at(self.problem.model, {**self.inputs, **part}, self.means, self.problem.target)
        spec, tensors = unpack(law)
        return pack(spec, {name: tensor[None] for name, tensor in tensors.items()})

    def _with_weights(self, part: Mapping[str, Tensor], count: int) -> Distribution:
        """The same where weights are drawn as well."""
        problem, rest = self.problem, {name: value for name, value in self.inputs.items() if name not in part}
        z = self.mean.expand(count, -1).clone()
        z[:, self.drawn] += self.sd[self.drawn] * self._normals(count, int(self.drawn.sum()))
        values = problem.density.constrain(z)
        values = {name: value for name, value in values.items() if name not in self.means}
        noise = self._normals(count, 0 if self.noise is None else self.noise.size)
        found: list[Any] = []

        def one(inputs: Mapping[str, Tensor], draw: Mapping[str, Tensor], numbers: Tensor) -> dict[str, Tensor]:
            own = {name: value[None] for name, value in inputs.items()}
            drawing = nullcontext() if self.noise is None else self.noise.drawing(self.variances, numbers[None])
            with drawing:
                law = program.distribution_at(problem.model, {**rest, **own}, {**self.means, **draw}, problem.target)
            spec, tensors = unpack(law)
            found.append(spec)
            return {name: tensor.clone() for name, tensor in tensors.items()}

        tensors = vmap(one, randomness="different")(part, values, noise)
        return pack(found[0], {name: tensor.transpose(0, 1) for name, tensor in tensors.items()})

    def _normals(self, rows: int, count: int) -> Tensor:
        drawn = torch.empty(rows, count, dtype=self.mean.dtype, device=self.mean.device)
        return drawn.normal_(generator=self.stream)

    def _linear_layers(self) -> RowNoise | None:
        """The linear layers that see every row once, as a vector."""
        model = self.problem.model
        if not isinstance(model, BayesianNetwork):
            return None
        linear = {name for name, module in model.net.named_modules() if type(module) is nn.Linear}
        names = {site.name for site in model.sites if site.name.rpartition(".")[0] in linear}
        found = RowNoise(model, next(iter(self.inputs[name] for name in self.problem.row_names)), names)
        once = {s for layer in found.layers if len(layer.inputs) == 1 for s in layer.sites}
        if once != set(found.sites):
            found = RowNoise(model, self.inputs[str(self.problem.x_name)], once)
        return found if found.layers else None


def row_risk(
    posterior: GaussianPosterior,
    data: Dataset,
    loss: Loss,
    *,
    passes: int,
    seed: int,
    progress: bool | None,
    together: int = 1,
) -> float:
    """Average loss over rows, each with ``passes`` independent draws from the posterior of its own.

    Args:
        posterior: one that ``draws_by_row`` takes.
        data: the rows of the bound.
        loss: a loss in [0, 1].
        passes: draws for each row, or groups of draws.
        seed: of the draws.
        progress: whether to show a progress bar; None asks the terminal.
        together: draws in a group; the loss of a group at a row is the product of its members' losses.

    Raises:
        CertificateError: a loss is NaN or outside [0, 1].
    """
    sampler, n = RowSampler(posterior, posterior.problem.inputs(data.x), seed), len(data)
    size = max(1, NUMBERS // sampler.width)  # of a block, which may hold a row several times
    total: list[float] = []
    bar = Bar("certify", passes * n, progress)
    try:
        for begin in range(0, passes * n, size):
            bar.update(begin, str)
            rows = torch.arange(begin, min(begin + size, passes * n)) % n
            y = data.y[rows]
            values = [checked(loss.draws(sampler.predict(rows), y), (1, len(y)), loss) for _ in range(together)]
            total.append(float(torch.cat(values).prod(0).sum()))
    finally:
        bar.close(passes * n, str)
    return min(1.0, math.fsum(total) / (passes * n))
