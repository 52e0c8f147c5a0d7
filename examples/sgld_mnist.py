"""Handwritten digits with SGLD and SGHMC: what does a sampled network know that a trained one does not?

    python examples/sgld_mnist.py --out results/sgld_mnist

A network with one hidden layer of 100 relu units learns digits from mini-batches, three times: by ``MAP`` (plain
training, the prior as weight decay), by ``SGLD`` and by ``SGHMC``, whose chains start where training ended. All three
have the same model, the same prior, and the same factor N/B.

Then they are asked about three kinds of images: test digits, test digits on their side, and things that are no digits
at all (letters of notMNIST). MNIST and notMNIST are read from ``$BAYESDL_REFERENCE/data/images`` (``mnist`` and
``notmnist``, IDX files). Where they are missing, and with ``--quick``, the 1,797 small digits that come with
scikit-learn take their place, and digits with scrambled pixels that of the letters.

What to look for: on test digits the three are alike. On letters, where the answer can only be a guess, the samplers say
so: their entropy is higher. On digits that lie on their side it is high for all. Turn a digit slowly, and see on its
way to which other digits each of them is led.
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
from scipy import ndimage
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.tables import render

COLOURS = {"MAP": "#555555", "SGLD": "#009E73", "SGHMC": "#0072B2"}
KINDS = ("test digits", "digits on their side", "no digits")


class Images:
    """Training and test digits as rows of pixels between 0 and 1, and images that are no digits.

    Args:
        folder: holds ``mnist`` and ``notmnist``; None takes the small digits.
        rows: training rows that are used at most.
    """

    def __init__(self, folder: Path | None, rows: int) -> None:
        """Read or load."""
        if folder is None:
            data = bdl.data.load("digits")
            self.name, self.train, self.test = "digits", self._pair(data.train, 16), self._pair(data.test, 16)
            order = torch.randperm(self.test[0].shape[1], generator=torch.Generator().manual_seed(1))
            self.others = self.test[0][:, order]
        else:
            train, test = (
                bdl.data.read_idx(folder / "mnist" / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")
            )
            letters = bdl.data.read_idx(folder / "notmnist" / "t10k-images-idx3-ubyte.gz")
            self.name, self.train, self.test = "MNIST", self._pair(train, 1), self._pair(test, 1)
            self.others = self._pair(letters, 1)[0][:2000]
        self.train = self.train[0][:rows], self.train[1][:rows]
        self.test = self.test[0][:2000], self.test[1][:2000]
        self.side = int(self.train[0].shape[1] ** 0.5)

    @staticmethod
    def _pair(data: bdl.Dataset, top: float) -> tuple[Tensor, Tensor]:
        x = data.x.float().flatten(1)
        return x / (top if x.max() <= top else 255.0), data.y

    def turned(self, x: Tensor, degrees: float) -> Tensor:
        """Rotated images, as rows of pixels."""
        pixels = x.reshape(-1, self.side, self.side).numpy()
        turned = ndimage.rotate(pixels, degrees, axes=(2, 1), reshape=False, order=1)
        return torch.as_tensor(turned.reshape(len(x), -1))


def plot_entropies(ax: Axes, entropies: dict[str, dict[str, Tensor]], kind: str) -> None:
    """Share of images whose predictive entropy is above a level."""
    for label, found in entropies.items():
        values = np.sort(found[kind].numpy())
        ax.step(values, 1 - np.arange(len(values)) / len(values), color=COLOURS[label], label=label, linewidth=2)
    ax.set(title=kind, xlabel="entropy of the prediction (nats)", xlim=(0, 2.3), ylim=(0, 1))
    ax.spines[["top", "right"]].set_visible(False)


def plot_turning(axes: Sequence[Axes], images: Images, x: Tensor, angles: Tensor, probs: dict[str, Tensor]) -> None:
    """A digit that is turned, and each method's probabilities of the classes."""
    frames = [
        images.turned(x[None], float(angle)).reshape(images.side, images.side) for angle in np.linspace(0, 180, 8)
    ]
    axes[0].imshow(np.concatenate(frames, 1), cmap="gray_r", aspect="auto")
    axes[0].set(xticks=[], yticks=[], title="One digit, turned: which class is how probable?")
    shades = [f"C{k}" for k in range(10)]
    for ax, (label, found) in zip(axes[1:], probs.items(), strict=True):
        ax.stackplot(angles.numpy(), found.T.numpy(), colors=shades, alpha=0.85)
        for k in range(10):
            where = int(found[2:-2, k].argmax()) + 2
            if found[where, k] > 0.5:
                height = float(found[where, :k].sum() + found[where, k] / 2)
                ax.text(float(angles[where]), height, str(k), color="white", fontsize=13, ha="center", va="center")
        ax.set(ylabel=label, xlim=(float(angles[0]), float(angles[-1])), ylim=(0, 1), yticks=[0, 1])
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel("degrees")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Fit the three methods, print and draw.

    Returns:
        By method: accuracy, nll, ece and the mean entropy on each kind of image.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/sgld_mnist"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="small digits and short chains, for a first look")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows of MNIST that are used")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    folder = Path(os.environ.get("BAYESDL_REFERENCE", "../shared")) / "data" / "images"
    images = Images(None if options.quick or not (folder / "mnist").is_dir() else folder, options.rows)
    small = images.name == "digits"
    width = 30 if small else 100
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(images.side**2, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    model = bdl.BayesianNetwork(net, bdl.priors.Normal("fan_in", w_std=4.0), bdl.likelihoods.Categorical())
    chains, batch = 4, 100
    settings = {"chains": chains, "batch_size": batch}
    if options.quick:
        settings |= {"warmup": 300, "draws": 20, "thin": 20}
    else:
        settings |= {"warmup": 1000, "draws": 40, "thin": 50}
    progress = False if options.quick else None
    trained = bdl.fit(model, images.train, bdl.MAP(epochs=30 if small else 10, batch_size=batch), progress=progress)
    start = {name: value[0] for name, value in trained.draws().items()}
    posteriors = {
        "MAP": trained,
        "SGLD": bdl.fit(model, images.train, bdl.SGLD(**settings), init=start, progress=progress),
        "SGHMC": bdl.fit(model, images.train, bdl.SGHMC(**settings), init=start, progress=progress),
    }

    x, y = images.test
    kinds = dict(zip(KINDS, (x, images.turned(x, 90.0), images.others), strict=True))
    result: dict[str, Any] = {"data": images.name}
    entropies: dict[str, dict[str, Tensor]] = {}
    for label, posterior in posteriors.items():
        report = bdl.evaluate(posterior.predict(x, max_draws=200), y)
        entropies[label] = {kind: posterior.predict(z, max_draws=200).entropy for kind, z in kinds.items()}
        means = {kind: float(found.mean()) for kind, found in entropies[label].items()}
        result[label] = {key: float(report[key]) for key in ("accuracy", "nll", "ece")} | means
    rows = [[label, *(f"{value:.3f}" for value in result[label].values())] for label in posteriors]
    title = f"{images.name}, {len(images.train[0])} training rows; mean entropy (at most 2.303)"
    print(render(title, ["method", "accuracy", "log loss", "ECE", *KINDS], rows))

    angles = torch.arange(0.0, 181.0, 4.0)
    # the digit in the test set that the three disagree about most when it lies on its side
    gap = entropies["SGHMC"][KINDS[1]] - entropies["MAP"][KINDS[1]]
    chosen = x[int(gap.masked_fill(y != 4, -10.0).argmax())]
    turned = torch.cat([images.turned(chosen[None], float(angle)) for angle in angles])
    probs = {label: posterior.predict(turned, max_draws=200).probs for label, posterior in posteriors.items()}
    figure = Figure(figsize=(13, 8), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    for ax, kind in zip(left.subplots(3, 1, sharex=True), KINDS, strict=True):
        plot_entropies(ax, entropies, kind)
        ax.set_ylabel("share of images above")
        if kind == KINDS[0]:
            ax.legend(frameon=False)
    plot_turning(right.subplots(4, 1, height_ratios=(0.8, 1, 1, 1)), images, chosen, angles, probs)
    path = options.out / "sgld_mnist.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
