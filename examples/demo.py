"""The main job: one network, six ways to fit it, on two real data sets, with certificates and pictures.

    python examples/demo.py --out results

Prints one table per data set, a PAC-Bayes certificate for the variational classifier, a hold-out certificate for NUTS,
and shows that a posterior that was saved and loaded again predicts the same numbers. Everything it writes goes into the
folder given by --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.evaluate import predictive_bands, reliability_diagram

TOY_PRIOR = bdl.priors.Normal("fan_in", w_std=4.0, b_std=1.5)  # functions that bend several times on the toy's range


def network(data: bdl.Dataset) -> bdl.BayesianNetwork:
    """One hidden layer, sized to the data; a standardised target wants a prior over functions of about unit size."""
    prior = bdl.priors.Normal("fan_in", w_std=1.0, b_std=0.5) if data.task == "regression" else None
    return bdl.models.mlp(data, hidden=(16,), activation="relu", prior=prior)


def methods(quick: bool, thin: int = 60) -> dict[str, bdl.Method]:
    """The six methods; ``thin`` is how many Langevin steps a draw takes, ``quick`` shortens everything, for tests."""
    if quick:
        return {
            "MAP": bdl.MAP(steps=200),
            "deep ensemble": bdl.DeepEnsemble(members=3, steps=200),
            "mean-field VI": bdl.MeanFieldVI(steps=200),
            "SGLD": bdl.SGLD(chains=4, warmup=200, draws=20, thin=10),
            "NUTS": bdl.NUTS(chains=4, warmup=30, draws=20, max_depth=5),
            "NNGP": bdl.NNGP(),
        }
    return {
        "MAP": bdl.MAP(),
        "deep ensemble": bdl.DeepEnsemble(members=5),
        "mean-field VI": bdl.MeanFieldVI(),
        "SGLD": bdl.SGLD(chains=4, warmup=5000, draws=500, thin=thin),
        "NUTS": bdl.NUTS(chains=4, warmup=250, draws=250),
        "NNGP": bdl.NNGP(),
    }


def run(name: str, out: Path, quick: bool, thin: int, progress: bool | None) -> bdl.Comparison:
    """Fit and evaluate all methods on one bundled data set, and save the posteriors."""
    data = bdl.data.load(name)
    found = bdl.compare(network(data), data, methods(quick, thin), seed=0, progress=progress)
    print(found)
    for label, posterior in found.posteriors.items():
        posterior.save(out / name / label.replace(" ", "-"))
    return found


def certificates(comparison: bdl.Comparison, quick: bool, progress: bool | None) -> dict[str, bdl.Certificate]:
    """Certify a variational classifier on half of its own training rows, and NUTS on the test rows."""
    data = bdl.data.load(comparison.name)
    # Scaler and prior come from half of the rows; the bound counts errors on the other half only.
    method = methods(quick)["mean-field VI"]
    posterior = bdl.fit(network(data), data.train, method, prior_rows=0.5, seed=0, progress=progress)
    found = {
        "mean-field VI": bdl.certify(posterior, data.train, delta=0.05, progress=progress),
        # Chains have no density, so theirs is a bound on rows that the sampler never saw.
        "NUTS": bdl.certify(comparison.posteriors["NUTS"], data.test, delta=0.05),
    }
    for certificate in found.values():
        print(certificate, "\n")
    return found


def reload(comparison: bdl.Comparison, out: Path) -> bool:
    """Load a posterior and compare its predictions, bit for bit."""
    x = bdl.data.load(comparison.name).test.x
    before = comparison.posteriors["NUTS"].predict(x).mean
    after = bdl.load(out / comparison.name / "NUTS").predict(x).mean
    same = torch.equal(before, after)
    print(f"loaded {out / comparison.name / 'NUTS'}: predictions identical: {same}\n")
    return same


def picture_bands(out: Path, quick: bool, progress: bool | None) -> None:
    """All methods on a 1-D problem with a gap, side by side."""
    data = bdl.data.synthetic.regression_gap(24, seed=0)
    likelihood = bdl.likelihoods.Gaussian(noise=0.3)
    model = bdl.models.mlp(data, hidden=(20,), activation="erf", prior=TOY_PRIOR, likelihood=likelihood)
    chosen = methods(quick)
    if not quick:  # few rows and a sharp likelihood make long trajectories; a picture needs fewer draws than a table
        chosen["NUTS"] = bdl.NUTS(chains=4, warmup=150, draws=150, max_depth=8)
    x = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)[:, None]
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    for ax, (label, method) in zip(axes, chosen.items(), strict=True):
        posterior = bdl.fit(model, data, method, seed=0, progress=progress)
        predictive_bands(x, posterior.predict(x), ax, data)
        ax.set_title(label)
        ax.set_ylim(-4.5, 4.5)
    figure.savefig(out / "bands.png")
    print(f"wrote {out / 'bands.png'}")


def picture_reliability(comparison: bdl.Comparison, out: Path) -> None:
    """Reliability of the classifiers on the test rows."""
    test = bdl.data.load(comparison.name).test
    figure = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax, (label, posterior) in zip(axes, comparison.posteriors.items(), strict=True):
        reliability_diagram(posterior.predict(test.x), test.y, ax)
        ax.set_title(label)
    figure.savefig(out / "reliability.png")
    print(f"wrote {out / 'reliability.png'}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything.

    Returns:
        The numbers of both tables, both certificates, and whether the loaded posterior predicts the same.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for posteriors and pictures")
    parser.add_argument("--quick", action="store_true", help="short runs: a test of the example, not of the methods")
    options = parser.parse_args(arguments)
    out, quick, progress = options.out, options.quick, False if options.quick else None
    out.mkdir(parents=True, exist_ok=True)
    regression = run("diabetes", out, quick, 120, progress)
    classifiers = run("breast_cancer", out, quick, 80, progress)
    certified = certificates(classifiers, quick, progress)
    same = reload(classifiers, out)
    picture_bands(out, quick, progress)
    picture_reliability(classifiers, out)
    return {
        "diabetes": regression.to_dict(),
        "breast_cancer": classifiers.to_dict(),
        "certificates": {label: certificate.to_dict() for label, certificate in certified.items()},
        "identical": same,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks of this size lose more by waiting for a second thread than it computes
    main()
