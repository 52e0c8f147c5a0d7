"""The Bayesian last layer: a trained network's features under exact linear regression."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from bayesdl.density import LogDensity, program
from bayesdl.density.sites import Site
from bayesdl.errors import MethodError, ModelError
from bayesdl.infer import method as check
from bayesdl.infer.last_layout import Layout, last_layer_of
from bayesdl.infer.linear_gaussian import LinearGaussian, embedded, noise_site, not_a_regression, prior_of
from bayesdl.infer.loop import Run
from bayesdl.infer.method import Work
from bayesdl.infer.optimise import Optimiser
from bayesdl.models.features import features, last_linear
from bayesdl.models.positive import PositivePrior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.covariance import MOST_DENSE, Dense
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.mixture import MixturePosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.problem import Problem

GRID, WIDEST = 2001, 20.0
"""Points of the quadrature over the logarithm of the noise, and the farthest it looks from the peak."""
MOST_SCALING = 1e3
"""Largest factor, up or down, that the evidence may put on the prior's standard deviations."""


@dataclass(frozen=True)
class LastLayer(Optimiser):
    r"""The exact Gaussian posterior of the last linear layer, over features that MAP has trained.

    Given the other layers and the noise the network is a Bayesian linear regression, ``f = W phi(x) + b``: its
    posterior is Gaussian and its evidence known. The other layers stay at the point that training found; a network that
    is nothing but a last layer (a linear model, ``RandomFourierFeatures`` under a linear layer) needs no training, and
    with known noise its posterior is exact altogether. A noise level with a prior is set where evidence times prior is
    highest, given the features; or, with ``noise_levels`` K > 1, integrated over: by quadrature its law given the
    targets is known, and the posterior is the equal mixture of the Gaussians at the mean of its logarithm in each of K
    bands of equal probability (``info["noise_levels"]``). That is exact for a linear model as K grows.

    ``info["log_evidence"]`` is the log density of the raw targets given features, prior and noise, or with the noise
    integrated out.

    Cost: the training, then N F^2 + F^3 and memory F^2 for the F weights of one output. All K outputs have the same
    covariance, which is kept once, if the prior is the same for each and couples none (the means may differ). Under any
    other prior F is the number of all weights.

    Args:
        tune_prior: scale the prior's standard deviations of the layer, all by one factor, to the highest evidence
            (``info["prior_scale"]``). The other settings are those of ``MAP``.
        noise_levels: K, see above; it means nothing where the noise is known.

    Source: Bishop (2006), sections 3.3 and 3.5; Ober and Rasmussen (2019) for networks.
    """

    name: ClassVar[str] = "LastLayer"
    takes_parameters: ClassVar[bool] = False

    tune_prior: bool = False
    noise_levels: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check.whole(self.name, noise_levels=self.noise_levels)
        if self.likelihood_temperature != 1:
            raise MethodError(f"{self.name}: likelihood_temperature={self.likelihood_temperature!r} must be 1 here.")

    def applies_to(self, density: LogDensity) -> str | None:
        """Why this method cannot be used on a density, or None if it can."""
        reason = not_a_regression(density, "whose last layer it can find")
        if reason is not None:
            return reason
        try:
            part = last_layer_of(density)
        except ModelError as error:
            return str(error).rstrip(".")
        prior, layout = prior_of(density, part, None), Layout.of(density)
        if prior is None:
            return "the prior of the last layer is not Gaussian"
        alike = layout.shared(prior.covariance) is not None
        weights = layout.order.shape[1] if alike else part.stop - part.start
        if weights * self.noise_levels**0.5 > MOST_DENSE:
            gigabytes = self.noise_levels * weights**2 * 8 / 2**30
            each = "for each output " if alike and layout.outputs > 1 else ""
            return (
                f"the last layer has {each}{weights} weights, whose covariance takes {gigabytes:,.1f} GiB with "
                f"noise_levels={self.noise_levels}; a narrower last hidden layer, or MeanFieldVI"
            )
        if self.tune_prior and density.gaussian_prior() is None:
            return "tune_prior= needs priors that are independent Gaussians over all unknowns"
        return super().applies_to(density)

    def work(self, problem: Problem) -> Work:
        """The training."""
        return replace(super().work(problem), note="and one factorisation for the last layer")

    def _fit(self, problem: Problem, run: Run) -> Posterior:
        density, part, layout = problem.density, last_layer_of(problem.density), Layout.of(problem.density)
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
        levels = [noise]
        if self.noise_levels > 1 and noise_at is not None:
            open_noise = problem.model.likelihood.noise
            levels, whole = noise_levels(regression, open_noise, noise, scale, self.noise_levels)
            info |= {"noise_levels": levels, "log_evidence": info["log_evidence"] - float(evidence) + whole}
        laws = []
        for level in levels:
            if noise_at is not None:
                z = density.unconstrain(density.constrain(z) | {"noise": z.new_tensor(level)})
            mean, spread = regression.posterior(level, scale)
            shared = mean.shape == layout.order.shape
            found = layout.law(mean, spread) if shared else Normal(mean[0], Dense.of(spread))
            laws.append(embedded(found.to(density.dtype, density.device), z, part))
        if scale != 1:
            own = density.gaussian_prior()
            assert own is not None  # applies_to has asked
            sd = own[1].clone()
            sd[part] *= scale
            problem = problem.with_prior_by_rows(own[0], sd)
        return GaussianPosterior(problem, laws[0], info) if len(laws) == 1 else MixturePosterior(problem, laws, info)

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


def noise_levels(
    regression: LinearGaussian, prior: PositivePrior, around: float, scale: float, count: int
) -> tuple[list[float], float]:
    """Noise levels that stand for equal shares of its law given the targets, and the evidence with it integrated out.

    By the trapezoidal rule over the noise's logarithm, on an interval that holds all but e^-40 of the peak.

    Args:
        regression: gives the evidence of every noise level.
        prior: of the noise level.
        around: a level near the peak.
        scale: factor of the prior's sd.
        count: number of levels.
    """
    centre, width = math.log(around), 4.0 / math.sqrt(regression.count)
    with torch.no_grad(), program.unchecked():
        while True:
            u = centre + width * torch.linspace(-1.0, 1.0, GRID, dtype=torch.float64)
            evidence = vmap(regression.log_evidence, (0, None))(u, u.new_tensor(scale).log())
            density = evidence + prior.distribution(u).log_prob(u.exp()) + u
            if float(density[[0, -1]].max() - density.max()) < -40 or width > WIDEST:
                break
            width *= 2
    share, edges = density.softmax(0), np.linspace(0.0, 1.0, count + 1)
    below = np.interp(edges, share.cumsum(0).numpy(), (share * u).cumsum(0).numpy())  # mean of what lies below an edge
    below[0], below[-1] = 0.0, float(share @ u)
    step = 2 * width / (GRID - 1)
    return np.exp(np.diff(below) * count).tolist(), float(density.logsumexp(0)) + math.log(step)


def _regression(problem: Problem, z: Tensor, prior: Normal) -> LinearGaussian:
    """The regression of all targets on the features at z: of each output, or of all where the prior couples them."""
    model, layout = problem.model, Layout.of(problem.density)
    phi = features(model, problem.density.constrain(z), problem.batch[problem.x_name or "x"]).double()
    y = problem.batch[problem.y_name or "y"].double().reshape(len(phi), -1)
    layer, order = last_linear(model)[1], layout.order
    biased = order.shape[1] > layer.in_features
    fixed = 0.0 if biased or layer.bias is None else layer.bias.detach().double()
    design = torch.cat([phi, phi.new_ones(len(phi), 1)], 1) if biased else phi
    mean = prior.mean.double()[order]
    away = y - design @ mean.mT - fixed
    gram, moment, square = design.mT @ design, away.mT @ design, away.square().sum()
    shared = layout.shared(prior.covariance)
    if shared is not None:
        return LinearGaussian(gram, moment, square, y.numel(), mean, shared)
    # Outputs share no targets: their blocks are equal, and nothing but the prior lies between them.
    back = order.flatten().argsort()
    whole = torch.block_diag(*[gram] * layout.outputs)[back][:, back]
    return LinearGaussian(whole, moment.flatten()[back][None], square, y.numel(), prior.mean[None], prior.covariance)
