"""The main job: one network, six ways to fit it, on two real data sets, with certificates and pictures.

    python examples/demo.py --out results

Prints one table per data set, a PAC-Bayes certificate for the variational classifier, a hold-out certificate for NUTS,
and shows that a posterior that was saved and loaded again predicts the same numbers. Everything it writes goes into the
folder given by --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.evaluate import predictive_bands, reliability_diagram

HIDDEN = (16,)
PRIOR = bdl.priors.Normal("fan_in", w_std=1.0, b_std=0.5)


def methods(quick: bool) -> dict[str, bdl.Method]:
    """The six methods; ``quick`` shortens the chains for tests."""
    short = 10 if quick else 1
    return {
        "MAP": bdl.MAP(),
        "deep ensemble": bdl.DeepEnsemble(members=5),
        "mean-field VI": bdl.MeanFieldVI(),
        "SGLD": bdl.SGLD(chains=4, warmup=5000 // short, draws=500 // short, thin=200 // short),
        "NUTS": bdl.NUTS(chains=4, warmup=300 // short, draws=250 // short),
        "NNGP": bdl.NNGP(),
    }


def run(name: str, out: Path, quick: bool, progress: bool | None) -> bdl.Comparison:
    """Fit and evaluate all methods on one bundled data set, and save the posteriors."""
    data = bdl.data.load(name)
    model = bdl.models.mlp(data, hidden=HIDDEN, activation="relu", prior=PRIOR)
    found = bdl.compare(model, data, methods(quick), seed=0, progress=progress)
    print(found)
    for label, posterior in found.posteriors.items():
        posterior.save(out / name / label.replace(" ", "-"))
    return found


def certificates(comparison: bdl.Comparison, progress: bool | None) -> None:
    """Certify a variational classifier on half of its own training rows, and NUTS on the test rows."""
    data = bdl.data.load(comparison.name)
    model = bdl.models.mlp(data, hidden=HIDDEN, activation="relu", prior=PRIOR)
    # Scaler and prior come from half of the rows; the bound counts errors on the other half only.
    posterior = bdl.fit(model, data.train, bdl.MeanFieldVI(), prior_rows=0.5, seed=0, progress=progress)
    print(bdl.certify(posterior, data.train, delta=0.05), "\n")
    # Chains have no density, so theirs is a bound on rows that the sampler never saw.
    print(bdl.certify(comparison.posteriors["NUTS"], data.test, delta=0.05), "\n")


def reload(comparison: bdl.Comparison, out: Path) -> None:
    """Load a posterior and compare its predictions, bit for bit."""
    x = bdl.data.load(comparison.name).test.x
    before = comparison.posteriors["NUTS"].predict(x).mean
    after = bdl.load(out / comparison.name / "NUTS").predict(x).mean
    print(f"loaded {out / comparison.name / 'NUTS'}: predictions identical: {torch.equal(before, after)}\n")


def picture_bands(out: Path, quick: bool, progress: bool | None) -> None:
    """All methods on a 1-D problem with a gap, side by side."""
    data = bdl.data.synthetic.regression_gap(60, seed=0)
    model = bdl.models.mlp(data, hidden=(20,), activation="relu", prior=PRIOR)
    x = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)[:, None]
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    for ax, (label, method) in zip(axes, methods(quick).items(), strict=True):
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
        ax.set_title(f"{label}: {ax.get_title()}")
    figure.savefig(out / "reliability.png")
    print(f"wrote {out / 'reliability.png'}")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for posteriors and pictures")
    parser.add_argument("--quick", action="store_true", help="short chains: a test of the example, not of the methods")
    arguments = parser.parse_args()
    out, quick, progress = arguments.out, arguments.quick, False if arguments.quick else None
    out.mkdir(parents=True, exist_ok=True)
    run("diabetes", out, quick, progress)
    classifiers = run("breast_cancer", out, quick, progress)
    certificates(classifiers, progress)
    reload(classifiers, out)
    picture_bands(out, quick, progress)
    picture_reliability(classifiers, out)


if __name__ == "__main__":
    main()
