"""What a network must be to stand in a log density; everything else is refused with the reason and the alternative."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bayesdl.errors import ModelError


def check_net(net: object) -> nn.Module:
    """Refuse what cannot be evaluated as a function of its parameters, row by row.

    Raises:
        ModelError: with the module's or parameter's name, the reason, and what to do.
    """
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        raise ModelError(
            f"net must be a plain torch.nn.Module, got {type(net).__name__} (a Pyro program needs no BayesianNetwork)."
        )
    for name, module in net.named_modules():
        _check_module(name or type(module).__name__, module)
    for name, parameter in net.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"Parameter {name!r} of a lazy module has no shape yet; call net(x) once before.")
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ModelError(
                f"Parameter {name!r} has dtype {parameter.dtype}; a prior needs real floating-point numbers."
            )
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"Parameter {name!r} holds NaN or infinite values; initialise the network anew.")
    for name, buffer in net.named_buffers():
        if is_lazy(buffer):
            raise ModelError(f"Buffer {name!r} of a lazy module has no shape yet; call net(x) once before.")
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise ModelError(f"Buffer {name!r} holds NaN; set it to numbers.")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("The network has no parameter that requires grad, so there is nothing to put a prior on.")
    dtypes = sorted({str(parameter.dtype) for parameter in trained})
    if len(dtypes) > 1:
        raise ModelError(f"The parameters have several dtypes ({', '.join(dtypes)}); use net.float() or net.double().")
    return net


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        raise ModelError(
            f"{name} ({type(module).__name__}) normalises by the statistics of the batch, so a row's likelihood "
            "depends on the other rows. Use GroupNorm or LayerNorm, or net.eval() to fix its running statistics"
            + ("." if module.track_running_stats else " (this one keeps none: track_running_stats=False).")
        )
    if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
        raise ModelError(
            f"{name} ({type(module).__name__}) writes running statistics in training mode. Use net.eval(), or "
            "track_running_stats=False."
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            raise ModelError(
                f"{name} (Embedding) rescales its weight by max_norm; use max_norm=None (a prior bounds it)."
            )
        if module.scale_grad_by_freq:
            raise ModelError(f"{name} (Embedding) scales its gradient by frequency; use scale_grad_by_freq=False.")


def check_names(parameters: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Refuse a network whose parameter names collide with other sites of the program.

    Raises:
        ModelError: with the name.
    """
    taken = {"data", "y", *others}
    for name in parameters:
        if name in taken:
            raise ModelError(f"A parameter of the network is called {name!r}, the name of another site; rename it.")
    doubled = sorted({name for name in others if others.count(name) > 1 or name in ("data", "y")})
    if doubled:
        raise ModelError(f"Prior and likelihood both have a site called {doubled[0]!r}; rename that of Hierarchical.")
