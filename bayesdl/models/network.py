"""Any torch.nn.Module as a Pyro program: net, prior and likelihood are three separate choices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from bayesdl.errors import DataError, ModelError, ModelMismatch
from bayesdl.models import likelihoods, priors, rebuild
from bayesdl.models.initial import initial_values
from bayesdl.models.parameters import parameters_of
from bayesdl.models.refusals import check_names, check_net

PLATE = "data"
TARGET = "y"


class BayesianNetwork:
    """The Pyro program ``theta ~ prior; y_i ~ likelihood(net(x_i; theta))`` for i in plate "data".

    Latent sites are the network's parameters that require grad, under the names of ``net.named_parameters()`` (a tied
    parameter once), then the hyperparameters of prior and likelihood. Frozen parameters and buffers are constants. An
    embedding's padding row is held at zero: its site has one row less. Dropout is off (see ``with_dropout``).

    Args:
        net: any module that maps ``[N, ...]`` to outputs ``[N]`` or ``[N, K]``, row by row. It is copied.
        prior: a prior of ``bayesdl.priors``; ``Normal("fan_in")`` by default.
        likelihood: a likelihood of ``bayesdl.likelihoods``; ``Gaussian()`` by default.

    Attributes:
        net: the copy, in eval mode.
        prior: the prior.
        likelihood: the likelihood.
        sites: one ``ParameterInfo`` per latent parameter.

    Raises:
        ModelError: the network, or the prior for it, is refused; the message says why and what to do instead.
    """

    row_arguments: ClassVar[tuple[str, ...]] = ("x", "y")
    """Arguments with a row for each row of the data. No site depends on how many there are."""

    def __init__(
        self,
        net: nn.Module,
        prior: priors.Prior | None = None,
        likelihood: likelihoods.Likelihood | None = None,
    ) -> None:
        check_net(net)
        self.prior = priors.Normal() if prior is None else prior
        self.likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
        if not isinstance(self.prior, priors.Prior):
            raise ModelError(f"prior must be one of bayesdl.priors, such as Normal(1.0); got {self.prior!r}.")
        if not isinstance(self.likelihood, likelihoods.Likelihood):
            raise ModelError(f"likelihood must be one of bayesdl.likelihoods, as Gaussian(); got {self.likelihood!r}.")
        try:
            self.net = copy.deepcopy(net).eval()
        except RuntimeError as error:
            raise ModelError(
                f"The network cannot be copied ({error}). If it uses torch.nn.utils.weight_norm, use "
                "torch.nn.utils.parametrizations.weight_norm instead."
            ) from error
        self.sites = parameters_of(self.net)
        self.prior.check(self.sites)
        names = tuple(site.name for site in self.sites)
        check_names(names, (*self.prior.scale_names(self.sites), *self.likelihood.latent_names))
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.net.modules())
        self._attends = any(map(_may_attend, self.net.modules()))

    def __repr__(self) -> str:
        size = sum(site.shape.numel() for site in self.sites)
        return f"BayesianNetwork({size} parameters, prior={self.prior}, likelihood={self.likelihood})"

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type, in which everything is computed."""
        return self.sites[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and where everything is computed."""
        return next(self.net.parameters()).device

    @property
    def scales_y(self) -> bool:
        """Whether the target lives on the whole real line, so that fitting may standardise it."""
        return self.likelihood.scales_y

    @property
    def task(self) -> str:
        """The kind of data it is for: "regression" or "classification"."""
        return self.likelihood.task

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program.

        Args:
            x: inputs ``[N, ...]``.
            y: targets, observed at site "y"; without them they are sampled.

        Returns:
            The value at site "y".

        Raises:
            ModelError: outputs, likelihood and target do not fit together.
        """
        scales = self.prior.sample_scales(self.sites)
        parameters = {site.name: pyro.sample(site.name, self.prior.distribution(site, scales)) for site in self.sites}
        f = self.forward(parameters, x)
        latents = self.likelihood.latents(f)
        with pyro.plate(PLATE, x.shape[0]):
            distribution = self.likelihood.distribution(f, latents)
            observed = None if y is None else self.likelihood.target(y, distribution, f.dtype)
            value: Tensor = pyro.sample(TARGET, distribution, obs=observed)
        return value

    def forward(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's outputs ``[N]`` or ``[N, K]`` for given values of the sites.

        Args:
            parameters: values by site name.
            x: inputs ``[N, ...]``; floating-point ones are converted to the network's dtype.

        Raises:
            ModelError: the network returns something else than one tensor with a row per row of x, or writes a buffer.
        """
        inputs = x.to(self.dtype) if x.is_floating_point() else x
        values = {site.name: site.to_parameter(parameters[site.name]) for site in self.sites}
        buffers = {name: (buffer, buffer._version) for name, buffer in self.net.named_buffers()}

        def call(values: dict[str, Tensor]) -> Any:
            return functional_call(self.net, values, (inputs,))

        with _plain_attention() if self._attends else nullcontext():
            # The fused LSTM and GRU kernels have no batching rule; differentiation takes them apart, and vjp is lazy.
            outputs = vjp(call, values)[0] if self._recurrent else call(values)
        for name, buffer in self.net.named_buffers():
            if name not in buffers or buffer is not buffers[name][0] or buffer._version != buffers[name][1]:
                raise ModelError(
                    f"The network writes its buffer {name!r} while it runs, so its outputs depend on what ran before. "
                    "Take that out of forward, or switch it off in eval mode."
                )
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"The network returns a {type(outputs).__name__}, one tensor [N, K] is needed. Wrap it in a module "
                "that picks the tensor (for an LSTM: outputs[0][:, -1])."
            )
        if outputs.dim() == 0 or outputs.shape[0] != x.shape[0]:
            raise ModelError(
                f"The network returns shape {tuple(outputs.shape)} for {x.shape[0]} rows of x; the first dimension "
                "must be the row (batch_first=True for recurrent and attention layers)."
            )
        return outputs

    def check_data(self, x: Tensor, y: Tensor | None = None) -> None:
        """Run the network on the first rows and check the target, before anything is fitted.

        Raises:
            DataError: the network cannot take x, or y is not a target of the likelihood.
            ModelError: outputs and likelihood do not fit together.
        """
        if _rows(x) < 1:
            raise DataError(f"x must be a tensor [N, ...] with at least one row, got {_shape(x)}.")
        if y is not None and _rows(y) != x.shape[0]:
            raise DataError(f"y must be a tensor with a row for each of the {x.shape[0]} rows of x, got {_shape(y)}.")
        values = {site.name: site.to_site(dict(self.net.named_parameters())[site.name]) for site in self.sites}
        with torch.no_grad():
            try:
                f = self.forward(values, x[:2])
            except ModelError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise DataError(f"The network cannot take x of shape {_shape(x)}, dtype {x.dtype}: {error}") from error
            self.likelihood.distribution(f, {name: f.new_ones(()) for name in ("noise", "df")})
        if y is not None:
            self.likelihood.check_target(y, 1 if f.dim() == 1 else f.shape[1])

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh values of the parameter sites from the modules' own initialisation, for optimisers.

        Modules without ``reset_parameters`` keep the values they came with; hyperparameter sites are not included.
        """
        return initial_values(self.net, self.sites, generator)

    def to(self, target: torch.dtype | torch.device | str) -> BayesianNetwork:
        """The same model in another dtype or on another device."""
        return BayesianNetwork(copy.deepcopy(self.net).to(target), self.prior, self.likelihood)

    def with_dropout(self, active: bool = True) -> BayesianNetwork:
        """The same model with its dropout modules drawing masks (for training and MC dropout), or off.

        Nothing else changes its mode: normalising layers keep their fixed statistics.
        """
        other = copy.copy(self)
        other.net = copy.deepcopy(self.net)
        for module in other.net.modules():
            if isinstance(module, _DropoutNd):
                module.training = active
        return other

    def config(self) -> dict[str, Any]:
        """The model as JSON, without its constants.

        Raises:
            ModelRequired: it contains code of the user's own.
        """
        return {
            "net": rebuild.describe(self.net),
            "dtype": str(self.dtype).removeprefix("torch."),
            "frozen": [name for name, parameter in self.net.named_parameters() if not parameter.requires_grad],
            "prior": priors.to_config(self.prior),
            "likelihood": likelihoods.to_config(self.likelihood),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BayesianNetwork:
        """Build the model that ``config`` described; ``load_constants`` then gives it its frozen tensors.

        Raises:
            ModelRequired: a class that is not in the tables.
            FileError: the description is damaged.
        """
        net = rebuild.build_net(config)
        return cls(net, priors.from_config(config["prior"]), likelihoods.from_config(config["likelihood"]))

    def constants(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers by name: the state that is neither inferred nor in ``config``."""
        frozen = {name: p.detach() for name, p in self.net.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.net.named_buffers())}

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Set the frozen parameters and buffers.

        Raises:
            ModelMismatch: the names or shapes are not this model's.
        """
        own = self.constants()
        if set(own) != set(constants):
            raise ModelMismatch(f"The model's constants are {sorted(own)}, the file has {sorted(constants)}.")
        for name, tensor in own.items():
            if tensor.shape != constants[name].shape:
                raise ModelMismatch(
                    f"Constant {name!r} has shape {tuple(tensor.shape)}, the file has {tuple(constants[name].shape)}."
                )
        for name, tensor in own.items():
            tensor.copy_(constants[name])


def _may_attend(module: nn.Module) -> bool:
    """Attention layers, and modules of the user's own, which may call attention's functional form."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or not type(
        module
    ).__module__.startswith("torch.nn.")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no batching rules, and differ with and without grad."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _rows(value: object) -> int:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else -1


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
