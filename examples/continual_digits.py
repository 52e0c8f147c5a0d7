"""One network learns four tasks, one after the other: forgetting, and its cure in one argument.

    python examples/continual_digits.py --out results/continual_digits

Every task shows the same small digits with the pixels in an order of its own, and takes the earlier tasks' images away.
A network with one hidden layer is fitted to each task in turn by mean-field VI, in three ways that differ in nothing
but where the prior comes from:

- *fine-tuning* starts from the last posterior, under the prior that the model came with;
- *prior=posterior* starts there too, and has the last posterior as its prior (Nguyen et al., 2018);
- *all tasks at once* sees every image so far, which the others may not: what could be reached.

What to look for: fine-tuning forgets each task as soon as it learns the next one, because nothing but its start tells
it of the earlier ones. Under yesterday's posterior the weights that the earlier tasks need are held where they are, and
the others are free. The cure is not complete: a Gaussian with independent coordinates drops how weights depend on each
other, a little more with every task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior.tables import render

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
WAYS = ("fine-tuning", "prior=posterior", "all tasks at once")
Pair = tuple[Tensor, Tensor]


def tasks(count: int) -> list[tuple[Pair, Pair]]:
    """Training and test rows of each task: digits between -1/2 and 1/2, their pixels in another order for each."""
    data, stream = bdl.data.load("digits"), torch.Generator().manual_seed(1)
    orders = [torch.arange(64), *(torch.randperm(64, generator=stream) for _ in range(count - 1))]
    parts = [(part.x.float() / 16 - 0.5, part.y) for part in (data.train, data.test)]
    return [((parts[0][0][:, order], parts[0][1]), (parts[1][0][:, order], parts[1][1])) for order in orders]


def accuracy(posterior: bdl.Posterior, rows: Pair) -> float:
    """Share of rows whose most probable class is right."""
    labels = posterior.predict(rows[0], max_draws=50).probs.argmax(1)
    return float((labels == rows[1]).double().mean())


def learn(way: str, rounds: list[tuple[Pair, Pair]], model: Any, method: bdl.Method) -> list[list[float]]:
    """Accuracy on the test rows of each task so far, after each task."""
    posterior: bdl.Posterior | None = None
    found = []
    for k, (train, _) in enumerate(rounds):
        if way == "all tasks at once":
            seen = [pair for pair, _ in rounds[: k + 1]]
            train = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
            posterior = bdl.fit(model, train, method, seed=k, progress=False)
        elif way == "fine-tuning":
            posterior = bdl.fit(model, train, method, seed=k, init=posterior, progress=False)
        else:
            posterior = bdl.fit(model, train, method, seed=k, prior=posterior, progress=False)
        found.append([accuracy(posterior, test) for _, test in rounds[: k + 1]])
    return found


def plot(ax: Axes, way: str, found: list[list[float]]) -> None:
    """A line for each task, from the moment when it was learnt."""
    for task in range(len(found)):
        after = range(task + 1, len(found) + 1)
        ax.plot(after, [found[k - 1][task] for k in after], "o-", color=COLOURS[task], label=f"task {task + 1}", lw=2)
    ax.plot(range(1, len(found) + 1), [sum(row) / len(row) for row in found], "k--", lw=1.5, label="mean so far")
    ax.set(title=way, xlabel="tasks learnt", xticks=range(1, len(found) + 1), ylim=(0.0, 1.02))
    ax.axhspan(0.0, 0.1, color="#BBBBBB", alpha=0.5, linewidth=0)
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Learn the tasks in three ways, print and draw.

    Returns:
        By way: accuracy on each task so far, after each task.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/continual_digits"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="three tasks and short fits, for a first look")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    rounds = tasks(3 if options.quick else 4)
    hidden = 50 if options.quick else 100
    model = bdl.models.mlp(bdl.data.load("digits"), hidden=(hidden,), activation="relu").to(torch.float32)
    steps = 400 if options.quick else 800
    # Far enough, in all, for the standard deviations to reach their place: log sd moves by the learning rate a step.
    method = bdl.MeanFieldVI(steps=steps, batch_size=200, samples=2, learning_rate=8 / steps, initial_scale=0.05)
    result: dict[str, Any] = {way: learn(way, rounds, model, method) for way in WAYS}

    rows = []
    for way, found in result.items():
        last = found[-1]
        rows.append([way, *(f"{share:.1%}" for share in last), f"{sum(last) / len(last):.1%}"])
    columns = ["prior", *(f"task {k + 1}" for k in range(len(rounds))), "mean"]
    print(render("Accuracy after the last task", columns, rows))

    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (way, found) in zip(axes, result.items(), strict=True):
        plot(ax, way, found)
    axes[0].set_ylabel("accuracy on the task's test digits")
    axes[0].text(1.05, 0.03, "guessing", color="#555555", fontsize=9)
    axes[1].legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.1))
    path = options.out / "continual_digits.png"
    figure.savefig(path)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
