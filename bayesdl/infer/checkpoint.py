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

    def save(self, state: State, fingerprint: Fingerprint) -> None:
        """Write the state; a kill at any moment leaves the previous file or the new one."""
        tensors, layout = encode(state)
        header = {"format": FORMAT, "fingerprint": fingerprint, **layout}
        write_tensors(self.file, tensors, header)

    def load(self, fingerprint: Fingerprint) -> State | None:
        """Read the state back, or None when there is no file yet.

        Raises:
            ResumeMismatch: the file belongs to another run; every field that differs is named with both values.
            FileError: the file is damaged or is not a checkpoint.
        """
        if not self.file.exists():
            return None
        tensors, header = read_tensors(self.file)
        try:
            if header["format"] != FORMAT:
                raise FileError(f"{self.file} has checkpoint format {header['format']!r}, this version reads {FORMAT}.")
            self._compare(header["fingerprint"], fingerprint)
            return decode(tensors, header)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            message = f"{self.file} is not a checkpoint of bayesdl ({error!r}); delete it to start anew."
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
