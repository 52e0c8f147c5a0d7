"""The latent sites of a posterior as JSON and back, so that draws can be read where the model is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import transforms
from torch.distributions.transforms import Transform

from bayesdl.density import LogDensity, Site
from bayesdl.density.sites import constrain
from bayesdl.errors import ModelRequired

# A fixed table, so that a file can never name code to import.
_PLAIN: dict[str, type[Transform]] = {
    cls.__name__: cls
    for cls in (
        transforms.ExpTransform,
        transforms.SigmoidTransform,
        transforms.SoftplusTransform,
        transforms.StickBreakingTransform,
        transforms.LowerCholeskyTransform,
        transforms.CorrCholeskyTransform,
        transforms.PositiveDefiniteTransform,
        OrderedTransform,
    )
}


def describe(density: LogDensity) -> list[dict[str, Any]]:
    """The sites as JSON values, in the order of the flat vector."""
    return [
        {
            "name": site.name,
            "shape": list(site.shape),
            "unconstrained_shape": list(site.unconstrained_shape),
            "start": site.start,
            "size": site.size,
            "scope": site.scope,
            "support": site.support,
            "transform": _to_json(site.transform),
        }
        for site in density.sites
    ]


def constrain_without_model(layout: Sequence[dict[str, Any]], z: Tensor) -> dict[str, Tensor]:
    """Constrained values ``[..., *shape]`` by site name at ``z [..., D]``, from what ``describe`` wrote.

    Raises:
        ModelRequired: a site's transform is none of the listed ones.
    """
    return constrain(sites_without_model(layout), z)


def sites_without_model(layout: Sequence[dict[str, Any]]) -> list[Site]:
    """The sites, from what ``describe`` wrote.

    Raises:
        ModelRequired: a site's transform is none of the listed ones.
    """
    foreign = [f"{site['name']!r} ({site['support']})" for site in layout if site["transform"] is None]
    if foreign:
        raise ModelRequired(
            f"The support of {', '.join(foreign)} is not among those that a file can describe: "
            "bayesdl.load(path, model=...) gives its draws."
        )
    return [
        Site(
            name=site["name"],
            shape=torch.Size(site["shape"]),
            unconstrained_shape=torch.Size(site["unconstrained_shape"]),
            start=site["start"],
            scope=site["scope"],
            transform=_from_json(site["transform"]),
            support=site["support"],
            unbounded=_is_identity(site["transform"]),
        )
        for site in layout
    ]


def _is_identity(value: Any) -> bool:
    """Whether a transform, as JSON, leaves everything as it is."""
    if isinstance(value, dict) and "independent" in value:
        return _is_identity(value["independent"])
    return isinstance(value, dict) and value.get("compose") == []


def _to_json(transform: Transform) -> Any | None:
    """A transform as JSON, or None for one that is not listed."""
    if isinstance(transform, transforms.IndependentTransform):
        inner = _to_json(transform.base_transform)
        return None if inner is None else {"independent": inner, "dims": transform.reinterpreted_batch_ndims}
    if isinstance(transform, transforms.ComposeTransform):
        parts = [_to_json(part) for part in transform.parts]
        return None if None in parts else {"compose": parts}
    if type(transform) is transforms.AffineTransform:
        return {"loc": _number(transform.loc), "scale": _number(transform.scale), "event_dim": transform.event_dim}
    name = type(transform).__name__
    return name if _PLAIN.get(name) is type(transform) else None


def _from_json(value: Any) -> Transform:
    if isinstance(value, str):
        return _PLAIN[value]()
    if "independent" in value:
        return transforms.IndependentTransform(_from_json(value["independent"]), value["dims"])
    if "compose" in value:
        return transforms.ComposeTransform([_from_json(part) for part in value["compose"]])
    return transforms.AffineTransform(_read(value["loc"]), _read(value["scale"]), event_dim=value["event_dim"])


def _number(value: Tensor | float) -> Any:
    if isinstance(value, Tensor):
        return {"values": value.tolist(), "double": value.dtype == torch.float64}
    return float(value)


def _read(value: Any) -> Tensor | float:
    if isinstance(value, dict):
        return torch.tensor(value["values"], dtype=torch.float64 if value["double"] else torch.float32)
    return float(value)
