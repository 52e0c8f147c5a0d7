"""Exact Gaussian-process regression: one step of the hyperparameters, beside GPyTorch.

    python benchmarks/gp_regression.py

Three ways to the log evidence and its gradient, with the same kernel module, the same Adam (rate 0.05) and the same
start: bayesdl's closed form in float64, GPyTorch as it comes (above 800 rows conjugate gradients and stochastic
Lanczos quadrature) and GPyTorch with the Cholesky factorisation forced, both in float64. In a round each takes one step
after the other; a ratio is the median over the rounds of a step's processor time in units of bayesdl's, one thread.
NLPD is the mean negative log predictive density of 500 test rows after the last round, each way predicting with the
hyperparameters that it found. Data: ten normal inputs, y = sin(x1) + 0.3 x2 x3 and noise of 0.2. Kernels: a Gaussian
one with a scale and one length, and the NNGP of three hidden relu layers (eight variances).

Every finished size is a line of ``gp_regression.jsonl``; a second run goes on where the first stopped, and ``--table``
writes gp_regression.md from what is in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesdl.infinite import NNGPKernel, fully_connected
from bayesdl.infinite.conditioned import Exact
from bayesdl.infinite.evidence import Evidence, Process

sys.path.insert(0, str(Path(__file__).parent / "comparison"))
from ledger import append, markdown, preface, read

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "gp_regression.jsonl", HERE / "gp_regression.md"
NOISE = 0.5  # standard deviation at the start
RATE = 0.05
KERNELS: dict[str, Callable[[], Kernel]] = {
    "Gaussian": lambda: gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double(),
    "NNGP": lambda: NNGPKernel(fully_connected(3, "relu", 1.4, 0.3), dtype=torch.float64),
}


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 5000])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        done = {(r["kernel"], r["n"]) for r in read(RESULTS)}
        for n in options.rows:
            for kernel in options.kernels:
                if (kernel, n) not in done:
                    append(RESULTS, one(kernel, n, options.rounds))
    TABLE.write_text(table(read(RESULTS)))
    print(TABLE.read_text())


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, 10]`` and targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=g, dtype=torch.float64)
    return x, torch.sin(x[:, 0]) + 0.3 * x[:, 1] * x[:, 2] + 0.2 * torch.randn(n, generator=g, dtype=torch.float64)


class Ours:
    """bayesdl's evidence under Adam."""

    def __init__(self, kernel: Kernel, x: Tensor, y: Tensor) -> None:
        self.process = Process(kernel, gpytorch.means.ZeroMean(), x, fitted=True)
        self.objective = Evidence(self.process, y.unsqueeze(0), None, None)
        log_noise = torch.tensor([NOISE], dtype=torch.float64).log()
        self.z = torch.cat([self.process.vector, log_noise]).requires_grad_()
        self.adam = torch.optim.Adam([self.z], lr=RATE)

    def step(self) -> None:
        """One step; Adam divides by the gradient's size, so that the sum over rows may stand for the mean."""
        _, gradient, _ = self.objective.evaluate(self.z.detach(), {})
        self.z.grad = -gradient / len(self.process.x)
        self.adam.step()

    def density(self, x: Tensor, y: Tensor) -> float:
        """Mean log predictive density."""
        z = self.z.detach()
        self.process.assign(z[:-1])
        b = torch.full_like(self.objective.y, float((-2 * z[-1]).exp()))
        with torch.no_grad():
            mean, variance = Exact(self.process.kernel, self.process.x, self.objective.y * b, b).moments(x)
        predictive = torch.distributions.Normal(mean[0], (variance[0] + 1 / b[0, 0]).sqrt())
        return float(predictive.log_prob(y).mean())


class Model(gpytorch.models.ExactGP):
    """GPyTorch's regression."""

    def __init__(self, kernel: Kernel, x: Tensor, y: Tensor, likelihood: Any) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x: Tensor) -> Any:
        """The prior."""
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class Theirs:
    """GPyTorch's evidence under Adam.

    Its noise is kept as the logarithm of the standard deviation, the same coordinate as ours.
    """

    def __init__(self, kernel: Kernel, x: Tensor, y: Tensor, cholesky: bool) -> None:
        self.cholesky = cholesky
        deviation = gpytorch.constraints.Positive(
            transform=lambda v: (2 * v).exp(), inv_transform=lambda v: v.log() / 2
        )
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=deviation).double()
        likelihood.noise = torch.tensor(NOISE**2, dtype=torch.float64)
        self.model = Model(kernel, x, y, likelihood).double()
        self.evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, self.model)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=RATE)

    def _settings(self) -> Any:
        return gpytorch.settings.max_cholesky_size(10**6 if self.cholesky else 800)

    def step(self) -> None:
        """One step."""
        with self._settings():
            self.adam.zero_grad()
            loss = -self.evidence(self.model(self.model.train_inputs[0]), self.model.train_targets)
            loss.backward()
            self.adam.step()

    def density(self, x: Tensor, y: Tensor) -> float:
        """Mean log predictive density."""
        self.model.eval()
        with torch.no_grad(), self._settings():
            predictive = self.model.likelihood(self.model(x))
            normal = torch.distributions.Normal(predictive.mean, predictive.variance.sqrt())
            return float(normal.log_prob(y).mean())


def one(name: str, n: int, rounds: int) -> dict[str, Any]:
    """All ways, round by round."""
    (x, y), new = data(n, 0), data(500, 1)
    ways = {
        "bayesdl": Ours(KERNELS[name](), x, y),
        "GPyTorch": Theirs(KERNELS[name](), x, y, cholesky=False),
        "GPyTorch, Cholesky": Theirs(KERNELS[name](), x, y, cholesky=True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, model in ways.items():
            began = time.process_time()
            model.step()
            seconds[way].append(time.process_time() - began)
    nlpd = {way: -model.density(*new) for way, model in ways.items()}
    print(name, n, {way: statistics.median(times) for way, times in seconds.items()}, nlpd, flush=True)
    return {"kernel": name, "n": n, "rounds": rounds, "seconds": seconds, "nlpd": nlpd}


def table(results: list[dict[str, Any]]) -> str:
    """What the results say."""
    columns = ("kernel", "n", "way", "seconds a step", "in units of bayesdl's", "test NLPD")
    lines = []
    for r in sorted(results, key=lambda r: (r["kernel"], r["n"])):
        for way, times in r["seconds"].items():
            ratio = statistics.median(a / b for a, b in zip(times, r["seconds"]["bayesdl"], strict=True))
            cells = (f"{statistics.median(times):.2f}", f"{ratio:.2f}", f"{r['nlpd'][way]:.4f}")
            lines.append((r["kernel"], f"{r['n']:,}", way, *cells))
    return f"# {(__doc__ or '').splitlines()[0]}\n\n{preface(__doc__)}\n\n{markdown(columns, lines)}"


if __name__ == "__main__":
    main()
