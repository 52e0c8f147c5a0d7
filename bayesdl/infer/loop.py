"""The one loop that drives every engine: progress, callback, interruption, checkpoints and exact resume."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyro
import torch

from bayesdl._distributed import Ranks
from bayesdl._memory import keep_freed_memory
from bayesdl._rng import derive_seed, generator
from bayesdl.density import LogDensity
from bayesdl.errors import MethodError
from bayesdl.infer.checkpoint import PROBE, Checkpoint, Fingerprint, State
from bayesdl.infer.progress import Bar

Callback = Callable[[State], bool | None]


class InterruptedWarning(UserWarning):
    """A fit was interrupted and goes on with what it had reached."""


class Engine(Protocol):
    """What the loop drives. Subclass it to inherit ``done`` and ``status``.

    A state is a flat dict of tensors, generators, numbers and None: all that the engine needs to go on. ``step``
    returns a new dict and leaves the old one's tensors as they are; only generators advance, and only a preallocated
    record (the draws) is written in place, at places that the old state does not count yet. So a step that is cut off
    in its middle is simply forgotten. The loop keeps the entries "step" and "gradients".
    """

    label: str
    total: int

    def init(self) -> State:
        """The state before the first step."""
        ...

    def step(self, state: State) -> State:
        """One transition or optimiser step."""
        ...

    def done(self, state: State) -> bool:
        """Whether the run has ended: after ``total`` steps, unless an engine stops early."""
        return bool(state["step"] >= self.total)

    def status(self, state: State) -> str:
        """A few words for the progress bar."""
        return ""


@dataclass
class Tally:
    """What a fit has evaluated and how it ended, over all its stages, one inside another or one after another."""

    interrupted: bool = False  # by Ctrl-C
    stopped: bool = False  # by the callback
    earlier: int = 0  # chain-gradients of the processes before this one, as read from checkpoints
    counters: list[tuple[LogDensity, int]] = field(default_factory=list)  # densities, and their counts when first seen

    def watch(self, density: LogDensity) -> None:
        """Count what a density evaluates from now on."""
        if all(known is not density for known, _ in self.counters):
            self.counters.append((density, density.gradients))

    @property
    def gradients_here(self) -> int:
        """Chain-gradients of this process."""
        return sum(density.gradients - first for density, first in self.counters)

    @property
    def gradients(self) -> int:
        """Chain-gradients of all processes that worked on this fit."""
        return self.earlier + self.gradients_here


@dataclass
class Run:
    """How a fit is to be run, as opposed to what it does: given once per ``fit``, used by each of its stages.

    Args:
        seed: the seed from which engines derive their generators.
        checkpoint: where the state is saved, or None.
        callback: called with the state after every step; a true result ends the run.
        progress: whether to show a bar; None asks the terminal.
        init: where the engine is asked to start, as given to ``fit`` (see starts.py).
        learn_prior: whether the prior is to be learnt on ``problem.prior_rows`` first.
        identity: what else must agree when a checkpoint is resumed (method, settings, data), as JSON values.
        tally: shared by all stages.
        ranks: the processes that work on the fit; each saves a checkpoint of its own.
        keep_stuck: whether chains that are stuck are told in ``info["stuck"]`` instead of raised.
        draws_to: folder into which draws are written as they come, or None.
        functions_at: the program's arguments at which functions are kept instead of latents, or None.
    """

    seed: int = 0
    checkpoint: Checkpoint | None = None
    callback: Callback | None = None
    progress: bool | None = None
    init: Any = None
    learn_prior: bool = False
    identity: Fingerprint = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    ranks: Ranks = field(default_factory=Ranks)
    keep_stuck: bool = False
    draws_to: Path | None = None
    functions_at: Mapping[str, Any] | None = None

    def stage(self, name: str, **identity: Any) -> Run:
        """A run for an earlier stage of the same fit (a start, a prior): own seed and file, no callback."""
        return Run(
            seed=derive_seed(self.seed, "stage", name),
            checkpoint=self.checkpoint.stage(name) if self.checkpoint else None,
            progress=self.progress,
            identity=self.identity | {"stage": name} | identity,
            tally=self.tally,
            ranks=self.ranks,
            keep_stuck=self.keep_stuck,
        )

    def drive(self, engine: Engine, density: LogDensity) -> State:
        """Run an engine from its start or its checkpoint to its end.

        Ctrl-C keeps the last complete step, saves it, and warns; the caller returns a posterior from it.

        Args:
            engine: what to run.
            density: the log density that it evaluates; its counter gives the number of gradients.

        Returns:
            The last complete state.

        Raises:
            ResumeMismatch: the checkpoint belongs to another run.
            FileError: the checkpoint is damaged.
        """
        keep_freed_memory()
        self.tally.watch(density)
        before = self.tally.gradients
        checkpoint = self.checkpoint.of(self.ranks) if self.checkpoint else None
        fingerprint = self.fingerprint(density) if checkpoint else {}
        state = checkpoint.load(fingerprint, self.ranks) if checkpoint else None
        if state is None:
            state = {"step": 0} | engine.init()
        else:
            self.tally.earlier += state["gradients"]
        state["gradients"] = self.tally.gradients - before
        saved = -1
        bar = Bar(engine.label, engine.total, self.progress if self.ranks.first else False)
        # State and generator positions change in one assignment, so that an interrupt can fall nowhere in between.
        kept = state, _positions(state)

        def status() -> str:
            return engine.status(kept[0])

        try:
            while not (engine.done(kept[0]) or self.tally.interrupted or self.tally.stopped):
                new = engine.step(kept[0])
                new["step"] = kept[0]["step"] + 1
                new["gradients"] = self.tally.gradients - before
                kept = new, _positions(new)
                if checkpoint and new["step"] % checkpoint.every == 0:
                    checkpoint.save(new, fingerprint, keep=self.ranks.world > 1)
                    saved = new["step"]
                if self.callback is not None and self.callback(new):
                    self.tally.stopped = True
                bar.update(new["step"], status)
        except KeyboardInterrupt:
            self.tally.interrupted = True
            _rewind(*kept)
            saved = -1
        finally:
            bar.close(kept[0]["step"], status)
        state = kept[0]
        # A state without a step may come from a start that was itself cut off; the next run begins there anew.
        if checkpoint and state["step"] and saved != state["step"]:
            checkpoint.save(state, fingerprint, keep=self.ranks.world > 1)
        if self.tally.interrupted:
            message = f"{engine.label} was interrupted at step {state['step']} of {engine.total}"
            where = f"; {checkpoint.file} holds the state to resume from" if checkpoint and state["step"] else ""
            warnings.warn(message + where + ".", InterruptedWarning, stacklevel=2)
        return state

    def too_early(self, need: str) -> BaseException:
        """The exception to raise when a run ended before it had anything to return.

        Args:
            need: what is missing, such as "the first draw after warm-up".
        """
        if self.tally.interrupted:
            return KeyboardInterrupt(f"The fit was interrupted before {need}; there is no posterior to return yet.")
        return MethodError(f"The callback ended the fit before {need}; there is no posterior to return yet.")

    def fingerprint(self, density: LogDensity) -> Fingerprint:
        """What must be the same for a checkpoint to be resumed: run, model, machine set-up; JSON values."""
        # A gradient and not a value alone: the first one settles which execution path the density takes. Small values
        # of both signs, for a deep network multiplies them layer by layer, and sums equal ones over each of its layers.
        point = torch.randn(density.dim, generator=generator(0, "probe")).to(density.prior_scale)
        probe = float(
            density.value_and_grad((0.1 * point * density.prior_scale)[None], density.glance, target="joint")[0]
        )
        fields = {
            **self.identity,
            "seed": self.seed,
            "sites": {site.name: list(site.shape) for site in density.sites},
            "dim": density.dim,
            PROBE: probe,
            "dtype": str(density.dtype),
            "device": str(density.device),
            "torch": str(torch.__version__),
            "pyro": str(pyro.__version__),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.world,
            "execution": density.execution,
        }
        # Through JSON and back, so that it compares equal with what a file holds (tuples become lists).
        plain: Fingerprint = json.loads(json.dumps(fields))
        return plain


def _positions(state: State) -> dict[str, torch.Tensor]:
    return {name: value.get_state() for name, value in state.items() if isinstance(value, torch.Generator)}


def _rewind(state: State, positions: dict[str, torch.Tensor]) -> None:
    for name, position in positions.items():
        state[name].set_state(position)
