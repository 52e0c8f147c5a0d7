"""The one place where a Pyro program becomes numbers: a batched, differentiable, unconstrained log density."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.func import vmap

from bayesdl._rng import generator
from bayesdl.density import checks, evaluator, program, sites, terms
from bayesdl.density.blocks import Step
from bayesdl.density.discovery import discover, first_rows, row_arguments, untouched
from bayesdl.density.evaluator import Evaluator, Execution, Wish
from bayesdl.density.gaussian_part import Coupling, GaussianPart
from bayesdl.density.program import Program
from bayesdl.density.sites import Site
from bayesdl.errors import BayesdlError, ModelError, NotFactorised, RowCoupling

Batch = Mapping[str, Any]
Target = Literal["posterior", "joint", "likelihood"]

CHUNK = 256
"""Chains or draws that the handlers evaluate at once where no gradient is taken."""


class LogDensity:
    r"""A Pyro program as a log density over flat unconstrained vectors ``z [..., D]``.

    With theta = T(z) the constrained latents, N rows in all and B in the batch,

        log_joint(theta) = log p(global) + (N/B) sum_i [log p(y_i | theta) / T_L + log p(local_i)]
        log_density(z)   = log_joint(theta) / T + log |det dT/dz|

    T is the temperature (1 = Bayes; T targets p(theta, y)^(1/T) in the constrained space, so the Jacobian is never
    tempered) and T_L the likelihood temperature. The factor N/B is taken from the batch's row count, here and nowhere
    else. The program runs under Pyro's handlers once; afterwards the recorded graph is replayed. Programs that cannot
    be recorded run the handlers, batched by ``vmap`` or, where control flow depends on values, one chain at a time.

    Attributes:
        sites: layout of the latent sites in z.
        dim: D, the number of unconstrained coordinates.
        n: rows N of the data plate, or None without one.
        observed: names of the observed sites in the data plate.
        row_names: arguments of the program with one entry per row.
        gradients: gradient evaluations so far, one per chain and call.
        execution: "compile", "replay", "handlers" or "loop"; settled by ``expect``, else by the first gradient.
        execution_note: why no faster way is gone, or empty.
        new_prior: what ``with_gaussian_prior`` put in the place of the program's prior, or None.
    """

    def __init__(
        self,
        model: Program,
        batch: Batch,
        *,
        data_plate: str = "data",
        temperature: float = 1.0,
        likelihood_temperature: float = 1.0,
        execution: Execution = "auto",
    ) -> None:
        """Discover the program's structure.

        Args:
            model: Pyro program, called as ``model(**batch)``.
            batch: all the data; tensors have the row dimension first.
            data_plate: name of the plate over rows.
            temperature: T.
            likelihood_temperature: T_L.
            execution: "auto" records if possible and compiles what ``expect`` finds worth it; the others force one way
                ("compile" falls back to "replay" where there is no compiler).

        Raises:
            ModelError: the program cannot be used, with the reason and what to write instead.
            DataError: observations lie outside the support of their distribution.
        """
        glance = first_rows(model, batch)
        found = discover(model, glance, data_plate)
        self.model = model
        self.batch: dict[str, Any] = dict(batch)
        self.sites: tuple[Site, ...] = found.sites
        self.observed = found.observed
        self.n = found.rows if glance is batch else len(batch[row_arguments(model)[0]])
        self.structure = found.structure
        self.temperature = float(temperature)
        self.likelihood_temperature = float(likelihood_temperature)
        self.dim = sum(site.size for site in found.sites)
        self.dtype, self.device = _dtype_and_device(found.example)
        self.execution: str = execution
        self.execution_note = ""
        self._asked = execution
        self.gradients = 0
        self.new_prior: tuple[Tensor, Tensor | Coupling] | None = None
        self._gaussian = GaussianPart.of(self.sites, self.dtype, self.device)
        self._prior_apart = False
        self._settled = False
        self._evaluators: dict[Any, Evaluator] = {}
        self._factors: dict[tuple[float, ...], Tensor] = {}
        self.row_names = tuple(
            name for name, value in batch.items() if isinstance(value, Tensor) and value.dim() and len(value) == self.n
        )
        self._glance = glance
        checks.refuse_own_subsample(glance, found)
        checks.refuse_random(model, glance, found)
        self._no_rows = checks.why_no_rows(found)
        self._no_batches = self._no_rows or checks.why_no_batches(model, glance, found, self.row_names)

    @property
    def glance(self) -> Batch | None:
        """A few rows, which tell one program from another; None for all, where they are few or hang together."""
        if not self.factorised or len(self._glance[self.row_names[0]]) == self.n:
            return None
        return {name: self._glance[name] for name in self.row_names}

    # -- coordinates -------------------------------------------------------------------------------------------

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values ``[..., *shape]`` by site name at ``z [..., D]``."""
        return sites.constrain(self.sites, z)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """``z [..., D]`` of constrained values ``[..., *shape]`` by site name.

        Raises:
            ModelError: names or shapes are not those of the sites.
        """
        return sites.unconstrain(self.sites, values).to(self.dtype)

    def log_abs_det(self, z: Tensor) -> Tensor:
        """Log |det dT/dz| at ``z [..., D]``, shape ``[...]``."""
        return sites.log_abs_det(self.sites, z)

    def prior_draws(self, n: int, seed: int = 0) -> Tensor:
        """``n`` draws from the prior, ``[n, D]``; runs the program n times, unless its prior was replaced.

        ``pyro.param`` coordinates keep their initial values.
        """
        if self.new_prior is not None:
            return self._gaussian.draws(n, generator(seed, "prior draws"))
        names = {site.name for site in self.sites}
        rows = []
        with torch.no_grad(), untouched(seed, "prior draws"), program.unchecked():
            for _ in range(n):
                nodes = program.run(self.model, self._glance, {}).nodes
                rows.append(self.unconstrain({k: v["value"] for k, v in nodes.items() if k in names}))
        return torch.stack(rows)

    # -- the prior as a Gaussian -------------------------------------------------------------------------------

    def gaussian_prior(self) -> tuple[Tensor, Tensor] | None:
        """(mean ``[D]``, sd ``[D]``) of the prior over z if it is an independent Gaussian, else None."""
        if self.new_prior is not None:
            mean, spread = self.new_prior
            return (mean, spread) if isinstance(spread, Tensor) else None
        if len(self._gaussian.names) < len(self.sites) or (self.structure.discrete and not self.structure.by_row):
            return None
        return self._gaussian.mean, 1.0 / self._gaussian.precision.sqrt()

    @property
    def prior_scale(self) -> Tensor:
        """``[D]``: the prior's sd, given all other coordinates, where it is Gaussian over z; 1 elsewhere."""
        precision = self._gaussian.precision
        return torch.where(precision > 0, precision, torch.ones_like(precision)).rsqrt()

    def with_gaussian_prior(self, mean: Tensor, spread: Tensor | Coupling) -> LogDensity:
        """The same likelihood under a Gaussian prior over z: learnt on other rows, or yesterday's posterior.

        Args:
            mean: ``[D]``.
            spread: standard deviations ``[D]`` of independent coordinates, or a covariance of any structure in the
                dtype of the density; its ``solve`` is recorded and compiled with the rest.

        Raises:
            ModelError: the program has local latents, parameters without a prior, or factors outside the data plate.
        """
        if (self.structure.discrete and not self.structure.by_row) or any(s.scope != "global" for s in self.sites):
            raise ModelError("Only a program whose latents are all global and continuous can change its prior.")
        other = copy.copy(self)
        names, mean = frozenset(site.name for site in self.sites), mean.to(self.dtype)
        if isinstance(spread, Tensor):
            spread = spread.to(self.dtype)
            other._gaussian = GaussianPart(names, mean, spread.square().reciprocal())
        else:
            other._gaussian = GaussianPart(names, mean, spread.precisions(), spread)
        other.new_prior = mean, spread
        # The likelihood's graphs stay; with T = 1 nothing else is needed beside the closed form.
        other._evaluators = {key: found for key, found in self._evaluators.items() if key[0] == "likelihood"}
        other._prior_apart = self.temperature == 1
        other._settled = False
        other.gradients = 0
        return other

    def with_batch(self, batch: Batch) -> LogDensity:
        """The same program over another data set of the same shapes; recorded graphs are shared."""
        other = copy.copy(self)
        other.batch, other.gradients = dict(batch), 0
        return other

    # -- values ------------------------------------------------------------------------------------------------

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density in the constrained space at ``z [..., D]``, shape ``[...]``; locals are not in it."""

        def rest(leaves: list[Tensor]) -> Any:
            return self._terms(leaves, self.batch).prior - self._jacobian(leaves, gaussian=True)

        return self._map(z, rest) + self._gaussian.log_prob(z)

    def log_likelihood(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log likelihood of every row, ``[..., N]``; discrete latents summed out, no temperature.

        Raises:
            NotFactorised: the program has no data plate, or its rows do not separate.
        """
        self.require_rows(whole=batch is None)
        rows = self.batch if batch is None else {**self.batch, **batch}
        return self._map(z, lambda leaves: self._terms(leaves, rows).rows)

    def log_density(self, z: Tensor, batch: Batch | None = None, *, target: Target = "posterior") -> Tensor:
        """The log density (see the class) at ``z [..., D]``, shape ``[...]``; ``target`` as in ``value_and_grad``."""
        rows, factors = self._rows_and_factors(batch, per_chain=False)
        rest = self._map(z, lambda leaves: self._target(leaves, rows, factors, target))
        return rest if target == "likelihood" else rest + self._gaussian.log_prob(z) * factors[1]

    def value_and_grad(
        self, z: Tensor, batch: Batch | None = None, *, target: Target = "posterior", per_chain: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log density and its gradient for all chains at once.

        Args:
            z: ``[C, D]``.
            batch: arguments of the program to use instead of its own: some rows, whose number B gives the factor N/B,
                or another data set of the same size.
            target: "posterior" (log density with Jacobian, for samplers and VI), "joint" (no Jacobian, for MAP), or
                "likelihood" (observed terms alone, for maximum likelihood).
            per_chain: the batch's tensors carry the chain dimension first, ``[C, B, ...]``: every chain has its own.

        Returns:
            ``(value [C], gradient [C, D])``, non-finite where the density is.

        Raises:
            NotFactorised: a mini-batch of a program whose rows do not separate.
        """
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ModelError(f"value_and_grad takes z [chains, {self.dim}]; got {tuple(z.shape)}.")
        rows, factors = self._rows_and_factors(batch, per_chain)
        self.gradients += len(z)
        own = frozenset(batch or ()) if per_chain else frozenset()
        recorded = self._recorded(target)
        with torch.no_grad():
            found, tensors = self._evaluator(z, rows, factors, recorded, own)
            value, gradient = found.function(z, factors, *tensors)
            if recorded == target:
                return value, gradient
            return self._gaussian.add(z, value, gradient, factors[1])

    def function(
        self, batch: Batch | None = None, *, target: Target | Literal["prior"] = "posterior"
    ) -> Callable[[Tensor], Tensor]:
        """The log density of one vector ``z [D]`` as a function that can be differentiated any number of times.

        Args:
            batch: as in ``value_and_grad``.
            target: as in ``value_and_grad``, or "prior": that of the constrained latents alone.
        """
        rows, factors = self._rows_and_factors(batch, per_chain=False)

        def one(z: Tensor) -> Tensor:
            leaves = sites.split(self.sites, z)
            with program.unchecked():
                if target == "prior":
                    rest = (self._terms(leaves, rows).prior - self._jacobian(leaves, gaussian=True)) * factors[1]
                else:
                    rest = self._target(leaves, rows, factors, target)
            return rest if target == "likelihood" else rest + self._gaussian.log_prob(z) * factors[1]

        return one

    @property
    def powers(self) -> tuple[float, float]:
        """(1/T, 1/(T T_L)): the powers of prior and likelihood in the target."""
        return 1.0 / self.temperature, 1.0 / (self.temperature * self.likelihood_temperature)

    def expect(
        self,
        calls: int,
        z: Tensor,
        batch: Batch | None = None,
        *,
        target: Target = "posterior",
        per_chain: bool = False,
        execution: str | None = None,
        fused: bool = False,
    ) -> str:
        """Announce ``calls`` evaluations like ``value_and_grad(z, batch, ...)``, and settle how they are done.

        A graph is compiled where that is forecast to save more time than it takes; the forecast counts operations and
        calls and looks at no clock, so the same run makes the same choice. Call it before the run, with tensors of the
        run's shapes; without it nothing is compiled.

        Args:
            calls: evaluations to come, each of all chains.
            z: ``[C, D]``, any point of the run.
            batch: as in ``value_and_grad``.
            target: as in ``value_and_grad``.
            per_chain: as in ``value_and_grad``.
            execution: the way to go whatever the forecast says; that of a run which is continued.
            fused: they come from within steps that are given to ``fused``: these are compiled, each when it is first
                used, and gradients asked for by themselves are replayed.

        Returns:
            ``execution``: the way that will be gone.
        """
        rows, factors = self._rows_and_factors(batch, per_chain)
        own = frozenset(batch or ()) if per_chain else frozenset()
        asked = self._asked if execution is None else cast(Execution, execution)
        recorded = target if fused else self._recorded(target)
        with torch.no_grad():
            found, _ = self._evaluator(z, rows, factors, recorded, own, Wish(asked, calls, fused))
        self.execution, self.execution_note, self._settled = found.way, found.note, True
        return self.execution

    def fused(
        self,
        step: Step,
        rows: Sequence[Tensor],
        shared: Sequence[Tensor] = (),
        batch: Batch | None = None,
        *,
        target: Target = "posterior",
        per_chain: bool = False,
    ) -> Callable[..., Sequence[Tensor]]:
        """A sampler's or optimiser's step as a function of its rows alone, with the gradients inside compiled along.

        Where ``expect(..., fused=True)`` found that compiling pays, everything that the step does becomes one piece of
        machine code, made for these shapes; elsewhere it is ``step`` itself.

        Args:
            step: ``(*rows, *shared, value_and_grad) -> results``, a pure function whose chains do not look at each
                other; equal steps share their machine code.
            rows: examples of its tensors with one entry per chain ``[C, ...]``, positions ``[C, D]`` first.
            shared: its tensors for all chains; fixed for the function that is returned.
            batch: as in ``value_and_grad``; its tensors must not change while the function is used.
            target: as in ``value_and_grad``.
            per_chain: as in ``value_and_grad``.

        Returns:
            ``(*rows) -> results``.
        """

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            return self.value_and_grad(z, batch, target=target, per_chain=per_chain)

        z = rows[0]
        tensors, factors = self._rows_and_factors(batch, per_chain)
        own = frozenset(batch or ()) if per_chain else frozenset()
        with torch.no_grad():
            found, data = self._evaluator(z, tensors, factors, target, own)
            machine = found.fused(step, rows, shared, (factors, *data))
            if machine is None:
                self.execution, self.execution_note = found.way, found.note
                return lambda *given: step(*given, *shared, value_and_grad)
            call, gradients = machine.bind(shared, (factors, *data)), machine.gradients * len(z)

        def counted(*given: Tensor) -> Sequence[Tensor]:
            self.gradients += gradients
            with torch.no_grad():
                return call(*given)

        return counted

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def factorised(self) -> bool:
        """Whether the program runs on any subset of its rows with one independent term per row."""
        return self._no_batches is None

    def require_rows(self, *, whole: bool = False) -> None:
        """Raise the reason why rows cannot be taken apart, if there is one.

        Args:
            whole: the terms of all rows are enough; the program need not run on part of them.

        Raises:
            NotFactorised: as said.
        """
        reason = self._no_rows if whole and not isinstance(self._no_batches, RowCoupling) else self._no_batches
        if reason is not None:
            raise reason

    def _recorded(self, target: Target) -> Target:
        """What a graph is recorded of: the likelihood alone, where a prior that was replaced is added beside it."""
        return "likelihood" if self._prior_apart and target == "posterior" else target

    def _terms(self, leaves: list[Tensor], batch: Batch) -> terms.Terms:
        values = {site.name: site.transform(leaf) for site, leaf in zip(self.sites, leaves, strict=True)}
        return terms.evaluate(self.model, batch, values, self.structure, self._gaussian.names)

    def _jacobian(self, leaves: list[Tensor], *, gaussian: bool | None = None) -> Tensor:
        """Log |det| over all sites, or over those whose prior is (not) in the Gaussian part."""
        total = leaves[0].new_zeros(())
        for site, leaf in zip(self.sites, leaves, strict=True):
            wanted = gaussian is None or gaussian == (site.name in self._gaussian.names)
            if wanted and not site.unbounded and site.scope != "param":  # a parameter has no density to transform
                total = total + site.transform.log_abs_det_jacobian(leaf, site.transform(leaf)).sum()
        return total

    def _target(self, leaves: list[Tensor], batch: Batch, factors: Tensor, target: Target) -> Tensor:
        """The target without the Gaussian part, which is added in closed form over the flat vector."""
        found = self._terms(leaves, batch)
        ratio, inverse_temperature, likelihood_power = factors.unbind()
        observed = found.outside if found.rows is None else found.outside + ratio * found.rows.sum()
        if target == "likelihood":
            return torch.as_tensor(observed) * likelihood_power * inverse_temperature
        local = found.local if isinstance(found.local, float) else ratio * found.local.sum()
        # The Gaussian part is a density of z; the prior of theta is that less the Jacobian, and T divides the latter.
        joint = found.prior + local + observed * likelihood_power - self._jacobian(leaves, gaussian=True)
        joint = joint * inverse_temperature
        return joint if target == "joint" else joint + self._jacobian(leaves)

    def _rows_and_factors(self, batch: Batch | None, per_chain: bool) -> tuple[dict[str, Any], Tensor]:
        ratio = 1.0
        rows = self.batch if batch is None else {**self.batch, **batch}
        counts = {rows[name].shape[1 if per_chain else 0] for name in self.row_names if name in (batch or ())}
        if counts - {self.n}:
            self.require_rows()
            if any(site.scope == "local" for site in self.sites):
                raise NotFactorised(
                    "Mini-batches need every continuous latent to be global; this program has latents inside the data "
                    "plate. Use a full-batch method."
                )
            ratio = float(self.n or 0) / counts.pop()
        numbers = (ratio, 1.0 / self.temperature, 1.0 / self.likelihood_temperature)
        factors = self._factors.get(numbers)
        if factors is None:
            factors = self._factors[numbers] = torch.tensor(numbers, dtype=self.dtype, device=self.device)
        return rows, factors

    def _map(self, z: Tensor, function: Callable[[list[Tensor]], Any]) -> Tensor:
        """Apply a function of one draw's leaves over the leading dimensions of z, under the handlers."""
        flat = z.reshape(-1, self.dim)

        def one(row: Tensor) -> Tensor:
            return torch.as_tensor(function(sites.split(self.sites, row)), dtype=self.dtype, device=self.device)

        with torch.no_grad(), program.unchecked():
            if self.execution == "loop":
                values = torch.stack([one(row) for row in flat])
            else:
                try:
                    values = vmap(one, chunk_size=CHUNK)(flat)
                except BayesdlError:
                    raise
                except Exception:  # vmap refuses value-dependent control flow with errors of many types
                    values = torch.stack([one(row) for row in flat])
        return values.reshape(z.shape[:-1] + values.shape[1:])

    def _evaluator(
        self,
        z: Tensor,
        rows: dict[str, Any],
        factors: Tensor,
        target: Target,
        own: frozenset[str],
        wish: Wish | None = None,
    ) -> tuple[Evaluator, list[Tensor]]:
        """The fastest way to evaluate that works, by shapes, and the batch's tensors for it.

        Settled on the first call with these shapes, unless later more calls are expected. ``own`` names the arguments
        that carry the chain dimension.
        """
        names = [name for name, value in rows.items() if isinstance(value, Tensor)]
        tensors = [rows[name] for name in names]
        shapes = [(t.shape, t.dtype, t.device) for t in tensors]
        key = (target, own, z.shape, z.dtype, _training(self.model), *names, *shapes)
        found = self._evaluators.get(key)
        if found is None or (wish is not None and wish.wants_another(found)):
            fixed = {name: value for name, value in rows.items() if name not in names}
            rows_of = tuple(0 if name in own else None for name in names)

            def one(leaves: list[Tensor], factors: Tensor, *tensors: Tensor) -> Tensor:
                return self._target(leaves, {**dict(zip(names, tensors, strict=True)), **fixed}, factors, target)

            gaussian = None if target == "likelihood" else self._gaussian
            wanted = Wish(self._asked) if wish is None else wish
            steady = all(rows[name].shape[1 if name in own else 0] == self.n for name in self.row_names)
            found = evaluator.build(one, self.sites, rows_of, gaussian, (z, factors, *tensors), wanted, steady=steady)
            self._evaluators[key] = found
            if not self._settled:
                self.execution, self.execution_note = found.way, found.note
        return found, tensors


def _training(model: Any) -> bool:
    return bool(getattr(model, "training", False))


def _dtype_and_device(example: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    dtype = torch.float32 if example else torch.get_default_dtype()
    for value in example.values():
        dtype = torch.promote_types(dtype, value.dtype)
    first = next(iter(example.values()), torch.empty(0))
    return dtype, first.device
