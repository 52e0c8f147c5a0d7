"""One look at a program before anything is computed: its sites, its data plate, and what would go wrong later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, LogNormal, Normal
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint
from torch.distributions.transforms import ExpTransform, Transform

from bayesdl import _rng
from bayesdl.density import program
from bayesdl.density.program import Message, Program, Trace
from bayesdl.density.sites import Site
from bayesdl.density.terms import Structure, refuse_explosion
from bayesdl.errors import BayesdlError, DataError, DynamicSupport, ModelError

GLANCE = 256
"""Rows of a network's data that show what the program is."""


@dataclass(frozen=True)
class Discovery:
    """What is known of a program after it ran twice on prior draws.

    Attributes:
        sites: continuous latent and ``pyro.param`` sites, in program order.
        structure: data plate and discrete latents.
        rows: number of rows N of the data plate, or None without one.
        observed: observed sites in the data plate, in program order.
        example: constrained values of one prior draw.
    """

    sites: tuple[Site, ...]
    structure: Structure
    rows: int | None
    observed: tuple[str, ...]
    example: dict[str, Tensor]


def row_arguments(model: Program) -> tuple[str, ...]:
    """Arguments that a network says to have a row for each row of the data; of other programs it is not known."""
    names: tuple[str, ...] = getattr(model, "row_arguments", ())
    return names


def first_rows(model: Program, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """What discovery runs on: some rows, where a network says which arguments have them, so that memory is bounded."""
    names = row_arguments(model)
    if not names or len(batch[names[0]]) <= GLANCE:
        return batch
    return {name: value[:GLANCE] if name in names else value for name, value in batch.items()}


def discover(model: Program, batch: Mapping[str, Any], plate: str) -> Discovery:
    """Run the program on two prior draws, with all checks on, and read off its structure.

    Raises:
        ModelError: the program cannot be used; the message says what to write instead.
        DynamicSupport: the support of a site moves with another site's value.
        DataError: observed values lie outside their support.
    """
    first, second = prior_trace(model, batch, 0), prior_trace(model, batch, 1)
    latents = _latent_names(first)
    if latents != _latent_names(second):
        raise ModelError(
            "The program has different latent sites on two prior draws; bayesdl needs the same sites every time. "
            f"Only sometimes present: {sorted(set(latents) ^ set(_latent_names(second)))}."
        )
    discrete = tuple(n for n in latents if program.is_discrete_latent(first.nodes[n]))
    _refuse_modules(first)
    _refuse_markov(first, discrete)
    refuse_explosion(first, list(discrete), plate)
    rows = _check_observed(first, plate, len(discrete) > 0)
    structure = _structure(first, plate, discrete)
    sites: list[Site] = []
    start = 0
    for name in latents:
        if name in discrete:
            continue
        site = _latent(first.nodes[name], second.nodes[name], start, plate)
        if discrete and not structure.by_row:
            # Both draws may have the same discrete values by chance, so they do not show what depends on these.
            site = replace(site, gaussian=None)
        sites.append(site)
        start = site.stop
    for node in first.nodes.values():
        if node["type"] == "param":
            site = _param(node, start)
            sites.append(site)
            start = site.stop
    if not sites:
        raise ModelError("The program has no continuous latent sites and no parameters: there is nothing to infer.")
    observed = tuple(n for n, s in first.nodes.items() if _is_data(s) and program.plate_frame(s, plate) is not None)
    example = {site.name: first.nodes[site.name]["value"].detach() for site in sites}
    return Discovery(tuple(sites), structure, rows, observed, example)


class _DetachParameters(Messenger):
    """Takes ``pyro.param`` sites out of the graph, so that what still requires gradients is no site at all."""

    def _pyro_post_param(self, msg: Message) -> None:
        msg["value"] = msg["value"].detach()


@contextmanager
def untouched(seed: int, *purpose: str) -> Iterator[None]:
    """Run a program with seeded generators and an empty parameter store; both return to what they were."""
    with _rng.isolated(seed, *purpose), pyro.get_param_store().scope():
        yield


def prior_trace(model: Program, batch: Mapping[str, Any], seed: int) -> Trace:
    """A trace of the program on one prior draw, with validation on.

    The global generators and Pyro's parameter store are left as they were found.
    """
    try:
        with untouched(seed, "discovery"), pyro.validation_enabled(True), _DetachParameters():
            trace = poutine.trace(model).get_trace(**batch)
            _compute_log_probs(trace)
            return trace
    except BayesdlError:
        raise
    except NotImplementedError as error:
        raise ModelError(
            f"A site of the program cannot be sampled ({error}). Use a proper prior, for example a "
            "wide Normal instead of ImproperUniform: discovery runs the program once."
        ) from error


def _compute_log_probs(trace: Trace) -> None:
    for site in trace.nodes.values():
        if not program.is_sample(site):
            continue
        try:
            site["plain_log_prob"] = site["fn"].log_prob(site["value"])
        except ValueError as error:
            if site["is_observed"]:
                raise DataError(
                    f"Observed site {site['name']!r}: the data do not fit its distribution "
                    f"{type(site['fn']).__name__}. {error}"
                ) from error
            raise


def _latent_names(trace: Trace) -> list[str]:
    return [name for name, site in trace.nodes.items() if program.is_latent(site)]


def _is_data(site: Message) -> bool:
    return program.has_density(site) and site["is_observed"]


def _check_observed(trace: Trace, plate: str, discrete: bool) -> int | None:
    """Check the shapes inside the data plate and that nothing trainable hides in the program; return N."""
    rows: int | None = None
    for name, site in trace.nodes.items():
        if not program.is_sample(site):
            continue
        frame = program.plate_frame(site, plate)
        if frame is not None:
            if not frame.vectorized:
                raise ModelError(
                    f"The data plate {plate!r} is a sequential loop; write `with pyro.plate({plate!r}, n):` so that "
                    "all rows are one tensor operation."
                )
            if rows is not None and rows != frame.size:
                raise ModelError(f"The data plate {plate!r} appears with {rows} and with {frame.size} rows.")
            rows = int(frame.size)
        if not _is_data(site):
            continue
        log_probability = site["plain_log_prob"]
        expected = _plate_shape(site)
        if not discrete and tuple(log_probability.shape) != expected:
            raise ModelError(
                f"Observed site {name!r}: its log probability has shape {tuple(log_probability.shape)}, its plates say "
                f"{expected}. Usually an observation of shape [N, 1] met a mean of shape [N]: squeeze one of them, or "
                "declare the last dimension an event with .to_event(1)."
            )
        if log_probability.requires_grad:
            raise ModelError(
                f"Observed site {name!r} depends on tensors that require gradients but are no sites of the program "
                "(the parameters of an nn.Module that is called inside it, perhaps): nothing would ever fit them. Use "
                "bayesdl.BayesianNetwork, give them priors with pyro.sample, or declare them with pyro.param."
            )
    return rows


def _plate_shape(site: Message) -> tuple[int, ...]:
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    depth = max((-frame.dim for frame in frames), default=0)
    shape = [1] * depth
    for frame in frames:
        shape[frame.dim] = int(frame.size)
    return tuple(shape)


def _structure(trace: Trace, plate: str, discrete: tuple[str, ...]) -> Structure:
    nesting = max(
        (
            -frame.dim
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ),
        default=0,
    )
    by_row = all([frame.name for frame in trace.nodes[name]["cond_indep_stack"]] == [plate] for name in discrete)
    return Structure(plate, nesting, discrete, by_row)


def _refuse_modules(trace: Trace) -> None:
    for name, node in trace.nodes.items():
        if node["type"] == "param" and "$$$" in name:
            raise ModelError(
                f"pyro.module (parameter {name!r}) is not supported: under substituted values its gradient is silently "
                "zero. Use bayesdl.BayesianNetwork for a network with a prior, or pyro.param for single parameters."
            )


def _refuse_markov(trace: Trace, discrete: tuple[str, ...]) -> None:
    for name in discrete:
        if trace.nodes[name]["infer"].get("_markov_depth", 0) > 0:
            raise ModelError(
                f"Discrete site {name!r} stands in pyro.markov, whose recycled dimensions are not summed out here. "
                "Sum it out by hand, by the forward algorithm."
            )


def _latent(first: Message, second: Message, start: int, plate: str) -> Site:
    name, distribution = first["name"], first["fn"]
    support = plain(name, distribution.support)
    if support.is_discrete:
        raise ModelError(
            f"Site {name!r} ({type(distribution).__name__}) is discrete with infinitely many values; it cannot be "
            "summed out. Sum it out by hand, or use a continuous relaxation."
        )
    if not same_support(support, plain(name, second["fn"].support)):
        raise DynamicSupport(
            f"The support of site {name!r} depends on another site's value. Sample a standardised variable with a "
            "fixed support and transform it, for example u ~ Uniform(0, 1) and a + u instead of Uniform(a, a + 1)."
        )
    if first["value"].shape != second["value"].shape:
        raise ModelError(f"Site {name!r} has a different shape on two prior draws.")
    transform = bijection(support)
    value = first["value"].detach()
    frame = program.plate_frame(first, plate)
    return Site(
        name=name,
        shape=value.shape,
        unconstrained_shape=transform.inv(value).shape,
        start=start,
        scope="global" if frame is None else "local",
        transform=transform,
        support=str(support),
        unbounded=is_real(support),
        gaussian=_gaussian(first, second, value.shape),
    )


def _param(node: Message, start: int) -> Site:
    name = node["name"]
    constraint = node["kwargs"].get("constraint", constraints.real)
    transform = bijection(constraint)
    value = node["value"].detach()
    shape = transform.inv(value).shape
    return Site(name, value.shape, shape, start, "param", transform, str(constraint), is_real(constraint))


def is_real(support: Any) -> bool:
    """Whether a support is all of the reals, in any number of dimensions."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def plain(name: str, support: Any) -> Any:
    """The support of a mixture is that of its components, whose dimension has no part in a value.

    Raises:
        ModelError: every component of the site has bounds of its own.
    """
    if isinstance(support, constraints.independent):
        inner = plain(name, support.base_constraint)
        same = inner is support.base_constraint
        return support if same else constraints.independent(inner, support.reinterpreted_batch_ndims)
    if isinstance(support, MixtureSameFamilyConstraint):
        inner = plain(name, support.base_constraint)
        if any(isinstance(value, Tensor) and value.dim() for value in vars(inner).values()):
            raise ModelError(
                f"The components of the mixture at site {name!r} have different supports, so its density jumps inside "
                "its support. Use components with one support."
            )
        return inner
    return support


def bijection(support: Any) -> Transform:
    """The bijection from the reals; exp for the positive numbers, without torch's shift by a bound of zero.

    Raises:
        ModelError: there is none.
    """
    if isinstance(support, constraints.greater_than | constraints.greater_than_eq) and support.lower_bound == 0:
        return ExpTransform()
    try:
        transform: Transform = biject_to(support)
    except NotImplementedError as error:
        raise ModelError(
            f"No map from the reals to the support {support} is known, so nothing can be fitted there. Sample a "
            "variable with a common support and transform it, or register one with torch.distributions.biject_to."
        ) from error
    return transform


def _gaussian(first: Message, second: Message, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """Mean and sd of the prior in the unconstrained coordinate, if it is an independent Gaussian with constants."""
    parameters = [_normal_parameters(message) for message in (first, second)]
    if parameters[0] is None or parameters[1] is None:
        return None
    (mean, sd), (mean_again, sd_again) = parameters[0], parameters[1]
    if not (torch.equal(mean, mean_again) and torch.equal(sd, sd_again)):
        return None
    return mean.expand(shape).detach(), sd.expand(shape).detach()


def _normal_parameters(message: Message) -> tuple[Tensor, Tensor] | None:
    distribution = message["fn"]
    if message["mask"] is not None or not _is_one(message["scale"]):
        return None
    while isinstance(distribution, Independent | torch.distributions.Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, Normal | LogNormal):
        return distribution.loc, distribution.scale
    return None


def _is_one(scale: float | Tensor) -> bool:
    return float(scale) == 1.0


def same_support(left: Any, right: Any) -> bool:
    """Whether two constraints are the same, bounds included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.shape == right.shape and bool((left == right).all())
    if isinstance(left, constraints.Constraint):
        keys = {k for k in set(vars(left)) | set(vars(right)) if not callable(vars(left).get(k))}
        return all(same_support(vars(left).get(k), vars(right).get(k)) for k in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_support, left, right))
    return bool(left == right)
