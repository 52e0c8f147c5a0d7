"""Digits, clothes and letters: who notices that an image is no digit?

    python examples/foreign_images.py --out results/foreign_images

One network with a hidden layer of 100 relu units learns digits, by eight methods that cost from one training to a few.
Then all are asked about test digits and about images of other kinds. A method is useful here if the entropy of its
prediction is larger for those: the AUROC is the probability that it is, for a foreign image and a test digit drawn at
random.

MNIST, Fashion-MNIST and notMNIST are read from ``$BAYESDL_REFERENCE/data/images`` (``mnist``, ``fashion_mnist`` and
``notmnist``, IDX files). Where they are missing, and with ``--quick``, the 1,797 small digits that come with
scikit-learn take the place of MNIST, and the same digits upside down and with scrambled pixels that of the others.

What to look for: accuracy hardly separates the methods, and neither does the log loss; what they say of foreign images
does. Some images fool all of them: the strip at the bottom shows the foreign images of which the methods together are
surest, and what they take them for. A network knows the classes that it has seen, and no others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.evaluate import detection_auroc
from bayesdl.evaluate.plots import tidy
from bayesdl.posterior.tables import render

COLOURS = ("#555555", "#D55E00", "#0072B2")
SHOWN = 12
"""Images in the strip."""


def digits_and_others(folder: Path | None, rows: int) -> tuple[bdl.Dataset, bdl.Dataset, dict[str, Tensor]]:
    """Training digits, test digits, and images of other kinds by name.

    Args:
        folder: holds ``mnist``, ``fashion_mnist`` and ``notmnist``; None takes the small digits.
        rows: training rows that are used at most.
    """
    if folder is None:
        small = bdl.data.load("digits")
        data = bdl.Dataset.from_arrays(small.x.reshape(-1, 1, 8, 8), small.y, name="digits", splits=small.splits)
        train, test = data.train, data.test
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        scrambled = test.x.flatten(1)[:, order].reshape(test.x.shape)
        return train, test, {"upside down": test.x.flip(2, 3), "scrambled": scrambled}

    def read(name: str, part: str) -> bdl.Dataset:
        return bdl.data.read_idx(folder / name / f"{part}-images-idx3-ubyte.gz")

    others = {
        label: read(name, "t10k").x[:2000] for label, name in (("letters", "notmnist"), ("clothes", "fashion_mnist"))
    }
    return read("mnist", "train")[:rows], read("mnist", "t10k")[:2000], others


def methods(steps: int) -> dict[str, bdl.Method]:
    """By label, each with that many steps for a training."""
    few = {"steps": steps, "batch_size": 100, "learning_rate": 0.003}
    return {
        "MAP": bdl.MAP(**few),
        "DeepEnsemble": bdl.DeepEnsemble(members=5, **few),
        "anchored ensemble": bdl.DeepEnsemble(members=5, anchored=True, **few),
        "MCDropout": bdl.MCDropout(**few),
        "SWAG": bdl.SWAG(**{**few, "steps": steps // 2}, snapshots=20, every=steps // 40, optimizer="adam", rate=0.003),
        "last-layer Laplace": bdl.Laplace(polish=0, random="last.*", **few),
        "Laplace": bdl.Laplace(polish=0, structure="kron", **few),
        "MeanFieldVI": bdl.MeanFieldVI(samples=1, **few),
    }


def network(train: bdl.Dataset, dropout: float) -> bdl.BayesianNetwork:
    """784-100-10 (or 64-100-10), in float32, with the last layer under that name."""
    pixels = train.x[0].numel()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(pixels, 100), torch.nn.ReLU(), torch.nn.Dropout(dropout)
        )
        net = torch.nn.Sequential()
        net.add_module("body", body)
        net.add_module("last", torch.nn.Linear(100, train.n_classes))
    return bdl.BayesianNetwork(net, bdl.priors.Normal("fan_in", w_std=4.0), bdl.likelihoods.Categorical())


def plot_entropies(ax: Axes, label: str, entropies: dict[str, Tensor], auroc: dict[str, float]) -> None:
    """Densities of the predictive entropy of each kind of image."""
    bins = np.linspace(0.0, np.log(10.0), 40)
    for colour, (kind, values) in zip(COLOURS, entropies.items(), strict=True):
        name = f"{kind}: {auroc[kind]:.2f}" if kind in auroc else kind
        ax.hist(values.numpy(), bins, density=True, color=colour, alpha=0.45, label=name)
    ax.set(title=label, yscale="log", ylim=(0.02, 30))
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(ax)


def plot_strip(ax: Axes, images: Tensor, probs: Tensor) -> None:
    """The images with the largest probability of a class, averaged over the methods."""
    top = probs.max(1)
    chosen = top.values.argsort(descending=True)[:SHOWN]
    side = images.shape[-1]
    ax.imshow(np.concatenate(list(images[chosen, 0].numpy()), 1), cmap="gray_r", aspect="equal")
    for k, row in enumerate(chosen.tolist()):
        ax.text((k + 0.5) * side, side * 1.22, f"{int(top.indices[row])}", ha="center", va="center", fontsize=11)
    ax.set(
        xticks=[], yticks=[], title="Foreign images of which the methods together are surest, and the digit they see"
    )
    ax.spines[:].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit the methods, print and draw.

    Returns:
        By method: accuracy, nll, ece, and the AUROC against each kind of foreign images.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/foreign_images"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="small digits and short trainings, for a first look")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows of MNIST that are used")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    folder = Path(os.environ.get("BAYESDL_REFERENCE", "../shared")) / "data" / "images"
    there = not options.quick and (folder / "mnist").is_dir()
    train, test, others = digits_and_others(folder if there else None, options.rows)
    result: dict[str, Any] = {"data": train.name}
    figure = Figure(figsize=(13, 8), dpi=150, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 1))
    axes = upper.subplots(2, 4, sharex=True, sharey=True)
    foreign = torch.cat(list(others.values()))
    together = torch.zeros(len(foreign), train.n_classes, dtype=torch.float64)
    for ax, (label, method) in zip(axes.flat, methods(400 if options.quick else 2000).items(), strict=True):
        model = network(train, 0.2 if label == "MCDropout" else 0.0)
        posterior = bdl.fit(model, train, method, progress=False if options.quick else None)
        inside = posterior.predict(test.x, max_draws=50)
        outside = {kind: posterior.predict(x, max_draws=50) for kind, x in others.items()}
        auroc = {kind: detection_auroc(inside, found) for kind, found in outside.items()}
        report = bdl.evaluate(inside, test.y)
        result[label] = {key: float(report[key]) for key in ("accuracy", "nll", "ece")} | auroc
        together += torch.cat([found.probs for found in outside.values()])
        entropies = {"test digits": inside.entropy} | {kind: found.entropy for kind, found in outside.items()}
        plot_entropies(ax, label, entropies, auroc)
    for ax in axes[-1]:
        ax.set_xlabel("entropy of the prediction (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("density")
    plot_strip(lower.subplots(), foreign, together / len(axes.flat))
    upper.suptitle("Predictive entropy; beside the kind of image its AUROC against test digits")

    rows = [[label, *(f"{value:.3f}" for value in result[label].values())] for label in result if label != "data"]
    columns = ["method", "accuracy", "log loss", "ECE", *(f"AUROC {kind}" for kind in others)]
    print(render(f"{len(train)} training images, {len(test)} test images", columns, rows))
    path = options.out / "foreign_images.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
