"""What each parameter of a torch.nn layer is, and over how many inputs its layer sums: a table by module type.

A sum of n independent terms of unit variance, each times a weight of variance w_std^2 / n, has variance w_std^2; that
is the scaling under which a network's prior over functions stays put as layers grow wide (Neal, 1996, section 2.1).
n follows from what the module computes, not from the shape of its tensor: an Embedding's row is used alone, and the
four gates of an LSTM, stacked in one matrix, each sum over their own inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bayesdl.errors import ModelError


class Role(NamedTuple):
    """What a parameter does in its layer.

    Attributes:
        kind: "weight", "bias", or of a normalising layer "gain" (multiplies) or "shift" (adds).
        fan_in: number of terms in the sums that a weight stands in; 1 for the other kinds.
    """

    kind: str
    fan_in: float = 1.0


def role_of(owners: tuple[tuple[nn.Module, str], ...], name: str, shape: tuple[int, ...]) -> Role:
    """The role of a parameter, given every (module, local name) under which it stands.

    A tied parameter gets the largest fan-in of its places: the smallest prior, under which no layer explodes.

    Raises:
        ModelError: the module type is not in the table, or the places disagree about the kind.
    """
    roles = [_role(module, local) for module, local in owners]
    if None in roles:
        module, local = owners[roles.index(None)]
        raise ModelError(
            f"The prior scale 'fan_in' is not defined for parameter {name!r} (shape {tuple(shape)}), {local!r} of a "
            f"{type(module).__name__}. Say its prior by a pattern: "
            f"PerParameter({{'{name}': Normal(1.0), '*': Normal('fan_in')}})."
        )
    known = [role for role in roles if role is not None]
    kinds = sorted({role.kind for role in known})
    if len(kinds) > 1:
        raise ModelError(
            f"Parameter {name!r} is tied between places where it is a {' and a '.join(kinds)}; say its prior by a "
            f"pattern: PerParameter({{'{name}': Normal(1.0), '*': Normal('fan_in')}})."
        )
    return max(known, key=lambda role: role.fan_in)


def _role(module: nn.Module, local: str) -> Role | None:
    """The role of parameter ``local`` of ``module`` by the first class in its ancestry that the table knows."""
    for ancestor in type(module).__mro__:
        if ancestor in _TABLE:
            return _TABLE[ancestor](module, local)
    return None


def _plain(fan_in: Callable[[nn.Module], float]) -> Callable[[nn.Module, str], Role | None]:
    """Layers with one ``weight`` and one ``bias``."""

    def role(module: nn.Module, local: str) -> Role | None:
        if local == "weight":
            return Role("weight", float(fan_in(module)))
        return Role("bias") if local == "bias" else None

    return role


def _linear(module: nn.Module) -> float:
    assert isinstance(module, nn.Linear)
    return module.in_features


def _bilinear(module: nn.Module) -> float:
    assert isinstance(module, nn.Bilinear)
    return module.in1_features * module.in2_features


def _conv(module: nn.Module) -> float:
    assert isinstance(module, _ConvNd)
    return module.in_channels / module.groups * math.prod(module.kernel_size)


def _conv_transpose(module: nn.Module) -> float:
    """Terms per output position, averaged over positions.

    Tap k of input position i lands on output position ``i stride - padding + k dilation``: of the kernel's taps, one
    in ``stride`` hits a given output position in each dimension.
    """
    assert isinstance(module, _ConvNd)
    return _conv(module) / math.prod(module.stride)


def _recurrent(module: nn.Module, local: str) -> Role | None:
    """Gates are stacked along rows; columns are what each gate sums over (inputs, hidden state, or projection)."""
    if local.startswith("bias"):
        return Role("bias")
    weight = getattr(module, local)
    if not isinstance(weight, Tensor) or not local.startswith("weight"):
        return None
    return Role("weight", float(weight.shape[-1]))


def _attention(module: nn.Module, local: str) -> Role | None:
    """Projections of query, key and value; ``out_proj`` is a Linear of its own."""
    assert isinstance(module, nn.MultiheadAttention)
    sums = {
        "in_proj_weight": module.embed_dim,
        "q_proj_weight": module.embed_dim,
        "k_proj_weight": module.kdim,
        "v_proj_weight": module.vdim,
    }
    if local in sums:
        return Role("weight", float(sums[local]))
    return Role("bias") if local in ("in_proj_bias", "bias_k", "bias_v") else None


def _norm(_: nn.Module, local: str) -> Role | None:
    return {"weight": Role("gain"), "bias": Role("shift")}.get(local)


_TABLE: dict[type, Callable[[nn.Module, str], Role | None]] = {
    nn.Linear: _plain(_linear),
    nn.Bilinear: _plain(_bilinear),
    _ConvTransposeNd: _plain(_conv_transpose),
    _ConvNd: _plain(_conv),
    nn.Embedding: _plain(lambda _: 1),
    nn.EmbeddingBag: _plain(lambda _: 1),
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
    nn.GroupNorm: _norm,
    _BatchNorm: _norm,
    _InstanceNorm: _norm,
}
