"""From a module to the layers of its infinitely wide limit: a walk over its graph.

Every value in the graph is a chain of steps from the network's input, and, beyond the last step, a run of elementwise
operations that have not been made a step yet. A run ends where something else begins; it is then one activation. A sum
of two chains is a ``Sum`` of what follows their common beginning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bayesdl.errors import ModelError
from bayesdl.infinite.layers import AvgPool, Flatten, Layer, LayerNorm, Sum, spatial_of
from bayesdl.infinite.operations import (
    ELEMENTWISE_MODULES,
    FUNCTIONS,
    METHODS,
    NEUTRAL_FUNCTIONS,
    NEUTRAL_MODULES,
    NO_LIMIT,
    PARTS,
    REASONS,
    SUMS,
)
from bayesdl.infinite.recognise import elementwise


@dataclass(frozen=True, eq=False)
class Step:
    """One layer at one place of the graph; two steps are equal only if they are the same."""

    layer: Layer


@dataclass(frozen=True)
class Value:
    """What a node of the graph computes."""

    steps: tuple[Step, ...]
    run: Callable[[Tensor], Tensor] | None = None


class Walk:
    """The walk over one module's graph.

    Args:
        net: the module.
        weights: ``(name, module) -> layer`` of a Linear or a convolution.
    """

    def __init__(self, net: nn.Module, weights: Callable[[str, nn.Module], Layer]) -> None:
        self.weights = weights
        # A single layer would be traced into; as the only part of a Sequential it is a leaf.
        alone = type(net).__module__.startswith("torch.nn") and not isinstance(net, nn.Sequential)
        self.root: nn.Module = nn.Sequential(net) if alone else net
        self.prefix = "0" if alone else None
        self.values: dict[fx.Node, Value] = {}
        self.used: set[nn.Module] = set()

    def layers(self) -> tuple[Layer, ...]:
        """The layers of the limit.

        Raises:
            ModelError: the graph cannot be traced, or a part of it has no rule.
        """
        for name, module in self.root.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise ModelError(
                    f"Layer {self._label(name, module)} has forward hooks; what they compute has no kernel."
                )
        try:
            graph = fx.Tracer().trace(self.root)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(self.root).__name__} cannot be traced by torch.fx, so its layers are unknown: {error} "
                f"{NO_LIMIT}"
            ) from error
        inputs = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
        if len(inputs) != 1:
            raise ModelError(f"The network takes {len(inputs)} inputs; infinite width is for networks with one.")
        for node in graph.nodes:
            if node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node) or result not in self.values:
                    raise ModelError("The network must return one tensor.")
                return tuple(step.layer for step in self._finish(result))
            self._visit(node)
        raise ModelError("The network returns nothing.")

    def _label(self, name: str, module: nn.Module) -> str:
        if self.prefix is not None and name.split(".")[0] == self.prefix:
            name = name[len(self.prefix) + 1 :]
        return f"{name!r} ({type(module).__name__})"

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if not node.args:
                self.values[node] = Value(())
        elif node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.op in ("call_function", "call_method") and any(n in self.values for n in node.all_input_nodes):
            found = self._function(node)
            if found is not None:
                self.values[node] = found

    def _finish(self, node: fx.Node) -> tuple[Step, ...]:
        """The steps of a node, its run made one."""
        value = self.values[node]
        if value.run is not None:
            layer = elementwise(value.run)
            steps = value.steps if layer is None else (*value.steps, Step(layer))
            self.values[node] = value = Value(steps)
        return value.steps

    def _module(self, node: fx.Node) -> Value:
        name = str(node.target)
        layer = self.root.get_submodule(name)
        label = self._label(name, layer)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise self._refusal(label, type(layer).__name__)
        source = node.args[0]
        if source not in self.values:
            raise self._refusal(label, type(layer).__name__)
        kind = type(layer)
        if kind in ELEMENTWISE_MODULES:
            return self._extend(source, layer)
        if kind in NEUTRAL_MODULES:
            return self.values[source]
        if kind in (nn.Linear, nn.Conv1d, nn.Conv2d):
            if layer in self.used:
                raise ModelError(
                    f"Layer {label} is used twice; infinite width needs weights of its own at every place."
                )
            self.used.add(layer)
            prefix = name if self.prefix is None else name[len(self.prefix) + 1 :]
            return Value((*self._finish(source), Step(self.weights(prefix, layer))))
        new, before = self._fixed(layer, label), self._finish(source)
        if isinstance(layer, nn.LayerNorm):
            passed = [step.layer for step in before]
            pixels = 0 if any(isinstance(one, Flatten) for one in passed) else spatial_of(passed)
            if len(layer.normalized_shape) != 1 + pixels:
                raise ModelError(
                    f"Layer {label} normalises over {layer.normalized_shape}; there is a rule for all units of a row "
                    "(channels and pixels) only."
                )
        return Value((*before, Step(new)))

    def _fixed(self, layer: nn.Module, label: str) -> Layer:
        """The rule of a module without weights."""
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            return Flatten()
        if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d)):
            dims = 1 if isinstance(layer, nn.AvgPool1d) else 2
            divisor = getattr(layer, "divisor_override", None)
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            return _pool(dims, label, size, stride, padding, layer.ceil_mode, layer.count_include_pad, divisor)
        if isinstance(layer, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
            return _global(layer.output_size, label)
        if isinstance(layer, nn.LayerNorm):
            return LayerNorm(layer.eps)
        if isinstance(layer, nn.GroupNorm) and layer.num_groups == 1:
            return LayerNorm(layer.eps)
        raise self._refusal(label, type(layer).__name__)

    def _refusal(self, label: str, kind: str) -> ModelError:
        why = next((reason for word, reason in REASONS.items() if word in kind.lower()), None)
        because = f": {why}" if why else ""
        return ModelError(
            f"Layer {label} has no rule for infinite width{because}. {PARTS} (ReLU, Erf, ...). {NO_LIMIT}"
        )

    def _extend(self, source: fx.Node, function: Callable[[Tensor], Tensor]) -> Value:
        before = self.values[source]
        inner = before.run
        run = function if inner is None else lambda x: function(inner(x))
        return Value(before.steps, run)

    def _function(self, node: fx.Node) -> Value | None:
        target, label = node.target, f"{node.name!r} ({getattr(node.target, '__name__', node.target)})"
        parents = [parent for parent in node.all_input_nodes if parent in self.values]
        source = parents[0]
        if target in ("size", "dim") or target is getattr:
            return None
        if target in NEUTRAL_FUNCTIONS or target in ("contiguous",):
            return self.values[source]
        if len(parents) == 1 and self._is_flatten(node):
            return Value((*self._finish(source), Step(Flatten())))
        steps = self._averages(node, label)
        if steps is not None:
            return Value((*self._finish(source), *map(Step, steps)))
        if target in (METHODS if node.op == "call_method" else FUNCTIONS):
            if all(self.values[parent].steps == self.values[source].steps for parent in parents):
                return self._combine(node)
            if target in SUMS and len(parents) == 2 and not node.kwargs and len(node.args) == 2:
                return self._add(*parents)
        raise self._refusal(label, str(getattr(target, "__name__", target)))

    def _is_flatten(self, node: fx.Node) -> bool:
        rest: tuple[Any, ...] = node.args[1:]
        keys = node.kwargs
        if node.target in ("flatten", torch.flatten):
            start = keys.get("start_dim", rest[0] if rest else 0)
            end = keys.get("end_dim", rest[1] if len(rest) > 1 else -1)
            return (start, end) == (1, -1)
        return node.target in ("view", "reshape") and len(rest) == 2 and rest[1] == -1 and isinstance(rest[0], fx.Node)

    def _averages(self, node: fx.Node, label: str) -> list[Layer] | None:
        """The layers of a pooling function or of a mean over all pixels."""
        args: tuple[Any, ...] = node.args[1:]
        keys: dict[str, Any] = dict(node.kwargs)
        if node.target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d):
            return [_global(args[0] if args else keys["output_size"], label)]
        if node.target in (F.avg_pool1d, F.avg_pool2d):
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            given = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True,
                     "divisor_override": None, **dict(zip(names, args, strict=False)), **keys}  # fmt: skip
            settings = [given[name] for name in names]
            return [_pool(1 if node.target is F.avg_pool1d else 2, label, *settings)]
        if node.target in ("mean", torch.mean):
            dims = keys.get("dim", args[0] if args else None)
            dims = (dims,) if isinstance(dims, int) else dims
            spatial = spatial_of([step.layer for step in self.values[node.all_input_nodes[0]].steps])
            if dims is not None and spatial and {d % (spatial + 2) for d in dims} == set(range(2, spatial + 2)):
                keep = keys.get("keepdim", args[1] if len(args) > 1 else False)
                return [AvgPool()] if keep else [AvgPool(), Flatten()]
        return None

    def _combine(self, node: fx.Node) -> Value:
        """An elementwise operation on runs that begin at the same step, and on constants."""
        inner = {parent: self.values[parent].run for parent in node.all_input_nodes if parent in self.values}
        fixed: dict[fx.Node, Any] = {}
        for other in node.all_input_nodes:
            if other not in inner:
                fixed[other] = self._constant(other)

        def run(x: Tensor) -> Tensor:
            def value(item: fx.Node) -> Any:
                if item in fixed:
                    held = fixed[item]
                    return held.to(x) if isinstance(held, Tensor) else held
                before = inner[item]
                return x if before is None else before(x)

            args, keys = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **keys)
            assert callable(node.target)
            return node.target(*args, **keys)

        return Value(self.values[next(iter(inner))].steps, run)

    def _constant(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(self.root)
            if isinstance(held, Tensor) and held.numel() == 1 and not isinstance(held, nn.Parameter):
                return held.detach().reshape(())
        raise ModelError(
            f"{node.name!r} takes part in an activation and is not a single constant; infinite width has rules for "
            f"elementwise functions with constants only. {NO_LIMIT}"
        )

    def _add(self, left: fx.Node, right: fx.Node) -> Value:
        a, b = self._finish(left), self._finish(right)
        common = 0
        while common < min(len(a), len(b)) and a[common] is b[common]:
            common += 1
        branches = tuple(tuple(step.layer for step in steps[common:]) for steps in (a, b))
        return Value((*a[:common], Step(Sum(branches))))


def _pair(value: Any, dims: int) -> tuple[int, ...]:
    value = (value,) * dims if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


def _pool(dims: int, label: str, size: Any, stride: Any, padding: Any, ceil: Any, count: Any, divisor: Any) -> AvgPool:
    window, pads = _pair(size, dims), _pair(padding, dims)
    if ceil or divisor is not None or (not count and any(pads)):
        raise ModelError(
            f"Layer {label} divides by a count that changes at the borders (ceil_mode, divisor_override or "
            "count_include_pad=False with padding); infinite width has a rule for the plain mean only."
        )
    return AvgPool(window, window if stride in (None, ()) else _pair(stride, dims), tuple((p, p) for p in pads))


def _global(size: Any, label: str) -> AvgPool:
    if size is None or set(_pair(size, 1)) != {1}:
        raise ModelError(
            f"Layer {label} has output size {size}; infinite width has a rule for 1, the mean of all pixels."
        )
    return AvgPool()
