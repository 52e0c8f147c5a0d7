"""Priors made of others: one per name pattern, and a Gaussian whose scale is itself unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bayesdl.errors import ModelError
from bayesdl.models.parameters import ParameterInfo
from bayesdl.models.positive import PositivePrior
from bayesdl.models.prior import NO_SCALES, Prior, check_scale, location_and_sd, over_shape


@dataclass(frozen=True)
class PerParameter(Prior):
    """A prior for each parameter by the first pattern that matches its name.

    Attributes:
        patterns: from shell-style pattern (``"*.bias"``, ``"0.*"``) to prior, in the order in which they are tried.
    """

    patterns: Mapping[str, Prior] | tuple[tuple[str, Prior], ...]

    def __post_init__(self) -> None:
        # Pairs, not a mapping: JSON writers may sort keys, and the order decides which pattern wins.
        given = self.patterns.items() if isinstance(self.patterns, Mapping) else self.patterns
        pairs = tuple((str(pattern), prior) for pattern, prior in given)
        if not pairs or not all(isinstance(prior, Prior) for _, prior in pairs):
            raise ModelError(f"PerParameter needs at least one pattern, each with a prior; got {dict(pairs)!r}.")
        object.__setattr__(self, "patterns", pairs)

    @property
    def _pairs(self) -> tuple[tuple[str, Prior], ...]:
        assert isinstance(self.patterns, tuple)
        return self.patterns

    def prior_of(self, name: str) -> Prior:
        """The prior of the parameter called ``name``.

        Raises:
            ModelError: no pattern matches.
        """
        for pattern, prior in self._pairs:
            if fnmatchcase(name, pattern):
                return prior
        raise ModelError(
            f"No pattern of PerParameter matches parameter {name!r}; patterns: {[p for p, _ in self._pairs]}. "
            "Add one for it, or '*' as the last."
        )

    def _groups(self, sites: Sequence[ParameterInfo]) -> list[tuple[str, Prior, list[ParameterInfo]]]:
        """The parameters that each pattern wins."""
        won: dict[str, list[ParameterInfo]] = {pattern: [] for pattern, _ in self._pairs}
        for site in sites:
            winner = next((pattern for pattern, _ in self._pairs if fnmatchcase(site.name, pattern)), None)
            if winner is not None:
                won[winner].append(site)
        return [(pattern, prior, won[pattern]) for pattern, prior in self._pairs]

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """The matching prior's distribution."""
        return self.prior_of(site.name).distribution(site, scales)

    def sample_scales(self, sites: Sequence[ParameterInfo]) -> dict[str, Tensor]:
        """The hyperparameters of every inner prior."""
        scales: dict[str, Tensor] = {}
        for _, prior, group in self._groups(sites):
            scales.update(prior.sample_scales(group))
        return scales

    def scale_names(self, sites: Sequence[ParameterInfo]) -> tuple[str, ...]:
        """The hyperparameter sites of every inner prior."""
        return tuple(name for _, prior, group in self._groups(sites) for name in prior.scale_names(group))

    def check(self, sites: Sequence[ParameterInfo]) -> None:
        """Every parameter needs a pattern and every pattern a parameter; a pattern without one is a misspelling.

        Raises:
            ModelError: with the names that there are.
        """
        names = [site.name for site in sites]
        unmatched = [name for name in names if not any(fnmatchcase(name, pattern) for pattern, _ in self._pairs)]
        if unmatched:
            raise ModelError(
                f"No pattern of PerParameter matches {unmatched}; patterns: {[p for p, _ in self._pairs]}. "
                "Add patterns for them, or '*' as the last."
            )
        for pattern, prior, group in self._groups(sites):
            if not group:
                taken = any(fnmatchcase(name, pattern) for name in names)
                why = "comes after patterns that take all its matches (the first wins)" if taken else "matches nothing"
                raise ModelError(f"Pattern {pattern!r} of PerParameter {why}; the parameters are {names}.")
            prior.check(group)
        scale_names = self.scale_names(sites)
        doubled = sorted({name for name in scale_names if scale_names.count(name) > 1})
        if doubled:
            raise ModelError(
                f"Two patterns of PerParameter have a hyperparameter called {doubled[0]!r}; "
                "give each Hierarchical a name of its own: Hierarchical(name='bias_scale')."
            )


_HALF_NORMAL = PositivePrior("HalfNormal", (1.0,))
_SHARING = ("layer", "global", "parameter")


@dataclass(frozen=True)
class Hierarchical(Prior):
    """A Gaussian whose scale is learnt: ``theta ~ Normal(m, s sd)``, ``s ~ hyperprior`` (Neal, 1996, section 3.2.1).

    m and sd are those of ``Normal(scale, w_std, b_std)``; s multiplies sd for all parameters that share it. Its site
    is called ``name`` when shared globally, else ``"<layer>.<name>"`` or ``"<parameter>.<name>"``.

    The parameterisation is centred: the latent sites are the parameters themselves and keep their names. With the
    dozens of parameters that share one s, s is known to about 1/sqrt(2 x their number) given the parameters, so the
    funnel that makes the non-centred form necessary for a handful of parameters is shallow here.

    Attributes:
        hyperprior: prior of s, a Pyro distribution on the positive reals; HalfNormal(1) by default.
        share: which parameters have one s in common: "layer" (the parameters of one module), "global", "parameter".
        scale: as in ``Normal``.
        w_std: as in ``Normal``.
        b_std: as in ``Normal``.
        name: last part of the hyperparameter sites' names.
    """

    hyperprior: PositivePrior | torch.distributions.Distribution = field(default=_HALF_NORMAL)
    share: str = "layer"
    scale: float | str = "fan_in"
    w_std: float = 1.0
    b_std: float = 1.0
    name: str = "scale"

    def __post_init__(self) -> None:
        check_scale("Hierarchical", self.scale, self.w_std, self.b_std)
        if self.share not in _SHARING:
            raise ModelError(f"Hierarchical: share must be one of {', '.join(_SHARING)}; got {self.share!r}.")
        if not self.name:
            raise ModelError("Hierarchical: name must not be empty.")
        object.__setattr__(self, "hyperprior", PositivePrior.of(self.hyperprior, "hyperprior"))

    def scale_name(self, site: ParameterInfo) -> str:
        """Name of the hyperparameter site on which a parameter's scale depends."""
        owner = {"layer": site.layer, "global": "", "parameter": site.name}[self.share]
        return f"{owner}.{self.name}" if owner else self.name

    def scale_names(self, sites: Sequence[ParameterInfo]) -> tuple[str, ...]:
        """One name per group of parameters, in their order."""
        return tuple(dict.fromkeys(map(self.scale_name, sites)))

    def sample_scales(self, sites: Sequence[ParameterInfo]) -> dict[str, Tensor]:
        """Sample s once for each group of parameters."""
        assert isinstance(self.hyperprior, PositivePrior)
        prior = self.hyperprior.distribution(sites[0].scalar(0.0))
        return {name: pyro.sample(name, prior) for name in self.scale_names(sites)}

    def distribution(self, site: ParameterInfo, scales: Mapping[str, Tensor] = NO_SCALES) -> Distribution:
        """``Normal(m, s sd)`` for the s of the parameter's group.

        Raises:
            ModelError: ``scales`` lacks the group's s.
        """
        name = self.scale_name(site)
        if name not in scales:
            raise ModelError(f"The prior of {site.name!r} depends on site {name!r}, which has no value here.")
        mean, sd = location_and_sd(site, self.scale, self.w_std, self.b_std)
        return over_shape(dist.Normal(site.scalar(mean), scales[name] * sd), site)

    def check(self, sites: Sequence[ParameterInfo]) -> None:
        """Every parameter needs a fan-in when scale is "fan_in"."""
        for site in sites:
            location_and_sd(site, self.scale, self.w_std, self.b_std)
