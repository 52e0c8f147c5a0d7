"""Infinitely wide networks on MNIST: accuracy and calibration, and convolutions against dense layers.

    python benchmarks/nngp_mnist.py --data ../shared/data/images/mnist

Regression on targets 0.9 for the true class and -0.1 for the others by the NNGP of relu networks. Every image is
divided by its root mean square, and nothing else is done to it. Published hyperparameters (Lee et al., 2018, table 1):
20 hidden layers, w^2 = 1.45, b^2 = 0.28 at 1,000 training images, and 7 layers, 0.61, 0.07 at 10,000, where the paper
reports 92.79% and 97.65% for one subset. The noise variance is 1e-10 (times the kernel's mean variance), as in the
paper's code. A subset is the first n rows of a permutation of the 60,000 training images by its seed; all 10,000 test
images are predicted. The mean does not change if kernel and noise are multiplied by one number, and that number is the
one of highest evidence, mean(y (K + noise)^-1 y). A class has the probability that its output is the largest of the ten
independent normal outputs. The convolutional network sees images
of 14x14 pixels, means of 2x2, and has a convolution of 5x5 windows with stride 2, relu, one of 3x3, relu, a 3x3 average
pool with stride 1 and a dense read-out, with w^2 = 2 and b = 0.1; it was chosen on training images in the order of seed
100, before any test image was seen. It and the dense one are compared on 1,000 test images, the same for all subsets.
Seconds are processor time of one thread.

Every finished subset is a line of ``nngp_mnist.jsonl``; a second run goes on where the first stopped, and ``--table``
writes nngp_mnist.md from what is in.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.evaluate import calibration
from bayesdl.infinite import InfiniteNetwork, from_module, fully_connected
from bayesdl.infinite.sites import Factors, condition, moments

sys.path.insert(0, str(Path(__file__).parent / "comparison"))
from ledger import append, markdown, preface, read, spread

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "nngp_mnist.jsonl", HERE / "nngp_mnist.md"
SEEDS = range(10)
NOISE = 1e-10
BLOCK = 1000  # test images at once
FEW = 1000  # test images of the comparison with convolutions, whose kernel with pooling is costly


class Case(NamedTuple):
    """A network and so many training images."""

    name: str
    images: int
    network: InfiniteNetwork
    flat: bool
    tested: int = 10_000
    goal: str = ""


def dense(depth: int, w_var: float, b_var: float) -> InfiniteNetwork:
    """A fully connected relu network."""
    return InfiniteNetwork(fully_connected(depth, "relu", math.sqrt(w_var), math.sqrt(b_var)))


def convolutional() -> InfiniteNetwork:
    """Two padded convolutions with relu, a pool and a dense read-out, of 14x14 images; the widths do not matter."""
    first, second = nn.Conv2d(1, 4, 5, stride=2, padding=2), nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(3, stride=1), nn.Flatten(), nn.Linear(100, 10)
    )
    return from_module(net.double(), w_std=math.sqrt(2), b_std=0.1)


CASES = (
    Case("dense", 200, dense(20, 1.45, 0.28), True, FEW),
    Case("convolutional", 200, convolutional(), False, FEW),
    Case("dense", 1000, dense(20, 1.45, 0.28), True, goal="92.7"),
    Case("dense", 10_000, dense(7, 0.61, 0.07), True, goal="97.6"),
)


def main() -> None:
    """Run what is missing within the time, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared/data/images/mnist")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 10_000], help="sizes of training sets")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no subset after so long")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        run(options)
    TABLE.write_text(table(read(RESULTS)))
    print(TABLE.read_text())


def run(options: argparse.Namespace) -> None:
    """What is missing."""
    began = time.perf_counter()
    done = {(r["name"], r["images"], r["seed"]) for r in read(RESULTS)}
    train, test = (bdl.data.read_idx(options.data / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    for case in CASES:
        for seed in SEEDS:
            if (case.name, case.images, seed) in done or case.images not in options.images:
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                return
            rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: case.images]
            result = {"name": case.name, "images": case.images, "seed": seed}
            new = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: case.tested]
            result |= one(case, (train.x[rows], train.y[rows]), (test.x[new], test.y[new]))
            append(RESULTS, result)
            print(result, flush=True)


def one(case: Case, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Fit a subset and predict the test images."""
    began = time.process_time()
    x = scaled(train[0], case.flat)
    targets = nn.functional.one_hot(train[1].long(), 10).T.double() - 0.1
    covariance = case.network.nngp(x)
    noise = NOISE * float(covariance.diagonal().mean())
    factors = condition(covariance, targets / noise, torch.full_like(targets, 1 / noise))
    del covariance
    amplitude = float((targets * factors.weights).mean())
    log_p, density = [], []
    for images, labels in zip(test[0].split(BLOCK), test[1].long().split(BLOCK), strict=True):
        mean, sd = predict(case, x, scaled(images, case.flat), factors, amplitude, noise)
        log_p.append(probabilities(mean, sd).log())
        wanted = nn.functional.one_hot(labels, 10).T.double() - 0.1
        density.append(torch.distributions.Normal(mean, sd).log_prob(wanted).mean(0))
    logits, labels = torch.cat(log_p), test[1].long()
    prediction = bdl.posterior.prediction.Prediction(torch.distributions.Categorical(logits=logits.unsqueeze(0)))
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "nll": float(-logits[range(len(labels)), labels].mean()),
        "ece": calibration.ece(prediction, labels),
        "density": float(torch.cat(density).mean()),
        "seconds": time.process_time() - began,
    }


def scaled(images: Tensor, flat: bool) -> Tensor:
    """Images divided by their root mean square, as rows, or with every 2x2 pixels replaced by their mean."""
    x = images.double()
    x = x / x.square().mean((1, 2, 3), keepdim=True).sqrt()
    return x.flatten(1) if flat else nn.functional.avg_pool2d(x, 2)


def predict(
    case: Case, x: Tensor, new: Tensor, factors: Factors, amplitude: float, noise: float
) -> tuple[Tensor, Tensor]:
    """Means ``[10, N]`` and standard deviations ``[10, N]`` of the outputs."""
    cross, diagonal = case.network.nngp(x, new), case.network.nngp(new, diag=True)
    mean, variance = moments(cross, diagonal, factors)
    return mean, (amplitude * (variance + noise)).sqrt()


def probabilities(mean: Tensor, sd: Tensor, points: int = 201) -> Tensor:
    """The probabilities ``[N, 10]`` that each of independent normals is the largest, by the trapezoidal rule."""
    z = torch.linspace(-7, 7, points, dtype=mean.dtype).view(-1, 1, 1)
    mass = torch.exp(-0.5 * z.square())
    mass = mass / mass.sum()
    p = torch.empty_like(mean)
    for k in range(len(mean)):
        others = torch.arange(len(mean)) != k
        below = (mean[k] + sd[k] * z - mean[others]) / sd[others]
        p[k] = (mass * torch.special.log_ndtr(below).sum(1, keepdim=True).exp()).sum((0, 1))
    p = p.clamp(min=1e-12).T
    return p / p.sum(1, keepdim=True)


def table(results: list[dict[str, Any]]) -> str:
    """What the results say."""
    columns = ("network", "images", "subsets", "accuracy, %", "goal", "NLL", "ECE", "log density an output", "seconds")
    lines = []
    for case in CASES:
        found = [r for r in results if (r["name"], r["images"]) == (case.name, case.images)]
        if found:
            values = [spread([r[name] for r in found]) for name in ("nll", "ece", "density")]
            accuracy = spread([100 * r["accuracy"] for r in found], 2)
            seconds = f"{statistics.median(r['seconds'] for r in found):.0f}"
            lines.append((case.name, f"{case.images:,}", str(len(found)), accuracy, case.goal, *values, seconds))
    text = f"# {(__doc__ or '').splitlines()[0]}\n\n{preface(__doc__)}\n\n{markdown(columns, lines)}"
    accuracy = {(r["name"], r["seed"]): 100 * r["accuracy"] for r in results if r["images"] == 200}
    gains = [accuracy["convolutional", s] - accuracy["dense", s] for s in SEEDS
             if {("convolutional", s), ("dense", s)} <= set(accuracy)]  # fmt: skip
    if len(gains) > 1:
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        text += (
            f"\nConvolutional minus dense on the same {len(gains)} subsets of 200 images: "
            f"{spread(gains, 2, sign=True)} points of accuracy, {statistics.mean(gains) / error:.1f} standard errors.\n"
        )
    return text


if __name__ == "__main__":
    main()
