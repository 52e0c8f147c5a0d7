"""Infinitely wide networks as GPyTorch kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.errors import DataError, ModelError
from bayesdl.infinite.inputs import input_covariance
from bayesdl.infinite.layers import Layer, check_layers, fully_connected, pools, spatial_of, weighted, with_scales
from bayesdl.infinite.recursion import Covariance, propagate


class NetworkKernel(Kernel, ABC):
    """A kernel of an infinitely wide network, as a GPyTorch kernel.

    The variances of weights and biases of every dense layer are hyperparameters, held as logarithms: ``raw_w_var``
    and ``raw_b_var`` of shape ``[*batch_shape, L]`` (without the layers that have no bias). The kernel divides inner
    products of inputs by the number of (active) features, as ``Normal("fan_in")`` scales its weights.

    Args:
        layers: from ``from_module``; by default one hidden relu layer with unit w_std and b_std.
        batch_shape: independent sets of hyperparameters, broadcast against the batch shape of the inputs.
        active_dims: the columns of the inputs that the kernel sees; by default all.
        input_shape: of an image, channels first, which a row of the inputs holds flattened; needed for convolutions.
        dtype: of the hyperparameters; the default dtype if None (``.double()`` later keeps single precision's error).

    Raises:
        ModelError: the stack has no limit, or convolutions lack their input_shape.

    Source: see ``bayesdl.infinite.rules``.  Cost: see ``bayesdl.infinite.kernel.kernels``.
    """

    def __init__(
        self,
        layers: Sequence[Layer] | None = None,
        *,
        batch_shape: torch.Size | None = None,
        active_dims: Sequence[int] | None = None,
        input_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(batch_shape=batch_shape, active_dims=None if active_dims is None else tuple(active_dims))
        self._layers = check_layers(fully_connected(1) if layers is None else layers)
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self._spatial = spatial_of(self._layers)
        if self._spatial and (self.input_shape is None or len(self.input_shape) != 1 + self._spatial):
            raise ModelError(f"The kernel of a convolution needs input_shape=(channels, *pixels), not {input_shape}.")
        widths = list(weighted(self._layers))
        self._biased = tuple(layer.b_std > 0 for layer in widths)
        self._register("w_var", [layer.w_std**2 for layer in widths], dtype)
        self._register("b_var", [layer.b_std**2 for layer in widths if layer.b_std > 0], dtype)

    def _register(self, name: str, values: list[float], dtype: torch.dtype | None) -> None:
        numbers = torch.tensor(values, dtype=torch.get_default_dtype() if dtype is None else dtype)
        raw = numbers.log().expand(*self.batch_shape, len(values))
        self.register_parameter(f"raw_{name}", torch.nn.Parameter(raw.clone()))
        self.register_constraint(f"raw_{name}", Positive(transform=torch.exp, inv_transform=torch.log))

    @property
    def w_var(self) -> Tensor:
        """Weight variances times fan-in, ``[*batch_shape, L]``."""
        value: Tensor = self.raw_w_var_constraint.transform(self.raw_w_var)
        return value

    @w_var.setter
    def w_var(self, value: Tensor | float) -> None:
        self._set("w_var", value)

    @property
    def b_var(self) -> Tensor:
        """Bias variances of the layers that have biases, ``[*batch_shape, number of them]``."""
        value: Tensor = self.raw_b_var_constraint.transform(self.raw_b_var)
        return value

    @b_var.setter
    def b_var(self, value: Tensor | float) -> None:
        self._set("b_var", value)

    def _set(self, name: str, value: Tensor | float) -> None:
        raw: Tensor = getattr(self, f"raw_{name}")
        constraint = getattr(self, f"raw_{name}_constraint")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(torch.as_tensor(value).to(raw).expand_as(raw))})

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers with the present hyperparameters, for a kernel without batch shape."""
        w, b = iter(self.w_var.sqrt().tolist()), iter(self.b_var.sqrt().tolist())
        return with_scales(self._layers, ((next(w), next(b) if biased else 0.0) for biased in self._biased))

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """Return ``[..., N, M]`` from ``x1 [..., N, d]`` and ``x2 [..., M, d]``; ``[..., N]`` with ``diag``.

        Raises:
            DataError: NaN or infinite values, half precision, or images of another size.

        With ``last_dim_is_batch`` every feature is an input of its own, and a dimension d precedes N.
        """
        for x in (x1, x2):
            self._check(x)
        if self._spatial:
            lead = torch.broadcast_shapes(self.batch_shape, x1.shape[:-2], x2.shape[:-2])
            x1, x2 = (x.expand(*lead, *x.shape[-2:]).unflatten(-1, self.input_shape or ()) for x in (x1, x2))
        elif last_dim_is_batch:
            x1, x2 = x1.mT.unsqueeze(-1), x2.mT.unsqueeze(-1)
        # A layer's variance is constant over pairs of rows, and over features where they are batched.
        constant = (1 if diag else 2) + last_dim_is_batch
        w_var = [v.reshape(*v.shape, *[1] * constant) for v in self.w_var.unbind(-1)]
        biases = iter(self.b_var.unbind(-1))
        zero = torch.zeros((), dtype=x1.dtype, device=x1.device)
        b_var = [v.reshape(*v.shape, *[1] * constant) for v in (next(biases) if b else zero for b in self._biased)]
        full = self._spatial > 0 and pools(self._layers)
        start = self._start(input_covariance(x1, x2, diag, spatial=self._spatial, full=full))
        return self._value(*propagate(self._layers, start, w_var, b_var))

    def _check(self, x: Tensor) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(f"The kernel needs inputs in float32 or float64; got {x.dtype}.")
        if not bool(x.isfinite().all()):
            raise DataError("The inputs hold NaN or infinite values; remove those rows.")
        if self._spatial and x.shape[-1] != math.prod(self.input_shape or ()):
            raise DataError(f"A row holds {x.shape[-1]} numbers, an image of input_shape={self.input_shape} another.")

    @abstractmethod
    def _start(self, covariance: Covariance) -> Covariance:
        """The covariance of the inputs, with a tangent kernel where that is wanted."""

    @abstractmethod
    def _value(self, nngp: Tensor, ntk: Tensor | None) -> Tensor:
        """The kernel of the two at the output."""


class NNGPKernel(NetworkKernel):
    """Covariance of the outputs of an infinitely wide network under its prior; see ``NetworkKernel``."""

    def _start(self, covariance: Covariance) -> Covariance:
        return covariance

    def _value(self, nngp: Tensor, ntk: Tensor | None) -> Tensor:
        return nngp


class NTKKernel(NetworkKernel):
    """Tangent kernel of an infinitely wide network in the NTK parameterisation; see ``NetworkKernel``."""

    def _start(self, covariance: Covariance) -> Covariance:
        return covariance._replace(ntk=torch.zeros_like(covariance.q12))

    def _value(self, nngp: Tensor, ntk: Tensor | None) -> Tensor:
        assert ntk is not None
        return ntk
