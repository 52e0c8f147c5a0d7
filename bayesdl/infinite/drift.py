"""How far a network of finite width is from its infinite limit: what training does to its tangent kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad

from bayesdl.errors import DataError, Divergence, MethodError
from bayesdl.infinite.dynamics import GradientFlow
from bayesdl.infinite.empirical import ntk_of
from bayesdl.infinite.finite import FiniteNetwork, Parameterisation
from bayesdl.models import BayesianNetwork


def kernel_distance(kernel: Tensor, reference: Tensor) -> float:
    """Relative distance ``|K - R| / |R|`` in the Frobenius norm."""
    return float((kernel - reference).norm() / reference.norm())


def kernel_alignment(kernel: Tensor, reference: Tensor) -> float:
    """``<K, R> / (|K| |R|)``: 1 where they are proportional (Cristianini et al., 2001)."""
    return float((kernel * reference).sum() / (kernel.norm() * reference.norm()))


@dataclass(frozen=True)
class KernelDrift:
    """A training run beside its linearisation; every tensor has an entry for each number of steps.

    Attributes:
        steps: of gradient descent, from 0.
        loss: ``sum (f - y)^2 / (2 N K)`` of the network.
        change: ``kernel_distance`` of the tangent kernel from the one at the start.
        alignment: ``kernel_alignment`` of the two.
        gap: root mean square difference between the outputs of the network and of its linearisation at the start,
            relative to that of the linearisation from where it began.
        outputs: of the network at the end, ``[M, K]``, at the rows that ``gap`` is about.
        linear: of its linearisation.
        learning_rate: of the run.
    """

    steps: Tensor
    loss: Tensor
    change: Tensor
    alignment: Tensor
    gap: Tensor
    outputs: Tensor
    linear: Tensor
    learning_rate: float


def kernel_drift(
    net: nn.Module | BayesianNetwork,
    x: Tensor,
    y: Tensor,
    *,
    x_new: Tensor | None = None,
    steps: int = 200,
    looks: int = 5,
    learning_rate: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    parameterisation: Parameterisation | None = None,
    seed: int | None = None,
) -> KernelDrift:
    """Train a copy by gradient descent on the mean squared error, and measure how its tangent kernel changes.

    In the infinite limit the kernel stays as it is, and the network and its linearisation stay together (Lee et al.,
    2019, theorem 2.1). At width n and a given time, change and gap fall as ``1 / n`` for smooth activations and more
    slowly for relu, whose units switch. They differ by a factor of ten between draws, so that one run says little.

    Args:
        net: any module, or a ``BayesianNetwork``. It is not changed.
        x: training inputs ``[N, ...]``.
        y: targets ``[N]`` or ``[N, K]``.
        x_new: rows at which the outputs are compared; by default the training rows.
        steps: of gradient descent.
        looks: how often the kernel is computed after the start, at equal distances.
        learning_rate: by default half of the largest stable one, ``N K / lambda_max``.
        params: values by name at which to start; the module's own by default.
        parameterisation: of the parameters that descend; by default "ntk" with a prior and "standard" without.
        seed: start at a draw from the prior, or for a bare module from its initialisation, instead of at ``params``.

    Raises:
        MethodError: a setting that is out of range.
        DataError: targets that do not fit the outputs.
        Divergence: the network's loss grew without bounds.
    """
    if not 1 <= looks <= steps:
        raise MethodError(f"looks={looks} must be from 1 to steps={steps}.")
    chosen = parameterisation or ("ntk" if isinstance(net, BayesianNetwork) else "standard")
    network = FiniteNetwork(net, params, chosen, x)
    if seed is not None:
        network.z = network.draw(seed, 0)
    rows, new = network.inputs(x), network.inputs(x if x_new is None else x_new)
    start = network.z
    with torch.no_grad():
        f_rows, f_new = network.at(start, rows), network.at(start, new)
    if y.shape[:1] != x.shape[:1] or y.numel() != f_rows.numel():
        raise DataError(f"y {list(y.shape)} does not fit the network's outputs {list(f_rows.shape)}.")
    target = y.to(f_rows).reshape(f_rows.shape)
    kernel = _flat(ntk_of(network, rows, per_output=True))
    flow = GradientFlow(kernel, target.flatten(), learning_rate=1.0, discrete=True)
    rate = flow.learning_rate_limit / 2 if learning_rate is None else learning_rate
    flow = GradientFlow(kernel, target.flatten(), learning_rate=rate, discrete=True)
    cross = _flat(ntk_of(network, new, rows, per_output=True))

    def loss(z: Tensor) -> Tensor:
        return (network.at(z, rows) - target).square().mean() / 2

    slope, mean_kernel = grad(loss), ntk_of(network, rows)
    times = torch.linspace(0, steps, looks + 1).round().long()
    found: dict[str, list[float]] = {"loss": [], "change": [], "alignment": [], "gap": []}
    outputs = linear = f_new
    for step in range(steps + 1):
        if step in times.tolist():
            now = ntk_of(network, rows)
            with torch.no_grad():
                found["loss"].append(float(loss(network.z)))
                outputs = network.at(network.z, new)
            if not outputs.isfinite().all():
                raise Divergence(f"The network's outputs are not finite after {step} steps: lower the learning rate.")
            linear = flow.mean(step, cross, (f_new.flatten(), f_rows.flatten())).reshape(f_new.shape)
            found["change"].append(kernel_distance(now, mean_kernel))
            found["alignment"].append(kernel_alignment(now, mean_kernel))
            moved = (linear - f_new).norm()
            found["gap"].append(float((outputs - linear).norm() / moved) if moved > 0 else 0.0)
        network.z = network.z - rate * slope(network.z)
    histories = {name: torch.tensor(values) for name, values in found.items()}
    return KernelDrift(steps=times, outputs=outputs, linear=linear, learning_rate=rate, **histories)


def width_rate(widths: Sequence[int], values: Tensor) -> tuple[float, float]:
    """The power of the width with which a quantity falls, by least squares on a log-log scale.

    Args:
        widths: W of them.
        values: positive, ``[W, R]`` with R repetitions for each width.

    Returns:
        The exponent (-1 for ``1 / width``) and its standard error from the spread of the repetitions.

    Raises:
        DataError: fewer than two widths or repetitions, or values that are not positive.
    """
    if len(widths) < 2 or values.dim() != 2 or len(values) != len(widths) or values.shape[1] < 2:
        raise DataError(f"values must be [W, R] with W = {len(widths)} > 1 and R > 1, got {list(values.shape)}.")
    if not bool((values > 0).all()):
        raise DataError("values must be positive.")
    log = torch.tensor(widths, dtype=torch.float64).log()
    weights = (log - log.mean()) / (log - log.mean()).square().sum()
    by_width = values.double().log()
    errors = by_width.var(1) / values.shape[1]
    return float(weights @ by_width.mean(1)), float((weights.square() @ errors).sqrt())


def _flat(kernel: Tensor) -> Tensor:
    """``[N1, N2, K, K]`` as a matrix over rows and outputs."""
    n1, n2, k, _ = kernel.shape
    return kernel.transpose(1, 2).reshape(n1 * k, n2 * k)
