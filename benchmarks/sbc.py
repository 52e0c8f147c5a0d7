"""How often simulation-based calibration finds a planted error: 100 repeats of 500 replicates each.

    python benchmarks/sbc.py

The model is a line through 20 rows, y = a + b x + noise of known size, whose posterior is known in closed form. It is
replaced by one that is right, that has 0.85 times the standard deviation, that is shifted by 0.2 standard deviations,
or that forgot the factor N/B of mini-batches of 5 rows (its likelihood counts a quarter). Ranks are taken among 99
draws, of both coefficients and of the log likelihood. Writes sbc.md beside this file.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from bayesdl._rng import generator
from bayesdl.evaluate import uniformity
from bayesdl.evaluate.sbc import Calibration

REPEATS, REPLICATES, DRAWS, ROWS, NOISE = 100, 500, 99, 20, 0.7
DOUBLE = torch.float64
ERRORS = {
    "none": {},
    "sd x 0.85": {"width": 0.85},
    "mean + 0.2 sd": {"shift": 0.2},
    "without N/B": {"power": 0.25},
}
LEVEL = 0.05


def calibration(seed: int, width: float = 1.0, shift: float = 0.0, power: float = 1.0) -> Calibration:
    """Ranks of one repeat."""
    stream = generator(seed, "sbc power")
    x = torch.linspace(-1.0, 2.0, ROWS, dtype=DOUBLE)
    design = torch.stack([torch.ones_like(x), x], 1)
    truth = torch.randn(REPLICATES, 2, generator=stream, dtype=DOUBLE)
    y = truth @ design.T + NOISE * torch.randn(REPLICATES, ROWS, generator=stream, dtype=DOUBLE)
    precision = torch.eye(2, dtype=DOUBLE) + power * design.T @ design / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = power * y @ design @ covariance / NOISE**2 + shift * covariance.diagonal().sqrt()
    noise = torch.randn(DRAWS, REPLICATES, 2, generator=stream, dtype=DOUBLE)
    draws = mean + width * noise @ torch.linalg.cholesky(covariance).T

    def quantities(theta: Tensor) -> Tensor:
        fit = -0.5 * ((y - theta @ design.T) / NOISE).square().sum(-1, keepdim=True)
        return torch.cat([theta, fit], -1)

    ranks = (quantities(draws) < quantities(truth)).sum(0)
    return Calibration(("a", "b", "log likelihood"), ranks, DRAWS)


def table() -> str:
    """Share of the repeats that each test rejects, at level 0.05 over all quantities together."""
    tests = {"smooth": uniformity.smooth, "ECDF band": uniformity.envelope, "chi-square": uniformity.chi_square}
    lines = ["| error | " + " | ".join(tests) + " |", "|---" * (len(tests) + 1) + "|"]
    for name, settings in ERRORS.items():
        found = [calibration(seed, **settings) for seed in range(REPEATS)]
        shares = [
            sum(float(test(c.ranks, c.draws).min()) * len(c.names) < LEVEL for c in found) / REPEATS
            for test in tests.values()
        ]
        lines.append(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    text = " ".join((__doc__ or "").split("\n\n")[2].split()).removesuffix(" Writes sbc.md beside this file.")
    machine = f"Python {platform.python_version()}, torch {torch.__version__}"
    page = f"# Power of simulation-based calibration\n\n{text}\n\n{table()}\n\n{machine}; seeds 0 to {REPEATS - 1}.\n"
    Path(__file__).with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
