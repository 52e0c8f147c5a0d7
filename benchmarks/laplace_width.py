"""Why is Laplace less sure of digits than its own mode is? How wide the Gaussian is, and in which directions.

    python benchmarks/laplace_width.py

The network and the prior that ``laplace_digits.py`` tunes K-FAC to (0.0434 of the default prior's precision; another
with ``--factor``), one mode, and around it: each structure, the covariance times a number, and the fixed point of
"curvature averaged over the posterior that it gives", which is what a Gaussian variational posterior of the linearised
network has. Printed besides: the variance of the test rows' logits by how far the data determine the direction that it
comes from, and the training rows' loss averaged over the posterior, against what the quadratic at the mode foretells.
Nothing was chosen by the test rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.curvature import NetworkOutputs
from bayesdl.curvature.functions import Moments, covariances
from bayesdl.curvature.linearised import LinearisedPosterior
from bayesdl.curvature.precision import choose, precision
from bayesdl.curvature.spectrum import covariance_of
from bayesdl.evaluate.detection import detection_auroc
from bayesdl.posterior.covariance import Blocks
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.normal import Normal
from bayesdl.posterior.placed import Placed
from bayesdl.posterior.tables import render

SHARES = ((0.0, 0.01), (0.01, 0.1), (0.1, 0.5), (0.5, 1.01))
STEPS = 6
"""Of the fixed-point iteration; it has converged to three digits."""


def scores(posterior: Any, data: bdl.Dataset, **settings: Any) -> list[str]:
    """Of the test rows, of them on their side, and of noise."""
    x = data.test.x
    turned = x.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    noise = 16.0 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    inside, aside, outside = (posterior.predict(rows, **settings) for rows in (x, turned, noise))
    report = bdl.evaluate(inside, data.test.y)
    aurocs = (detection_auroc(inside, other) for other in (aside, outside))
    return [f"{value:.3f}" for value in (report.nll, report.accuracy, *aurocs)]


def logit_variance(found: Any, covariance: Placed, rows: Tensor) -> float:
    """Mean over rows of the summed variances of the logits, less what they have in common."""
    moments = LinearisedPosterior(found.problem, Normal(found.mean, covariance), found.info).functions[1]
    assert moments is not None
    spread = moments(rows)[1]
    centred = spread - spread.mean(1, keepdim=True) - spread.mean(2, keepdim=True) + spread.mean((1, 2), keepdim=True)
    return float(centred.diagonal(dim1=1, dim2=2).sum(1).mean())


def kept(covariance: Placed, chosen: Callable[[Tensor], Tensor]) -> Placed:
    """The covariance of some directions alone, by their variances in units of the prior's."""
    blocks: Any = covariance.inner
    some = tuple(replace(block, spread=block.spread * chosen(block.spread) + 1e-30) for block in blocks.blocks)
    return replace(covariance, inner=Blocks(some))


def averaged(found: Any, structure: str) -> Any:
    """The posterior whose curvature is the average over itself, with the mean where it was."""
    problem, mean, covariance = found.problem, found.mean, found.law.covariance
    stream = torch.Generator().manual_seed(0)
    half = torch.randn(64, 10, generator=stream, dtype=torch.float64)
    choice = choose(problem, structure, "ggn", "*", 20, None)
    for _ in range(STEPS):
        moments = covariances(NetworkOutputs(problem, mean), covariance)
        assert moments is not None

        def roots(self: Any, batch: Any, curvature: str, moments: Moments = moments) -> Tensor:
            centre, spread = moments(batch["x"])
            values, vectors = torch.linalg.eigh(spread)
            root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT
            logits = centre + torch.einsum("bkl,sl->sbk", root, torch.cat([half, -half]))
            p = logits.softmax(-1)
            bend = torch.diag_embed(p.mean(0)) - torch.einsum("sbk,sbl->bkl", p, p) / len(p)
            values, vectors = torch.linalg.eigh(bend)
            return vectors * values.clamp(min=0).sqrt().unsqueeze(1)

        with mock.patch.object(NetworkOutputs, "roots", roots):
            covariance = covariance_of(precision(problem, mean, choice), len(mean))
    return LinearisedPosterior(problem, Normal(mean, covariance), found.info)


def main() -> None:
    """Fit once, and print the table and the three findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=0.0434, help="on the precision of the default prior")
    parser.add_argument("--polish", type=int, default=600, help="most iterations of L-BFGS for the mode")
    options = parser.parse_args()
    data = bdl.data.load("digits")
    sd = options.factor**-0.5
    prior = bdl.priors.Normal("fan_in", w_std=sd, b_std=sd)
    model = bdl.models.mlp(data, hidden=(128, 128), prior=prior).to(torch.float64)
    method = bdl.Laplace(structure="kron", steps=1000, polish=options.polish)
    found: Any = bdl.fit(model, data.train, method, seed=0, progress=False)
    whole: Placed = found.law.covariance
    point = DrawsPosterior(found.problem, found.mean[None, None], {}, {})
    table = [["the mode", *scores(point, data)], ["K-FAC", *scores(found, data)]]
    for number in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        narrow = replace(whole, scale=whole.scale * math.sqrt(number))
        posterior = LinearisedPosterior(found.problem, Normal(found.mean, narrow), found.info)
        table.append([f"K-FAC, covariance times {number:g}", *scores(posterior, data)])
    table.append(["K-FAC, curvature averaged over the posterior", *scores(averaged(found, "kron"), data)])
    values = found.problem.density.constrain(found.mean)
    for label, settings in (
        ("E-KFAC", {"structure": "ekfac"}),
        ("diagonal", {"structure": "diag"}),
        ("last layer, full", {"structure": "full", "random": "4.*"}),
        ("K-FAC, weights drawn", {"structure": "kron", "predictive": "sampled"}),
    ):
        other = bdl.Laplace(polish=0, **settings)  # type: ignore[arg-type]
        posterior = bdl.fit(model, data.train, other, init=values, seed=0, progress=False)
        draws = {"max_draws": 200} if "predictive" in settings else {}
        table.append([label, *scores(posterior, data, **draws)])
    print(render("Digits, one mode", ["", "NLL", "accuracy", "AUROC, turned", "AUROC, noise"], table))

    rows = found.problem.inputs(data.test.x)["x"]
    total, before = (logit_variance(found, law, rows) for law in (whole, kept(whole, lambda v: 1 / v)))
    print(f"variance of the logits: {total:.1f}; under the prior {before:.1f}")
    for low, high in SHARES:
        part = kept(whole, lambda v, low=low, high=high: (1 - v >= low) & (1 - v < high))  # type: ignore[misc]
        print(f"  share of directions determined {low:g} to {high:g}: {logit_variance(found, part, rows) / total:.3f}")
    some = slice(0, 500)
    by_draw = found.predict(data.train.x[some]).log_prob_by_draw(data.train.y[some])
    at_mode = point.predict(data.train.x[some]).log_prob_by_draw(data.train.y[some])
    foretold = float(-at_mode.mean()) + found.info["effective_parameters"] / (2 * len(data.train.x))
    print(
        f"loss of training rows: {float(-at_mode.mean()):.3f} at the mode, {float(-by_draw.mean()):.3f} averaged over "
        f"the posterior, {foretold:.3f} foretold by the quadratic"
    )


if __name__ == "__main__":
    main()
