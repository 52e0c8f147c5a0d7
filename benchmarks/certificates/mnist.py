"""Certificates on MNIST: how small a risk can be guaranteed from 60,000 rows?

    python benchmarks/certificates/mnist.py --data ../shared/data/images

*Prior from half of the rows.* Pixels scaled by one mean and one deviation of these rows; they train the prior's mean
under weight noise, all rows train the posterior, and the certificate counts the other half. Settings were chosen on the
prior's rows alone, 25,000 to train and 5,000 to compare, in some twenty trainings of the dense and four of the
convolutional network; that training under noise is not to be stopped early had been seen in certificates on another
split of the rows. Beside the certificate of the Gibbs predictor stands a bound from a binomial tail at the same
delta, of the prior's mean network on the rows that the certificate counts: at equal error it is always the smaller one
(log 1 / delta against log 2 sqrt(n) / delta, and no KL).

*No data in the prior.* Pixels in [0, 1], units that no row has given; the prior is N(initial weights, s^2), and
all 60,000 rows train and count. Or one network whose weights take few values, in a prior of 2^-bits: six candidates
(three widths, two penalties), of which the best one is shown. 14x14 are means of 2x2 pixels. Width, s or penalty,
learning rate and p_min are round numbers, chosen in some twenty trials on the rows that count. So each line has the
thousandth part of delta: a bound for any of 1,000 such settings, whichever the rows have chosen.

delta is 0.035 in all. The mean of each posterior, one network, was tried last on the
10,000 test rows, whose binomial tail is its own bound. Seconds are processor time of one thread.

Every finished line is in ``mnist.jsonl``, its certificate beside it; a second run goes on where the first stopped, also
within a fit, and ``--table`` writes mnist.md from what is in. ``bayesdl verify`` recomputes a certificate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import bayesdl as bdl
from bayesdl.bounds import Certificate, clopper_pearson_upper, compress
from bayesdl.bounds.certificate import ceiling

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "mnist.jsonl", HERE / "mnist.md"
DELTA = 0.035
SETTINGS = 1000  # among which the rows that count may have chosen, where no others did
PASSES = 50  # losses a counted row, each under weights of its own
WIDE = bdl.priors.Normal("fan_in", w_std=30.0)  # so that it hardly weighs on the training of the prior's mean
FILTERS = bdl.priors.Normal("fan_in", w_std=6.0)  # an error in a filter is one in all pixels


def dense(*widths: int) -> nn.Module:
    """Linear layers and relu."""
    layers = [part for a, b in pairwise(widths[:-1]) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(*widths[-2:]))


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers, as in Perez-Ortiz et al. (2021)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@dataclass(frozen=True)
class Task:
    """A line of the table.

    Attributes:
        name: of the line, and of its files.
        nets: networks; of several the best certificate is shown, at its share of delta.
        priors: of the model, each with every network.
        method: how to train.
        published: to hold the certificate against.
        passes: losses a row.
        pixels: 28, with units from the prior's rows, or 28 or 14 in [0, 1].
        binary: 0 to 4 against 5 to 9.
        compressed: whether weights are rounded to a few values.
    """

    name: str
    nets: Sequence[Callable[[], nn.Module]]
    priors: Sequence[bdl.priors.Prior]
    method: bdl.Method
    published: str
    passes: int = PASSES
    pixels: int = 28
    binary: bool = False
    compressed: bool = False

    @property
    def learnt(self) -> bool:
        """Whether half of the rows are the prior's."""
        return isinstance(self.method, bdl.PACBayes) and self.method.prior_fraction is not None

    def rows(self, data: bdl.Dataset) -> Any:
        """What is fitted: a Dataset, whose prior's rows give units, or a pair, which nothing scales."""
        if self.learnt:
            return data
        x = data.x if self.pixels == 28 else avg_pool2d(data.x, 2)
        return x, (data.y >= 5).long() if self.binary else data.y


def learnt(**settings: Any) -> bdl.PACBayes:
    """Training for the bound, with half of the rows for the prior."""
    return bdl.PACBayes(prior_fraction=0.5, delta=0.028, prior_learning_rate=0.001, **settings)


def free(**settings: Any) -> bdl.PACBayes:
    """Training for the bound, with no row for the prior."""
    return bdl.PACBayes(prior_fraction=None, prior_scale=1.0, delta=0.028, p_min=0.01, **settings)


TASKS = (
    Task(
        "784-600-600-600-10",
        [lambda: dense(784, 600, 600, 600, 10)],
        [WIDE],
        learnt(
            prior_scale=0.5 / 30,
            prior_noise=1 / 30,
            batch_size=250,
            learning_rate=30.0,
            steps=2400,
            prior_steps=4800,
        ),
        "0.0279 (0.0420 in a re-run)",
    ),
    Task(
        "two convolutions, two linear layers",
        [convolutional],
        [bdl.priors.PerParameter({"0.*": FILTERS, "2.*": FILTERS, "*": WIDE})],
        learnt(
            prior_scale=0.1 / 30,
            prior_noise=0.5 / 30,
            batch_size=125,
            learning_rate=3.0,
            steps=50,
            prior_steps=2000,
        ),
        "0.0155",
        passes=3,
    ),
    Task(
        "14x14-100-10",
        [lambda: dense(196, 100, 10)],
        [bdl.priors.Normal(0.3)],
        free(batch_size=500, learning_rate=10.0, steps=8000),
        "0.3155 (784-600-600-600-10)",
        passes=20,
        pixels=14,
    ),
    Task(
        "14x14-100-2, 0 to 4 against 5 to 9",
        [lambda: dense(196, 100, 2)],
        [bdl.priors.Normal(0.3)],
        free(batch_size=500, learning_rate=10.0, steps=8000),
        "0.161 (784-600-2)",
        passes=20,
        pixels=14,
        binary=True,
    ),
    Task(
        "14x14-{16, 24, 32}-10, compressed",
        [lambda: dense(196, 16, 10), lambda: dense(196, 24, 10), lambda: dense(196, 32, 10)],
        [bdl.priors.Laplace(0.05), bdl.priors.Laplace(0.03)],
        bdl.MAP(batch_size=500, learning_rate=0.01, steps=10_000),
        "0.116 (in a learnt subspace)",
        pixels=14,
        compressed=True,
    ),
)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data" / "images")
    parser.add_argument("--only", nargs="+", type=int, help="places of lines, from 1; default: all")
    parser.add_argument("--checkpoints", type=Path, default=Path("results") / "certificates")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {line["name"] for line in read()}
    for place, task in enumerate(TASKS, 1):
        if (options.only is None or place in options.only) and task.name not in done and not options.table:
            result = run(task, place, options)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
    TABLE.write_text(table(read()))
    print(TABLE.read_text())


def read() -> list[dict[str, Any]]:
    """The finished lines."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(task: Task, place: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fit, certify, and look at the test rows."""
    train, test = (
        bdl.data.read_idx(options.data / "mnist" / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")
    )
    data, prior_rows = task.rows(train), chosen_on(train) if task.learnt else None
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    fits: list[Any] = []
    for net in task.nets:
        for prior in task.priors:
            model = bdl.BayesianNetwork(net(), prior, bdl.likelihoods.Categorical()).to(torch.float32)
            checkpoint = bdl.Checkpoint(options.checkpoints / f"{place}-{len(fits)}.ckpt", every=100)
            fit = task.method.fit(model, data, seed=0, checkpoint=checkpoint, prior_rows=prior_rows)
            fits.append(compress(fit, data) if task.compressed else fit)
    fitted = time.process_time() - began
    counted = fits[0].info.get("counted_rows", len(train))
    found: list[Certificate] = bdl.certify(
        fits, data, delta=DELTA / (1 if task.learnt else SETTINGS), draws=task.passes * counted
    )
    certificate, posterior = min(zip(found, fits, strict=True), key=lambda pair: pair[0].bound)
    seconds = time.process_time() - began - fitted
    certificate.save(HERE / f"mnist-{place}.json")
    networks = {"posterior's mean": at_point(posterior, posterior.z[0] if task.compressed else posterior.mean)}
    tail = None
    if task.learnt:
        networks["prior's mean"] = at_point(posterior, posterior.problem.density.new_prior[0])
        errors = wrong(networks["prior's mean"], train.subset(~train.rows.isin(posterior.problem.prior_rows)))
        tail = float(clopper_pearson_upper(errors=errors, n=certificate.n, delta=DELTA))
    return {
        "name": task.name,
        "bound": certificate.bound,
        "candidates": len(fits),
        "bounds": [one.bound for one in found],
        "risk": certificate.risk,
        "risk_upper": certificate.risk_upper,
        "kl": certificate.kl,
        "bits": posterior.info.get("bits"),
        "n": certificate.n,
        "draws": certificate.draws,
        "prior_bound": tail,
        "test_errors": {name: wrong(network, *task_rows(task, test)) for name, network in networks.items()},
        "published": task.published,
        "seconds": [fitted, seconds],
        "settings": task.method.settings(),
        "torch": str(torch.__version__),
    }


def chosen_on(train: bdl.Dataset) -> bdl.data.RowIds:
    """The rows of the prior: those on which the settings were chosen."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    return train.rows.take(order[: len(train) // 2])


def task_rows(task: Task, data: bdl.Dataset) -> tuple[Any, ...]:
    """Rows for ``wrong``: a Dataset, or inputs and targets."""
    rows = task.rows(data)
    return rows if isinstance(rows, tuple) else (rows,)


def at_point(posterior: Any, point: Tensor) -> Callable[[Tensor], Tensor]:
    """The network with some weights, as a function from rows to labels."""
    values = {name: value[0] for name, value in posterior.problem.density.constrain(point.reshape(1, -1)).items()}

    def labels(x: Tensor) -> Tensor:
        inputs = posterior.problem.inputs(x)[posterior.problem.x_name]
        with torch.no_grad():
            return posterior.problem.model.forward(values, inputs).argmax(1)

    return labels


def wrong(labels: Callable[[Tensor], Tensor], data: Any, y: Tensor | None = None) -> int:
    """Errors on rows."""
    x, y = (data.x, data.y) if y is None else (data, y)
    return sum(int((labels(a) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown."""
    columns = ("network", "prior's rows", "augmentation", "certificate", "published", "risk", "KL, nats", "n")
    columns += ("tail bound, prior's network", "test error of the mean", "its tail bound", "s fitting, certifying")
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    order = [task.name for task in TASKS]
    for r in sorted(results, key=lambda line: order.index(line["name"])):
        errors = r["test_errors"][MEAN]
        cells = (
            r["name"],
            "1/2" if r["prior_bound"] else "none",
            "none",
            f"**{ceiling(r['bound'])}**",
            r["published"],
            f"{r['risk']:.4f}",
            f"{r['kl']:,.1f}",
            f"{r['n']:,}",
            "" if r["prior_bound"] is None else ceiling(r["prior_bound"]),
            f"{errors / 10_000:.4f}",
            ceiling(float(clopper_pearson_upper(errors=errors, n=10_000, delta=DELTA))),
            ", ".join(f"{s:.0f}" for s in r["seconds"]),
        )
        lines.append(" | ".join(cells))
    text = (__doc__ or "").split("\n\n")[2:5]
    return (
        "## Certificates on MNIST\n\n" + "\n\n".join(text) + "\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"
    )


MEAN = "posterior's mean"

if __name__ == "__main__":
    main()
