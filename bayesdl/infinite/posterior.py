"""The posterior over functions of a Gaussian process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, ClassVar

import gpytorch
import torch
from gpytorch import Module
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from bayesdl._rng import derive_seed, generator
from bayesdl.errors import MethodError, ModelMismatch, ModelRequired
from bayesdl.infinite import structure
from bayesdl.infinite.conditioned import Conditioned, Exact, Inducing, Iterative
from bayesdl.infinite.divergence import kl_of
from bayesdl.infinite.variational import normal_points
from bayesdl.models.likelihoods import Bernoulli, Gaussian
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.prediction import GaussianPrediction, Prediction
from bayesdl.posterior.problem import Problem

ROWS = 1024  # new rows handled at once where the caller gives no batch size
JOINT = 5000  # most rows of one joint draw, whose covariance is factored
CELLS = 2**22  # draws times rows times functions of a mixture that are held at once


class GPPosterior(Posterior):
    """A Gaussian process conditioned on data: exactly for Gaussian noise, variationally for classes.

    It knows functions, not weights: ``predict`` and ``functions`` work, ``draws`` raises. Everything is computed in
    float64 on the CPU. The sites ``a``, ``b`` are those of ``bayesdl.infinite.sites``.

    Attributes:
        x: training inputs in model units, ``[n, d]``.
        a: ``[C, n]`` for C latent functions.
        b: ``[C, n]``.
        noise: standard deviation of the Gaussian noise in model units; None for classes.
        inducing: ``[m, d]`` inducing points; None if the posterior is that of all rows.
        kernel: the GPyTorch kernel; None if it is the user's code and the posterior was loaded without it.
        mean: the GPyTorch mean; None likewise.
        info: beside what every method reports: "log_evidence" and whether it is "exact" or a "lower bound",
            "hyperparameters", "noise", "converged".
    """

    kind: ClassVar[str] = "gp"

    def __init__(
        self, problem: Problem | None, kernel: Kernel | None, mean: Module | None,
        x: Tensor, a: Tensor, b: Tensor, noise: float | None, info: dict[str, Any], *,
        inducing: Tensor | None = None, weights: Tensor | None = None, ready: Conditioned | None = None,
    ) -> None:  # fmt: skip
        super().__init__(problem, info)
        self.kernel, self.mean = kernel, mean
        self.x, self.a, self.b, self.noise = x.detach(), a.detach(), b.detach(), noise
        self.inducing, self._weights = inducing, weights
        self._state: dict[str, Tensor] = {}
        if ready is not None:
            self._conditioned = ready

    def __repr__(self) -> str:
        """Method, rows and latent functions."""
        return f"GPPosterior({self.info.get('method', '?')}, {len(self.x)} rows, {len(self.a)} latent function(s))"

    @property
    def log_evidence(self) -> float:
        """The log evidence log p(y | x) in nats, of targets in raw units; for classes its variational lower bound."""
        return float(self.info["log_evidence"])

    def unconstrained_draws(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Refuse: there are no weights to draw.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "A Gaussian process is a posterior over functions; it has no weights to draw. Use functions(x, n) for "
            "draws of the latent function, or predict(x)."
        )

    def predict(
        self, x: Any, *, batch_size: int | None = None, max_draws: int = 1000, site: str | None = None, seed: int = 0
    ) -> Prediction:
        """Return the predictive distribution at raw inputs.

        For a Gaussian target it is exact: ``mean = k^T (K + s^2)^-1 y``, epistemic variance
        ``k(x, x) - k^T (K + s^2)^-1 k``, aleatoric variance ``s^2``. For classes and for several targets it is a
        mixture over ``max_draws`` quasi-random draws of the latent functions: right for each row by itself, but not
        for the dependence between rows, for which there is ``functions``.

        Args:
            x: inputs ``[N, ...]`` in the data's units.
            batch_size: rows per pass; a pass needs C n batch_size numbers. It does not change the result.
            max_draws: components of the mixture.
            site: must be the target's site, if given.
            seed: of the quasi-random points, where there are several latent functions.

        Raises:
            DataError: inputs that do not fit the model.
            ModelRequired: loaded without its model or its kernel.

        Cost: O(C n^2 N).
        """
        if max_draws < 1:
            raise MethodError(f"max_draws={max_draws} must be at least 1.")
        if site is not None and site != self.problem.target:
            raise MethodError(f"site={site!r}: a Gaussian process predicts its target {self.problem.target!r} only.")
        mean, variance = self._moments(self._inputs(x), batch_size)
        scale, shift = float(self.problem.scaler.y_scale), float(self.problem.scaler.y_mean)
        if self.noise is not None and len(mean) == 1:
            return GaussianPrediction(mean[0], variance[0], self.noise**2, shift=shift, scale=scale)
        # Only means and variances are kept; the draws are made again, block by block, for each statistic.
        size = max(1, CELLS // (max_draws * len(mean)))
        blocks = [
            (m.shape[1], partial(self._at_draws, m, v, max_draws, seed))
            for m, v in zip(mean.split(size, 1), variance.split(size, 1), strict=True)
        ]
        return Prediction.stream(blocks, shift=shift, scale=scale)

    def log_likelihood(self, x: Any, y: Any = None, *, max_draws: int = 1000, seed: int = 0) -> Tensor:
        """Return the log likelihood of every row under draws of its latent functions, ``[S, N]``, in raw units.

        The draws are those of ``predict``.
        """
        batch = self.problem.inputs(x) if y is None else self.problem.labelled(x, y)
        name = self.problem.y_name or self.problem.target
        target = batch[name].to("cpu", torch.float64)
        mean, variance = self._moments(self._flat(batch), None)
        values: Tensor = self._at_draws(mean, variance, max_draws, seed).log_prob(target)
        return values - target[0].numel() * float(self.problem.scaler.y_scale.log())

    def sampler(self, x: Any) -> Callable[[int, int], Prediction]:
        """See the base class: here each draw is one of every row's latent functions, by independent normal points.

        The same points serve every row, so draws are right row by row, which is all that an average over rows needs.
        """
        mean, variance = self._moments(self._inputs(x), None)
        scaler = self.problem.scaler

        def sample(draws: int, seed: int) -> Prediction:
            source = generator(seed, "GP", "sampler")
            points = torch.randn(draws, len(mean), generator=source, dtype=torch.float64)
            distribution = self._at_points(mean, variance, points)
            return Prediction(distribution, shift=float(scaler.y_mean), scale=float(scaler.y_scale))

        return sample

    def kl(self) -> float | None:
        """KL(posterior process || prior process) in nats; None where the rows of a bound chose kernel or noise.

        With ``prior_rows`` kernel and noise were fitted on those alone, and the prior of a regression is the process
        conditioned on them; for classes, whose sites depend on all rows, it is the process before any.
        """
        parts = self.kl_parts()
        return None if parts is None else sum(parts.values())

    def kl_parts(self) -> dict[str, float] | None:
        """The divergence of each latent function."""
        if not self._fixed:
            return None
        with torch.no_grad():
            covariance = self._modules()[0](self.x).to_dense()
        return kl_of(covariance, self.a, self.b, self._early())

    def learnt_prior(self) -> GPPosterior | None:
        """The process conditioned on the rows of the prior."""
        early = self._early()
        if early is None:
            return None
        kernel, mean = self._modules()
        a, b = self.a[:, early], self.b[:, early]
        return GPPosterior(self._problem, kernel, mean, self.x[early], a, b, self.noise, self.info)

    @property
    def _fixed(self) -> bool:
        """Whether kernel and noise were stated or fitted on the prior's rows alone, and the sites lie at the rows."""
        exact = self.inducing is None and self.info.get("solver") != "cg"
        return exact and self.info.get("hyperparameters_from", "all rows") != "all rows"

    def _early(self) -> Tensor | None:
        """``[n]`` bool: the rows of a regression that the prior of a certificate is conditioned on; None without."""
        problem = self.problem
        if self.noise is None or not self._fixed or problem.rows is None or problem.prior_rows is None:
            return None
        among = problem.rows.isin(problem.prior_rows)
        return among if bool(among.any()) and not bool(among.all()) else None

    def why_no_kl(self) -> str:
        """See the base class."""
        return (
            "knows no KL divergence from a prior fixed in advance, because kernel or noise were fitted to the same "
            "rows (fit with prior_rows=0.5, or state the noise and keep fit_kernel=False), or because inducing points "
            "or iterations stand for the process"
        )

    def functions(self, x: Any, n: int = 100, seed: int = 0) -> Tensor:
        """Return joint draws of the latent function without noise, ``[n, N]``, or ``[n, N, C]`` with C functions.

        In raw units for regression; logits for classes. The covariance is factored through its eigenvalues, those
        that rounding made negative set to zero: it may be singular, and no jitter is added.

        Args:
            x: inputs ``[N, ...]`` in the data's units.
            n: number of draws.
            seed: the draws are a function of it.

        Cost: O(C (n_train^2 N + N^3)).
        """
        if n < 1:
            raise MethodError(f"functions(n={n}): n must be at least 1.")
        rows = self._inputs(x)
        if len(rows) > JOINT:
            raise MethodError(
                f"functions(x): a joint draw at {len(rows)} rows is too large; give at most {JOINT} rows."
            )
        prior_mean = self._modules()[1]
        with torch.no_grad():
            g, covariance = self._conditioned.joint(rows)
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
            source = generator(seed, "GP", "functions")
            noise = torch.randn(n, *covariance.shape[:-1], 1, generator=source, dtype=torch.float64)
            draws = self._latent(prior_mean(rows) + g + (root @ noise).squeeze(-1))
        scaler = self.problem.scaler
        result = draws * float(scaler.y_scale) + float(scaler.y_mean) if self.noise is not None else draws
        return result.squeeze(1) if result.shape[1] == 1 else result.movedim(1, -1)

    def to_gpytorch(self) -> gpytorch.models.ExactGP:
        """Return the regression as a GPyTorch ``ExactGP`` with its likelihood, in model units, in evaluation mode.

        Raises:
            MethodError: for classes or several targets, which are no ``ExactGP``.
        """
        if self.noise is None or len(self.a) > 1:
            raise MethodError("Only a regression of one target is an ExactGP.")
        kernel, mean = (copy.deepcopy(module) for module in self._modules())
        positive = gpytorch.constraints.Positive(transform=torch.exp, inv_transform=torch.log)
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=positive).double()
        likelihood.noise = torch.tensor(self.noise**2, dtype=torch.float64)
        with torch.no_grad():
            y = self.a[0] / self.b[0] + mean(self.x)
        return _ExactGP(self.x, y, likelihood, kernel, mean).double().eval()

    def with_kernel(self, kernel: Kernel, mean: Module | None = None) -> GPPosterior:
        """Return the posterior made whole with a kernel of the user's own code, after ``bayesdl.load``.

        The stored hyperparameters are put into copies of the modules.

        Raises:
            ModelMismatch: the modules have other parameters than the stored ones.
        """
        mean = gpytorch.means.ZeroMean() if mean is None else mean
        given = {"kernel": copy.deepcopy(kernel).double(), "mean": copy.deepcopy(mean).double()}
        for name, module in given.items():
            try:
                module.load_state_dict(_part(self._state, name))
            except RuntimeError as error:
                raise ModelMismatch(f"The {name} is not the one that was fitted: {error}") from None
        return GPPosterior(self._problem, given["kernel"], given["mean"], self.x, self.a, self.b, self.noise, self.info,
                           inducing=self.inducing, weights=self._weights)  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Training inputs, sites, and the state of kernel and mean."""
        kernel, mean = self._modules()
        parts = {f"{name}/{key}": value for name, module in (("kernel", kernel), ("mean", mean))
                 for key, value in module.state_dict().items()}  # fmt: skip
        if self.inducing is not None:
            parts["inducing"] = self.inducing
        if self.info.get("solver") == "cg":
            conditioned = self.__dict__.get("_conditioned")
            parts["weights"] = self._weights if conditioned is None else conditioned.weights
        return {"x": self.x, "a": self.a, "b": self.b, **parts}

    @classmethod
    def restore(cls, problem: Problem | None, tensors: dict[str, Tensor], info: dict[str, Any]) -> GPPosterior:
        """Rebuild what ``tensors`` wrote.

        A kernel that is code comes back from the model's network where it is of that, else through ``with_kernel``.
        """
        whole = cls(problem, None, None, tensors["x"], tensors["a"], tensors["b"], info["noise"], info,
                    inducing=tensors.get("inducing"), weights=tensors.get("weights"))  # fmt: skip
        whole._state = {name: value for name, value in tensors.items() if "/" in name}
        if info["structure"] is None:
            if problem is None or info["method"] != "NNGP":
                return whole
            settings, rows = info["settings"], problem.batch[problem.x_name or "x"]
            return whole.with_kernel(structure.of_model(problem.model, rows, settings["w_std"], settings["b_std"]))
        return whole.with_kernel(*(structure.from_json(info["structure"][name]) for name in ("kernel", "mean")))

    def _modules(self) -> tuple[Kernel, Module]:
        if self.kernel is None or self.mean is None:
            raise ModelRequired(
                "The kernel of this Gaussian process is code that a file cannot hold: make the posterior whole with "
                "posterior.with_kernel(kernel, mean)."
            )
        return self.kernel, self.mean

    @cached_property
    def _conditioned(self) -> Conditioned:
        parts = (self._modules()[0], self.x, self.a, self.b)
        if self.inducing is not None:
            return Inducing(*parts, self.inducing)
        if self.info.get("solver") == "cg":
            return Iterative(*parts, weights=self._weights, memory=self.info["settings"]["memory"])
        return Exact(*parts)

    def _inputs(self, x: Any) -> Tensor:
        return self._flat(self.problem.inputs(x))

    def _flat(self, batch: dict[str, Any]) -> Tensor:
        assert self.problem.x_name is not None
        return flat(batch[self.problem.x_name])

    def _moments(self, rows: Tensor, batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Means and variances of the latent functions, ``[C, N]``."""
        prior_mean = self._modules()[1]
        size = min(ROWS, self._conditioned.rows) if batch_size is None else batch_size
        if size < 1:
            raise MethodError(f"batch_size={batch_size} must be at least 1.")
        parts = []
        with torch.no_grad():
            for part in rows.split(size):
                g, variance = self._conditioned.moments(part)
                parts.append((prior_mean(part) + g, variance))
        means, variances = zip(*parts, strict=True)
        return torch.cat(means, -1), torch.cat(variances, -1)

    def _latent(self, f: Tensor) -> Tensor:
        """Latent functions ``[S, C, N]``; of two classes, where each has one, the difference, a logit ``[S, 1, N]``."""
        binary = isinstance(self.problem.model.likelihood, Bernoulli) and f.shape[1] == 2
        return f[:, 1:] - f[:, :1] if binary else f

    def _at_draws(self, mean: Tensor, variance: Tensor, draws: int, seed: int) -> Distribution:
        """The target's distribution at draws of the latent functions with moments ``[C, N]``, batch shape ``[S, N]``.

        The same standard normal points serve every row, so that a row's prediction does not depend on its batch.
        """
        points = normal_points(draws, len(mean), derive_seed(seed, "GP", "predict") % 2**31)
        return self._at_points(mean, variance, points)

    def _at_points(self, mean: Tensor, variance: Tensor, points: Tensor) -> Distribution:
        """The target's distribution at latent functions ``mean + sd * point`` for points ``[S, C]``."""
        f = self._latent((mean.T + variance.T.sqrt() * points.unsqueeze(1)).mT).mT
        single = f.squeeze(-1) if f.shape[-1] == 1 else f
        likelihood = self.problem.model.likelihood
        if isinstance(likelihood, Gaussian):
            normal = Normal(single, torch.full_like(single, self.noise or 0.0), validate_args=False)
            return normal if single.dim() == 2 else Independent(normal, 1, validate_args=False)
        if isinstance(likelihood, Bernoulli):
            return torch.distributions.Bernoulli(logits=single, validate_args=False)
        return Categorical(logits=f, validate_args=False)


class _ExactGP(gpytorch.models.ExactGP):
    """Kernel and mean as GPyTorch's own model."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: Module, kernel: Kernel, mean: Module) -> None:
        super().__init__(x, y, likelihood)
        self.covar_module, self.mean_module = kernel, mean

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The prior at x ``[N, d]``."""
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def flat(x: Tensor) -> Tensor:
    """Return inputs ``[N, ...]`` as rows ``[N, d]`` in float64 on the CPU."""
    return x.detach().to("cpu", torch.float64).reshape(len(x), -1)


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
