"""Checkpoints: an engine's complete state in one file, written atomically, resumed bit for bit."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bayesdl._distributed import Ranks
from bayesdl._files import read_tensors, write_tensors
from bayesdl.errors import FileError, MethodError, ResumeMismatch

State: TypeAlias = dict[str, Any]  # values: Tensor, torch.Generator, int, float, bool or None
Fingerprint: TypeAlias = dict[str, Any]  # values: whatever JSON holds

FORMAT = 1
LAYOUT = "layout"
# A run that goes on under other values of these is a valid run, but not bit for bit the uninterrupted one.
INEXACT = frozenset({"torch", "pyro", "threads", "execution"})
# The model's code cannot be compared; its log joint at one fixed point can, up to rounding.
PROBE = "log_joint_probe"


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run saves itself, and how strictly it resumes.

    The file ``path`` (".safetensors" is appended where missing) holds tensors and generator states; its header holds
    numbers and the run's fingerprint. A fit that finds the file goes on from it.

    Args:
        path: the file; a run of several stages writes one file per stage beside it.
        every: steps between two saves. The last state is always saved.
        allow_inexact: go on even if versions, threads or the execution path have changed; the result is then not
            bit for bit that of an uninterrupted run.
    """

    path: str | os.PathLike[str]
    every: int = 100
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if type(self.every) is not int or self.every < 1:
            raise MethodError(f"every={self.every!r} is not possible for a checkpoint: it must be at least 1 step.")

    @property
    def file(self) -> Path:
        """The file that is written."""
        path = Path(self.path)
        return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")

    def stage(self, name: str) -> Checkpoint:
        """The checkpoint of a stage of the run, in a file beside the main one."""
        path = self.file.with_name(f"{self.file.stem}.{name}.safetensors")
        return Checkpoint(path, self.every, self.allow_inexact)

    def of(self, ranks: Ranks) -> Checkpoint:
        """The checkpoint of one of several processes, in a file of its own; of a single one, this."""
        return self if ranks.world == 1 else self.stage(f"rank{ranks.rank}-of-{ranks.world}")

    @property
    def before(self) -> Path:
        """The save before the last one, which a run of several processes keeps."""
        return self.file.with_name(f"{self.file.stem}.before.safetensors")

    def save(self, state: State, fingerprint: Fingerprint, *, keep: bool = False) -> None:
        """Write the state; a kill at any moment leaves the previous file or the new one.

        Args:
            state: of an engine.
            fingerprint: what must be the same for a resumed run.
            keep: whether the file that is there becomes ``before``.
        """
        tensors, layout = encode(state)
        header = {"format": FORMAT, "fingerprint": fingerprint, **layout}
        if keep and self.file.exists():
            os.replace(self.file, self.before)
        write_tensors(self.file, tensors, header)

    def load(self, fingerprint: Fingerprint, ranks: Ranks | None = None) -> State | None:
        """Read the state back, or None when there is no file yet.

        Several processes may have been killed on either side of a save: they go back to the last step that all of them
        have.

        Raises:
            ResumeMismatch: the file belongs to another run; every field that differs is named with both values.
            FileError: the file is damaged or is not a checkpoint.
        """
        if ranks is not None and ranks.world > 1:
            return self._load_common(fingerprint, ranks)
        return self._load(self.file, fingerprint) if self.file.exists() else None

    def _load_common(self, fingerprint: Fingerprint, ranks: Ranks) -> State | None:
        found = [self._load(file, fingerprint) for file in (self.file, self.before) if file.exists()]
        mine = {int(state["step"]): state for state in found}
        steps = ranks.numbers(sorted(mine))
        common = set.intersection(*map(set, steps))
        if not common and any(steps):
            raise FileError(
                f"The checkpoints of the {ranks.world} processes have no step in common ({steps}); delete them to "
                "start anew."
            )
        return mine[max(common)] if common else None

    def _load(self, file: Path, fingerprint: Fingerprint) -> State:
        tensors, header = read_tensors(file)
        try:
            if header["format"] != FORMAT:
                raise FileError(f"{file} has checkpoint format {header['format']!r}, this version reads {FORMAT}.")
            self._compare(header["fingerprint"], fingerprint)
            return decode(tensors, header)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            message = f"{file} is not a checkpoint of bayesdl ({error!r}); delete it to start anew."
            raise FileError(message) from None

    def _compare(self, stored: Fingerprint, current: Fingerprint) -> None:
        different = [
            name
            for name in dict.fromkeys([*stored, *current])
            if not _same(name, stored.get(name), current.get(name)) and not (self.allow_inexact and name in INEXACT)
        ]
        if not different:
            return
        lines = "".join(f"\n  {key}: {stored.get(key)!r} in the file, {current.get(key)!r} now" for key in different)
        advice = (
            "pass Checkpoint(path, allow_inexact=True) to go on without bit-for-bit equality"
            if INEXACT.issuperset(different)
            else "call fit as it was called before, or use another checkpoint path"
        )
        raise ResumeMismatch(f"{self.file} belongs to another run:{lines}\nTo resume, {advice}.")


def encode(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as tensors (generators as their bytes) and a JSON description of the rest."""
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {"tensors": {}, "generators": {}, "scalars": {}}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
            layout["tensors"][name] = str(value.device)
        elif isinstance(value, torch.Generator):
            tensors[name] = value.get_state()
            layout["generators"][name] = str(value.device)
        else:
            layout["scalars"][name] = value
    return tensors, layout


def decode(tensors: dict[str, Tensor], layout: dict[str, Any]) -> State:
    """The state that ``encode`` took apart."""
    state: State = {name: tensors[name].to(device) for name, device in layout["tensors"].items()}
    for name, device in layout["generators"].items():
        state[name] = torch.Generator(device=device)
        state[name].set_state(tensors[name])
    return state | layout["scalars"]


def pack(state: State) -> dict[str, Tensor]:
    """A state as tensors alone, for a posterior to carry."""
    tensors, layout = encode(state)
    return tensors | {LAYOUT: torch.frombuffer(bytearray(json.dumps(layout).encode()), dtype=torch.uint8)}


def unpack(tensors: dict[str, Tensor]) -> State:
    """The state that ``pack`` took apart, with generators of its own."""
    return decode(tensors, json.loads(bytes(tensors[LAYOUT].tolist())))


def _same(name: str, stored: Any, current: Any) -> bool:
    if name == PROBE and isinstance(stored, float) and isinstance(current, float):
        if not (math.isfinite(stored) and math.isfinite(current)):
            return math.isfinite(stored) == math.isfinite(current)
        return math.isclose(stored, current, rel_tol=1e-4, abs_tol=1e-4)
    return bool(stored == current)


def as_checkpoint(value: Checkpoint | str | os.PathLike[str] | None) -> Checkpoint | None:
    """A path as a checkpoint with the default settings; a checkpoint or None as it is."""
    if value is None or isinstance(value, Checkpoint):
        return value
    return Checkpoint(value)
