"""The Bayesian last layer: a trained network's features under exact linear regression."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.density.sites import Site
from bayesdl.errors import MethodError, ModelError
from bayesdl.infer.linear_gaussian import LinearGaussian, embedded, noise_site, not_a_regression, prior_of
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Work
from bayesdl.infer.optimise import Optimiser
from bayesdl.models import BayesianNetwork
from bayesdl.models.features import features, last_linear
from bayesdl.models.positive import PositivePrior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import MOST_DENSE
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

MOST_SCALING = 1e3
"""Largest factor, up or down, that the evidence may put on the prior's standard deviations."""


@dataclass(frozen=True)
class LastLayer(Optimiser):
    r"""The exact Gaussian posterior of the last linear layer, over features that MAP has trained.

    Given the other layers and the noise the network is a Bayesian linear regression, ``f = W phi(x) + b``: its
    posterior is Gaussian and its evidence known. The other layers stay at the point that training found; a network that
    is nothing but a last layer (a linear model, ``RandomFourierFeatures`` under a linear layer) needs no training, and
    with known noise its posterior is exact altogether. A noise level with a prior is set where evidence times prior is
    highest, given the features.

    ``info["log_evidence"]`` is the log density of the raw targets given features, noise and prior.

    Cost: the training, then N P^2 + P^3 for the P weights of the layer.

    Args:
        tune_prior: scale the prior's standard deviations of the layer, all by one factor, to the highest evidence
            (``info["prior_scale"]``). The other settings are those of ``MAP``.

    Source: Bishop (2006), sections 3.3 and 3.5; Ober and Rasmussen (2019) for networks.
    """

    name: ClassVar[str] = "LastLayer"
    takes_parameters: ClassVar[bool] = False

    tune_prior: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.likelihood_temperature != 1:
            raise MethodError(f"{self.name}: likelihood_temperature={self.likelihood_temperature!r} must be 1 here.")

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = not_a_regression(density, "whose last layer it can find")
        if reason is not None:
            return reason
        try:
            part = _layer(density)
        except ModelError as error:
            return str(error).rstrip(".")
        weights = part.stop - part.start
        if weights > MOST_DENSE:
            return (
                f"the last layer has {weights} weights, whose covariance takes {weights**2 * 8 / 2**30:,.1f} GiB; a "
                "narrower last hidden layer, or MeanFieldVI"
            )
        if self.tune_prior and density.gaussian_prior() is None:
            return "tune_prior= needs priors that are independent Gaussians over all unknowns"
        if prior_of(density, part, None) is None:
            return "the prior of the last layer is not Gaussian"
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """The training."""
        return replace(super().work(problem), note="and one factorisation for the last layer")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        density, part = problem.density, _layer(problem.density)
        noise_at = noise_site(density)
        z, info = self._train(problem, run, part, noise_at)
        prior = prior_of(density, part, z)
        assert prior is not None  # applies_to has asked
        regression = _regression(problem, z, prior)
        noise, scale = self._levels(problem, regression, z)
        evidence = regression.log_evidence(*torch.tensor([noise, scale], dtype=torch.float64).log())
        info |= {
            "noise": noise,
            "prior_scale": scale,
            "log_evidence": float(evidence) - problem.n * problem.log_scale,
        }
        law = regression.posterior(noise, scale)
        if noise_at is not None:
            z = density.unconstrain(density.constrain(z) | {"noise": z.new_tensor(noise)})
        if scale != 1:
            own = density.gaussian_prior()
            assert own is not None  # applies_to has asked
            sd = own[1].clone()
            sd[part] *= scale
            problem = replace(problem, density=density.with_gaussian_prior(own[0], sd))
        return GaussianPosterior(problem, embedded(law.to(density.dtype, density.device), z, part), info)

    def _train(self, problem: Problem, run: Run, part: slice, noise: Site | None) -> tuple[Tensor, dict[str, Any]]:
        """Values ``[D]`` of all sites; those of the layer do not matter."""
        points = problem.density.dim - (part.stop - part.start) - (0 if noise is None else noise.size)
        if points:
            z, info = self.optimise(problem, run, members=1)
            return z[0], info
        return problem.density.prior_draws(1, run.seed)[0], {"steps": 0}

    def _levels(self, problem: Problem, regression: LinearGaussian, z: Tensor) -> tuple[float, float]:
        """Noise and factor of the prior's sd: as stated, or of the highest evidence (times the noise's prior)."""
        stated = problem.model.likelihood.noise
        open_noise = isinstance(stated, PositivePrior)
        first = math.log(float(problem.density.constrain(z)["noise"]) if open_noise else stated)
        logs = torch.tensor([first, 0.0], dtype=torch.float64)
        free = torch.tensor([open_noise, self.tune_prior])
        if not free.any():
            return math.exp(first), 1.0
        start, move = logs.clone(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimiser: Any = torch.optim.LBFGS(
            [move], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            at = start + move * free
            loss = -regression.log_evidence(at[0], at[1])
            if open_noise:
                loss = loss - stated.distribution(start).log_prob(at[0].exp())
            loss = loss / regression.count
            loss.backward()
            return loss

        with torch.enable_grad():
            optimiser.step(closure)
        noise, scale = (start + move.detach() * free).exp().tolist()
        if not (0 < noise < math.inf and 1 / MOST_SCALING < scale < MOST_SCALING):
            raise MethodError(
                f"{self.name}: the evidence has no maximum inside (noise {noise:.3g}, prior scaled by {scale:.3g}): "
                "the targets are noise to these features, or follow them exactly. Use tune_prior=False, or give the "
                "likelihood a noise level."
            )
        return noise, scale


def _layer(density: LogDensity) -> slice:
    """Where the last layer's weight and bias lie in z: side by side.

    Raises:
        ModelError: the network has no last linear layer.
    """
    assert isinstance(density.model, BayesianNetwork)  # applies_to has asked
    name, _ = last_linear(density.model)
    own = [site for site in density.sites if site.name.rpartition(".")[0] == name and site.scope == "global"]
    own = [site for site in own if site.name.rpartition(".")[2] in ("weight", "bias")]
    part = slice(own[0].start, own[-1].stop)
    if part.stop - part.start != sum(site.size for site in own):
        raise ModelError("The last layer's weight and bias do not stand side by side among the sites.")
    return part


def _regression(problem: Problem, z: Tensor, prior: Normal) -> LinearGaussian:
    """The regression of all targets on the features at z; weights of K outputs ``[K, H]``, then biases ``[K]``."""
    model, part = problem.model, _layer(problem.density)
    phi = features(model, problem.density.constrain(z), problem.batch[problem.x_name or "x"]).double()
    y = problem.batch[problem.y_name or "y"].double().reshape(len(phi), -1)
    _, layer = last_linear(model)
    outputs, width = layer.out_features, layer.in_features
    biased = part.stop - part.start > outputs * width
    fixed = 0.0 if biased or layer.bias is None else layer.bias.detach().double()
    design = torch.cat([phi, phi.new_ones(len(phi), 1)], 1) if biased else phi
    mean = prior.mean.double()
    weights = mean[: outputs * width].reshape(outputs, width)
    biases = mean[outputs * width :].reshape(outputs, -1)
    away = y - design @ torch.cat([weights, biases], 1).mT - fixed
    one, along = design.mT @ design, design.mT @ away
    # Column (k, h) of the design is feature h for output k: outputs share no targets, so their blocks are equal.
    order = torch.arange(outputs * (width + biased)).reshape(outputs, -1)
    order = torch.cat([order[:, :width].flatten(), order[:, width:].flatten()])
    gram = torch.block_diag(*[one] * outputs)[order][:, order]
    return LinearGaussian(gram, along.mT.reshape(-1)[order], away.square().sum(), y.numel(), prior)
