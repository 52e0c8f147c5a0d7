"""Images in IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from bayesdl.data.checks import Array
from bayesdl.data.dataset import Dataset
from bayesdl.data.files import read_bytes
from bayesdl.errors import DataError, FileError

# Big-endian header: two zero bytes, the type (8: unsigned byte), the number of dims, then the sizes.
_UNSIGNED_BYTE = 8


def read_idx(images: str | Path, labels: str | Path | None = None) -> Dataset:
    """Read images and their labels from IDX files, packed by gzip or not.

    Images become float32 ``[N, 1, H, W]`` in [0, 1] (divided by 255). Labels keep their numbers; the classes are 0 to
    the largest one.

    Args:
        images: the file of images, such as "train-images-idx3-ubyte.gz".
        labels: the file of labels; default: the one beside it whose name has "labels-idx1" for "images-idx3".

    Raises:
        FileError: a file is missing, or its gzip stream is damaged.
        DataError: a file is not IDX, is cut short, or the two hold different numbers of entries.
    """
    images = Path(images)
    labels = _beside(images) if labels is None else Path(labels)
    pixels = _read(images, dims=3, content="images [N, H, W]")
    codes = _read(labels, dims=1, content="labels [N]")
    if len(pixels) != len(codes):
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} holds {len(codes)} labels; they are not of one set."
        )
    x = pixels[:, None].astype(np.float32) / np.float32(255)
    classes = [str(label) for label in range(int(codes.max()) + 1)]
    try:
        return Dataset.from_arrays(x, codes, "classification", name=images.name, y_name="label", classes=classes)
    except DataError as error:
        raise DataError(f"{labels}: {error}") from None


def _beside(images: Path) -> Path:
    name = images.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    path = images.with_name(name)
    if name == images.name or not path.exists():
        missing = f"; {path} does not exist" if name != images.name else ""
        raise FileError(f"No labels were given for {images}{missing}. Pass read_idx(images, labels).")
    return path


def _read(path: Path, dims: int, content: str) -> Array:
    """The array of unsigned bytes in an IDX file.

    Raises:
        DataError: another magic number, or another length than the header announces.
    """
    raw = read_bytes(path)
    start = 4 + 4 * dims
    magic = struct.pack(">HBB", 0, _UNSIGNED_BYTE, dims)
    if raw[:4] != magic:
        raise DataError(
            f"{path} starts with {raw[:4].hex(' ') or 'nothing'}, but an IDX file of {content} starts with "
            f"{magic.hex(' ')}. Were images and labels swapped?"
        )
    if len(raw) < start:
        raise DataError(f"{path} ends within its header of {start} bytes; fetch it again.")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    if math.prod(shape) != len(raw) - start:
        raise DataError(
            f"{path} announces {' x '.join(map(str, shape))} = {math.prod(shape)} bytes but holds {len(raw) - start}; "
            "it is cut short or damaged."
        )
    if not math.prod(shape):
        raise DataError(f"{path} holds no {content}: its sizes are {shape}.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
