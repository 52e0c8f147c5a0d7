"""Atomic writes and safe reads: tensors in safetensors, the rest in JSON; nothing that is read can run code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from bayesdl.errors import FileError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part (write, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Floats round-trip exactly; NaN and infinity use Python's JSON spelling."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except ValueError as error:
        raise FileError(f"{path} is not readable as JSON ({error}); the file is damaged or not from bayesdl.") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any = None) -> None:
    """Write named tensors, and any JSON value as their header, as one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, tensors_to_bytes(plain, {"bayesdl": json.dumps(header)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read the tensors and the header that ``write_tensors`` wrote.

    Raises:
        FileError: the file is missing, truncated, or not one that bayesdl wrote.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied into memory of torch's own alignment, on which the last digit of a matrix product depends.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(metadata["bayesdl"])
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FileError(
            f"{path} is not a tensor file written by bayesdl ({error}); it is damaged or foreign."
        ) from None
