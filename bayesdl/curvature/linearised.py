"""A Gaussian over a network's weights that predicts with the network linearised in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import jvp, vmap

from bayesdl._rng import derive_seed, generator
from bayesdl.curvature.functions import Moments, covariances
from bayesdl.curvature.links import LINKS, Link, link_of
from bayesdl.curvature.outputs import NetworkOutputs
from bayesdl.density import program
from bayesdl.errors import DataError, MethodError
from bayesdl.posterior.families import Spec, pack, unpack
from bayesdl.posterior.gaussian import GaussianPosterior
from bayesdl.posterior.prediction import Prediction
from bayesdl.posterior.predictive import CELLS

ROWS = 128
"""New rows whose functions are looked at together where the caller gives no number."""


class LinearisedPosterior(GaussianPosterior):
    """q(z) = N(mean, S) as a law of functions ``f(x; mean) + J(x) (z - mean)`` (Khan et al., 2019; Immer et al., 2021).

    At every row the outputs are ``N(f(x; mean), J S J^T)``. Where the structure of S allows it these K x K matrices are
    computed layer by layer, without a Jacobian; they then enter by draws whose first two moments are exact over the
    draws, so a regression's mean and epistemic variance carry no Monte-Carlo error. Such draws are right for every row
    by itself, not for the dependence between rows. Otherwise functions are drawn, z by z.

    Class probabilities may also be had in closed form, without draws: ``info["link"]`` or ``predict(link=)`` says how
    (``curvature.links``). Such a prediction is one distribution a row: it has no epistemic part of its own.

    It has no ``kl``: the functions depend on the data through the mean beside through z, so the divergence of the
    weights from their prior bounds nothing. ``law.kl`` is that of the weights. Draws of the latents are those of q.
    """

    kind: ClassVar[str] = "linearised"

    def __repr__(self) -> str:
        """Method, number of coordinates, structure."""
        return super().__repr__().replace("GaussianPosterior", type(self).__name__)

    @cached_property
    def functions(self) -> tuple[NetworkOutputs, Moments | None]:
        """The network at the mean, and how to compute the moments of its outputs, if that can be."""
        network = NetworkOutputs(self.problem, self.mean)
        return network, covariances(network, self.law.covariance)

    def kl(self) -> float | None:
        """None, see the class."""
        return None

    def predict(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        max_draws: int = 1000,
        site: str | None = None,
        seed: int = 0,
        link: str | None = None,
    ) -> Prediction:
        """The predictive distribution of the linearised network at raw inputs.

        Args:
            x: inputs ``[N, ...]``.
            batch_size: rows whose functions are looked at together; it does not change the result.
            max_draws: draws of the outputs.
            site: must be the target's site, if given.
            seed: of the draws.
            link: "monte_carlo", or for class probabilities "probit" or "bridge"; by default as in the fit.

        Raises:
            DataError: inputs that do not fit the model.
            MethodError: a link that is not for this likelihood, or needs covariances that this posterior has not.
            ModelRequired: loaded without a model.

        Cost: one forward and K backward passes, and for each layer ``O I`` multiplications a row and output; or, for
        other structures, one forward derivative a draw.
        """
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        if batch_size is not None and batch_size < 1:
            raise DataError(f"batch_size={batch_size} must be at least 1.")
        if site is not None and site != self.problem.target:
            raise MethodError(f"site={site!r}: a network predicts its target {self.problem.target!r} only.")
        chosen = self.info.get("link", LINKS[0]) if link is None else link
        if chosen not in LINKS:
            raise MethodError(f"link={chosen!r} must be one of {', '.join(LINKS)}.")
        inputs = self.problem.inputs(x)["x"]
        closed = link_of(chosen, self.problem.model.likelihood)
        if closed is not None:
            return self._in_closed_form(inputs, closed, batch_size or ROWS)
        return self._predict(inputs, max_draws, seed, batch_size)

    def _in_closed_form(self, rows: Tensor, link: Link, size: int) -> Prediction:
        network, moments = self.functions
        if moments is None:
            raise MethodError("This covariance gives no covariances of outputs row by row: use link='monte_carlo'.")
        with torch.no_grad(), program.unchecked():
            logits = torch.cat([link(*moments(piece)) for piece in rows.split(size)])
            distribution = network.model.likelihood.distribution(network.shaped(logits), {})
            return Prediction(distribution.expand((1, len(rows))))

    def _predict(self, rows: Tensor, max_draws: int, seed: int, batch_size: int | None = None) -> Prediction:
        """At inputs in model units."""
        problem, draw = self.problem, _Draws(self, max_draws, seed)
        size = batch_size or min(ROWS, max(1, CELLS // max_draws))
        pieces = rows.split(size)
        scale, shift = float(problem.scaler.y_scale), float(problem.scaler.y_mean)
        if max_draws * len(rows) <= CELLS:
            return Prediction.concat([Prediction(draw(piece), scale=scale, shift=shift) for piece in pieces])
        blocks = [(len(piece), partial(draw, piece)) for piece in pieces]
        return Prediction.stream(blocks, scale=scale, shift=shift)

    def log_likelihood(self, x: Any, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Log likelihood of every row under every draw of its outputs, ``[S, N]``, as a density of the raw targets."""
        inputs, targets = (x["x"], x["y"]) if isinstance(x, Mapping) and y is None else (x, y)
        self.problem.labelled(inputs, targets)  # says what is wrong with them
        return self.predict(inputs, max_draws=max_draws, seed=seed, link=LINKS[0]).log_prob_by_draw(targets)

    def rows_by_chain(self, batch: dict[str, Any] | None = None) -> Tensor:
        """Log likelihood of rows under draws of the outputs, ``[1, S, N]``."""
        given = dict(self.problem.batch) if batch is None else batch
        found = self.prediction_by_chain(given, self.problem.target)
        y = given["y"]
        return found.log_prob_by_draw(self.problem.scaler.unscale_y(y) if y.is_floating_point() else y)[None]

    def prediction_by_chain(self, inputs: dict[str, Any], site: str) -> Prediction:
        """With as many draws of the outputs as there are draws of the latents."""
        return self._predict(inputs["x"], self.unconstrained_by_chain().shape[1], 0)


class _Draws:
    """Draws of the target's distribution: of the likelihood's own parameters once, of the outputs row by row."""

    def __init__(self, posterior: LinearisedPosterior, draws: int, seed: int) -> None:
        self.posterior, self.draws, self.seed = posterior, draws, seed
        self.network, self.variance = posterior.functions
        self.hyper = self._hyper()

    def __call__(self, rows: Tensor) -> Distribution:
        """Batch shape ``[S, B]``."""
        with torch.no_grad(), program.unchecked():
            f = self._by_rows(rows, self.variance) if self.variance is not None else self._by_draws(rows)
            found: list[Spec] = []

            def one(outputs: Tensor, hyper: dict[str, Tensor]) -> dict[str, Tensor]:
                shaped = self.network.shaped(outputs)
                latents = self.network.latents(hyper, shaped)
                spec, tensors = unpack(self.network.model.likelihood.distribution(shaped, latents))
                found.append(spec)
                return {name: tensor.clone() for name, tensor in tensors.items()}

            tensors: dict[str, Tensor] = vmap(one)(f, self.hyper)
            return pack(found[0], tensors)

    def _hyper(self) -> dict[str, Tensor]:
        """Draws ``[S, *shape]`` of the likelihood's own parameters."""
        names = self.network.model.likelihood.latent_names
        sites = [site for site in self.network.hyper if site.name in names]
        values = {}
        for site in sites:
            law = self.posterior.law.marginal(slice(site.start, site.stop))
            z = law.draws(self.draws, derive_seed(self.seed, "linearised", site.name))
            values[site.name] = site.transform(z.reshape(self.draws, *site.unconstrained_shape))
        return values

    def _by_rows(self, rows: Tensor, variance: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Outputs ``[S, B, K]`` from their moments; the same normal numbers serve every row."""
        mean, covariance = variance(rows)
        values, vectors = torch.linalg.eigh(covariance)
        # The symmetric root: unlike the factors it is a continuous function of the matrix.
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT
        stream = generator(self.seed, "linearised", "outputs")
        noise = torch.randn(self.draws, mean.shape[1], generator=stream, dtype=torch.float64)
        return mean + torch.einsum("bkl,sl->sbk", root, _standardised(noise).to(mean))

    def _by_draws(self, rows: Tensor) -> Tensor:
        """Outputs ``[S, B, K]`` by one forward derivative a draw of the weights."""
        mean, network = self.posterior.mean, self.network
        away = self.posterior.law.draws(self.draws, self.seed) - mean

        def function(z: Tensor) -> Tensor:
            return network.at(z, rows)

        def moved(step: Tensor) -> Tensor:
            both = jvp(function, (mean,), (step,))
            return both[0] + both[1]

        found: Tensor = vmap(moved, chunk_size=64)(away)
        return found


def _standardised(noise: Tensor) -> Tensor:
    """Normal numbers ``[S, K]`` moved a little, so that their mean is 0 and their second moments are 1 exactly."""
    if len(noise) == 1:
        return torch.zeros_like(noise)
    if len(noise) <= noise.shape[1] + 1:
        return noise
    centred = noise - noise.mean(0)
    root = torch.linalg.cholesky(centred.mT @ centred / len(noise))
    return torch.linalg.solve_triangular(root, centred.mT, upper=False).mT
