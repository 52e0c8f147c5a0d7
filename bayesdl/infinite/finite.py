"""A network of finite width as a function of one flat vector of parameters, in torch's units or in the NTK's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions.transforms import identity_transform

from bayesdl._rng import generator, isolated
from bayesdl.density import Site
from bayesdl.errors import DataError, ModelError
from bayesdl.models import BayesianNetwork, priors

Parameterisation = Literal["standard", "ntk"]
ELEMENTS = 2**24
"""Numbers in the largest tensor that is made at once."""


class FiniteNetwork:
    """``f(x; z)`` at a point z.

    In the "standard" parameterisation z are the module's parameters. In the "ntk" parameterisation they are these in
    units of their prior standard deviations, ``theta = sd z``: with the prior ``Normal("fan_in", w_std, b_std)`` a
    layer computes ``w_std / sqrt(fan_in) W x + b_std b`` with W and b standard normal (Jacot et al., 2018, sec. 2).

    Args:
        net: any module, which is copied and put into eval mode, or a ``BayesianNetwork``.
        params: values of all or some of the parameters by name; the module's own by default.
        parameterisation: see above.
        x: inputs ``[N, ...]``, of which the first row is kept, where it is needed.

    Attributes:
        model: the network with its prior.
        sites: where each parameter is in z.
        scale: units of z, ``[D]``.
        z: the point ``[D]``.
        example: the first row.

    Raises:
        ModelError: the network is refused, or has no prior whose standard deviations could be units.
        DataError: inputs that do not fit it, or parameters that are not its own.
    """

    def __init__(
        self,
        net: nn.Module | BayesianNetwork,
        params: Mapping[str, Tensor] | None = None,
        parameterisation: Parameterisation = "standard",
        x: Tensor | None = None,
    ) -> None:
        if parameterisation not in ("standard", "ntk"):
            raise ModelError(f"parameterisation={parameterisation!r} must be 'standard' or 'ntk'.")
        self.has_prior = isinstance(net, BayesianNetwork)
        # The prior of a bare module is never looked at; this one has a rule for every kind of parameter.
        self.model = net if isinstance(net, BayesianNetwork) else BayesianNetwork(net, priors.Normal(1.0))
        if x is not None:
            self.example = self.inputs(x)[:1]
        self.sites = tuple(self._sites())
        self.scale = self._units(parameterisation)
        own = dict(self.model.net.named_parameters())
        values = {info.name: info.to_site(own[info.name].detach()) for info in self.model.sites}
        self.z = self.flat({**values, **self._checked(params or {}, values)})

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs in the network's dtype, checked.

        Raises:
            DataError: they are not finite, or the network cannot take them.
        """
        if not isinstance(x, Tensor):
            raise DataError(f"Inputs must be a tensor [N, ...], got {type(x).__name__}.")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise DataError("Inputs hold NaN or infinite values.")
        self.model.check_data(x)
        return (x.to(self.model.dtype) if x.is_floating_point() else x).to(self.model.device)

    def flat(self, theta: Mapping[str, Tensor]) -> Tensor:
        """The point ``[D]`` of parameters by name."""
        return torch.cat([theta[site.name].flatten() for site in self.sites]) / self.scale

    def parameters(self, z: Tensor) -> dict[str, Tensor]:
        """Parameters by name at ``z [D]``."""
        theta = self.scale * z
        return {site.name: theta[site.start : site.stop].reshape(site.shape) for site in self.sites}

    def outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``[B, K]``."""
        return self.model.forward(parameters, x).reshape(len(x), -1)

    def at(self, z: Tensor, x: Tensor) -> Tensor:
        """``[B, K]`` at ``z [D]``."""
        return self.outputs(self.parameters(z), x)

    def draw(self, seed: int, number: int) -> Tensor:
        """A point ``[D]`` drawn from the prior, or for a bare module from its own initialisation."""
        model = self.model
        if not self.has_prior:
            return self.flat(model.initial_values(generator(seed, "initialisation", number)))
        with isolated(seed, "prior", number):
            scales = model.prior.sample_scales(model.sites)
            return self.flat({info.name: model.prior.distribution(info, scales).sample() for info in model.sites})

    def prior_sd(self, name: str) -> Tensor:
        """Prior standard deviations of a parameter, in its shape.

        Raises:
            ModelError: there is no prior, or it has no such numbers.
        """
        if not self.has_prior:
            raise ModelError(
                "A bare module has no prior, whose standard deviations are needed here: give "
                "BayesianNetwork(net, prior=priors.Normal('fan_in', w_std=..., b_std=...))."
            )
        prior = self.model.prior
        if prior.scale_names(self.model.sites):
            raise ModelError(f"{prior!r} has scales that are themselves unknown: use Normal, for fixed deviations.")
        info = next(info for info in self.model.sites if info.name == name)
        sd: Tensor = prior.distribution(info).stddev
        if not bool(sd.isfinite().all()):
            raise ModelError(f"The prior of {name!r} has no finite standard deviation: use Normal.")
        return sd.expand(info.shape)

    def _units(self, parameterisation: Parameterisation) -> Tensor:
        if parameterisation == "ntk":
            return torch.cat([self.prior_sd(site.name).flatten() for site in self.sites])
        return torch.ones(self.sites[-1].stop, dtype=self.model.dtype, device=self.model.device)

    def _sites(self) -> Iterator[Site]:
        start = 0
        for info in self.model.sites:
            yield Site(info.name, info.shape, info.shape, start, "global", identity_transform, "the reals", True)
            start += info.shape.numel()

    def _checked(self, params: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in params.items():
            if name not in own:
                raise DataError(f"params has {name!r}, which is none of the network's parameters {sorted(own)}.")
            if value.shape != own[name].shape:
                raise DataError(f"params[{name!r}] has shape {tuple(value.shape)}, not {tuple(own[name].shape)}.")
        return {name: value.detach().to(own[name]) for name, value in params.items()}
