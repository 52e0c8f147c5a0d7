"""Where a network's last layer lies among the unknowns, and what all of its outputs share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.density import LogDensity
from bayesdl.errors import ModelError
from bayesdl.models import BayesianNetwork
from bayesdl.models.features import last_linear
from bayesdl.posterior.covariance import Covariance, Dense, Diagonal, Kronecker
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import Placed


def last_layer_of(density: LogDensity) -> slice:
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


@dataclass(frozen=True)
class Layout:
    """How the layer's weights ``[K, H]`` and then its biases ``[K]`` make a matrix of one row for each output.

    Attributes:
        outputs: K.
        order: ``[K, F]``, where each entry of the matrix lies among the layer's coordinates; F = H + 1 with biases.
    """

    outputs: int
    order: Tensor

    @classmethod
    def of(cls, density: LogDensity) -> Layout:
        """Of the last layer of a network."""
        assert isinstance(density.model, BayesianNetwork)  # applies_to has asked
        part, (_, layer) = last_layer_of(density), last_linear(density.model)
        outputs, width = layer.out_features, layer.in_features
        numbers = torch.arange(part.stop - part.start)
        weights, biases = numbers[: outputs * width], numbers[outputs * width :]
        return cls(outputs, torch.cat([weights.reshape(outputs, width), biases.reshape(outputs, -1)], 1))

    def shared(self, covariance: Covariance) -> Covariance | None:
        """The prior covariance ``[F, F]`` of every output, where outputs are independent with the same one."""
        if isinstance(covariance, Diagonal):
            sd = covariance.sd[self.order]
            return Diagonal(sd[0]) if torch.equal(sd, sd[:1].expand_as(sd)) else None
        inner = covariance.inner if isinstance(covariance, Placed) else None
        if not (isinstance(covariance, Placed) and isinstance(inner, Kronecker)):
            return None
        alike = inner.spread.shape == self.order.shape and torch.equal(
            inner.spread, inner.spread[:1].expand_as(inner.spread)
        )
        straight = torch.equal(covariance.place, self.order.flatten().to(covariance.place))
        eye = torch.eye(self.outputs).to(inner.left)
        if not (alike and straight and bool((covariance.scale == 1).all()) and torch.equal(inner.left, eye)):
            return None
        right = inner.right.double()
        return Dense.of((right * inner.spread[0].double()) @ right.mT)

    def law(self, mean: Tensor, covariance: Tensor) -> Normal:
        """Of the layer's coordinates, from means ``[K, F]`` and one covariance ``[F, F]`` of every output."""
        flat = torch.empty_like(mean.flatten())
        flat[self.order.flatten()] = mean.flatten()
        if self.outputs == 1:
            return Normal(flat, Dense.of(covariance))
        variances, basis = torch.linalg.eigh(covariance)
        spread = variances.clamp(min=torch.finfo(variances.dtype).tiny).expand_as(mean).contiguous()
        eye = torch.eye(self.outputs, dtype=mean.dtype, device=mean.device)
        inner = Kronecker(eye, basis.contiguous(), spread)
        place = self.order.flatten().to(mean.device)
        return Normal(flat, Placed(place, place[:0], torch.ones_like(flat), inner))
