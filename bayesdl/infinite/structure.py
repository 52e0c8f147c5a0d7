"""Kernels and means as JSON: enough to rebuild the plain ones; any other is code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import gpytorch
import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.errors import FileError
from bayesdl.infinite.convert import from_module
from bayesdl.infinite.kernels import NetworkKernel, NNGPKernel, NTKKernel
from bayesdl.infinite.layers import layers_from_json, layers_to_json, spatial_of

# Constructor settings that are attributes under the same name; everything else must be at its default.
_SETTINGS: dict[type[Module], tuple[str, ...]] = {
    gpytorch.kernels.RBFKernel: ("ard_num_dims",),
    gpytorch.kernels.MaternKernel: ("nu", "ard_num_dims"),
    gpytorch.kernels.RQKernel: ("ard_num_dims",),
    gpytorch.kernels.PeriodicKernel: ("ard_num_dims",),
    gpytorch.kernels.LinearKernel: ("ard_num_dims",),
    gpytorch.means.ZeroMean: (),
    gpytorch.means.ConstantMean: (),
}
_COMPOSITES: dict[type[Module], Callable[[Kernel], list[Kernel]]] = {
    gpytorch.kernels.ScaleKernel: lambda kernel: [kernel.base_kernel],
    gpytorch.kernels.AdditiveKernel: lambda kernel: list(kernel.kernels),
    gpytorch.kernels.ProductKernel: lambda kernel: list(kernel.kernels),
}
_CLASSES: tuple[type[Module], ...] = (*_SETTINGS, *_COMPOSITES, NNGPKernel, NTKKernel)
_BY_NAME = {cls.__name__: cls for cls in _CLASSES}


def to_json(module: Module) -> dict[str, Any] | None:
    """Return the structure of a kernel or mean as JSON values, or None if it holds a class that is not listed."""
    kind = type(module)
    value: dict[str, Any] = {"class": kind.__name__}
    if isinstance(module, Kernel) and module.active_dims is not None:
        value["active_dims"] = module.active_dims.tolist()
    if isinstance(module, NetworkKernel):
        layers = layers_to_json(module.layers)
        shape = {} if module.input_shape is None else {"input_shape": list(module.input_shape)}
        return None if layers is None else {**value, **shape, "layers": layers}
    if kind in _COMPOSITES:
        parts = [to_json(part) for part in _COMPOSITES[kind](module)]
        return None if None in parts else {**value, "parts": parts}
    if kind in _SETTINGS:
        return {**value, **{name: getattr(module, name) for name in _SETTINGS[kind]}}
    return None


def from_json(value: Mapping[str, Any]) -> Module:
    """Build the kernel or mean that ``to_json`` described, in float64 and with default hyperparameters.

    Raises:
        FileError: the description is damaged.
    """
    settings = {key: item for key, item in value.items() if key not in ("class", "parts", "layers")}
    try:
        kind = _BY_NAME[value["class"]]
        if "layers" in value:
            return kind(layers_from_json(value["layers"]), dtype=torch.float64, **settings).double()
        parts = [from_json(part) for part in value.get("parts", ())]
        return kind(*parts, **settings).double()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"The file's description of a kernel is damaged: {error!r}.") from error


def of_model(model: Any, rows: Tensor, w_std: float | None, b_std: float | None) -> NNGPKernel:
    """Return the kernel of a model's network, in float64.

    Args:
        model: a ``BayesianNetwork``.
        rows: ``[N, ...]`` of its inputs.
        w_std: of all layers; by default as the model's prior says.
        b_std: likewise.

    Raises:
        ModelError: the network has no limit.
    """
    layers = from_module(model, w_std=w_std, b_std=b_std)
    shape = rows.shape[1:] if spatial_of(layers) else None
    return NNGPKernel(layers, input_shape=shape, dtype=torch.float64).double()


def storable(kernel: Kernel, mean: Module, x: Tensor) -> dict[str, Any] | None:
    """Return the structures of kernel and mean as JSON values, or None where they are code.

    A listed class may carry constraints of the user's own, which change what its raw parameters mean. So the rebuilt
    modules are tried: they count only if they give the same numbers at the rows ``x [n, d]``.
    """
    described = {"kernel": to_json(kernel), "mean": to_json(mean)}
    if described["kernel"] is None or described["mean"] is None:
        return None
    for name, module in (("kernel", kernel), ("mean", mean)):
        rebuilt = from_json(described[name] or {})
        try:
            rebuilt.load_state_dict(copy.deepcopy(module.state_dict()))
        except RuntimeError:
            return None
        with torch.no_grad():
            pair = [m(x).to_dense() if isinstance(m, Kernel) else m(x) for m in (module, rebuilt)]
        if not torch.equal(*pair):
            return None
    return described


def hyperparameters(module: Module) -> dict[str, Any]:
    """Return the constrained values of a kernel's or mean's parameters by name."""
    found = {}
    for name, parameter, constraint in module.named_parameters_and_constraints():
        value = parameter if constraint is None else constraint.transform(parameter)
        found[name.replace("raw_", "")] = value.detach().tolist()
    return found
