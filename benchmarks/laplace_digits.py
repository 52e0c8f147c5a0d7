"""Laplace with a tuned prior on digits: is the posterior better than its mode, and what does the evidence choose?

    python benchmarks/laplace_digits.py

A 64-128-128-10 tanh network on scikit-learn's digits (1,438 training rows, 359 test rows) in double precision. The
prior N(0, 1 / (factor x fan-in)) begins at factor 1, and ``Laplace(tune=...)`` moves it to the highest evidence.
Printed: the factors and the evidence's gradient there; for the mode under the default prior (``MAP``), the mode under
the tuned prior, and the posterior by each link: negative log likelihood and accuracy of the test rows, the AUROC of
predictive entropy for test digits against the same on their side and against uniform noise, and which share of the test
rows' entropy is epistemic (mutual information; only draws have one). Nothing was chosen by the test rows.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import bayesdl as bdl
from bayesdl.evaluate.detection import detection_auroc
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.tables import render

POSTERIORS: dict[str, dict[str, Any]] = {
    "K-FAC, one number": {"structure": "kron", "tune": "prior"},
    "K-FAC, a number a layer": {"structure": "kron", "tune": "layers"},
    "last layer, full": {"structure": "full", "tune": "prior", "random": "4.*"},
}


def scores(posterior: Any, data: bdl.Dataset, **settings: Any) -> list[str]:
    """Of the test rows, of them on their side, and of noise."""
    x, y = data.test.x, data.test.y
    turned = x.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    noise = 16.0 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    inside, aside, outside = (posterior.predict(rows, **settings) for rows in (x, turned, noise))
    report = bdl.evaluate(inside, y)
    share = float(inside.mutual_information.mean() / inside.entropy.mean())
    aurocs = (detection_auroc(inside, other) for other in (aside, outside))
    return [f"{value:.3f}" for value in (report.nll, report.accuracy, *aurocs, share)]


def main() -> None:
    """Fit, print the numbers that were tuned, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(POSTERIORS), action="append", help="some of the posteriors")
    parser.add_argument("--polish", type=int, default=1500, help="most iterations of L-BFGS for a mode")
    options = parser.parse_args()
    data = bdl.data.load("digits")
    model = bdl.models.mlp(data, hidden=(128, 128)).to(torch.float64)
    mode = bdl.fit(model, data.train, bdl.MAP(steps=1000), seed=0, progress=False)
    rows = [["MAP, default prior", *scores(mode, data)]]
    for name in options.only or POSTERIORS:
        began = time.process_time()
        method = bdl.Laplace(steps=1000, polish=options.polish, **POSTERIORS[name])
        found: Any = bdl.fit(model, data.train, method, seed=0, progress=False)
        told = {key: found.info[key] for key in ("prior_precision", "evidence_gradient", "interior", "mode_distance")}
        took = time.process_time() - began
        print(f"{name}: {told}, log evidence {found.info['log_evidence']:.2f}, {took:.0f} s", flush=True)
        tuned = DrawsPosterior(found.problem, found.mean[None, None], {}, {})
        rows.append([f"{name}: its mode", *scores(tuned, data)])
        rows += [[f"{name}: {link}", *scores(found, data, link=link)] for link in ("monte_carlo", "probit", "bridge")]
    columns = ["", "NLL", "accuracy", "AUROC, turned", "AUROC, noise", "epistemic share"]
    print(render("Digits, 64-128-128-10", columns, rows))


if __name__ == "__main__":
    main()
