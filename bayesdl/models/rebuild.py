"""Networks made of listed torch.nn layers, as JSON and back.

Every layer type has its own entry: its constructor's arguments, read from attributes of the same name. Class names of
a file are looked up in this table and never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesdl._rng import isolated
from bayesdl.errors import FileError, ModelRequired
from bayesdl.models.layers import Erf, RandomFourierFeatures

_CHANNELS = ("in_channels", "out_channels", "groups", "bias")
_CONV = (*_CHANNELS, "kernel_size", "stride", "padding", "dilation", "padding_mode")
_CONV_TRANSPOSE = (*_CONV, "output_padding")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")

_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    RandomFourierFeatures: ("in_features", "out_features", "lengthscale", "seed"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _CONV_TRANSPOSE),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAX_POOL),
    nn.AvgPool1d: _AVG_POOL,
    **dict.fromkeys((nn.AvgPool2d, nn.AvgPool3d), (*_AVG_POOL, "divisor_override")),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), ("output_size",)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _BATCH_NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _BATCH_NORM),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), ("p", "inplace")),
    **dict.fromkeys((nn.Identity, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, Erf), ()),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Hardswish, nn.Hardsigmoid), ("inplace",)),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.PReLU: ("num_parameters",),
}
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class _Entry(NamedTuple):
    """How one layer type is read and made."""

    layer: type[nn.Module]
    arguments: Callable[[Any], dict[str, Any]]


def _read(keys: tuple[str, ...]) -> Callable[[Any], dict[str, Any]]:
    def arguments(module: Any) -> dict[str, Any]:
        found = {key: getattr(module, key) for key in keys}
        # A layer keeps its bias as a tensor or None where its constructor takes a flag.
        return {key: value is not None if key == "bias" else value for key, value in found.items()}

    return arguments


def _transformer_layer(module: Any) -> dict[str, Any]:
    names = [name for name, function in _ACTIVATIONS.items() if function is module.activation]
    if not names:
        raise ModelRequired("A TransformerEncoderLayer's activation is the user's own code; pass model=... to load.")
    return {
        "d_model": module.self_attn.embed_dim,
        "nhead": module.self_attn.num_heads,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "activation": names[0],
        "layer_norm_eps": module.norm1.eps,
        "batch_first": module.self_attn.batch_first,
        "norm_first": module.norm_first,
        "bias": module.linear1.bias is not None,
    }


_TABLE: dict[str, _Entry] = {layer.__name__: _Entry(layer, _read(keys)) for layer, keys in _ATTRIBUTES.items()}
_TABLE["TransformerEncoderLayer"] = _Entry(nn.TransformerEncoderLayer, _transformer_layer)


def describe(net: nn.Module) -> dict[str, Any]:
    """A network of listed layers in nested Sequentials, as JSON.

    Raises:
        ModelRequired: another class, a hook, a tied parameter, a layer used twice, or a layer changed after it was
            made: the network is code and must be passed to ``load``.
    """
    config = _describe(net, set())
    rebuilt = _quietly(config)
    if _signature(rebuilt) != _signature(net):
        raise ModelRequired("A layer of the network was changed after it was made; pass model=... to load.")
    return config


def build_net(config: Mapping[str, Any]) -> nn.Module:
    """The network of a model's config, its frozen parameters marked, in eval mode, its values still to be set.

    Raises:
        ModelRequired: a class that is not in the table.
        FileError: the description is damaged.
    """
    dtype = getattr(torch, str(config.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not {"net", "prior", "likelihood", "frozen"} <= set(config):
        raise FileError(f"The file's description of the model is damaged: it has {sorted(config)}.")
    net = _quietly(config["net"]).to(dtype)
    parameters = dict(net.named_parameters())
    for name in config["frozen"]:
        if name not in parameters:
            raise FileError(f"The file's description of the model is damaged: it freezes {name!r}, which is not there.")
        parameters[name].requires_grad_(False)
    return net.eval()


def _quietly(config: Any) -> nn.Module:
    """Build without touching the global random state, which layers use to initialise themselves."""
    with isolated(0, "rebuild"):
        return _build(config)


def _describe(module: nn.Module, seen: set[int]) -> dict[str, Any]:
    name = type(module).__name__
    parts = [module] if type(module) is nn.Sequential else list(module.modules())
    for part in parts:
        stateful = any(True for _ in (*part.parameters(), *part.buffers()))
        if stateful and id(part) in seen:
            raise ModelRequired(f"The network uses one {type(part).__name__} twice; pass model=... to load.")
        seen.add(id(part))
        if any(part.__dict__.get(kind) for kind in _CODE):
            raise ModelRequired(f"A {type(part).__name__} has a hook or a forward of its own; pass model=... to load.")
    if type(module) is nn.Sequential:
        return {"class": name, "layers": [[key, _describe(layer, seen)] for key, layer in _layers(module)]}
    entry = _TABLE.get(name)
    if entry is None or entry.layer is not type(module):
        raise ModelRequired(
            f"{type(module).__qualname__} is not a layer that a file can describe, so the network is code; pass "
            "model=... to load."
        )
    return {"class": name, **{key: _to_json(value) for key, value in entry.arguments(module).items()}}


def _layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a Sequential, repeated ones as often as they stand in it."""
    return [(key, layer) for key, layer in net._modules.items() if layer is not None]


_CODE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")


def _build(config: Any) -> nn.Module:
    name = config.get("class") if isinstance(config, Mapping) else None
    if name != "Sequential" and name not in _TABLE:
        raise ModelRequired(f"The file asks for layer {name!r}, which this version of bayesdl does not know.")
    try:
        if name == "Sequential":
            net = nn.Sequential()
            for key, layer in config["layers"]:
                net.add_module(key, _build(layer))
            return net
        arguments = {key: _from_json(value) for key, value in config.items() if key != "class"}
        return _TABLE[name].layer(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise FileError(f"The file's description of layer {name} is damaged: {error}.") from error


def _to_json(value: Any) -> Any:
    return [_to_json(item) for item in value] if isinstance(value, (tuple, list)) else value


def _from_json(value: Any) -> Any:
    return tuple(_from_json(item) for item in value) if isinstance(value, list) else value


def _signature(net: nn.Module) -> list[Any]:
    """Everything that a rebuilt network must share with the original, but for values."""
    modules: list[Any] = [(name, type(module)) for name, module in net.named_modules(remove_duplicate=False)]
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    tied = len(list(net.named_parameters())) < len(list(net.named_parameters(remove_duplicate=False)))
    return [*modules, *((name, tensor.shape) for name, tensor in tensors), tied]
