"""Predictions: at every row an equally weighted mixture, over posterior draws, of the likelihood's own distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesdl._rng import generator, isolated
from bayesdl.errors import DataError, ModelError
from bayesdl.posterior import quantiles
from bayesdl.posterior.blocks import Blocks
from bayesdl.posterior.families import CannotUnpack, take
from bayesdl.posterior.targets import CLASS_KINDS, Kind, check_target, innermost, kind_of


class Prediction:
    """What the posterior says about new rows, in the data's raw units.

    p(y_i) = (1/S) sum_s p(y_i | draw s). All statistics are computed when first asked for, in blocks of rows, in
    float64. S is the number of draws, N of rows, K of outputs or classes.

    Args:
        distribution: The likelihood's distribution in the model's units, batch shape ``[S, N]``, event shape ``[]``
            or ``[K]``.
        kind: Kind of target; by default read off the distribution.
        shift: Raw target = shift + scale * (target in model units); only for real targets.
        scale: See ``shift``.

    Raises:
        ModelError: The distribution has another shape, or a target that is not real is scaled.
    """

    def __init__(
        self, distribution: Distribution, *, kind: Kind | None = None, shift: float = 0.0, scale: float = 1.0
    ) -> None:
        self._setup(Blocks([(_rows(distribution), lambda: distribution)]), distribution, kind, shift, scale)

    @classmethod
    def stream(
        cls,
        blocks: Sequence[tuple[int, Callable[[], Distribution]]],
        *,
        kind: Kind | None = None,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> Prediction:
        """A prediction that holds no parameters: every statistic calls the blocks in turn and forgets them again.

        Args:
            blocks: For each block its number of rows and a function that makes its distribution ``[S, rows]``.
            kind: As in the constructor, like ``shift`` and ``scale``.
            shift: See above.
            scale: See above.
        """
        result = cls.__new__(cls)
        result._setup(Blocks(blocks), blocks[0][1](), kind, shift, scale)
        return result

    def _setup(self, blocks: Blocks, first: Distribution, kind: Kind | None, shift: float, scale: float) -> None:
        _rows(first)
        self._blocks = blocks
        self.family = type(innermost(first)).__name__
        self.draws = int(first.batch_shape[0])
        self.event_shape = tuple(first.event_shape)
        self.kind: Kind = kind_of(first) if kind is None else kind
        if self.kind not in get_args(Kind):
            raise ModelError(f"kind is one of {', '.join(get_args(Kind))}; got {self.kind!r}.")
        self.shift, self.scale = float(shift), float(scale)
        if not (self.scale > 0 and math.isfinite(self.scale) and math.isfinite(self.shift)):
            raise ModelError(f"the target's scale must be positive and its shift finite; got {shift=}, {scale=}.")
        if self.kind != "real" and (self.shift, self.scale) != (0.0, 1.0):
            raise ModelError(f"a {self.kind} target cannot be shifted or scaled; got {shift=}, {scale=}.")

    # --- Rows -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.family}, kind={self.kind!r}, rows={len(self)}, draws={self.draws})"

    def __getitem__(self, index: Any) -> Prediction:
        """The prediction for some of the rows: an integer, a slice, or an array of indices or a boolean mask."""
        return self._like(self._blocks.select(self._row_numbers(index)))

    @staticmethod
    def concat(parts: Sequence[Prediction]) -> Prediction:
        """One prediction from the predictions of consecutive batches of rows, without copying.

        Raises:
            ModelError: The parts differ in draws, kind, outputs or units, so they are no batches of one prediction.
        """
        if not parts:
            raise ModelError("there are no predictions to put together.")
        return parts[0]._joined(parts)

    def _joined(self, parts: Sequence[Prediction]) -> Prediction:
        def signature(p: Prediction) -> tuple[object, ...]:
            return type(p), p.draws, p.kind, p.event_shape, p.shift, p.scale

        different = [repr(p) for p in parts if signature(p) != signature(self)]
        if different:
            raise ModelError(f"only batches of one prediction can be put together: {self!r} and {different[0]} differ.")
        return self._like(Blocks([block for part in parts for block in part._blocks.blocks]))

    def _like(self, blocks: Blocks) -> Prediction:
        result = Prediction.__new__(Prediction)
        result.__dict__.update({name: self.__dict__[name] for name in _FIELDS}, _blocks=blocks)
        return result

    def _row_numbers(self, index: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        index = index.detach().cpu().numpy() if isinstance(index, Tensor) else index
        try:
            rows = np.atleast_1d(np.arange(len(self))[index])
        except IndexError as error:
            raise DataError(f"no such rows in a prediction of {len(self)}: {error}.") from None
        if rows.ndim != 1 or not len(rows):
            raise DataError(f"an index must choose at least one row, in one dimension; it chose {rows.shape}.")
        return rows

    def _collect(self, statistic: Callable[[Distribution, slice], Tensor], dim: int = 0) -> Tensor:
        with torch.no_grad():
            pieces = [statistic(d, rows).to("cpu", torch.float64) for rows, d in self._blocks.pieces()]
        return torch.cat(pieces, dim)

    # --- Moments ----------------------------------------------------------------------------------------------------

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        def moments(distribution: Distribution, rows: slice) -> Tensor:
            means, variances = self._draw_moments(distribution)
            mean = means.mean(0)
            spread = (means - mean).square().mean(0) if self.draws > 1 else torch.zeros_like(mean)
            return torch.stack([mean, spread, variances.mean(0)], dim=1)

        mean, epistemic, aleatoric = self._collect(moments).unbind(1)
        return self.shift + self.scale * mean, self._squared(epistemic), self._squared(aleatoric)

    def _squared(self, variance: Tensor) -> Tensor:
        """In raw units; one factor after the other, for the square of a float may overflow, an error in Python."""
        return self.scale * (self.scale * variance)

    def _draw_moments(self, distribution: Distribution) -> tuple[Tensor, Tensor]:
        if self.kind in CLASS_KINDS:
            p = self._class_probs(distribution)
            return p, p * (1 - p)
        try:
            return distribution.mean, distribution.variance
        except NotImplementedError:
            with isolated(0, "Prediction", "moments"):
                samples = distribution.sample(torch.Size([256]))
            return samples.mean(0), samples.var(0)

    @property
    def mean(self) -> Tensor:
        """Predictive mean ``[N]`` or ``[N, K]``; for classes the probability of each class (or head) ``[N, K]``.

        NaN where some draw's mean does not exist (Cauchy; Student-t with df <= 1), infinite where it is infinite;
        families without closed moments are averaged over 256 seeded samples of every draw (see ``moment_method``).
        """
        return self._moments[0]

    @property
    def epistemic(self) -> Tensor:
        """Variance of the draws' means (divisor S): what more data would remove. Exactly 0 for a single draw.

        For classes: of the indicator of each class ``[N, K]``.
        """
        return self._moments[1]

    @property
    def aleatoric(self) -> Tensor:
        """Mean over draws of the likelihood's variance: noise that stays however much data there is."""
        return self._moments[2]

    @property
    def variance(self) -> Tensor:
        """Predictive variance, exactly ``epistemic + aleatoric`` (law of total variance); shapes as ``mean``."""
        return self.epistemic + self.aleatoric

    @property
    def sd(self) -> Tensor:
        """Predictive standard deviation, shapes as ``mean``."""
        return self.variance.sqrt()

    @cached_property
    def moment_method(self) -> str:
        """How the moments were found, "exact" or "samples", and why some are missing where they are not finite."""
        _, first = next(self._blocks.pieces())
        method = "exact"
        if self.kind not in CLASS_KINDS:
            try:
                _ = first.mean, first.variance
            except NotImplementedError:
                method = "samples"
        undefined, infinite = int(self.variance.isnan().sum()), int(self.variance.isinf().sum())
        if undefined:
            method += f"; {undefined} entries are NaN: the mean of {self.family} does not exist there in some draw"
        if infinite:
            method += f"; {infinite} variances are infinite: so is that of {self.family} there in some draw"
        return method

    @property
    def mean_by_draw(self) -> Tensor:
        """The mean (for classes: the probabilities) under each single draw, ``[S, N]`` or ``[S, N, K]``; not cached."""
        return self.shift + self.scale * self._collect(lambda d, _: self._draw_moments(d)[0], dim=1)

    @property
    def gaussian_components(self) -> tuple[Tensor, Tensor] | None:
        """Means and standard deviations ``[S, N]`` (``[S, N, K]``) if every component is Gaussian, else None."""
        if not all(isinstance(quantiles.marginal(d), Normal) for _, d in self._blocks.pieces()):
            return None
        sds = self.scale * self._collect(lambda d, _: d.variance.sqrt(), dim=1)
        return self.mean_by_draw, sds

    # --- Classes ----------------------------------------------------------------------------------------------------

    def _class_probs(self, distribution: Distribution) -> Tensor:
        inner: Any = quantiles.unwrap(distribution)
        p: Tensor = inner.probs
        return torch.stack([1 - p, p], dim=-1) if self.kind == "binary" else p

    def _need_classes(self, what: str) -> None:
        if self.kind not in CLASS_KINDS:
            raise ModelError(f"{what} belongs to predictions of classes; this one predicts a {self.kind} target.")

    @property
    def probs(self) -> Tensor:
        """Class probabilities ``[N, K]`` (binary: columns 0 and 1; several labels: P(label k = 1))."""
        self._need_classes("probs")
        return self.mean

    @property
    def labels(self) -> Tensor:
        """Most probable class ``[N]``, ties to the smaller one; with several labels 0 or 1 for each, ``[N, K]``."""
        self._need_classes("labels")
        return (self.mean > 0.5).long() if self.kind == "multilabel" else self.mean.argmax(-1)

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty in nats: the entropy of the mean probabilities ``[N]`` (several labels: ``[N, K]``)."""
        self._need_classes("entropy")
        return self._entropy(self.mean)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part in nats: the mean over draws of each draw's entropy; shapes as ``entropy``."""
        self._need_classes("expected_entropy")
        return self._collect(lambda d, _: self._entropy(self._class_probs(d)).mean(0))

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part in nats: ``entropy - expected_entropy`` >= 0, exactly 0 for a single draw.

        The information that the label would give about the parameters (Houlsby et al., 2011).
        """
        return (self.entropy - self.expected_entropy).clamp(min=0) if self.draws > 1 else 0 * self.entropy

    def _entropy(self, p: Tensor) -> Tensor:
        each_head = self.kind == "multilabel"
        terms: Tensor = torch.special.entr(p) + torch.special.entr(1 - p) if each_head else torch.special.entr(p)
        return terms if each_head else terms.sum(-1)

    # --- Density, cdf, quantiles --------------------------------------------------------------------------------------

    def target(self, y: Any) -> Tensor:
        """Check observed targets against this prediction and return them as a tensor ``[N]`` or ``[N, K]``.

        Raises:
            DataError: Wrong number of rows or shape, NaN or infinite values, labels or counts out of range.
        """
        classes = self.mean.shape[1] if self.kind == "categorical" else 2
        return check_target(y, self.kind, (len(self), *self.event_shape), classes)

    def log_prob_by_draw(self, y: Any) -> Tensor:
        """Log density (in raw units) of observed targets under each single draw, ``[S, N]``; -inf off the support.

        Raises:
            DataError: As `target`.
        """
        values = self._in_model_units(self.target(y))
        return self._collect(lambda d, rows: quantiles.log_density(d, values[rows]), dim=1) - self._log_volume

    def log_prob(self, y: Any) -> Tensor:
        """Log predictive density log p(y_i) = logmeanexp_s log p(y_i | draw s) in raw units, ``[N]``.

        Args:
            y: Observed targets ``[N]``, or ``[N, K]`` (then their joint log density); -inf off the support.

        Raises:
            DataError: As `target`.
        """
        values = self._in_model_units(self.target(y))
        total = self._collect(lambda d, rows: quantiles.log_density(d, values[rows]).logsumexp(0))
        return total - math.log(self.draws) - self._log_volume

    def cdf(self, y: Any) -> Tensor:
        """P(Y <= y), ``[N]`` or for each output ``[N, K]``; exact or from samples as ``quantile_method`` says.

        Raises:
            DataError: As `target`.
            ModelError: For classes, which have no order.
        """
        self._need_order("cdf")
        values = self._in_model_units(self.target(y))

        def level(distribution: Distribution, rows: slice) -> Tensor:
            one = quantiles.marginal_with_cdf(distribution)
            if one is None:
                return quantiles.sampled_cdf(distribution, values[rows])
            return quantiles.cdf(one, values[rows]).mean(0)

        return self._collect(level)

    def cdf_by_draw(self, y: Any) -> Tensor:
        """P(Y <= y) under each single draw, ``[S, N]`` or for each output ``[S, N, K]``.

        Raises:
            DataError: As `target`.
            ModelError: For classes, which have no order, and for families without a cdf.
        """
        self._need_order("cdf_by_draw")
        values = self._in_model_units(self.target(y))

        def level(distribution: Distribution, rows: slice) -> Tensor:
            one = quantiles.marginal_with_cdf(distribution)
            if one is None:
                raise ModelError(f"{self.family} has no cdf in closed form, so there is none for a single draw.")
            return quantiles.cdf(one, values[rows])

        return self._collect(level, dim=1)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles of the mixture at levels in (0, 1).

        Args:
            q: One level, or Q of them.

        Returns:
            ``[N]`` (``[N, K]``) for one level, ``[Q, N]`` (``[Q, N, K]``) for several.

        Raises:
            DataError: A level outside (0, 1).
            ModelError: For classes, which have no order.
        """
        self._need_order("quantile")
        levels = torch.as_tensor(q, dtype=torch.float64)
        if levels.dim() > 1 or not bool(((levels > 0) & (levels < 1)).all()):
            raise DataError(f"quantile levels lie strictly between 0 and 1, one or a list of them; got {q}.")

        found = torch.stack([self._quantile(level) for level in levels.reshape(-1).tolist()])
        return found if levels.dim() else found[0]

    def _quantile(self, level: float) -> Tensor:
        key = round(level, 12)  # 0.05 and (1 - 0.9) / 2 are one level
        if key not in self._quantiles:

            def solve(distribution: Distribution, rows: slice) -> Tensor:
                one = quantiles.marginal_with_cdf(distribution)
                if one is None:
                    return quantiles.sampled_quantile(distribution, level)
                return quantiles.mixture_quantile(one, level)

            self._quantiles[key] = self.shift + self.scale * self._collect(solve)
        return self._quantiles[key]

    @cached_property
    def _quantiles(self) -> dict[float, Tensor]:
        return {}

    @cached_property
    def quantile_method(self) -> str:
        """How quantiles are found: "cdf" (exact) or "samples" (about 20,000 seeded ones a row)."""
        self._need_order("quantile_method")
        _, first = next(self._blocks.pieces())
        return "samples" if quantiles.marginal_with_cdf(first) is None else "cdf"

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval: quantiles at (1 - level)/2 and (1 + level)/2, shapes as ``mean``."""
        if not 0 < level < 1:
            raise DataError(f"an interval's level lies strictly between 0 and 1; got {level}.")
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Samples of new targets ``[n, N]`` or ``[n, N, K]`` in raw units; integers for classes.

        One sample belongs to one posterior draw, chosen at random, at all rows: it keeps the dependence between rows.

        Args:
            n: Number of samples.
            seed: The same seed gives the same samples; the global random state is untouched.
        """
        if n < 1:
            raise DataError(f"at least one sample must be asked for; got n={n}.")
        return self._sample(torch.randint(self.draws, (n,), generator=generator(seed, "Prediction", "draws")), seed)

    def sample_by_draw(self, seed: int = 0) -> Tensor:
        """One sample of new targets under every single draw, in their order; ``[S, N]`` or ``[S, N, K]``."""
        return self._sample(torch.arange(self.draws), seed)

    def _sample(self, order: Tensor, seed: int) -> Tensor:
        with isolated(seed, "Prediction", "sample"):
            samples = self._collect(lambda d, _: _sample(d, order), dim=1)
        if self.kind == "real":
            return self.shift + self.scale * samples
        return samples.long()

    def _need_order(self, what: str) -> None:
        if self.kind in CLASS_KINDS:
            raise ModelError(f"{what} needs an ordered target; this prediction is of classes ({self.kind}): use probs.")

    @property
    def _log_volume(self) -> float:
        return math.prod(self.event_shape) * math.log(self.scale)

    def _in_model_units(self, y: Tensor) -> Tensor:
        if self.kind == "real":
            return (y - self.shift) / self.scale
        return y if self.kind == "categorical" else y.to(torch.float64)  # only labels serve as indices


_FIELDS = ("family", "draws", "event_shape", "kind", "shift", "scale")


class GaussianPrediction(Prediction):
    """One Gaussian a row whose epistemic part is known, as a Gaussian process gives it.

    Args:
        mean: Predictive mean ``[N]`` in model units.
        latent_variance: Variance of the latent function ``[N]``: the epistemic part.
        noise_variance: Variance of the observation noise, a number or ``[N]``: the aleatoric part.
        shift: As for `Prediction`.
        scale: As for `Prediction`.

    Raises:
        ModelError: Shapes differ, or a variance is negative or the total not positive.
    """

    def __init__(
        self,
        mean: Tensor,
        latent_variance: Tensor,
        noise_variance: Tensor | float,
        *,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        noise = torch.as_tensor(noise_variance, dtype=torch.float64).detach().cpu().expand(mean.shape)
        centre, latent = mean.detach().to("cpu", torch.float64), latent_variance.detach().to("cpu", torch.float64)
        if centre.dim() != 1 or latent.shape != centre.shape:
            raise ModelError(f"mean and latent_variance are vectors [N]; got {mean.shape} and {latent_variance.shape}.")
        if not bool(((latent >= 0) & (noise >= 0) & (latent + noise > 0)).all()):
            raise ModelError("variances must be finite, not negative, and positive in total; add noise or jitter.")
        super().__init__(
            Normal(centre[None], (latent + noise).sqrt()[None], validate_args=False), shift=shift, scale=scale
        )
        self._parts = centre, latent, noise

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        mean, latent, noise = self._parts
        return self.shift + self.scale * mean, self._squared(latent), self._squared(noise)

    def __getitem__(self, index: Any) -> Prediction:
        """The prediction for some of the rows."""
        rows = torch.from_numpy(self._row_numbers(index))
        mean, latent, noise = (part[rows] for part in self._parts)
        return GaussianPrediction(mean, latent, noise, shift=self.shift, scale=self.scale)

    def _joined(self, parts: Sequence[Prediction]) -> Prediction:
        same = [p for p in parts if isinstance(p, GaussianPrediction)]
        if len(same) < len(parts) or any((p.shift, p.scale) != (self.shift, self.scale) for p in same):
            raise ModelError("only batches of one prediction can be put together: kinds or units differ.")
        mean, latent, noise = (torch.cat(columns) for columns in zip(*(p._parts for p in same), strict=True))
        return GaussianPrediction(mean, latent, noise, shift=self.shift, scale=self.scale)


def _rows(distribution: Distribution) -> int:
    batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
    if len(batch) != 2 or len(event) > 1 or 0 in batch:
        raise ModelError(
            "a prediction needs a distribution of batch shape [draws, rows], at least one of each, and event shape "
            f"[] or [outputs]; got batch shape {batch} and event shape {event}."
        )
    return batch[1]


def _sample(distribution: Distribution, order: Tensor) -> Tensor:
    try:
        return take(distribution, order, 0).sample()
    except CannotUnpack:
        # All draws are sampled as often as the most frequent one is needed; a draw's k-th use takes its k-th sample.
        counts = torch.bincount(order, minlength=distribution.batch_shape[0])
        by_draw = order.argsort(stable=True)
        use = torch.empty_like(order)
        use[by_draw] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[order[by_draw]]
        return distribution.sample(torch.Size([int(counts.max())]))[use, order]
