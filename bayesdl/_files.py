"""Atomic writes and safe reads: tensors in safetensors, the rest in JSON; nothing that is read can run code."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
    with opened(path) as (file, header):
        # Copied into memory of torch's own alignment, on which the last digit of a matrix product depends.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118 - not a mapping


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file that ``write_tensors`` wrote, to read parts of its tensors: safetensors' own handle, and the header.

    Raises:
        FileError: the file is missing, truncated, or not one that bayesdl wrote; also if that shows while it is read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {})["bayesdl"])
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{path} is not a tensor file written by bayesdl ({error}); it is damaged or foreign."
        ) from None


def stamp(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
