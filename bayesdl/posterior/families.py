"""Probability distributions taken apart into their parameter tensors, and put together again with more draws.

A posterior prediction needs the likelihood's distribution at every draw. ``torch.func.vmap`` over draws can return
tensors but no distributions, so the distribution is *unpacked* into tensors inside the vmap and *packed* again outside,
where every tensor has gained the leading dimension ``S`` of the draws.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import validation_enabled
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
    transforms,
)

# Parametrisations of one and the same quantity, preferred one first where the distribution holds several.
_ALTERNATIVES = (("logits", "probs"), ("gate_logits", "gate"), ("scale_tril", "covariance_matrix", "precision_matrix"))
# Elementwise transforms whose only parameters are the listed ones.
_TRANSFORMS: dict[type[transforms.Transform], tuple[str, ...]] = {
    transforms.ExpTransform: (),
    transforms.SigmoidTransform: (),
    transforms.SoftplusTransform: (),
    transforms.TanhTransform: (),
    transforms.AffineTransform: ("loc", "scale"),
    transforms.PowerTransform: ("exponent",),
}


class CannotUnpack(TypeError):
    """Signal: this distribution is not determined by parameters that can be read off it; go draw by draw."""


@dataclass(frozen=True)
class Spec:
    """What is left of a distribution when its tensors are taken away; comparable, and free of tensors.

    Args:
        family: Class of the distribution (or of a transform inside one).
        names: Constructor arguments that are tensors.
        settings: Constructor arguments that are plain numbers, such as ``total_count`` of a Multinomial.
        parts: Constructor arguments that are distributions or transforms themselves.
    """

    family: type[Any]
    names: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    parts: tuple[tuple[str, Spec], ...] = ()


def unpack(distribution: Distribution, batch_shape: Sequence[int] | None = None) -> tuple[Spec, dict[str, Tensor]]:
    """Take a distribution apart: ``pack(*unpack(d))`` equals ``d``.

    Runs inside ``torch.func.vmap``: it only reads attributes and broadcasts views (no ``.item()``, no copy).

    Args:
        distribution: Any torch or Pyro distribution.
        batch_shape: Shape to which the parameters are broadcast; by default the distribution's own.

    Returns:
        The tensor-free description, and the tensors by name, each ``[*batch_shape, *event dimensions]``
        (nested ones by path, such as ``"base_distribution.loc"``).

    Raises:
        CannotUnpack: If the parameters do not determine the distribution or cannot be found.
    """
    shape = torch.Size(distribution.batch_shape if batch_shape is None else batch_shape)
    if isinstance(distribution, ExpandedDistribution):
        return unpack(distribution.base_dist, shape)
    if isinstance(distribution, MaskedDistribution):
        mask: Any = distribution._mask
        own = {"mask": mask.expand(shape)} if isinstance(mask, Tensor) else {}
        parts = {"base_dist": unpack(distribution.base_dist, shape)}
        return _join(type(distribution), own, {} if own else {"mask": mask}, parts)
    if isinstance(distribution, Independent):
        base, inner = distribution.base_dist, distribution.reinterpreted_batch_ndims
        base_shape = shape + base.batch_shape[len(base.batch_shape) - inner :]
        parts = {"base_distribution": unpack(base, base_shape)}
        return _join(type(distribution), {}, {"reinterpreted_batch_ndims": inner}, parts)
    if isinstance(distribution, MixtureSameFamily):
        component = distribution.component_distribution
        parts = {
            "mixture_distribution": unpack(distribution.mixture_distribution, shape),
            "component_distribution": unpack(component, shape + component.batch_shape[-1:]),
        }
        return _join(type(distribution), {}, {}, parts)
    if isinstance(distribution, TransformedDistribution) and not distribution.arg_constraints:
        full = shape + distribution.event_shape
        parts = {"base_distribution": unpack(distribution.base_dist, shape)}
        parts.update(
            {f"transforms.{i}": _unpack_transform(t, full) for i, t in enumerate(_flat(distribution.transforms))}
        )
        return _join(type(distribution), {}, {}, parts)
    return _unpack_parameters(distribution, shape)


def pack(spec: Spec, tensors: Mapping[str, Tensor]) -> Distribution:
    """Put a distribution together again, without validation of its arguments.

    Args:
        spec: From `unpack`.
        tensors: Its tensors, all with the same additional leading dimensions (``[S, ...]`` after a vmap over draws).

    Returns:
        The distribution with batch shape ``[*leading, *batch_shape]``.

    Raises:
        CannotUnpack: If a constructor refuses what `unpack` read off the distribution.
    """
    try:
        with validation_enabled(False):  # some families build an inner distribution without passing the choice on
            result: Distribution = _unvalidated(_build(spec, tensors, ""))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CannotUnpack(f"{spec.family.__name__} cannot be made from its parameters: {error}") from error
    return result


def take(distribution: Distribution, index: slice | Tensor, dim: int, dtype: torch.dtype | None = None) -> Distribution:
    """Part of a distribution along one of its batch dimensions.

    Args:
        distribution: Batch shape ``[B0, B1, ...]``.
        index: A slice (no copy) or an integer tensor.
        dim: Batch dimension, counted from the left.
        dtype: If given, floating-point parameters are converted to it.

    Raises:
        CannotUnpack: As `unpack`.
    """
    spec, tensors = unpack(distribution)
    where = (slice(None),) * dim + (index,)
    cut = {name: tensor[where] for name, tensor in tensors.items()}
    if dtype is not None:
        cut = {name: t.to(dtype) if t.is_floating_point() else t for name, t in cut.items()}
    return pack(spec, cut)


def row_pieces(
    distribution: Distribution, step: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Distribution]]:
    """A distribution ``[S, n]`` cut into pieces of ``step`` rows, with their row ranges.

    One that cannot be taken apart comes as one piece, as it is.
    """
    n = distribution.batch_shape[1]
    try:
        for low in range(0, n, step):
            rows = slice(low, min(low + step, n))
            yield rows, take(distribution, rows, 1, dtype)
    except CannotUnpack:
        yield slice(0, n), distribution


def stack(distributions: Sequence[Distribution]) -> Distribution:
    """One distribution of batch shape ``[S, *batch_shape]`` from S distributions of the same shape.

    Where the distributions can be taken apart their parameters are stacked; otherwise a `Stacked` holds them.
    """
    try:
        unpacked = [unpack(distribution) for distribution in distributions]
        spec, first = unpacked[0]
        shapes = {name: tensor.shape for name, tensor in first.items()}
        if any(s != spec or {k: t.shape for k, t in tensors.items()} != shapes for s, tensors in unpacked):
            return Stacked(distributions)
        return pack(spec, {name: torch.stack([tensors[name] for _, tensors in unpacked]) for name in first})
    except CannotUnpack:
        return Stacked(distributions)


class Stacked(Distribution):
    """S distributions of any kind side by side, for those that cannot be taken apart. Cost: a Python loop over S."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - declared so by torch

    def __init__(self, distributions: Sequence[Distribution]) -> None:
        self.members = [_unvalidated(distribution) for distribution in distributions]
        first = self.members[0]
        super().__init__(torch.Size([len(self.members)]) + first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        """Support of the first member."""
        return self.members[0].support

    @property
    def mean(self) -> Tensor:
        """Means ``[S, *batch, *event]``."""
        return torch.stack([member.mean for member in self.members])

    @property
    def variance(self) -> Tensor:
        """Variances ``[S, *batch, *event]``."""
        return torch.stack([member.variance for member in self.members])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        """Draws ``[*sample_shape, S, *batch, *event]``."""
        return torch.stack([member.sample(sample_shape) for member in self.members], dim=len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log densities of values ``[..., S or 1, *batch, *event]``."""
        dim = -1 - len(self.members[0].batch_shape)
        values = self._values(value, dim - len(self.event_shape))
        return torch.stack([m.log_prob(v) for m, v in zip(self.members, values, strict=True)], dim=dim)

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution functions at values ``[..., S or 1, *batch]``."""
        dim = -1 - len(self.members[0].batch_shape)
        return torch.stack([m.cdf(v) for m, v in zip(self.members, self._values(value, dim), strict=True)], dim=dim)

    def _values(self, value: Tensor, dim: int) -> tuple[Tensor, ...]:
        value = value.reshape(*[1] * max(0, -dim - value.dim()), *value.shape)
        size = list(value.shape)
        size[dim] = len(self.members)
        return value.expand(size).unbind(dim)


def _unpack_parameters(distribution: Distribution, shape: torch.Size) -> tuple[Spec, dict[str, Tensor]]:
    own: dict[str, Tensor] = {}
    settings: list[tuple[str, Any]] = []
    arguments = _arguments(type(distribution))
    limits = distribution.arg_constraints
    skipped = {name for group in _ALTERNATIVES for name in _not_stored(distribution, group, arguments)}
    for name in arguments:
        if name in skipped:
            continue
        value = getattr(distribution, name, inspect.Parameter.empty)
        if name in limits and isinstance(value, Tensor):
            own[name] = _broadcast(distribution, name, value, shape, _event_dim(limits[name], distribution))
        elif isinstance(value, bool | int | float | str) or value is None:
            settings.append((name, value))
        else:
            raise CannotUnpack(f"{type(distribution).__name__} keeps no constructor argument {name!r} as a parameter")
    if not own:
        raise CannotUnpack(f"{type(distribution).__name__} declares no parameters")
    return Spec(type(distribution), tuple(own), tuple(settings)), own


def _not_stored(distribution: Distribution, group: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """All names of the group but the one to read: the one that was given, so that nothing is rounded on the way."""
    present = [name for name in group if name in arguments]
    if len(present) < 2:
        return []
    kept = vars(distribution)
    given = [n for n in present if n in kept and kept[n] is kept.get("_param")]
    best = (given or [name for name in present if name in kept] or present)[0]
    if "scale_tril" in present:
        best = "scale_tril"  # whatever was given, torch factorises it at once and keeps the factor
    return [name for name in present if name != best]


def _broadcast(distribution: Distribution, name: str, value: Tensor, shape: torch.Size, event_dim: int) -> Tensor:
    batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
    if len(batch) > len(shape) or any(b not in (1, s) for b, s in zip(reversed(batch), reversed(shape), strict=False)):
        raise CannotUnpack(
            f"{type(distribution).__name__}.{name} has shape {tuple(value.shape)}, which does not broadcast to the "
            f"batch shape {tuple(shape)}"
        )
    return value.expand(shape + event)


def _event_dim(limit: Any, distribution: Distribution) -> int:
    try:
        return int(limit.event_dim)
    except NotImplementedError:  # a dependent constraint that leaves it open: the event's own dimensions
        return len(distribution.event_shape)


def _unpack_transform(transform: transforms.Transform, full: torch.Size) -> tuple[Spec, dict[str, Tensor]]:
    if type(transform) not in _TRANSFORMS:
        raise CannotUnpack(f"the transform {type(transform).__name__} may hold parameters of its own")
    own: dict[str, Tensor] = {}
    settings: list[tuple[str, Any]] = []
    for name in _TRANSFORMS[type(transform)]:
        value = getattr(transform, name)
        if isinstance(value, Tensor):
            own[name] = value.expand(full)
        else:
            settings.append((name, value))
    if isinstance(transform, transforms.AffineTransform):
        settings.append(("event_dim", transform.event_dim))
    return Spec(type(transform), tuple(own), tuple(settings)), own


def _flat(chain: Sequence[transforms.Transform]) -> list[transforms.Transform]:
    flat: list[transforms.Transform] = []
    for transform in chain:
        flat += _flat(transform.parts) if isinstance(transform, transforms.ComposeTransform) else [transform]
    return flat


def _join(
    family: type[Any],
    own: dict[str, Tensor],
    settings: Mapping[str, Any],
    parts: Mapping[str, tuple[Spec, dict[str, Tensor]]],
) -> tuple[Spec, dict[str, Tensor]]:
    tensors = dict(own)
    for path, (_, inner) in parts.items():
        tensors.update({f"{path}/{name}": tensor for name, tensor in inner.items()})
    inner_specs = tuple((path, spec) for path, (spec, _) in parts.items())
    return Spec(family, tuple(own), tuple(settings.items()), inner_specs), tensors


def _build(spec: Spec, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    arguments: dict[str, Any] = dict(spec.settings)
    arguments.update({name: tensors[prefix + name] for name in spec.names})
    for name, part in spec.parts:
        built = _build(part, tensors, f"{prefix}{name}/")
        if name.startswith("transforms."):
            arguments.setdefault("transforms", []).append(built)
        else:
            arguments[name] = built
    return spec.family(**arguments)


def _unvalidated(distribution: Distribution) -> Distribution:
    """A shallow copy that validates neither itself nor what it wraps."""
    result = copy.copy(distribution)
    result._validate_args = False
    for name, value in vars(result).items():
        if isinstance(value, Distribution):
            setattr(result, name, _unvalidated(value))
    return result


def _arguments(family: type[Distribution]) -> tuple[str, ...]:
    parameters = inspect.signature(family).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise CannotUnpack(f"{family.__name__} takes arguments that its signature does not name")
    return tuple(p.name for p in parameters if p.name != "validate_args")
